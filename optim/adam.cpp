#include "optim/adam.h"

#include <utility>

namespace thinwire::optim {

Adam::Adam(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups)
    : Optimizer(reducer, "Adam", std::move(members)),
      groups_(name(), Optimizer::groups(), std::move(groups)),
      m_(add_slot("exp_avg", SlotKind::kShared)),
      v_(add_slot("exp_avg_sq", SlotKind::kShared)) {}

std::shared_ptr<Adam> Adam::make(GradientReducer& reducer, std::vector<Member> members,
                                 std::vector<AdamOptions> groups) {
  std::shared_ptr<Adam> optimizer(new Adam(reducer, std::move(members), std::move(groups)));
  reducer.follow(optimizer);
  return optimizer;
}

void Adam::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  const AdamOptions options = groups_.now(group(i));
  const std::span<float> m = m_.values[i];
  const std::span<float> v = v_.values[i];
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    adam_step(options, {.m = steps() + 1, .v = steps() + 1}, reduced.slice(begin, end),
              slice(weights, begin, end), slice(m, begin, end), slice(v, begin, end));
  });
}

}  // namespace thinwire::optim
