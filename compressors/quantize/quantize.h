// Blockwise quantisation to 1..8 bits: each block of v = gradient + residual is divided by a scale
// and rounded to integers, to nearest with error feedback (1-bit SGD, Seide et al., Interspeech
// 2014; blocks as in Markov et al., CGX, Middleware 2022) or stochastically without bias (QSGD,
// Alistarh et al., NeurIPS 2017, with the maximum norm). Formulas and bytes: FORMAT.md.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

inline constexpr std::int64_t kMinQuantizeBlock = 64;
inline constexpr std::int64_t kMaxQuantizeBlock = 4096;  // 16 KiB of fp32: a block stays in L1
inline constexpr std::int64_t kQuantizeBlockStep = 64;

struct QuantizeOptions {
  int bits = 8;              // [1, 8]
  std::int64_t block = 256;  // elements a scale; a multiple of kQuantizeBlockStep
  bool stochastic = false;
};

// InvalidArgument for options out of range.
std::shared_ptr<const PayloadCodec> make_quantize_codec(const QuantizeOptions& options);

extern const Family kQuantizeFamily;

}  // namespace thinwire
