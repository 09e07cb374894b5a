#include "optim/zero_one_adam.h"

#include <algorithm>
#include <utility>

#include "compressors/core/codec_support.h"
#include "optim/variance_floor.h"

namespace thinwire::optim {
namespace {

constexpr const char* kStartHint = "the optimizer's schedule says what is compressed, and when";

}  // namespace

ZeroOneAdam::ZeroOneAdam(GradientReducer& reducer, std::vector<Member> members,
                         std::vector<AdamOptions> groups, const ZeroOneOptions& schedule)
    : Optimizer(reducer, "ZeroOneAdam", std::move(members)),
      groups_(name(), Optimizer::groups(), decoupled(std::move(groups))),
      schedule_(schedule),
      var_freeze_step_(schedule.var_freeze_step),
      sum_lr_(size()),
      m_(add_slot("exp_avg", SlotKind::kLocal)),
      v_(add_slot("exp_avg_sq", SlotKind::kShared)),
      u_(add_slot("sum", SlotKind::kOptionalLocal)),
      anchor_(add_slot("anchor", SlotKind::kOptional)) {
  refuse_start(*reducer.plan(), kStartHint);
  if (any_compressed() && size() != layers()) {
    refuse("expected all " + std::to_string(layers()) + " layers of the reducer, got " +
               std::to_string(size()),
           "in local steps no layer is exchanged: give it all parameters that are trained");
  }
}

void ZeroOneAdam::check_plan(const Plan& plan) const {
  refuse_start(plan, kStartHint);
  refuse_other_members(
      plan, [](const Codec& codec) { return !codec.is_none(); },
      "which layers are compressed is settled with the first step");
}

std::shared_ptr<ZeroOneAdam> ZeroOneAdam::make(GradientReducer& reducer,
                                               std::vector<Member> members,
                                               std::vector<AdamOptions> groups,
                                               const ZeroOneOptions& schedule) {
  std::shared_ptr<ZeroOneAdam> optimizer(
      new ZeroOneAdam(reducer, std::move(members), std::move(groups), schedule));
  reducer.follow(optimizer);
  return optimizer;
}

ZeroOneStep ZeroOneAdam::next() const {
  // After var_freeze_step on one rank, say.
  const bool late = steps() >= var_freeze_step_ && !folded_;
  return any_compressed() && !late ? schedule_.at(steps()) : ZeroOneStep::kVariance;
}

bool ZeroOneAdam::synchronised() const {
  return !any_compressed() || !folded_ || steps() == 0 ||
         schedule_.at(steps() - 1) != ZeroOneStep::kLocal;
}

StepMode ZeroOneAdam::begin() {
  groups_.begin();
  kind_ = next();
  switch (kind_) {
    case ZeroOneStep::kVariance:
      return StepMode::kDense;
    case ZeroOneStep::kLocal:
      return StepMode::kLocal;
    case ZeroOneStep::kMomentum:
    case ZeroOneStep::kSync:
      break;
  }
  return StepMode::kPolicy;
}

bool ZeroOneAdam::before(std::size_t i, TensorView gradient, TensorView out) {
  if (kind_ != ZeroOneStep::kMomentum && kind_ != ZeroOneStep::kSync) {
    return false;
  }
  const AdamOptions& options = groups_.at_begin(group(i));
  MomentumOptions momentum{.beta1 = options.beta1, .loss_scale = loss_scale()};
  if (kind_ == ZeroOneStep::kSync && sum_lr_[i] + options.lr > 0) {
    momentum.factor = options.lr;
  }
  if (sum_lr_[i] > 0) {
    local_sum(momentum, gradient, m_.values[i], v_.values[i], u_.values[i], out);
  } else {
    local_momentum(momentum, gradient, m_.values[i], v_.values[i], out);
  }
  return true;
}

void ZeroOneAdam::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  if (kind_ == ZeroOneStep::kLocal) {
    train_alone(i, weights, reduced);
    return;
  }
  if (kind_ == ZeroOneStep::kSync) {
    synchronise(i, weights, reduced);
    return;
  }
  AdamOptions options = groups_.now(group(i));
  options.bias_correction = options.bias_correction && !folded_;
  sum_lr_[i] = 0;  // an interval that several ranks have begun ends on one
  drop(u_, i);
  drop(anchor_, i);
  const bool measures = kind_ == ZeroOneStep::kVariance;
  const AdamSteps now{.m = steps() + 1, .v = variance_steps_ + (measures ? 1 : 0)};
  if (compressed(i) && (!measures || steps() > variance_steps_)) {  // m is off, or will be
    const AdamSteps before{.m = steps(), .v = variance_steps_};
    options.least_v = schedule_.options().floor * momentum_floor(options, before, m_.values[i]);
  }
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    const std::span<float> m = slice(std::span(m_.values[i]), begin, end);
    const std::span<float> v = slice(std::span(v_.values[i]), begin, end);
    const std::span<float> w = slice(weights, begin, end);
    if (measures) {
      adam_step(options, now, reduced.slice(begin, end), w, m, v);
    } else {
      frozen_adam_step(options, now, reduced.slice(begin, end), w, m, v);
    }
  });
}

