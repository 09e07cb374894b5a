#include "optim/sgd.h"

#include <utility>

namespace thinwire::optim {

Sgd::Sgd(GradientReducer& reducer, std::vector<Member> members, std::vector<SgdOptions> groups)
    : Optimizer(reducer, "SGD", std::move(members)),
      groups_(name(), Optimizer::groups(), std::move(groups)),
      velocity_(add_slot("momentum_buffer", SlotKind::kOptional)) {}

std::shared_ptr<Sgd> Sgd::make(GradientReducer& reducer, std::vector<Member> members,
                               std::vector<SgdOptions> groups) {
  std::shared_ptr<Sgd> optimizer(new Sgd(reducer, std::move(members), std::move(groups)));
  reducer.follow(optimizer);
  return optimizer;
}

void Sgd::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  const SgdOptions options = groups_.now(group(i));
  const std::span<float> velocity =
      options.momentum > 0 ? ensure(velocity_, i) : std::span<float>();
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    const auto of = [&](std::span<float> values) {
      return values.empty() ? values : slice(values, begin, end);
    };
    sgd_step(options, reduced.slice(begin, end), of(weights), of(velocity));
  });
}

}  // namespace thinwire::optim
