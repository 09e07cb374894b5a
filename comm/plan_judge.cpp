#include "comm/plan_judge.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace thinwire {
namespace {

constexpr double kLeastGain = 0.01;  // of a step, worth a trial
constexpr int kMemory = 4;           // windows that a mean is over, about
constexpr double kMostNoise = 0.2;

}  // namespace

std::optional<double> PlanJudge::seconds(const PlanId& plan) const {
  const auto found = known_.find(plan);
  if (found == known_.end()) return std::nullopt;
  return found->second.seconds;
}

PlanJudge::Verdict PlanJudge::measured(double seconds) {
  Known& known = known_[current_];
  if (known.windows > 0) {
    const double off = std::abs(seconds - known.last) / known.last;
    noise_ += (std::min(off, kMostNoise) - noise_) / kMemory;
  }
  known.last = seconds;
  known.windows = std::min(known.windows + 1, kMemory);
  known.seconds += (seconds - known.seconds) / known.windows;

  if (trial_) {
    const Trial trial = *std::exchange(trial_, std::nullopt);
    const std::optional<double> before = this->seconds(trial.before);
    const double allowed = trial.reason == Reason::kBetter ? 1 + std::max(noise_, kLeastGain) : 1;
    if (before && known.seconds >= *before * allowed) {
      current_ = trial.before;
      return Verdict::kTakenBack;
    }
    return Verdict::kKept;
  }
  // One that was faster, but was left for what looked better at first.
  const auto best = std::min_element(
      known_.begin(), known_.end(),
      [](const auto& a, const auto& b) { return a.second.seconds < b.second.seconds; });
  if (best->second.seconds < known.seconds * (1 - std::max(noise_, kLeastGain))) {
    current_ = best->first;
    return Verdict::kTakenBack;
  }
  return Verdict::kNone;
}

bool PlanJudge::consider(const PlanId& plan, double saves, Reason reason) {
  const std::optional<double> now = seconds(current_);
  if (trial_ || plan == current_ || !now) {
    return false;
  }
  const std::optional<double> known = seconds(plan);
  if (known) saves = *now - *known;
  const double margin = *now * std::max(noise_, kLeastGain);
  const bool go = reason == Reason::kProbe    ? !known.has_value()
                  : reason == Reason::kFaster ? saves > margin
                                              : saves > -margin / 2;
  if (!go) {
    return false;
  }
  trial_ = Trial{.before = current_, .reason = reason};
  current_ = plan;
  return true;
}

void PlanJudge::adopt(const PlanId& plan) {
  trial_.reset();
  current_ = plan;
}

void PlanJudge::forget(const PlanId& plan) { known_.erase(plan); }

std::vector<PlanId> PlanJudge::known() const {
  std::vector<PlanId> plans;
  for (const auto& [plan, seconds] : known_) plans.push_back(plan);
  return plans;
}

void PlanJudge::network_changed() {
  known_.clear();
  if (trial_) current_ = trial_->before;
  trial_.reset();
}

}  // namespace thinwire
