#include "compressors/lowrank/lowrank_reference.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

template <typename T>
float v_at(const LowRankMatrix& v, const T* grad, std::int64_t i) {
  float x = to_float(grad[i]);
  if (v.residual != nullptr) x += v.decay * v.residual[i];
  return x;
}

// Calls f(row, column, v there, bounded) for all elements.
template <typename F>
void for_each_bounded(const LowRankMatrix& v, F&& f) {
  visit(v.grad, [&](const auto* grad) {
    for (std::int64_t i = 0; i < v.grad.elements; ++i) {
      const float x = v_at(v, grad, i);
      f(i / v.columns, i % v.columns,
        static_cast<double>(std::clamp(x, -kLowRankBound, kLowRankBound) + (x - x)));
    }
  });
}

// factor = sums, rounded.
void round_sums(const std::vector<double>& sums, const LowRankFactor& factor) {
  std::transform(sums.begin(), sums.end(), factor.data,
                 [](double x) { return static_cast<float>(x); });
}

}  // namespace

void lowrank_project_left_reference(const LowRankMatrix& v, const LowRankFactor& right,
                                    const LowRankFactor& left) {
  std::vector<double> sums(static_cast<std::size_t>(left.rank * left.stride()));
  for (int j = 0; j < left.rank; ++j) {
    double* column = sums.data() + j * left.stride();
    for_each_bounded(v, [&](std::int64_t row, std::int64_t c, double x) {
      column[row] += x * static_cast<double>(right.column(j)[c]);
    });
  }
  round_sums(sums, left);
}

void lowrank_project_right_reference(const LowRankMatrix& v, const LowRankFactor& left,
                                     const LowRankFactor& right) {
  std::vector<double> sums(static_cast<std::size_t>(right.rank * right.stride()));
  for (int j = 0; j < right.rank; ++j) {
    double* column = sums.data() + j * right.stride();
    for_each_bounded(v, [&](std::int64_t row, std::int64_t c, double x) {
      column[c] += x * static_cast<double>(left.column(j)[row]);
    });
  }
  round_sums(sums, right);
}

void lowrank_replace_reference(const LowRankReconstruct& args) {
  visit(args.v.grad, [&](auto* grad) {
    using T = std::remove_pointer_t<decltype(grad)>;
    for (std::int64_t i = 0; i < args.v.grad.elements; ++i) {
      float sum = 0;
      for (int j = 0; j < args.left.rank; ++j) {
        sum += args.left.column(j)[i / args.v.columns] * args.right.column(j)[i % args.v.columns];
      }
      const float v = v_at(args.v, grad, i);
      grad[i] = from_float<T>(std::clamp(sum, -lowrank_most<T>(), lowrank_most<T>()));
      if (args.next != nullptr) args.next[i] = v - to_float(grad[i]);
    }
  });
}

void lowrank_orthonormalise_reference(const LowRankFactor& factor, const RandomStream& stream) {
  const auto dot = [](const float* a, const float* b, std::int64_t n) {
    double lanes[kLowRankLanes] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      lanes[i % kLowRankLanes] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
    }
    return lowrank_total(lanes);
  };
  const auto subtract = [](double c, const float* a, float* b, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
      b[i] = static_cast<float>(static_cast<double>(b[i]) - c * static_cast<double>(a[i]));
    }
  };
  const auto multiply = [](double c, float* a, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) a[i] = static_cast<float>(static_cast<double>(a[i]) * c);
  };
  lowrank_gram_schmidt(factor, stream, dot, subtract, multiply);
}

void lowrank_draw(const RandomStream& stream, int draw, int j, const LowRankFactor& factor) {
  const std::int64_t pairs = (factor.length + 1) / 2;
  float* column = factor.column(j);
  for (std::int64_t pair = 0; pair < pairs; ++pair) {
    const std::int64_t block = (std::int64_t{draw} * kMaxLowRank + j) * pairs + pair;
    const auto words = random_block(stream, static_cast<std::uint64_t>(block));
    const auto value = [](std::uint32_t a, std::uint32_t b) {
      const std::uint32_t sum = (a & 0xFFFF) + (a >> 16) + (b & 0xFFFF) + (b >> 16);
      return static_cast<float>(static_cast<std::int32_t>(sum) - 2 * 0xFFFF) * 0x1p-16F;
    };
    column[2 * pair] = value(words[0], words[1]);
    if (2 * pair + 1 < factor.length) column[2 * pair + 1] = value(words[2], words[3]);
  }
}

}  // namespace thinwire
