// The arithmetic of the low-rank codecs on plain pointers. A tensor is a matrix of `rows` rows, v
// its gradient plus its residual, and M^ = left * right^T with a factor of `rank` columns on either
// side. Pure functions, thread-safe; the caller owns all memory.
//
// lowrank_reconstruct and lowrank_orthonormalise give the same bits on every SIMD target: fixed
// order of sums, no fma. The projections use fma and as many lanes as there are; with eps = 2^-24
// they stay within 2 (k + 2) eps sum |v| |b| of the exact sum of k products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "compressors/core/convert.h"
#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

inline constexpr int kMaxLowRank = 64;
// Columns of a factor are padded to multiples of this many floats.
inline constexpr std::int64_t kLowRankLanes = 16;
// Projections are this much smaller than v times basis, so that no sum over a matrix or over ranks
// of finite values overflows.
inline constexpr float kLowRankScale = 0x1p-24F;
inline constexpr float kLowRankUnscale = 0x1p24F;

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
  TensorView grad;  // rows * columns elements, row by row
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const float* residual = nullptr;  // as many, or null
  float decay = 1.0F;
};

// left = kLowRankScale * v * right.
void lowrank_project_left(const LowRankMatrix& v, const LowRankFactor& right,
                          const LowRankFactor& left);
// right = kLowRankScale * v^T * left.
void lowrank_project_right(const LowRankMatrix& v, const LowRankFactor& left,
                           const LowRankFactor& right);

struct LowRankReconstruct {
  LowRankMatrix v;  // its gradient gets M^ = left * right^T / kLowRankScale
  LowRankFactor left;
  LowRankFactor right;
  float* next = nullptr;  // v - M^, or null; 64-byte aligned; may equal v.residual
};
// M^ is bounded by the largest finite value of the gradient's dtype, v - M^ by that of fp32.
void lowrank_reconstruct(const LowRankReconstruct& args);

// Makes the columns an orthonormal basis whose span holds theirs, by Gram-Schmidt, each column
// twice ("twice is enough"), in fp64 rounded to fp32 after each step. A column that depends on
// those before it, or is zero, is drawn from `stream`: a basis always has `rank` columns, and what
// starts from zeros is a random basis.
void lowrank_orthonormalise(const LowRankFactor& factor, const RandomStream& stream);

// ---- Shared by the reference and the kernels.

// The largest finite value of T, or of fp32 where T has larger ones.
template <typename T>
constexpr float lowrank_most() {
  if constexpr (std::is_same_v<T, BF16>) return to_float(BF16{kMaxBF16});
  if constexpr (std::is_same_v<T, FP16>) return to_float(FP16{kMaxFP16});
  return std::numeric_limits<float>::max();
}

// What is left of a unit column is noise of its roundings below this length.
inline constexpr double kLowRankDependent = 0x1p-18;
// Draws before a column stays zero. One that lies in the span of the others is all but impossible.
inline constexpr int kLowRankDraws = 4;

// Near-normal values (sums of four 16-bit words, variance 1/3), draw number `draw` of column j.
void lowrank_draw(const RandomStream& stream, int draw, int j, const LowRankFactor& factor);

// Lanes summed in halves: 0 with 8, then with 4, 2, 1.
double lowrank_total(const double* lanes);

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
