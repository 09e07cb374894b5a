#include "compressors/lowrank/lowrank_reference.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

constexpr float kMaxFloat = std::numeric_limits<float>::max();

template <typename T>
float v_at(const LowRankMatrix& v, const T* grad, std::int64_t i) {
  float x = to_float(grad[i]);
  if (v.residual != nullptr) x += v.decay * v.residual[i];
  return x;
}

}  // namespace

void lowrank_project_left_reference(const LowRankMatrix& v, const LowRankFactor& right,
                                    const LowRankFactor& left) {
  visit(v.grad, [&](const auto* grad) {
    for (int j = 0; j < left.rank; ++j) {
      std::fill_n(left.column(j), left.stride(), 0.0F);
      for (std::int64_t row = 0; row < v.rows; ++row) {
        double sum = 0;
        for (std::int64_t c = 0; c < v.columns; ++c) {
          sum += static_cast<double>(v_at(v, grad, row * v.columns + c)) *
                 static_cast<double>(right.column(j)[c]);
        }
        left.column(j)[row] = static_cast<float>(sum * static_cast<double>(kLowRankScale));
      }
    }
  });
}

void lowrank_project_right_reference(const LowRankMatrix& v, const LowRankFactor& left,
                                     const LowRankFactor& right) {
  visit(v.grad, [&](const auto* grad) {
    for (int j = 0; j < right.rank; ++j) {
      std::fill_n(right.column(j), right.stride(), 0.0F);
      for (std::int64_t c = 0; c < v.columns; ++c) {
        double sum = 0;
        for (std::int64_t row = 0; row < v.rows; ++row) {
          sum += static_cast<double>(v_at(v, grad, row * v.columns + c)) *
                 static_cast<double>(left.column(j)[row]);
        }
        right.column(j)[c] = static_cast<float>(sum * static_cast<double>(kLowRankScale));
      }
    }
  });
}

void lowrank_reconstruct_reference(const LowRankReconstruct& args) {
  visit(args.v.grad, [&](auto* grad) {
    using T = std::remove_pointer_t<decltype(grad)>;
    const float most = lowrank_most<T>();
    for (std::int64_t row = 0; row < args.v.rows; ++row) {
      for (std::int64_t c = 0; c < args.v.columns; ++c) {
        const std::int64_t i = row * args.v.columns + c;
        float sum = 0;
        for (int j = 0; j < args.left.rank; ++j) {
          sum += args.left.column(j)[row] * args.right.column(j)[c];
        }
        const float v = v_at(args.v, grad, i);
        grad[i] = from_float<T>(std::clamp(sum * kLowRankUnscale, -most, most));
        if (args.next != nullptr) {
          args.next[i] = std::clamp(v - to_float(grad[i]), -kMaxFloat, kMaxFloat);
        }
      }
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

double lowrank_total(const double* lanes) {
  double sums[kLowRankLanes];
  std::copy_n(lanes, kLowRankLanes, sums);
  for (std::int64_t half = kLowRankLanes / 2; half > 0; half /= 2) {
    for (std::int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
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
