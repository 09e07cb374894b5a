// The arithmetic of the low-rank codecs on plain pointers: v, a gradient plus its residual, as a
// matrix; M^ = left * right^T with a factor of `rank` columns on either side. Pure functions,
// thread-safe; the caller owns all memory.
//
// All give the same bits on every SIMD target (fixed order of sums, no fma), but for projections
// with LowRankSums::kFast: they use fma and as many lanes as there are and, with eps = 2^-24, stay
// within 2 (k + 2) eps sum |v| |b| of the exact sum of k products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>

#include "compressors/core/convert.h"
#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

inline constexpr int kMaxLowRank = 64;
// Columns of a factor are padded to multiples of this many floats.
inline constexpr std::int64_t kLowRankLanes = 16;
// Projections cut v at this magnitude, so that no sum over a matrix or over ranks overflows, and M^
// is too small for v - M^ to do so: below half a unit in the last place of the largest fp32. What
// is cut off stays in the residual.
inline constexpr float kLowRankBound = 0x1p80F;

// `rank` columns of `length` floats, one behind the other at a distance of `stride`, aligned to 64;
// zeros from `length` to `stride`.
struct LowRankFactor {
  float* data = nullptr;
  std::int64_t length = 0;
  int rank = 0;

  static constexpr std::int64_t stride_of(std::int64_t length) {
    return (length + kLowRankLanes - 1) / kLowRankLanes * kLowRankLanes;
  }
  std::int64_t stride() const { return stride_of(length); }
  float* column(int j) const { return data + j * stride(); }
};

struct LowRankMatrix {
  TensorView grad;  // row by row; the last row may lack some elements, which are zeros then
  std::int64_t columns = 1;
  const float* residual = nullptr;  // as many elements, or null
  float decay = 1.0F;

  std::int64_t rows() const { return (grad.elements + columns - 1) / columns; }
};

enum class LowRankSums : std::uint8_t { kFast, kExact };

// left = v * right, v^T * left = right. A v that is not finite gives some value that is not.
void lowrank_project_left(const LowRankMatrix& v, const LowRankFactor& right,
                          const LowRankFactor& left, LowRankSums sums);
void lowrank_project_right(const LowRankMatrix& v, const LowRankFactor& left,
                           const LowRankFactor& right, LowRankSums sums);

struct LowRankReconstruct {
  LowRankMatrix v;
  LowRankFactor left;
  LowRankFactor right;
  float* next = nullptr;  // gets v - M^; may equal v.residual; or null
};
// Writes M^ to the gradient's place, bounded by its dtype's largest finite value.
void lowrank_replace(const LowRankReconstruct& args);
// Only reads the gradient; `next` may be its memory.
void lowrank_subtract(const LowRankReconstruct& args);
// out = left * right^T, row by row, as far as there are elements.
void lowrank_decode(const LowRankFactor& left, const LowRankFactor& right, TensorView out);
// out += weight * left * right^T, two roundings.
void lowrank_add(const LowRankFactor& left, const LowRankFactor& right, float weight,
                 std::span<float> out);

// Makes the columns an orthonormal basis whose span holds theirs, by Gram-Schmidt, each column
// twice ("twice is enough"), in fp64 rounded to fp32 after each step. A column that depends on
// those before it, or is zero, is drawn from `stream`: a basis always has `rank` columns, and what
// starts from zeros is a random basis.
void lowrank_orthonormalise(const LowRankFactor& factor, const RandomStream& stream);

// ---- Shared by the reference and the kernels.

// What M^ is bounded by in a gradient of type T: fp16's largest value; the others hold any M^.
template <typename T>
constexpr float lowrank_most() {
  return std::is_same_v<T, FP16> ? to_float(FP16{kMaxFP16}) : std::numeric_limits<float>::max();
}

// What is left of a unit column is noise of its roundings below this length.
inline constexpr double kLowRankDependent = 0x1p-18;
// Draws before a column stays zero. One that lies in the span of the others is all but impossible.
inline constexpr int kLowRankDraws = 4;

// Near-normal values (sums of four 16-bit words, variance 1/3), draw number `draw` of column j.
void lowrank_draw(const RandomStream& stream, int draw, int j, const LowRankFactor& factor);

// Lanes summed in halves: 0 with 8, then with 4, 2, 1.
template <typename T>
T lowrank_total(const T* lanes) {
  T sums[kLowRankLanes];
  std::copy_n(lanes, kLowRankLanes, sums);
  for (std::int64_t half = kLowRankLanes / 2; half > 0; half /= 2) {
    for (std::int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

// The order of work of lowrank_orthonormalise, on a target's dot(a, b), subtract(c, a, b): b -= c
// a, and multiply(c, a): a *= c.
template <typename Dot, typename Subtract, typename Multiply>
void lowrank_gram_schmidt(const LowRankFactor& factor, const RandomStream& stream, Dot&& dot,
                          Subtract&& subtract, Multiply&& multiply) {
  const std::int64_t n = factor.stride();
  // Whether column j could be made a unit vector orthogonal to those before it.
  const auto add_column = [&](int j) {
    float* column = factor.column(j);
    const double size = std::sqrt(dot(column, column, n));
    if (!(size > 0)) return false;
    multiply(1 / size, column, n);
    for (int pass = 0; pass < 2; ++pass) {
      for (int k = 0; k < j; ++k) {
        subtract(dot(factor.column(k), column, n), factor.column(k), column, n);
      }
    }
    const double rest = std::sqrt(dot(column, column, n));
    if (!(rest > kLowRankDependent)) return false;
    multiply(1 / rest, column, n);
    return true;
  };
  for (int j = 0; j < factor.rank; ++j) {
    bool added = add_column(j);
    for (int draw = 0; !added && draw < kLowRankDraws; ++draw) {
      lowrank_draw(stream, draw, j, factor);
      added = add_column(j);
    }
    if (!added) std::fill_n(factor.column(j), n, 0.0F);
  }
}

}  // namespace thinwire
