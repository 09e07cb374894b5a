// The planner's inner loop one cell at a time: the oracle of planner_simd.cpp. Pure function.
#pragma once

#include <span>

#include "compressors/adaptive/planner_kernels.h"

namespace thinwire {

void plan_relax_reference(const double* from, std::span<const PlanMove> moves,
                          std::span<double> to);

}  // namespace thinwire
