// What top-k loses at any density, from one histogram of magnitudes. Pure functions, thread-safe;
// allocates nothing; the same floats on every SIMD target.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace thinwire {

// Densities that the curves of top-k are known at, rising.
inline constexpr std::array kCurveDensities = {1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3,   1.4e-3,
                                               2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.4e-2, 2e-2,
                                               3e-2, 5e-2, 0.1,  0.2,  0.3,  0.5,    1.0};

// Shares of the squared norm.
struct TopKCurve {
  // What is not sent.
  std::array<double, kCurveDensities.size()> dropped = {};
  // What rounding the sent values to q8 and q4 loses.
  std::array<double, kCurveDensities.size()> q8 = {};
  std::array<double, kCurveDensities.size()> q4 = {};
};

// values: finite; a sample, or all, of a tensor of `tensor_elements`. largest: bits of their
// largest magnitude, which is at least 2^-100.
TopKCurve measure_topk(std::span<const float> values, std::uint32_t largest,
                       std::int64_t tensor_elements);

}  // namespace thinwire
