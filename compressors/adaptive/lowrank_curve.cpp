#include "compressors/adaptive/lowrank_curve.h"

#include <hwy/aligned_allocator.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <span>
#include <vector>

#include "compressors/lowrank/lowrank_kernels.h"

namespace thinwire {
namespace {

// Columns of the sketch, more than are asked for: what the last ones miss shows less.
constexpr int kSketch = kCurveRanks + 8;
// Whole power iterations before the projection that is measured.
constexpr int kIterations = 2;
// Jacobi's sweeps over a small matrix: each about squares what is off the diagonal.
constexpr int kSweeps = 6;
// Singular values, as a share of all there are, that noise is told from by what they leave.
constexpr double kSignalShare = 0.25;
// Of a squared norm: less is not told from rounding.
constexpr double kLeastNoise = 0x1p-40;

using Matrix = std::array<std::array<double, kSketch>, kSketch>;
using Spectrum = std::array<double, kCurveRanks>;

double square(double x) { return x * x; }

class Factor {
 public:
  Factor(std::int64_t length, int rank)
      : data_(hwy::AllocateAligned<float>(
            static_cast<std::size_t>(rank * LowRankFactor::stride_of(length)))),
        view_{.data = data_.get(), .length = length, .rank = rank} {
    std::fill_n(data_.get(), rank * view_.stride(), 0.0F);
  }
  const LowRankFactor& view() const { return view_; }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
  LowRankFactor view_;
};

Matrix gram(const LowRankFactor& factor) {
  Matrix products = {};
  for (int i = 0; i < factor.rank; ++i) {
    for (int j = 0; j <= i; ++j) {
      std::array<double, kLowRankLanes> lanes = {};
      for (std::int64_t at = 0; at < factor.length; ++at) {
        lanes[static_cast<std::size_t>(at % kLowRankLanes)] +=
            double{factor.column(i)[at]} * double{factor.column(j)[at]};
      }
      products[static_cast<std::size_t>(i)][static_cast<std::size_t>(j)] =
          products[static_cast<std::size_t>(j)][static_cast<std::size_t>(i)] =
              lowrank_total(lanes.data());
    }
  }
  return products;
}

// By Jacobi's rotations; the largest, falling.
Spectrum eigenvalues(Matrix a) {
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    for (std::size_t p = 0; p + 1 < a.size(); ++p) {
      for (std::size_t q = p + 1; q < a.size(); ++q) {
        if (a[p][q] == 0) continue;
        const double theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
        const double t =
            std::copysign(1 / (std::fabs(theta) + std::sqrt(theta * theta + 1)), theta);
        const double c = 1 / std::sqrt(t * t + 1);
        const double s = t * c;
        for (std::size_t k = 0; k < a.size(); ++k) {
          const double kp = a[k][p];
          a[k][p] = c * kp - s * a[k][q];
          a[k][q] = s * kp + c * a[k][q];
        }
        for (std::size_t k = 0; k < a.size(); ++k) {
          const double pk = a[p][k];
          a[p][k] = c * pk - s * a[q][k];
          a[q][k] = s * pk + c * a[q][k];
        }
      }
    }
  }
  std::array<double, kSketch> values;
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::max(a[i][i], 0.0);
  std::sort(values.begin(), values.end(), std::greater<>());
  Spectrum largest;
  std::copy_n(values.begin(), largest.size(), largest.begin());
  return largest;
}

// The largest squared singular values of the sample, zeros where it has fewer.
Spectrum squared_singular_values(const GradientSample& sample) {
  const auto [rows, columns] = sample.extents;
  const auto rank = static_cast<int>(std::min<std::int64_t>({kSketch, rows, columns}));
  const LowRankMatrix v{
      .grad = {const_cast<float*>(sample.values.data()), sample.extents.elements(), DType::kF32},
      .columns = columns};
  const RandomStream stream = random_stream(0, 0, -1);
  const Factor left(rows, rank);
  const Factor right(columns, rank);
  for (int iteration = 0; iteration < kIterations; ++iteration) {
    // At first of zeros, of which a random basis becomes.
    lowrank_orthonormalise(right.view(), stream);
    lowrank_project_left(v, right.view(), left.view(), LowRankSums::kExact);
    lowrank_orthonormalise(left.view(), stream);
    lowrank_project_right(v, left.view(), right.view(), LowRankSums::kExact);
  }
  return eigenvalues(gram(right.view()));
}

// How many there are, small ones counted for less. squares: of lengths.
double effective(std::span<const double> squares) {
  double sum = 0;
  double lengths = 0;
  for (const double value : squares) {
    sum += value;
    lengths += std::sqrt(value);
  }
  return lengths * lengths / sum;
}

struct Extents {
  double rows = 0;
  double columns = 0;

