// Largest coefficients of a cosine transform: v = gradient + residual, as a flat sequence, is cut
// into tiles; each tile's orthonormal DCT-II is taken and its TOPK largest coefficients are sent
// (Peng, Quesnelle, Kingma, DeMo, arXiv 2411.19870, section 3, which tiles matrices in two
// dimensions). Formulas and bytes: FORMAT.md.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

inline constexpr std::int64_t kMinDctTile = 8;
inline constexpr std::int64_t kMaxDctTile = 4096;  // 16 tiles in three copies: 768 KiB, within L2

// Numbers on the wire.
enum class DctValues { kF32 = 0, kBF16 = 1, kQ8 = 2 };

struct DctOptions {
  std::int64_t keep = 32;  // coefficients of a tile that are sent, in [1, tile]
  std::int64_t tile = 64;  // elements; a power of two in [kMinDctTile, kMaxDctTile]
  DctValues values = DctValues::kBF16;
};

// InvalidArgument for options out of range.
std::shared_ptr<const PayloadCodec> make_dct_codec(const DctOptions& options);

extern const Family kDctFamily;

}  // namespace thinwire
