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
    : FrozenVariance(reducer, "OneBitLAMB", std::move(members), std::move(groups), freeze),
      lamb_(lamb),
      coefficient_(size()),
      factor_(size(), 1.0),
      scale_(size(), 1.0),
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
}

std::shared_ptr<OneBitLamb> OneBitLamb::make(GradientReducer& reducer, std::vector<Member> members,
                                             std::vector<AdamOptions> groups,
                                             const FreezeOptions& freeze, const LambOptions& lamb) {
  std::shared_ptr<OneBitLamb> optimizer(
      new OneBitLamb(reducer, std::move(members), std::move(groups), freeze, lamb));
  reducer.follow(optimizer);
  return optimizer;
}

void OneBitLamb::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  if (frozen(i)) {
    update_frozen(i, weights, reduced);
    return;
  }
  const AdamOptions options = options_of(i);
  const AdamSteps now{.m = steps() + 1, .v = steps() + 1};
  const LambSums sums = lamb_moments(options, now, reduced, weights, m(i), v(i));
  const double trust = sums.weights > 0 && sums.update > 0
                           ? std::clamp(std::sqrt(sums.weights / sums.update),
                                        lamb_.coefficient_min, lamb_.coefficient_max)
                           : 1;
  coefficient_[i] += (1 - lamb_.coefficient_beta) * (trust - coefficient_[i]);
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    lamb_move(options, now, trust, slice(weights, begin, end), slice(m(i), begin, end),
              slice(v(i), begin, end));
  });
}

void OneBitLamb::update_frozen(std::size_t i, std::span<float> weights, TensorView reduced) {
  const AdamOptions options = options_of(i);
  const LambSums sums =
      frozen_lamb_moments(options, scale_[i], reduced, weights, m(i), v(i), ensure(fresh_, i));
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
    frozen_lamb_move(options, trust, slice(weights, begin, end), slice(m(i), begin, end),
                     slice(v(i), begin, end));
  });
}

void OneBitLamb::froze() {
  double mean = 0;
  double count = 0;
  for (std::size_t i = 0; i < size(); ++i) {
    if (compressed(i) && elements(i) > 0) {
      std::ranges::copy(v(i), ensure(fresh_, i).begin());
      coefficient_[i] /= bias_correction(lamb_.coefficient_beta, steps());
      mean += root_mean_square(m(i));
      count += 1;
    }
  }
  mean /= std::max(count, 1.0);
  for (std::size_t i = 0; i < size(); ++i) {
    if (compressed(i) && elements(i) > 0) {
      const double rms = root_mean_square(m(i));
      scale_[i] = rms > 0 && mean > 0 ? mean / rms : 1;
    }
  }
}

std::string OneBitLamb::settings_text() const {
  return FrozenVariance::settings_text() + ", coefficient " + number_text(lamb_.coefficient_min) +
         " to " + number_text(lamb_.coefficient_max) + " with beta " +
         number_text(lamb_.coefficient_beta) + ", factor " + number_text(lamb_.factor_min) +
         " to " + number_text(lamb_.factor_max) + " by " + number_text(lamb_.factor_threshold);
}

double OneBitLamb::momentum_factor(const OptimizerState& state, std::size_t i) const {
  return expect(state.numbers, "lamb_scale", size())[i];
}

void OneBitLamb::save(Numbers& numbers) const {
  FrozenVariance::save(numbers);
  numbers["lamb_coefficient"] = coefficient_;
  numbers["lamb_factor"] = factor_;
  numbers["lamb_scale"] = scale_;
}

void OneBitLamb::load(const Numbers& numbers) {
  const std::vector<double>& coefficient = expect(numbers, "lamb_coefficient", size());
  const std::vector<double>& factor = expect(numbers, "lamb_factor", size());
  const std::vector<double>& scale = expect(numbers, "lamb_scale", size());
  FrozenVariance::load(numbers);
  coefficient_ = coefficient;
  factor_ = factor;
  scale_ = scale;
}

}  // namespace thinwire::optim