  Extents of(const MatrixExtents& part, const MatrixExtents& whole) const {
    return {rows * static_cast<double>(whole.rows) / static_cast<double>(part.rows),
            columns * static_cast<double>(whole.columns) / static_cast<double>(part.columns)};
  }
};

// Rows and columns that noise is in: those without count for nothing.
Extents effective_extents(const GradientSample& sample) {
  const auto row_size = static_cast<std::size_t>(sample.extents.columns);
  std::vector<double> squares(row_size);
  std::vector<double> columns(row_size);
  std::vector<double> rows;
  for (std::size_t begin = 0; begin < sample.values.size(); begin += row_size) {
    for (std::size_t j = 0; j < row_size; ++j) {
      const double value = sample.values[begin + j];
      squares[j] = value * value;
      columns[j] += squares[j];
    }
    std::array<double, kLowRankLanes> lanes = {};
    for (std::size_t j = 0; j < row_size; ++j) lanes[j % lanes.size()] += squares[j];
    rows.push_back(lowrank_total(lanes.data()));
  }
  return {effective(rows), effective(columns)};
}

// The largest squared singular value of noise of variance 1.
double noise_edge(const Extents& extents) {
  return square(std::sqrt(extents.rows) + std::sqrt(extents.columns));
}

// The squared singular value of the tensor that one of the sample stands for; both in units of the
// noise's variance.
double extend(double value, const Extents& sample, const Extents& tensor) {
  const double edge = noise_edge(sample);
  if (value <= edge) return value / edge * noise_edge(tensor);
  const double over = value - sample.rows - sample.columns;
  const double root = std::sqrt(std::max(square(over) - 4 * sample.rows * sample.columns, 0.0));
  const double signal =
      (over + root) / 2 * (tensor.rows * tensor.columns) / (sample.rows * sample.columns);
  return (signal + tensor.rows) * (signal + tensor.columns) / signal;
}

// Takes the spectrum of a sample over to the whole tensor; in units of the sample's squared norm.
void extend_to_tensor(const GradientSample& sample, double squares, Spectrum& values) {
  const Extents part = effective_extents(sample);
  const Extents whole = part.of(sample.extents, sample.tensor);
  const double signals =
      std::min<double>(kCurveRanks, std::floor(std::min(part.rows, part.columns) * kSignalShare));
  const double rest = std::accumulate(values.begin(), values.begin() + static_cast<int>(signals),
                                      squares, std::minus<>());
  const double noise =
      std::max(rest, kLeastNoise * squares) / ((part.rows - signals) * (part.columns - signals));
  const double share = part.rows * part.columns / (whole.rows * whole.columns);
  for (double& value : values) value = share * noise * extend(value / noise, part, whole);
}

}  // namespace

std::array<double, kCurveRanks> measure_lowrank(const GradientSample& sample, double squares) {
  Spectrum left;
  left.fill(1);
  if (!sample.tensor.is_matrix()) return left;
  Spectrum values = squared_singular_values(sample);
  if (!sample.whole()) extend_to_tensor(sample, squares, values);
  double kept = 0;
  for (std::size_t r = 0; r < values.size(); ++r) {
    kept += values[r];
    left[r] = std::max(1 - kept / squares, 0.0);
  }
  return left;
}

}  // namespace thinwire
