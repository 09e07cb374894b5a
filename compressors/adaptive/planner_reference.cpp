#include "compressors/adaptive/planner_reference.h"

#include <algorithm>
#include <limits>

namespace thinwire {

void plan_relax_reference(const double* from, std::span<const PlanMove> moves,
                          std::span<double> to) {
  for (std::size_t c = 0; c < to.size(); ++c) {
    double least = std::numeric_limits<double>::infinity();
    for (const PlanMove& move : moves) {
      least = std::min(least, from[static_cast<std::ptrdiff_t>(c) - move.shift] + move.error);
    }
    to[c] = least;
  }
}

}  // namespace thinwire
