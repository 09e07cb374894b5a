#include "compressors/dct/dctcols_reference.h"

#include <cmath>

#include "compressors/dct/dct_angles.h"

namespace thinwire {
namespace {

// Calls f(element in the tensor, row, column).
template <typename F>
void for_each_element(const DctMatrix& matrix, F&& f) {
  for (std::int64_t i = 0; i < matrix.rows; ++i) {
    for (std::int64_t j = 0; j < matrix.columns; ++j) {
      f(static_cast<std::size_t>(matrix.transposed ? j * matrix.rows + i : i * matrix.columns + j),
        i, j);
    }
  }
}

// The chosen columns of Q, m values each.
std::vector<double> basis(std::int64_t m, std::span<const std::uint32_t> chosen) {
  std::vector<double> all;
  for (const std::int64_t k : chosen) {
    for (std::int64_t j = 0; j < m; ++j) all.push_back(dct_basis(j, k, m));
  }
  return all;
}

}  // namespace

double dct_basis(std::int64_t j, std::int64_t k, std::int64_t m) {
  return std::sqrt((k == 0 ? 1.0 : 2.0) / static_cast<double>(m)) *
         dct_turn((2 * j + 1) * k % (4 * m), 4 * m).cos;
}

std::vector<double> dctcols_project_reference(std::span<const float> values,
                                              const DctMatrix& matrix,
                                              std::span<const std::uint32_t> chosen) {
  const std::vector<double> q = basis(matrix.columns, chosen);
  std::vector<double> out(chosen.size() * static_cast<std::size_t>(matrix.rows));
  for_each_element(matrix, [&](std::size_t at, std::int64_t i, std::int64_t j) {
    for (std::int64_t c = 0; c < static_cast<std::int64_t>(chosen.size()); ++c) {
      out[static_cast<std::size_t>(c * matrix.rows + i)] +=
          static_cast<double>(values[at]) * q[static_cast<std::size_t>(c * matrix.columns + j)];
    }
  });
  return out;
}

std::vector<double> dctcols_restore_reference(std::span<const float> columns,
                                              const DctMatrix& matrix,
                                              std::span<const std::uint32_t> chosen) {
  const std::vector<double> q = basis(matrix.columns, chosen);
  std::vector<double> out(static_cast<std::size_t>(matrix.rows * matrix.columns));
  for_each_element(matrix, [&](std::size_t at, std::int64_t i, std::int64_t j) {
    for (std::int64_t c = 0; c < static_cast<std::int64_t>(chosen.size()); ++c) {
      out[at] += static_cast<double>(columns[static_cast<std::size_t>(c * matrix.rows + i)]) *
                 q[static_cast<std::size_t>(c * matrix.columns + j)];
    }
  });
  return out;
}

}  // namespace thinwire
