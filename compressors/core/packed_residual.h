// PackedResidual: one generation of a residual in fewer bytes than fp32. Owns its bytes. Writing
// rounds; with dither so that the expected value is what was written (what error feedback relies
// on: increments below a rounding step must not vanish), without it to the nearest, which keeps
// every value that was read from a PackedResidual of the same kind as it is.
//
//   kBF16  2 bytes an element; finite values stay finite
//   kQ8    33 bytes a block of 32 elements: 8-bit codes and one power of two for them, as MXINT8 of
//          the OCP Microscaling Formats (MX) Specification 1.0; the block's largest |code| is 64 to
//          127 before rounding
//
// The same bits on every SIMD target. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "compressors/core/convert.h"
#include "compressors/core/huge_pages.h"
#include "compressors/core/random.h"

namespace thinwire {

enum class ResidualStorage : std::uint8_t { kFP32, kBF16, kQ8 };

// Bytes of a residual that is stored so.
std::size_t residual_bytes(ResidualStorage storage, std::int64_t elements);

class PackedResidual {
 public:
  PackedResidual() = default;  // of nothing
  // All zeros. `storage` is not kFP32.
  PackedResidual(ResidualStorage storage, std::int64_t elements);

  std::size_t bytes() const;
  // `values`: finite, one an element. `dither` null: to the nearest.
  void write(std::span<const float> values, const Dither* dither);
  void read(std::span<float> values) const;
  // kBF16: the values as they are stored, 64-byte aligned.
  std::span<BF16> bf16();
  std::span<const BF16> bf16() const;

 private:
  ResidualStorage storage_ = ResidualStorage::kBF16;
  std::int64_t elements_ = 0;
  Pages data_;
};

}  // namespace thinwire
