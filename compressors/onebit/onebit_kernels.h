// The inner loops of onebit on plain pointers, and the layout of a body (FORMAT.md). Pure
// functions, thread-safe; the caller owns all memory. onebit_simd.cpp and onebit_reference.cpp give
// the same bits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>

#include "compressors/core/tensor_view.h"
#include "compressors/onebit/onebit.h"

namespace thinwire {

inline constexpr std::int64_t kOneBitFirstBytes = 4;
inline constexpr std::int64_t kOneBitScaleBytes = 4;

// Elements that share a scale; block 0 is the tensor.
constexpr std::int64_t onebit_block(std::int64_t block, std::int64_t n) {
  return block == 0 ? n : block;
}
// Scales of an n-element tensor.
constexpr std::int64_t onebit_scales(std::int64_t block, std::int64_t n) {
  return block == 0 ? (n == 0 ? 0 : 1) : (n + block - 1) / block;
}
// What follows the mode: begin of the first masked run, scales, sign bits.
constexpr std::int64_t onebit_bytes(std::int64_t block, std::int64_t n) {
  return kOneBitFirstBytes + kOneBitScaleBytes * onebit_scales(block, n) + (n + 7) / 8;
}

// |v| or v^2 are summed in fp64 in 16 lanes (element i of the block in lane i % 16, in order); the
// lanes are then halved four times.
inline constexpr int kOneBitLanes = 16;
inline double onebit_total(const double* lanes) {
  double sum[kOneBitLanes] = {};
  for (int j = 0; j < kOneBitLanes; ++j) sum[j] = lanes[j];
  for (int half = kOneBitLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}
// The magnitude of `sent` elements, rounded to fp32 once; 0 when there are none.
inline float onebit_scale(OneBitScale kind, double total, std::int64_t sent) {
  if (sent == 0) return 0;
  const double mean = total / static_cast<double>(sent);
  const double scale = kind == OneBitScale::kL2 ? std::sqrt(mean) : mean;
  // The sum's rounding must not carry the mean of largest values over to Inf.
  return static_cast<float>(std::fmin(scale, double{std::numeric_limits<float>::max()}));
}

struct OneBitEncode {
  TensorView grad = {};
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;      // n values, 64-byte aligned unless the gradient's own, or null
  std::byte* body = nullptr;  // onebit_bytes(block, n) bytes, any alignment
  std::int64_t block = 0;     // a multiple of 64, or 0
  OneBitScale scale = OneBitScale::kL2;
};

// Returns whether all v were finite; if not, body and next are unspecified.
bool onebit_encode(const OneBitEncode& args);

// A body of n elements without its mode.
struct OneBitBody {
  const std::byte* scales = nullptr;
  const std::byte* signs = nullptr;
  std::int64_t first_run = 0;

  OneBitBody() = default;
  OneBitBody(const std::byte* body, std::int64_t block, std::int64_t n);
};

// No scale is negative, NaN or Inf, and the runs lie in the tensor. What follows takes only such.
bool onebit_valid(const OneBitBody& body, std::int64_t block, std::int64_t n);

void onebit_decode(const OneBitBody& body, std::int64_t block, TensorView out);

// Bodies that are summed in one pass.
inline constexpr std::size_t kOneBitTogether = 8;
// out += weight * each body in turn, at most kOneBitTogether of them; from zeros when `fresh`.
void onebit_sum(std::span<const OneBitBody> bodies, std::int64_t block, float weight, bool fresh,
                std::span<float> out);

}  // namespace thinwire
