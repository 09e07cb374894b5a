// The inner loop of the planner on plain pointers. Pure function, thread-safe; the caller owns all
// memory. planner_simd.cpp and planner_reference.cpp give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace thinwire {

// A candidate of a layer on the planner's grid: how many cells later the plan finishes by it.
struct PlanMove {
  std::int32_t shift = 0;
  std::uint32_t option = 0;
  double error = 0;
};

// Cells of a row: a multiple of this.
inline constexpr std::size_t kPlanCellGroup = 32;

// to[c] = the least from[c - shift] + error of all moves, at least one, for c in [0, to.size()).
// `from` is read in [-to.size(), 2 to.size()), as far as the shifts go, and holds no NaN.
void plan_relax(const double* from, std::span<const PlanMove> moves, std::span<double> to);

}  // namespace thinwire
