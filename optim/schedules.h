// When 1-bit Adam freezes its variance, and what a step of 0/1 Adam exchanges. Both are decided
// from numbers that are the same on every rank, by additions, multiplications and divisions alone,
// so all ranks decide alike. Values without hidden state; one thread at a time per object.
#pragma once

#include <cstdint>
#include <vector>

namespace thinwire::optim {

// Times the floors of variance_floor.h: the error of one bit moves a weight by three learning rates
// at most. A larger floor slows the elements that seldom have a gradient, an embedding's rare rows;
// with none the CNN of tests/convergence diverges under 1-bit Adam.
inline constexpr double kVarianceFloor = 0.1;

struct FreezeOptions {
  double beta2 = 0.999;        // in [0, 1)
  double ratio = 0.96;         // in (0, 1]
  std::int64_t min_steps = 0;  // >= 0: never before so many; the paper: the learning rate's warm-up
  std::int64_t at_step = 0;    // >= 1: after so many, whatever the norms; 0: by the norms
  double floor = kVarianceFloor;  // >= 0; 0: none
};

// All of a FreezeRule that changes: to save and restore.
struct FreezeState {
  std::int64_t steps = 0;         // observed so far
  std::int64_t frozen_after = 0;  // so many steps; 0: not frozen
  // ||v||_1 of the last min(steps, delta) steps; that of step t, from 1, at (t - 1) mod delta. None
  // with at_step.
  std::vector<double> norms = {};
};

// The variance-ratio rule of 1-bit Adam (Tang et al., arXiv 2102.02888): v is frozen after the
// first step t with ||v_t||_1 / ||v_{t-delta}||_1 >= ratio, delta = round(1 / (1 - beta2)), and so
// after delta + 1 steps at the earliest. Both norms are taken with Adam's bias correction
// 1 / (1 - beta2^t): v grows from zero, and without it the first few delta steps would pass
// whatever the gradients do; later it is 1. Not while v_{t-delta} is zero.
class FreezeRule {
 public:
  // InvalidArgument, naming the option, for a value out of range.
  explicit FreezeRule(const FreezeOptions& options);

  // After each step that was applied: ||v||_1 of all parameters, v without bias correction (see
  // l1_norm); any number unless needs_norm(). Returns frozen(); once frozen, nothing changes.
  // InvalidArgument for a negative norm, NaN or Inf. O(log steps).
  bool observe(double norm);
  bool needs_norm() const { return options_.at_step == 0 && !frozen(); }
  bool frozen() const { return state_.frozen_after > 0; }
  std::int64_t delta() const { return delta_; }
  const FreezeOptions& options() const { return options_; }

  const FreezeState& state() const { return state_; }
  // InvalidArgument when the parts of `state` contradict each other or delta().
  void restore(FreezeState state);

 private:
  FreezeOptions options_;
  std::int64_t delta_;
  FreezeState state_;
};

// What a step exchanges in 0/1 Adam (Lu et al., ICLR 2023, arXiv 2202.06009, algorithm 1).
enum class ZeroOneStep : std::uint8_t {
  kVariance,  // gradients, uncompressed: variance and momentum are updated
  kMomentum,  // momenta, compressed
  kLocal,     // nothing
  kSync,      // what the local steps since the last exchange, this one included, have added up to
};

// The published settings (BERT).
struct ZeroOneOptions {
  std::int64_t kappa = 16;                  // >= 1
  std::int64_t var_freeze_step = 100'000;   // >= 1
  std::int64_t local_step_scaler = 32'678;  // >= 1
  std::int64_t local_step_clipper = 16;     // >= 1
  double floor = kVarianceFloor;            // >= 0; 0: none
};

// Steps are those applied, from 0. Before var_freeze_step variance is updated at steps whose gap is
// 1 for the first kappa of them, 2 for the next kappa, then 4 and so on. From var_freeze_step on
// steps are local, in intervals that end with a sync: an interval that begins b steps after
// var_freeze_step is min(local_step_clipper, 2^floor(b / local_step_scaler)) long. The step's
// number is all the state there is.
class ZeroOneSchedule {
 public:
  // InvalidArgument, naming the option, for a value out of range.
  explicit ZeroOneSchedule(const ZeroOneOptions& options);
  // InvalidArgument for step < 0. O(log step).
  ZeroOneStep at(std::int64_t step) const;
  const ZeroOneOptions& options() const { return options_; }

 private:
  ZeroOneOptions options_;
};

}  // namespace thinwire::optim
