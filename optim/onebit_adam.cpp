#include "optim/onebit_adam.h"

#include <cmath>
#include <utility>

namespace thinwire::optim {

OneBitAdam::OneBitAdam(GradientReducer& reducer, std::vector<Member> members,
                       std::vector<AdamOptions> groups, const FreezeOptions& freeze)
    : Optimizer(reducer, "OneBitAdam", std::move(members)),
      groups_(name(), Optimizer::groups(), decoupled(std::move(groups))),
      freeze_(freeze),
      m_(add_slot("exp_avg", SlotKind::kShared)),
      v_(add_slot("exp_avg_sq", SlotKind::kShared)) {
  refuse_start("the optimizer starts compression when it freezes the variance (freeze_step)");
}

std::shared_ptr<OneBitAdam> OneBitAdam::make(GradientReducer& reducer, std::vector<Member> members,
                                             std::vector<AdamOptions> groups,
                                             const FreezeOptions& freeze) {
  std::shared_ptr<OneBitAdam> optimizer(
      new OneBitAdam(reducer, std::move(members), std::move(groups), freeze));
  reducer.follow(optimizer);
  return optimizer;
}

void OneBitAdam::set_options(std::vector<AdamOptions> groups) {
  groups_.set(decoupled(std::move(groups)));
}

AdamOptions OneBitAdam::options_of(std::size_t i) const {
  AdamOptions options = groups_.now(group(i));
  options.bias_correction = options.bias_correction && !(freeze_.frozen() && has_codec(i));
  return options;
}

StepMode OneBitAdam::begin() {
  groups_.begin();
  return freeze_.frozen() ? StepMode::kPolicy : StepMode::kDense;
}

bool OneBitAdam::before(std::size_t i, TensorView gradient, TensorView out) {
  if (!frozen(i)) {
    return false;
  }
  const MomentumOptions options{.beta1 = groups_.at_begin(group(i)).beta1,
                                .loss_scale = loss_scale()};
  local_momentum(options, gradient, m_.values[i], v_.values[i], out);
  return true;
}

void OneBitAdam::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  const AdamOptions options = options_of(i);
  const std::span<float> m = m_.values[i];
  const std::span<float> v = v_.values[i];
  const AdamSteps now{.m = steps() + 1, .v = steps() + 1};
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    const TensorView part = reduced.slice(begin, end);
    const std::span<float> w = slice(weights, begin, end);
    if (frozen(i)) {
      frozen_adam_step(options, part, w, slice(m, begin, end), slice(v, begin, end));
    } else {
      adam_step(options, now, part, w, slice(m, begin, end), slice(v, begin, end));
    }
  });
}

void OneBitAdam::end_update() {
  if (freeze_.frozen() || !any_compressed()) {
    return;
  }
  const double norm = freeze_.needs_norm() ? compressed_norm(v_) : 0;
  if (std::isfinite(norm) && freeze_.observe(norm)) {
    for (std::size_t i = 0; i < size(); ++i) {
      if (compressed(i)) {
        fold_bias(groups_.now(group(i)), {.m = steps(), .v = steps()}, m_.values[i], v_.values[i]);
      }
    }
  }
}

// What is pending are momenta, each of which would have been added to the next m = beta1 m + ...
void OneBitAdam::adapt(OptimizerState& state) const {
  for (std::size_t i = 0; i < size(); ++i) {
    const double beta1 = groups_.now(group(i)).beta1;
    if (has_codec(i) && !compressed(i) && is_frozen(state) && beta1 > 0) {
      settle_residual(state, i, 1 / beta1);
    }
  }
}

void OneBitAdam::save(Numbers& numbers) const { Optimizer::save(freeze_, numbers); }
void OneBitAdam::load(const Numbers& numbers) { Optimizer::load(freeze_, numbers); }

}  // namespace thinwire::optim
