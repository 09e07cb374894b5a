// The randomised Hadamard rotation: signs at random, then an orthonormal Walsh-Hadamard transform.
// Its signs are the same for all units of a tensor and all ranks, and change with key and step.
// Pure functions, thread-safe.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "compressors/core/convert.h"
#include "compressors/core/random.h"

namespace thinwire {

inline constexpr std::int64_t kMaxRotation = 4096;

// Elements rotated together: blocks within them have scales of about one size.
constexpr std::int64_t rotation_elements(std::int64_t block) { return block < 1024 ? 1024 : block; }

// Bounds what is rotated, so that neither the sums nor v - decoded can overflow: rotated values
// are at most 4096^(1/2) * 2^96 and roundings.
inline constexpr float kRotationClip = 0x1p96F;
// Bits of 2^104, above all scales of rotated values. 2^104 times the largest code, 2^7, times the
// 4096 values of a sum is still finite.
inline constexpr std::uint32_t kRotationLimitBits = (127U + 104U) << 23;

// Columns of signs: element i has bit 31 - i % 512 / 16 of word 16 * (i / 512) + i % 16.
inline constexpr std::int64_t kRotationColumns = 16;
inline constexpr std::int64_t kRotationSignsTogether = 32 * kRotationColumns;

struct QuantizeRotation {
  std::uint64_t seed = 0;
  alignas(64) std::array<std::uint32_t, kMaxRotation / 32> words = {};

  QuantizeRotation() = default;
  // The signs of `elements` <= kMaxRotation elements.
  QuantizeRotation(std::uint64_t of_seed, std::int64_t elements) : seed(of_seed) {
    // Counters of their own: rounding draws below 2^32.
    const RandomStream stream{.key = seed, .counter = std::uint64_t{1} << 32};
    for (std::size_t i = 0; i < static_cast<std::size_t>(elements) / 128; ++i) {
      const auto block = random_block(stream, i);
      for (std::size_t w = 0; w < 4; ++w) words[4 * i + w] = block[w];
    }
  }
  // Sign bit of element i.
  std::uint32_t sign(std::int64_t i) const {
    const std::int64_t word = i / kRotationSignsTogether * kRotationColumns + i % kRotationColumns;
    return words[static_cast<std::size_t>(word)]
               << (i % kRotationSignsTogether / kRotationColumns) &
           kSignBit32;
  }
};

// n^(-1/2) for a power of two n, the nearest fp32.
constexpr float rotation_scale(std::int64_t n) {
  const int m = std::countr_zero(static_cast<std::uint64_t>(n));
  const float power = std::bit_cast<float>((127U - static_cast<unsigned>(m) / 2) << 23);
  return m % 2 == 0 ? power : power * 0x1.6a09e6p-1F;
}

// Calls f(begin, size) for the parts of n <= unit elements that are rotated each by itself: the
// unit, or decreasing powers of two.
template <typename F>
void for_each_rotation(std::int64_t unit, std::int64_t n, F&& f) {
  std::int64_t begin = 0;
  for (std::int64_t size = unit; size > 0; size /= 2) {
    if ((n & size) == 0) continue;
    f(begin, size);
    begin += size;
  }
}

}  // namespace thinwire
