#include "compressors/randmask/randmask_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/randmask/randmask_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"
#include "compressors/randmask/randmask_reference.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

// Whole vectors of [0, n); returns how many elements were done.
template <bool kStream, typename T>
std::int64_t spread_vectors(const RandmaskSpread& args, T* grad) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  const VF32 decay = hn::Set(F32(), args.decay);
  std::int64_t i = 0;
  for (; i + lanes <= args.grad.elements; i += lanes) {
    if (args.next != nullptr) {
      const float* residual = args.residual == nullptr ? nullptr : args.residual + i;
      const VF32 v = load_sum(grad + i, residual, decay);
      if (kStream) {
        hn::Stream(v, F32(), args.next + i);
      } else {
        hn::StoreU(v, F32(), args.next + i);
      }
    }
    store_zero(grad + i);
  }
  if (kStream) hwy::FlushStream();
  return i;
}

void spread(const RandmaskSpread& args) {
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  visit(args.grad, [&](auto* grad) {
    const std::int64_t done =
        stream ? spread_vectors<true>(args, grad) : spread_vectors<false>(args, grad);
    randmask_spread_reference(after(args, done));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(spread);

void randmask_spread(const RandmaskSpread& args) { HWY_DYNAMIC_DISPATCH(spread)(args); }

}  // namespace thinwire
#endif  // HWY_ONCE
