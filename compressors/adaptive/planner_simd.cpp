#include "compressors/adaptive/planner_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/adaptive/planner_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include <limits>

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Four vectors at a time: their minima are four chains that do not wait for each other.
void relax(const double* from, std::span<const PlanMove> moves, std::span<double> to) {
  const hn::CappedTag<double, kPlanCellGroup / 4> d;
  const std::size_t n = hn::Lanes(d);
  const auto unreachable = hn::Set(d, std::numeric_limits<double>::infinity());
  for (std::size_t c = 0; c < to.size(); c += 4 * n) {
    auto least0 = unreachable;
    auto least1 = unreachable;
    auto least2 = unreachable;
    auto least3 = unreachable;
    for (const PlanMove& move : moves) {
      const double* at = from + static_cast<std::ptrdiff_t>(c) - move.shift;
      const auto error = hn::Set(d, move.error);
      least0 = hn::Min(least0, hn::Add(hn::LoadU(d, at), error));
      least1 = hn::Min(least1, hn::Add(hn::LoadU(d, at + n), error));
      least2 = hn::Min(least2, hn::Add(hn::LoadU(d, at + 2 * n), error));
      least3 = hn::Min(least3, hn::Add(hn::LoadU(d, at + 3 * n), error));
    }
    hn::StoreU(least0, d, to.data() + c);
    hn::StoreU(least1, d, to.data() + c + n);
    hn::StoreU(least2, d, to.data() + c + 2 * n);
    hn::StoreU(least3, d, to.data() + c + 3 * n);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(relax);

void plan_relax(const double* from, std::span<const PlanMove> moves, std::span<double> to) {
  HWY_DYNAMIC_DISPATCH(relax)(from, moves, to);
}

}  // namespace thinwire
#endif  // HWY_ONCE
