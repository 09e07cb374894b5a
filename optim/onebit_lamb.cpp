#include "optim/onebit_lamb.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace thinwire::optim {
namespace {

double root_mean_square(std::span<const float> values) {
  return std::sqrt(square_sum(values) / static_cast<double>(values.size()));
}

}  // namespace

OneBitLamb::OneBitLamb(GradientReducer& reducer, std::vector<Member> members,
                       std::vector<AdamOptions> groups, const FreezeOptions& freeze,
                       const LambOptions& lamb)
    : Optimizer(reducer, "OneBitLAMB", std::move(members)),
      groups_(name(), Optimizer::groups(), decoupled(std::move(groups))),
      freeze_(freeze),
      lamb_(lamb),
      coefficient_(size()),
      factor_(size(), 1.0),
      scale_(size(), 1.0),
      m_(add_slot("exp_avg", SlotKind::kShared)),
      v_(add_slot("exp_avg_sq", SlotKind::kShared)),
      fresh_(add_slot("exp_avg_sq_fresh", SlotKind::kOptional)) {
  const auto check = [&](bool holds, const char* option, const char* expected, double got) {
    if (!holds) {
      refuse(std::string(option) + ": expected " + expected + ", got " + number_text(got),
             "leave it out for the published setting");
    }
  };
  check(lamb.coefficient_min > 0, "coefficient_min", "more than 0", lamb.coefficient_min);
  check(lamb.coefficient_max >= lamb.coefficient_min, "coefficient_max", "coefficient_min or more",
        lamb.coefficient_max);
  check(lamb.coefficient_beta >= 0 && lamb.coefficient_beta < 1, "coefficient_beta",
        "a value in [0, 1)", lamb.coefficient_beta);
  check(lamb.factor_min > 0, "factor_min", "more than 0", lamb.factor_min);
  check(lamb.factor_max >= lamb.factor_min, "factor_max", "factor_min or more", lamb.factor_max);
  check(lamb.factor_threshold > 0 && lamb.factor_threshold < 1, "factor_threshold",
        "a value in (0, 1)", lamb.factor_threshold);
  refuse_start("the optimizer starts compression when it freezes the variance (freeze_step)");
}

std::shared_ptr<OneBitLamb> OneBitLamb::make(GradientReducer& reducer, std::vector<Member> members,
                                             std::vector<AdamOptions> groups,
                                             const FreezeOptions& freeze, const LambOptions& lamb) {
  std::shared_ptr<OneBitLamb> optimizer(
      new OneBitLamb(reducer, std::move(members), std::move(groups), freeze, lamb));
  reducer.follow(optimizer);
  return optimizer;
}

AdamOptions OneBitLamb::options_of(std::size_t i) const {
  AdamOptions options = groups_.now(group(i));
  options.bias_correction = options.bias_correction && !(freeze_.frozen() && has_codec(i));
  return options;
}

StepMode OneBitLamb::begin() {
  groups_.begin();
  return freeze_.frozen() ? StepMode::kPolicy : StepMode::kDense;
}

bool OneBitLamb::before(std::size_t i, TensorView gradient, TensorView out) {
  if (!frozen(i)) {
    return false;
  }
  const MomentumOptions options{
      .beta1 = groups_.at_begin(group(i)).beta1, .loss_scale = loss_scale(), .factor = scale_[i]};
  local_momentum(options, gradient, m_.values[i], v_.values[i], out);
  return true;
}

void OneBitLamb::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  if (frozen(i)) {
    update_frozen(i, weights, reduced);
    return;
  }
  const AdamOptions options = options_of(i);
  const AdamSteps now{.m = steps() + 1, .v = steps() + 1};
  const std::span<float> m = m_.values[i];
  const std::span<float> v = v_.values[i];
  const LambSums sums = lamb_moments(options, now, reduced, weights, m, v);
  const double trust = sums.weights > 0 && sums.update > 0
                           ? std::clamp(std::sqrt(sums.weights / sums.update),
                                        lamb_.coefficient_min, lamb_.coefficient_max)
                           : 1;
  coefficient_[i] += (1 - lamb_.coefficient_beta) * (trust - coefficient_[i]);
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    lamb_move(options, now, trust, slice(weights, begin, end), slice(m, begin, end),
              slice(v, begin, end));
  });
}

