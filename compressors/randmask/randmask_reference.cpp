#include "compressors/randmask/randmask_reference.h"

#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire {

void randmask_spread_reference(const RandmaskSpread& args) {
  visit(args.grad, [&](auto* grad) {
    using T = std::remove_pointer_t<decltype(grad)>;
    for (std::int64_t i = 0; i < args.grad.elements; ++i) {
      float v = to_float(grad[i]);
      if (args.residual != nullptr) v += args.decay * args.residual[i];
      if (args.next != nullptr) args.next[i] = v;
      grad[i] = T{};
    }
  });
}

}  // namespace thinwire
