// SIMD targets: which instruction sets the kernels may use. Results never depend on it.
// set_simd_limit is for tests and for THINWIRE_SIMD; call it before other threads run kernels.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace thinwire {

// Targets compiled in and runnable here, best first: "avx3", "avx2", "sse4", ..., "scalar".
std::vector<std::string> simd_targets();
// The target kernels use now.
std::string simd_target();
// Uses no better target than `target` ("" lifts the limit). InvalidArgument for an unknown name.
void set_simd_limit(std::string_view target);
// Applies THINWIRE_SIMD once a process; make_codec and the planner's solve call it before any of
// their kernels can run. InvalidArgument when the variable names no target. Thread-safe.
void apply_environment_simd();

}  // namespace thinwire
