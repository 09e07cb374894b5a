// The inner loops of PackedResidual, on whole groups of elements. Pure functions, thread-safe; the
// caller owns all memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "compressors/core/packed_residual.h"

namespace thinwire {

inline constexpr std::int64_t kPackedGroup = 128;  // elements that are worked on together
inline constexpr std::int64_t kPackedBlock = 32;   // elements of kQ8 that share a scale

// Bytes of a group: kBF16 its values; kQ8 its codes, then the biased exponents of its scales.
constexpr std::int64_t packed_group_bytes(ResidualStorage storage) {
  return storage == ResidualStorage::kBF16 ? 2 * kPackedGroup
                                           : kPackedGroup + kPackedGroup / kPackedBlock;
}

// `count` groups from `group` on, counted from the residual's first element. Each element is
// rounded by the dither_bits() of its number in the residual, modulo 2^32.
void pack_groups(ResidualStorage storage, const float* values, const Dither* dither,
                 std::int64_t group, std::int64_t count, std::byte* out);
void unpack_groups(ResidualStorage storage, const std::byte* in, std::int64_t count, float* values);

inline constexpr float kLargestCode = 127;

// The scale of a kQ8 block: the biased exponent of the least power of two that brings its largest
// magnitude to kLargestCode or below, from 2^-126 to 2^121, where the code stops at kLargestCode
// so that finite values stay finite; 0 for a block of zeros.
inline std::uint32_t packed_scale(std::uint32_t largest_bits) {
  if (largest_bits == 0) return 0;
  constexpr std::uint32_t kMantissa = 0x7FFFFF;
  constexpr std::uint32_t k127 = 0x7E0000;  // the mantissa of 127 = 1.984375 * 2^6
  const std::uint32_t exponent = largest_bits >> 23;
  const std::uint32_t wanted = exponent + ((largest_bits & kMantissa) > k127 ? 1 : 0);
  return std::clamp<std::uint32_t>(wanted, 7, 254) - 6;
}

}  // namespace thinwire
