// The random mask one element at a time: the oracle of randmask_simd.cpp. Pure functions.
#pragma once

#include "compressors/randmask/randmask_kernels.h"

namespace thinwire {

void randmask_spread_reference(const RandmaskSpread& args);

}  // namespace thinwire
