// 0/1 Adam (Lu et al., ICLR 2023, arXiv 2202.06009, algorithm 1): AdamW that measures its variance
// at ever rarer steps, exchanges compressed momenta between them, and, once the variance is
// frozen, trains on each rank alone for ever longer intervals, which end with a compressed exchange
// of what the steps have added up to (ZeroOneSchedule). The authors' program sends gradients, not
// momenta, between the variance steps, which converges worse (docs/optimizers.md).
//
// Within an interval the weights of the ranks differ; after its last step they are the same bits
// again. Bias is corrected by the steps that updated m and v each, which the paper leaves out. What
// error feedback holds when the intervals begin is carried over in their unit, lr times a momentum.
// NaN or Inf in a step without exchange costs that rank that layer's step. Where the variance of an
// element is zero, it has had no gradient when variance was measured, and takes none in other steps
// (mask).
//
// Weight decay is decoupled. Without compression, and with one rank, it is AdamW.
#pragma once

#include <cstdint>

#include "optim/groups.h"
#include "optim/optimizer.h"
#include "optim/schedules.h"

namespace thinwire::optim {

class ZeroOneAdam final : public Optimizer {
 public:
  // PolicyError for a layer that starts later (start=). InvalidArgument when ranks compress and
  // the reducer has layers that are no members.
  static std::shared_ptr<ZeroOneAdam> make(GradientReducer& reducer, std::vector<Member> members,
                                           std::vector<AdamOptions> groups,
                                           const ZeroOneOptions& schedule = {});
  // eps and weight_decay from the next step() on; betas, and lr where the step ends an interval,
  // from the next reduction on.
  void set_options(std::vector<AdamOptions> groups) { groups_.set(decoupled(std::move(groups))); }
  void check_plan(const Plan& plan) const override;
  // What the next step exchanges.
  ZeroOneStep next() const;
  // The last step applied was no local one: weights are the same bits on all ranks.
  bool synchronised() const;

 private:
  ZeroOneAdam(GradientReducer& reducer, std::vector<Member> members,
              std::vector<AdamOptions> groups, const ZeroOneOptions& schedule);
  StepMode begin() override;
  bool before(std::size_t i, TensorView gradient, TensorView out) override;
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  void end_update() override;
  void adapt(OptimizerState& state) const override;
  void save(Numbers& numbers) const override;
  void load(const Numbers& numbers) override;
  std::vector<std::string> options_text() const override { return groups_.text(); }
  std::string settings_text() const override { return optim::settings_text(schedule_.options()); }

  void train_alone(std::size_t i, std::span<float> weights, TensorView gradient);
  void synchronise(std::size_t i, std::span<float> weights, TensorView reduced);
  void begin_intervals();
  void forget_unmoved();

  Groups<AdamOptions> groups_;
  const ZeroOneSchedule schedule_;
  const std::int64_t var_freeze_step_;
  ZeroOneStep kind_ = ZeroOneStep::kVariance;  // of the step on its way
  std::int64_t variance_steps_ = 0;
  bool folded_ = false;               // bias is in m and v: intervals have begun
  std::vector<double> sum_lr_;        // of the steps since the last exchange, one a member
  std::vector<std::size_t> unmoved_;  // members with lr 0 in all of the interval that ends
  Slot& m_;
  Slot& v_;
  Slot& u_;       // the sum of lr m over these steps; stale where there are none
  Slot& anchor_;  // the weights before the first of them; stale likewise
};

}  // namespace thinwire::optim
