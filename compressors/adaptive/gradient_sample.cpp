#include "compressors/adaptive/gradient_sample.h"

#include <algorithm>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

// Columns that are sampled of wide matrices: with kSampleElements that makes 256 rows. Of few rows
// all are, if that leaves kLeastColumns. A segment of a row is some blocks of the quantisers.
constexpr std::int64_t kColumns = 512;
constexpr std::int64_t kLeastColumns = 256;
constexpr std::int64_t kColumnStep = 64;
// Elements that a run of whole short rows has at least: blocks of the quantisers go across them.
constexpr std::int64_t kRun = 1024;
// Elements of a block of what is no matrix.
constexpr std::int64_t kBlock = 4096;

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The runs of a sample: `width` elements of a row, or `group` whole rows together, of every
// stride-th row or group.
struct Grid {
  std::int64_t width = 0;
  std::int64_t group = 1;
  std::int64_t stride = 1;
  std::int64_t windows = 1;  // places of a run in its row

  Grid(std::int64_t rows, std::int64_t columns, std::int64_t columns_wanted, std::int64_t most)
      : width(std::min(columns, columns_wanted)) {
    if (width == columns) group = divide_up(kRun, columns);
    stride = divide_up(divide_up(rows, group), most / (group * width));
    if (width < columns) {
      if (rows * kLeastColumns <= most) stride = 1;
      const std::int64_t room = most / divide_up(rows, stride);
      width = std::min(columns, room / kColumnStep * kColumnStep);
    }
    windows = divide_up(columns, width);
  }
};

// v of [begin, begin + out.size()).
template <typename T>
void copy_run(const SampleSource& source, const T* grad, std::int64_t begin, std::span<float> out) {
  grad += begin;
  if (source.residual.elements == 0) {
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = to_float(grad[i]);
    return;
  }
  visit(source.residual, [&](const auto* residual) {
    residual += begin;
    for (std::size_t i = 0; i < out.size(); ++i) {
      out[i] = to_float(grad[i]) + source.decay * to_float(residual[i]);
    }
  });
}

void check(const SampleSource& source, const MatrixExtents& tensor, std::int64_t most_elements) {
  const auto complain = [](const std::string& what, std::int64_t got, std::int64_t expected) {
    throw InvalidArgument("sample of a gradient: " + what + " of " + std::to_string(got) +
                          " elements, expected " + std::to_string(expected));
  };
  const std::int64_t n = source.grad.elements;
  if (tensor.elements() != n) complain("shape", tensor.elements(), n);
  const std::int64_t residual = source.residual.elements;
  if (residual != 0 && residual != n) complain("residual", residual, n);
  if (most_elements < kMinSampleElements) {
    complain("sample", most_elements, kMinSampleElements);
  }
}

}  // namespace

MatrixExtents::MatrixExtents(std::span<const std::int64_t> shape) {
  if (shape.empty()) return;
  rows = shape.front();
  for (const std::int64_t extent : shape.subspan(1)) columns *= extent;
}

void take_sample(const SampleSource& source, std::uint64_t key_hash, std::uint64_t counter,
                 GradientSample& sample, std::int64_t most_elements) {
  sample.tensor = MatrixExtents(source.shape);
  check(source, sample.tensor, most_elements);
  const std::int64_t n = source.grad.elements;
  sample.values.resize(static_cast<std::size_t>(std::min(n, most_elements)));
  visit(source.grad, [&](const auto* grad) {
    if (n <= most_elements) {
      sample.extents = sample.tensor;
      return copy_run(source, grad, 0, sample.values);
    }
    const bool matrix = sample.tensor.is_matrix();
    const std::int64_t rows = matrix ? sample.tensor.rows : divide_up(n, kBlock);
    const std::int64_t columns = matrix ? sample.tensor.columns : kBlock;
    const Grid grid(rows, columns, matrix ? kColumns : kBlock, most_elements);
    const auto cells = static_cast<std::uint64_t>(grid.stride * grid.windows);
    const auto cell = static_cast<std::int64_t>((key_hash % cells + counter % cells) % cells);
    const std::int64_t column = std::min(cell / grid.stride * grid.width, columns - grid.width);
    std::size_t taken = 0;
    for (std::int64_t group = cell % grid.stride; group * grid.group < rows; group += grid.stride) {
      const std::int64_t begin = group * grid.group * columns + column;
      const std::int64_t end = std::min(begin + grid.group * grid.width, n);
      const auto size = static_cast<std::size_t>(end - begin);
      copy_run(source, grad, begin, std::span(sample.values).subspan(taken, size));
      taken += size;
    }
    sample.values.resize(taken);
    const auto size = static_cast<std::int64_t>(taken);
    sample.extents.rows = matrix ? size / grid.width : 1;
    sample.extents.columns = matrix ? grid.width : size;
  });
}

}  // namespace thinwire
