// The sums of error_curves_kernels.h one element at a time: the oracle of error_curves_simd.cpp.
// Pure functions.
#pragma once

#include "compressors/adaptive/error_curves_kernels.h"

namespace thinwire {

void block_errors_reference(const float* values, std::size_t blocks, BlockErrors* out);

}  // namespace thinwire
