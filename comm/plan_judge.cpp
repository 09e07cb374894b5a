#include "comm/plan_judge.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace thinwire {
namespace {

// Shares of a step.
constexpr double kLeastGain = 0.01;  // worth a trial
constexpr double kMostLoss = 0.02;   // for less error
constexpr double kMostNoise = 0.2;
// Windows.
constexpr int kMemory = 4;            // that a mean is over, about
constexpr int kTrialWindows = 8;      // of both plans, at the most
constexpr std::uint64_t kFresh = 50;  // that a measurement is believed; doubled by each lost trial
constexpr std::uint64_t kFirstRest = 2;  // from one lost trial to the next
constexpr std::uint64_t kLongestRest = 64;

constexpr int kMostDoublings = 6;

}  // namespace

std::optional<double> PlanJudge::seconds(const PlanId& plan) const {
  const auto found = known_.find(plan);
  if (found == known_.end()) return std::nullopt;
  return found->second.seconds;
}

const PlanJudge::Known* PlanJudge::lately(const PlanId& plan) const {
  const auto found = known_.find(plan);
  return found == known_.end() || found->second.until < window_ ? nullptr : &found->second;
}

void PlanJudge::note(double seconds) {
  ++window_;
  Known& known = known_[current_];
  if (known.windows > 0) {
    const double off = std::abs(seconds - known.last) / known.last;
    noise_ += (std::min(off, kMostNoise) - noise_) / kMemory;
  }
  known.last = seconds;
  known.windows = std::min(known.windows + 1, kMemory);
  known.seconds += (seconds - known.seconds) / known.windows;
  known.until = window_ + (kFresh << std::min(known.trials, kMostDoublings));
}

PlanJudge::Verdict PlanJudge::measured(double seconds) {
  note(seconds);
  if (trial_) {
    return go_on_with_trial(seconds);
  }
  const Known* best = nullptr;
  PlanId plan;
  for (const auto& [id, known] : known_) {
    if (lately(id) != nullptr && (best == nullptr || known.seconds < best->seconds)) {
      best = &known;
      plan = id;
    }
  }
  if (best->seconds >= known_[current_].seconds * (1 - std::max(noise_, kLeastGain))) {
    return Verdict::kNone;
  }
  begin_trial(plan, Reason::kFaster);
  return Verdict::kTriedAgain;
}

PlanJudge::Verdict PlanJudge::go_on_with_trial(double seconds) {
  Trial& trial = *trial_;
  (current_ == trial.tried ? trial.of_tried : trial.of_before).add(seconds);
  const double before = trial.of_before.mean();
  const double most =
      before *
      (trial.reason == Reason::kBetter ? 1 + std::clamp(noise_ / 2, kLeastGain, kMostLoss) : 1);
  const double tried = trial.of_tried.mean();
  const int windows = trial.of_before.windows + trial.of_tried.windows;
  // Two standard errors of the difference, but for the noise being a mean of magnitudes.
  const double unsure =
      before * noise_ * std::sqrt(1.0 / trial.of_before.windows + 1.0 / trial.of_tried.windows);
  if (std::abs(tried - most) <= unsure && windows < kTrialWindows) {
    current_ = current_ == trial.tried ? trial.before : trial.tried;
    return Verdict::kNone;
  }
  const bool kept = tried < most;
  believe(trial.before, trial.of_before);
  believe(trial.tried, trial.of_tried);
  current_ = kept ? trial.tried : trial.before;
  Rest& rest = rest_of(trial.reason);
  rest.windows = kept ? 0 : std::clamp(2 * rest.windows, kFirstRest, kLongestRest);
  rest.until = window_ + rest.windows;
  if (!kept) ++known_[trial.tried].trials;
  trial_.reset();
  return kept ? Verdict::kKept : Verdict::kTakenBack;
}

void PlanJudge::believe(const PlanId& plan, const Side& side) {
  Known& known = known_[plan];
  known.seconds = side.mean();
  known.windows = std::min(side.windows, kMemory);
}

void PlanJudge::begin_trial(const PlanId& plan, Reason reason) {
  trial_ =
      Trial{.before = current_, .tried = plan, .reason = reason, .of_before = {}, .of_tried = {}};
  trial_->of_before.add(known_[current_].last);
  current_ = plan;
}

bool PlanJudge::consider(const PlanId& plan, double saves, Reason reason) {
  const std::optional<double> now = seconds(current_);
  if (trial_ || plan == current_ || !now || window_ < rest_of(reason).until) {
    return false;
  }
  const Known* known = lately(plan);
  if (known != nullptr) saves = *now - known->seconds;
  const double margin = *now * std::max(noise_, kLeastGain);
  const bool go = reason == Reason::kProbe    ? known == nullptr
                  : reason == Reason::kFaster ? saves > margin
                                              : saves > -margin / 2;
  if (go) {
    begin_trial(plan, reason);
  }
  return go;
}

void PlanJudge::adopt(const PlanId& plan) {
  trial_.reset();
  current_ = plan;
}

void PlanJudge::forget(const PlanId& plan) {
  known_.erase(plan);
  if (trial_ && (plan == trial_->before || plan == trial_->tried)) {
    current_ = plan == trial_->before ? trial_->tried : trial_->before;
    trial_.reset();
  }
}

std::vector<PlanId> PlanJudge::known() const {
  std::vector<PlanId> plans;
  for (const auto& [plan, seconds] : known_) plans.push_back(plan);
  return plans;
}

void PlanJudge::network_changed() {
  known_.clear();
  rests_ = {};
  if (trial_) current_ = trial_->before;
  trial_.reset();
}

}  // namespace thinwire
