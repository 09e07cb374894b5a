// 1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888): AdamW on uncompressed gradients until the
// variance is stable, then its variance is frozen, and what is exchanged, compressed with error
// feedback on both sides, is the momentum. Made for the policy onebit; any codec that feeds errors
// back will do. Layers that the policy leaves uncompressed stay with AdamW, and so does everything
// on one rank.
//
// Weight decay is decoupled. Where the variance of an element is zero when it freezes, no gradient
// has come yet, and none is taken from then on (mask).
#pragma once

#include <cstdint>

#include "optim/groups.h"
#include "optim/optimizer.h"
#include "optim/schedules.h"

namespace thinwire::optim {

class OneBitAdam final : public Optimizer {
 public:
  // PolicyError for a layer that starts later (start=). The freeze rule watches the compressed
  // layers.
  static std::shared_ptr<OneBitAdam> make(GradientReducer& reducer, std::vector<Member> members,
                                          std::vector<AdamOptions> groups,
                                          const FreezeOptions& freeze = {});
  // lr, eps and weight_decay from the next step() on; betas from the next reduction on.
  void set_options(std::vector<AdamOptions> groups);
  // Applied steps before the variance froze; 0 while it has not.
  std::int64_t frozen_after() const { return freeze_.state().frozen_after; }

 private:
  OneBitAdam(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups,
             const FreezeOptions& freeze);
  bool frozen(std::size_t i) const { return freeze_.frozen() && compressed(i); }
  // The group's; what was frozen on several ranks and goes on on one has its bias folded in.
  AdamOptions options_of(std::size_t i) const;
  StepMode begin() override;
  bool before(std::size_t i, TensorView gradient, TensorView out) override;
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  void end_update() override;
  void adapt(OptimizerState& state) const override;
  void save(Numbers& numbers) const override;
  void load(const Numbers& numbers) override;
  std::vector<std::string> options_text() const override { return groups_.text(); }
  std::string settings_text() const override { return optim::settings_text(freeze_.options()); }

  Groups<AdamOptions> groups_;
  FreezeRule freeze_;
  Slot& m_;
  Slot& v_;
};

}  // namespace thinwire::optim
