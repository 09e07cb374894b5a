#include "optim/frozen_variance.h"

#include <cmath>
#include <utility>

#include "optim/variance_floor.h"

namespace thinwire::optim {
namespace {

constexpr const char* kStartHint =
    "the optimizer starts compression when it freezes the variance (freeze_step)";

}  // namespace

FrozenVariance::FrozenVariance(GradientReducer& reducer, std::string name,
                               std::vector<Member> members, std::vector<AdamOptions> groups,
                               const FreezeOptions& freeze)
    : Optimizer(reducer, std::move(name), std::move(members)),
      groups_(Optimizer::name(), Optimizer::groups(), decoupled(std::move(groups))),
      freeze_(freeze),
      m_(add_slot("exp_avg", SlotKind::kShared)),
      v_(add_slot("exp_avg_sq", SlotKind::kShared)) {
  refuse_start(*reducer.plan(), kStartHint);
}

void FrozenVariance::set_options(std::vector<AdamOptions> groups) {
  groups_.set(decoupled(std::move(groups)));
}

void FrozenVariance::check_plan(const Plan& plan) const {
  refuse_start(plan, kStartHint);
  refuse_other_members(
      plan, [](const Codec& codec) { return !codec.is_none(); },
      "which layers exchange momentum is settled with the first step");
}

AdamOptions FrozenVariance::options_of(std::size_t i) const {
  AdamOptions options = groups_.now(group(i));
  options.bias_correction = options.bias_correction && !(freeze_.frozen() && has_codec(i));
  return options;
}

StepMode FrozenVariance::begin() {
  groups_.begin();
  return freeze_.frozen() ? StepMode::kPolicy : StepMode::kDense;
}

bool FrozenVariance::before(std::size_t i, TensorView gradient, TensorView out) {
  if (!frozen(i)) {
    return false;
  }
  const MomentumOptions options{.beta1 = groups_.at_begin(group(i)).beta1,
                                .loss_scale = loss_scale(),
                                .factor = momentum_factor(i)};
  local_momentum(options, gradient, m(i), v(i), out);
  return true;
}

void FrozenVariance::end_update() {
  if (freeze_.frozen() || !any_compressed()) {
    return;
  }
  const double norm = freeze_.needs_norm() ? compressed_norm(v_) : 0;
  if (!std::isfinite(norm) || !freeze_.observe(norm)) {
    return;
  }
  for (std::size_t i = 0; i < size(); ++i) {
    if (compressed(i)) {
      fold_bias(groups_.now(group(i)), {.m = steps(), .v = steps()}, m(i), v(i));
      floor_variance(freeze_.options().floor * momentum_floor(m(i)), v(i));
    }
  }
  froze();
}

// What is pending are momenta, each of which would have been added to the next m = beta1 m + ...
void FrozenVariance::adapt(OptimizerState& state) const {
  for (std::size_t i = 0; i < size(); ++i) {
    const double part = groups_.now(group(i)).beta1 * momentum_factor(state, i);
    if (has_codec(i) && !compressed(i) && is_frozen(state) && part > 0) {
      settle_residual(state, i, 1 / part);
    }
  }
}

void FrozenVariance::save(Numbers& numbers) const { Optimizer::save(freeze_, numbers); }
void FrozenVariance::load(const Numbers& numbers) { Optimizer::load(freeze_, numbers); }

std::string FrozenVariance::settings_text() const {
  return optim::settings_text(freeze_.options());
}

}  // namespace thinwire::optim
