// FrozenVariance: what 1-bit Adam and 1-bit LAMB share (Tang et al., arXiv 2102.02888, section 4):
// gradients travel uncompressed until the variance is stable; then it is frozen, and what is
// exchanged in a compressed layer's gradient's place is the momentum of this rank's gradient.
// Layers that the policy leaves uncompressed never freeze, and neither does anything on one rank.
#pragma once

#include <cstdint>

#include "optim/groups.h"
#include "optim/optimizer.h"
#include "optim/schedules.h"

namespace thinwire::optim {

class FrozenVariance : public Optimizer {
 public:
  // lr, eps and weight_decay from the next step() on; betas from the next reduction on.
  void set_options(std::vector<AdamOptions> groups);
  // Applied steps before the variance froze; 0 while it has not.
  std::int64_t frozen_after() const { return freeze_.state().frozen_after; }
  void check_plan(const Plan& plan) const final;

 protected:
  // PolicyError for a layer that starts later (start=). The freeze rule watches the compressed
  // layers.
  FrozenVariance(GradientReducer& reducer, std::string name, std::vector<Member> members,
                 std::vector<AdamOptions> groups, const FreezeOptions& freeze);

  bool frozen(std::size_t i) const { return freeze_.frozen() && compressed(i); }
  // The group's, as they are now; what was frozen on several ranks and goes on on one has its bias
  // folded in.
  AdamOptions options_of(std::size_t i) const;
  std::span<float> m(std::size_t i) { return m_.values[i]; }
  std::span<float> v(std::size_t i) { return v_.values[i]; }

  // What a member's momentum is multiplied by before it is exchanged, now and in a saved state.
  virtual double momentum_factor(std::size_t /*i*/) const { return 1; }
  virtual double momentum_factor(const OptimizerState& /*state*/, std::size_t /*i*/) const {
    return 1;
  }
  // After the step that froze the variance; biases are folded into the moments.
  virtual void froze() {}

  void save(Numbers& numbers) const override;
  void load(const Numbers& numbers) override;
  std::string settings_text() const override;

 private:
  StepMode begin() final;
  bool before(std::size_t i, TensorView gradient, TensorView out) final;
  void end_update() final;
  void adapt(OptimizerState& state) const final;
  std::vector<std::string> options_text() const final { return groups_.text(); }

  Groups<AdamOptions> groups_;
  FreezeRule freeze_;
  Slot& m_;
  Slot& v_;
};

}  // namespace thinwire::optim
