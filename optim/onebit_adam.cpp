#include "optim/onebit_adam.h"

#include <utility>

namespace thinwire::optim {

OneBitAdam::OneBitAdam(GradientReducer& reducer, std::vector<Member> members,
                       std::vector<AdamOptions> groups, const FreezeOptions& freeze)
    : FrozenVariance(reducer, "OneBitAdam", std::move(members), std::move(groups), freeze) {}

std::shared_ptr<OneBitAdam> OneBitAdam::make(GradientReducer& reducer, std::vector<Member> members,
                                             std::vector<AdamOptions> groups,
                                             const FreezeOptions& freeze) {
  std::shared_ptr<OneBitAdam> optimizer(
      new OneBitAdam(reducer, std::move(members), std::move(groups), freeze));
  reducer.follow(optimizer);
  return optimizer;
}

void OneBitAdam::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  const AdamOptions options = options_of(i);
  const AdamSteps now{.m = steps() + 1, .v = steps() + 1};
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    const TensorView part = reduced.slice(begin, end);
    const std::span<float> w = slice(weights, begin, end);
    if (frozen(i)) {
      frozen_adam_step(options, {}, part, w, slice(m(i), begin, end), slice(v(i), begin, end));
    } else {
      adam_step(options, now, part, w, slice(m(i), begin, end), slice(v(i), begin, end));
    }
  });
}

}  // namespace thinwire::optim
