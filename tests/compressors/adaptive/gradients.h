// Gradients of the kinds that training makes, for tests of error estimates. Reproducible.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace thinwire {

enum class GradientKind {
  kNormal,
  kStudent,     // t with 3 degrees of freedom: heavy tails
  kSparseRows,  // an embedding's: fifteen of sixteen rows are zero
  kLowRank,     // a rank of 8 in noise that holds a tenth of the energy
  kRecurrent,   // sums of outer products with falling weights, rows and columns of many scales
};
inline constexpr GradientKind kGradientKinds[] = {GradientKind::kNormal, GradientKind::kStudent,
                                                  GradientKind::kSparseRows, GradientKind::kLowRank,
                                                  GradientKind::kRecurrent};

inline std::string name(GradientKind kind) {
  constexpr const char* kNames[] = {"normal", "student", "sparse rows", "low rank", "recurrent"};
  return kNames[static_cast<int>(kind)];
}

// rows x columns values.
inline std::vector<float> make_gradient(GradientKind kind, std::int64_t rows, std::int64_t columns,
                                        std::uint64_t seed = 1) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<double> normal;
  const auto draws = [&](std::int64_t n, double spread) {
    std::vector<double> values(static_cast<std::size_t>(n));
    for (double& value : values) value = std::exp(spread * normal(engine));
    return values;
  };
  std::vector<double> sum(static_cast<std::size_t>(rows * columns));
  // Adds weight * u v^T.
  const auto add_outer = [&](double weight) {
    std::vector<double> right(static_cast<std::size_t>(columns));
    for (double& x : right) x = weight * normal(engine);
    for (std::int64_t i = 0; i < rows; ++i) {
      const double left = normal(engine);
      for (std::int64_t j = 0; j < columns; ++j) {
        sum[static_cast<std::size_t>(i * columns + j)] += left * right[static_cast<std::size_t>(j)];
      }
    }
  };
  const auto in_row = [&](std::size_t i) { return i / static_cast<std::size_t>(columns); };
  const auto in_column = [&](std::size_t i) { return i % static_cast<std::size_t>(columns); };
  switch (kind) {
    case GradientKind::kNormal:
      for (double& x : sum) x = normal(engine);
      break;
    case GradientKind::kStudent: {
      std::student_t_distribution<double> student(3);
      for (double& x : sum) x = student(engine);
      break;
    }
    case GradientKind::kSparseRows: {
      std::vector<bool> used(static_cast<std::size_t>(rows));
      for (std::size_t i = 0; i < used.size(); ++i) used[i] = i == 0 || engine() % 16 == 0;
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = used[in_row(i)] ? normal(engine) : 0;
      break;
    }
    case GradientKind::kLowRank:
      for (int i = 0; i < 8; ++i) add_outer(1 / std::sqrt(8.0));
      for (double& x : sum) x += std::sqrt(1.0 / 9) * normal(engine);
      break;
    case GradientKind::kRecurrent: {
      for (int i = 1; i <= 64; ++i) add_outer(1.0 / i);
      const std::vector<double> row = draws(rows, 1);
      const std::vector<double> column = draws(columns, 0.5);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] *= row[in_row(i)] * column[in_column(i)];
      break;
    }
  }
  std::vector<float> values(sum.size());
  std::transform(sum.begin(), sum.end(), values.begin(),
                 [](double x) { return static_cast<float>(1e-3 * x); });
  return values;
}

}  // namespace thinwire
