// The column codec's transforms by their definition, in fp64: the oracle of dctcols_simd.cpp. Pure
// functions; unlike the kernels, these allocate.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compressors/dct/dctcols_kernels.h"

namespace thinwire {

// Entry (j, k) of the orthonormal DCT-II's m x m matrix Q: V Q has the rows' transforms.
double dct_basis(std::int64_t j, std::int64_t k, std::int64_t m);

// Columns `chosen` of V Q, n values each; `values` holds V as its tensor does.
std::vector<double> dctcols_project_reference(std::span<const float> values,
                                              const DctMatrix& matrix,
                                              std::span<const std::uint32_t> chosen);
// The tensor of which these are the columns, all others being zero.
std::vector<double> dctcols_restore_reference(std::span<const float> columns,
                                              const DctMatrix& matrix,
                                              std::span<const std::uint32_t> chosen);

}  // namespace thinwire
