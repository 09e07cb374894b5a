// One bit an element: the sign of v = gradient + residual, times one magnitude for all that is
// encoded or for each block of it: ||v||_2 / sqrt(m) (1-bit Adam, Tang et al., ICML 2021,
// arXiv 2102.02888) or ||v||_1 / m (EF-SignSGD, Karimireddy et al., ICML 2019, arXiv 1901.09847,
// algorithm 1), m the number of elements that are sent. A zero is sent as +magnitude, but long runs
// of zeros, such as unused rows of an embedding, are masked: they decode to 0 and enter neither
// magnitude nor residual. Formulas and bytes: FORMAT.md.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
// Tensors of up to 2^32 - 1 elements; InvalidArgument beyond.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

inline constexpr std::int64_t kMinOneBitBlock = 64;
inline constexpr std::int64_t kMaxOneBitBlock = 65536;
inline constexpr std::int64_t kOneBitBlockStep = 64;

enum class OneBitScale : std::uint8_t { kL2, kL1 };

struct OneBitOptions {
  std::int64_t block = 0;  // elements a scale, a multiple of kOneBitBlockStep; 0: the whole tensor
  OneBitScale scale = OneBitScale::kL2;
};

// InvalidArgument for options out of range.
std::shared_ptr<const PayloadCodec> make_onebit_codec(const OneBitOptions& options);

extern const Family kOneBitFamily;

}  // namespace thinwire
