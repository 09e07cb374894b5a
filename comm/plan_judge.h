// PlanJudge: which plan a job goes by, from how long steps took under each. A plan is tried beside
// the present one, window by window in turn, until the difference is more than noise, or four
// windows of each are over; then it is kept or taken back. What was measured is believed for a
// while. Pure bookkeeping: the same calls give the same verdicts on every rank.
#pragma once

#include <array>
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
  // The plan on trial, which is current() every other window; without a trial current().
  const PlanId& tried() const { return trial_ ? trial_->tried : current_; }
  // The plan from before the trial; without one current().
  const PlanId& before() const { return trial_ ? trial_->before : current_; }
  // Mean seconds of a step under the plan on this network, where it was measured.
  std::optional<double> seconds(const PlanId& plan) const;
  // What two windows under one plan, one after the other, differ by: a share of a step.
  double noise() const { return noise_; }

  enum class Verdict : std::uint8_t {
    kNone,        // nothing to tell; a trial may go on, under the other plan
    kKept,        // the trial's plan stays
    kTakenBack,   // current() is the plan from before the trial
    kTriedAgain,  // current() is a plan that was faster than the one before, on trial
  };
  // A window under current(), `seconds` a step.
  Verdict measured(double seconds);

  enum class Reason : std::uint8_t {
    kFaster,  // predicted to be: tried where it saves more than the noise, kept if it saves any
    kBetter,  // loses less in the same time: kept unless slower by half the noise, or by 2 %
    kProbe,   // to know how fast it is: as kFaster, whatever is predicted
  };
  // saves: seconds a step that the plan is predicted to take less than current(); where both were
  // measured lately, that counts instead, and there is nothing to probe. True: current() is `plan`
  // now, on trial. Not during a trial, nor before current() was measured, nor soon after
  // predictions for this reason were wrong: each lost trial in a row doubles the rest.
  bool consider(const PlanId& plan, double saves, Reason reason);
  // Goes on by it without a trial.
  void adopt(const PlanId& plan);
  // Plans that were measured on this network, any of which may be tried again.
  std::vector<PlanId> known() const;
  // Never goes back to it; a trial in which it is one of the two ends for the other.
  void forget(const PlanId& plan);
  // Forgets how long steps took; a trial ends undecided, its plan taken back: the window that is
  // over was none of current()'s then.
  void network_changed();

 private:
  struct Known {
    double seconds = 0;  // mean
    double last = 0;
    int windows = 0;
    std::uint64_t until = 0;  // believed so long
    int trials = 0;           // that it lost
  };
  struct Side {
    double sum = 0;
    int windows = 0;

    void add(double seconds) {
      sum += seconds;
      ++windows;
    }
    double mean() const { return sum / windows; }
  };
  struct Trial {
    PlanId before;
    PlanId tried;
    Reason reason = Reason::kFaster;
    Side of_before;
    Side of_tried;
  };

  struct Rest {
    std::uint64_t until = 0;
    std::uint64_t windows = 0;
  };

  Rest& rest_of(Reason reason) { return rests_.at(static_cast<std::size_t>(reason)); }
  void note(double seconds);
  Verdict go_on_with_trial(double seconds);
  void begin_trial(const PlanId& plan, Reason reason);
  void believe(const PlanId& plan, const Side& side);
  // Measured on this network, not too long ago.
  const Known* lately(const PlanId& plan) const;

  PlanId current_;
  std::optional<Trial> trial_;
  std::map<PlanId, Known> known_;
  double noise_ = 0.03;
  std::uint64_t window_ = 0;
  std::array<Rest, 3> rests_;  // by reason
};

}  // namespace thinwire
