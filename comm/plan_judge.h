// PlanJudge: which plan a job goes by, from how long steps took under each. A plan is tried for a
// window of steps, then kept or taken back. Pure bookkeeping: the same calls give the same verdicts
// on every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace thinwire {

// The choice of each layer.
using PlanId = std::vector<std::uint16_t>;

class PlanJudge {
 public:
  explicit PlanJudge(PlanId first) : current_(std::move(first)) {}

  const PlanId& current() const { return current_; }
  bool on_trial() const { return trial_.has_value(); }
  // Mean seconds of a step under the plan on this network, where it was measured.
  std::optional<double> seconds(const PlanId& plan) const;
  // What two windows under one plan, one after the other, differ by: a share of a step.
  double noise() const { return noise_; }

  enum class Verdict : std::uint8_t {
    kNone,       // nothing to decide
    kKept,       // the trial's plan stays
    kTakenBack,  // current() is the plan from before the trial, or one that was faster
  };
  // A window under current(), `seconds` a step.
  Verdict measured(double seconds);

  enum class Reason : std::uint8_t {
    kFaster,  // predicted to be: tried where it saves more than the noise, kept if it saves any
    kBetter,  // loses less in the same time: kept unless it is slower by more than the noise
    kProbe,   // to know how fast it is: as kFaster, whatever is predicted, once a network
  };
  // True: current() is `plan` now, on trial. Not during a trial, nor before current() was measured.
  // saves: seconds a step that the plan is predicted to take less than current(); where both were
  // measured, that counts instead.
  bool consider(const PlanId& plan, double saves, Reason reason);
  // Goes on by it without a trial.
  void adopt(const PlanId& plan);
  // Plans that were measured on this network, any of which may be gone back to.
  std::vector<PlanId> known() const;
  // Never goes back to it.
  void forget(const PlanId& plan);
  // Forgets how long steps took; a trial ends undecided, its plan taken back: the window that is
  // over was none of current()'s then.
  void network_changed();

 private:
  struct Known {
    double seconds = 0;  // mean
    double last = 0;
    int windows = 0;
  };
  struct Trial {
    PlanId before;
    Reason reason = Reason::kFaster;
  };

  PlanId current_;
  std::optional<Trial> trial_;
  std::map<PlanId, Known> known_;
  double noise_ = 0.03;
};

}  // namespace thinwire
