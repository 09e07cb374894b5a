#include "optim/schedules.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "compressors/core/error.h"
#include "optim/optim_kernels.h"

namespace thinwire::optim {
namespace {

template <typename T>
void require(bool holds, const char* name, T value, const char* expected) {
  if (holds) return;
  throw InvalidArgument(std::string(name) + " " + std::to_string(value) + ": expected " + expected);
}

bool is_norm(double x) { return std::isfinite(x) && x >= 0; }

bool updates_variance(std::int64_t step, std::int64_t kappa) {
  std::int64_t last = -1;  // update before those of this gap
  std::int64_t gap = 1;
  while ((step - last - 1) / gap >= kappa) {
    last += kappa * gap;
    gap *= 2;
  }
  return (step - last) % gap == 0;
}

// `step` from the first local one.
bool ends_interval(std::int64_t step, std::int64_t scaler, std::int64_t clipper) {
  std::int64_t begin = 0;  // of the first interval of this length
  std::int64_t length = 1;
  for (std::int64_t until = scaler; length < clipper; until += scaler) {
    const std::int64_t intervals = until > begin ? (until - begin - 1) / length + 1 : 0;
    if (step < begin + intervals * length) break;
    begin += intervals * length;
    length = std::min(clipper, length * 2);
  }
  return (step - begin + 1) % length == 0;
}

}  // namespace

FreezeRule::FreezeRule(const FreezeOptions& options) : options_(options), delta_(0) {
  require(options.beta2 >= 0 && options.beta2 < 1, "beta2", options.beta2, "a number in [0, 1)");
  require(options.ratio > 0 && options.ratio <= 1, "ratio", options.ratio, "a number in (0, 1]");
  require(options.min_steps >= 0, "min_steps", options.min_steps, "0 or more");
  require(options.at_step >= 0, "freeze step", options.at_step, "1 or more, or 0 for the rule");
  require(is_norm(options.floor), "variance floor", options.floor, "a finite number, 0 or more");
  delta_ = std::llround(1 / (1 - options.beta2));
}

bool FreezeRule::observe(double norm) {
  require(is_norm(norm), "norm of the variance", norm, "a finite number, 0 or more");
  if (frozen()) return true;
  if (options_.at_step > 0) {
    ++state_.steps;
    if (state_.steps >= options_.at_step) state_.frozen_after = state_.steps;
    return frozen();
  }
  const auto place = static_cast<std::size_t>(state_.steps % delta_);
  ++state_.steps;
  if (place == state_.norms.size()) {
    state_.norms.push_back(norm);
    return false;
  }
  const double before = std::exchange(state_.norms[place], norm);
  const double corrected = norm / bias_correction(options_.beta2, state_.steps);
  const double corrected_before = before / bias_correction(options_.beta2, state_.steps - delta_);
  const bool settled = before > 0 && corrected >= options_.ratio * corrected_before;
  if (settled && state_.steps >= options_.min_steps) state_.frozen_after = state_.steps;
  return frozen();
}

void FreezeRule::restore(FreezeState state) {
  require(state.steps >= 0, "saved steps", state.steps, "0 or more");
  require(state.frozen_after == 0 || state.frozen_after == state.steps, "saved frozen_after",
          state.frozen_after, "0, or the saved steps");
  if (options_.at_step > 0) {
    state.norms.clear();
  } else if (state.frozen_after == 0) {
    require(state.norms.size() == static_cast<std::size_t>(std::min(state.steps, delta_)),
            "saved norms: count", state.norms.size(), "one a step, delta at most");
  }
  for (const double norm : state.norms) {
    require(is_norm(norm), "saved norm", norm, "a finite number, 0 or more");
  }
  state_ = std::move(state);
}

ZeroOneSchedule::ZeroOneSchedule(const ZeroOneOptions& options) : options_(options) {
  require(options.kappa >= 1, "kappa", options.kappa, "1 or more");
  require(options.var_freeze_step >= 1, "var_freeze_step", options.var_freeze_step, "1 or more");
  require(options.local_step_scaler >= 1, "local_step_scaler", options.local_step_scaler,
          "1 or more");
  require(options.local_step_clipper >= 1, "local_step_clipper", options.local_step_clipper,
          "1 or more");
  require(is_norm(options.floor), "variance floor", options.floor, "a finite number, 0 or more");
}

ZeroOneStep ZeroOneSchedule::at(std::int64_t step) const {
  require(step >= 0, "step", step, "0 or more");
  if (step < options_.var_freeze_step) {
    return updates_variance(step, options_.kappa) ? ZeroOneStep::kVariance : ZeroOneStep::kMomentum;
  }
  const bool ends = ends_interval(step - options_.var_freeze_step, options_.local_step_scaler,
                                  options_.local_step_clipper);
  return ends ? ZeroOneStep::kSync : ZeroOneStep::kLocal;
}

}  // namespace thinwire::optim