void ZeroOneAdam::train_alone(std::size_t i, std::span<float> weights, TensorView gradient) {
  const AdamOptions options = groups_.now(group(i));
  const bool first = sum_lr_[i] == 0;
  const std::span<float> u = ensure(u_, i);
  const std::span<float> anchor = first ? ensure(anchor_, i) : std::span<float>();
  sum_lr_[i] += options.lr;
  if (!all_finite(gradient)) {
    if (first) {
      std::ranges::copy(weights, anchor.begin());
      std::ranges::fill(u, 0.0F);
    }
    return;
  }
  for_ranges(gradient.elements, [&](std::int64_t begin, std::int64_t end) {
    local_adam_step(options, gradient.slice(begin, end), slice(weights, begin, end),
                    slice(std::span(m_.values[i]), begin, end),
                    slice(std::span(v_.values[i]), begin, end), slice(u, begin, end),
                    first ? slice(anchor, begin, end) : anchor);
  });
}

void ZeroOneAdam::synchronise(std::size_t i, std::span<float> weights, TensorView reduced) {
  AdamOptions options = groups_.now(group(i));
  const std::span<float> m = m_.values[i];
  const std::span<float> v = v_.values[i];
  const double sum_lr = sum_lr_[i] + groups_.at_begin(group(i)).lr;
  if (sum_lr > 0) {
    const bool alone = sum_lr_[i] > 0;
    for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
      const std::span<float> w = slice(weights, begin, end);
      sync_adam_step(options, sum_lr, reduced.slice(begin, end), w, slice(m, begin, end),
                     slice(v, begin, end),
                     alone ? slice(std::span(anchor_.values[i]), begin, end) : w);
    });
  } else {
    options.lr = 0;
    options.bias_correction = false;
    frozen_adam_step(options, {}, reduced, weights, m, v);
    unmoved_.push_back(i);
  }
  sum_lr_[i] = 0;
}

void ZeroOneAdam::end_update() {
  variance_steps_ += kind_ == ZeroOneStep::kVariance ? 1 : 0;
  if (any_compressed() && !folded_ && steps() >= var_freeze_step_) {
    begin_intervals();
  }
  if (!unmoved_.empty()) {
    forget_unmoved();
  }
}

void ZeroOneAdam::begin_intervals() {
  std::vector<float> factors(layers(), 1.0F);
  for (std::size_t i = 0; i < size(); ++i) {
    const AdamOptions options = groups_.now(group(i));
    fold_bias(options, {.m = steps(), .v = variance_steps_}, m_.values[i], v_.values[i]);
    if (compressed(i)) {
      floor_variance(schedule_.options().floor * momentum_floor(m_.values[i]), v_.values[i]);
    }
    // What is pending are momenta with their bias; from now on sums of lr m without.
    const double bias = options.bias_correction ? bias_correction(options.beta1, steps()) : 1;
    factors[layer_index(i)] = static_cast<float>(options.lr / bias);
  }
  reducer().scale_memories(factors);
  folded_ = true;
}

// What error feedback has kept of a momentum is no part of what later steps add up to.
void ZeroOneAdam::forget_unmoved() {
  std::vector<float> factors(layers(), 1.0F);
  for (const std::size_t i : unmoved_) {
    factors[layer_index(i)] = 0;
  }
  unmoved_.clear();
  reducer().scale_memories(factors);
}

// What is pending are momenta, each of which would have been added to the next m = beta1 m + ...;
// in the intervals sums of lr m. A momentum dm moves weights by lr dm / (1 - beta1) in all.
void ZeroOneAdam::adapt(OptimizerState& state) const {
  const bool sums = expect(state.numbers, "folded", 1)[0] != 0;
  for (std::size_t i = 0; i < size(); ++i) {
    const AdamOptions options = groups_.now(group(i));
    const double part = sums ? options.lr / (1 - options.beta1) : options.beta1;
    if (has_codec(i) && !compressed(i) && part > 0) {
      settle_residual(state, i, 1 / part);
    }
  }
}

void ZeroOneAdam::save(Numbers& numbers) const {
  numbers["variance_steps"] = {static_cast<double>(variance_steps_)};
  numbers["folded"] = {folded_ ? 1.0 : 0.0};
  numbers["sum_lr"] = sum_lr_;
}

void ZeroOneAdam::load(const Numbers& numbers) {
  const std::vector<double>& sum_lr = expect(numbers, "sum_lr", size());
  const double folded = expect(numbers, "folded", 1)[0];
  variance_steps_ = static_cast<std::int64_t>(expect(numbers, "variance_steps", 1)[0]);
  folded_ = folded != 0;
  sum_lr_ = sum_lr;
}

}  // namespace thinwire::optim
