// The inner loop of error_curves.h on plain pointers. Pure functions, thread-safe;
// error_curves_simd.cpp and error_curves_reference.cpp give the same bits.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "compressors/quantize/quantize.h"

namespace thinwire {

inline constexpr std::int64_t kErrorBlock = default_quantize_block(QuantizeKind::kMaxAbs);
// Bits of the quantisers that round to the nearest of several levels.
inline constexpr int kErrorLeastBits = 2;
inline constexpr int kErrorMostBits = 8;

// Sums over a block's v / largest. Each has 16 lanes, element i in lane i % 16, which are then
// halved four times.
struct BlockErrors {
  // Bits of the largest magnitude. Where that is not finite, or below kQuantizeTiny, the rest is
  // unspecified.
  std::uint32_t largest = 0;
  float magnitudes = 0;
  float squares = 0;
  float bf16 = 0;  // squares of what rounding to bf16 loses
  // Of what kErrorLeastBits, ... kErrorMostBits lose: squares, in units of a step, which is
  // largest / quantize_levels(bits).
  std::array<float, kErrorMostBits - kErrorLeastBits + 1> rounding = {};
};

// Of whole blocks of kErrorBlock values, any alignment.
void block_errors(const float* values, std::size_t blocks, BlockErrors* out);

}  // namespace thinwire