void OneBitLamb::update_frozen(std::size_t i, std::span<float> weights, TensorView reduced) {
  const AdamOptions options = groups_.now(group(i));
  const std::span<float> m = m_.values[i];
  const std::span<float> v = v_.values[i];
  const LambSums sums =
      frozen_lamb_moments(options, scale_[i], reduced, weights, m, v, ensure(fresh_, i));
  double factor = static_cast<double>(sums.ratio);
  if (options.weight_decay > 0 && sums.update > 0) {
    const double share = std::min(1.0, std::sqrt(sums.direction / sums.update));
    factor = factor * share + 1 - share;
  }
  factor = std::clamp(factor, lamb_.factor_min, lamb_.factor_max);
  factor = std::clamp(factor, factor_[i] * (1 - lamb_.factor_threshold),
                      factor_[i] * (1 + lamb_.factor_threshold));
  factor_[i] = factor;
  const double trust = coefficient_[i] * factor;
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    frozen_lamb_move(options, trust, slice(weights, begin, end), slice(m, begin, end),
                     slice(v, begin, end));
  });
}

void OneBitLamb::end_update() {
  if (freeze_.frozen() || !any_compressed()) {
    return;
  }
  const double norm = freeze_.needs_norm() ? compressed_norm(v_) : 0;
  if (std::isfinite(norm) && freeze_.observe(norm)) {
    freeze();
  }
}

void OneBitLamb::freeze() {
  double mean = 0;
  double count = 0;
  for (std::size_t i = 0; i < size(); ++i) {
    if (compressed(i) && elements(i) > 0) {
      fold_bias(groups_.now(group(i)), {.m = steps(), .v = steps()}, m_.values[i], v_.values[i]);
      std::copy(v_.values[i].begin(), v_.values[i].end(), ensure(fresh_, i).begin());
      coefficient_[i] /= bias_correction(lamb_.coefficient_beta, steps());
      mean += root_mean_square(m_.values[i]);
      count += 1;
    }
  }
  mean /= std::max(count, 1.0);
  for (std::size_t i = 0; i < size(); ++i) {
    if (compressed(i) && elements(i) > 0) {
      const double rms = root_mean_square(m_.values[i]);
      scale_[i] = rms > 0 && mean > 0 ? mean / rms : 1;
    }
  }
}

std::string OneBitLamb::settings_text() const {
  return optim::settings_text(freeze_.options()) + ", coefficient " +
         number_text(lamb_.coefficient_min) + " to " + number_text(lamb_.coefficient_max) +
         " with beta " + number_text(lamb_.coefficient_beta) + ", factor " +
         number_text(lamb_.factor_min) + " to " + number_text(lamb_.factor_max) + " by " +
         number_text(lamb_.factor_threshold);
}

// As in OneBitAdam, and in units of the layer's scale.
void OneBitLamb::adapt(OptimizerState& state) const {
  const std::vector<double>& scale = expect(state.numbers, "lamb_scale", size());
  for (std::size_t i = 0; i < size(); ++i) {
    const double beta1 = groups_.now(group(i)).beta1;
    if (has_codec(i) && !compressed(i) && is_frozen(state) && beta1 > 0 && scale[i] > 0) {
      settle_residual(state, i, 1 / (beta1 * scale[i]));
    }
  }
}

void OneBitLamb::save(Numbers& numbers) const {
  Optimizer::save(freeze_, numbers);
  numbers["lamb_coefficient"] = coefficient_;
  numbers["lamb_factor"] = factor_;
  numbers["lamb_scale"] = scale_;
}

void OneBitLamb::load(const Numbers& numbers) {
  const std::vector<double>& coefficient = expect(numbers, "lamb_coefficient", size());
  const std::vector<double>& factor = expect(numbers, "lamb_factor", size());
  const std::vector<double>& scale = expect(numbers, "lamb_scale", size());
  Optimizer::load(freeze_, numbers);
  coefficient_ = coefficient;
  factor_ = factor;
  scale_ = scale;
}

}  // namespace thinwire::optim
