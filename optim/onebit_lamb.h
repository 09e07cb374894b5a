// 1-bit LAMB (Li et al., HiPC 2022, arXiv 2104.06069): LAMB (You et al., ICLR 2020, arXiv
// 1904.00962) on uncompressed gradients until the variance is stable, then 1-bit Adam's compressed
// momentum with each layer's trust coefficient frozen, too, and corrected by how far a variance
// rebuilt from the momenta has moved from the frozen one:
//   r = max((sqrt(v) + eps) / (sqrt(fresh) + eps)),
// with weight decay r <- r q + 1 - q, q = min(1, |d without decay| / |d|), kept within
// [factor_min, factor_max] and within factor_threshold of the last step's. Momenta are brought to
// one size before they are compressed: c_l = mean over layers of rms(m), over rms(m_l), as they
// were when the variance froze; it matters to codecs that choose between layers.
//
// Layers that the policy leaves uncompressed stay with LAMB, and so does everything on one rank.
#pragma once

#include <cstdint>

#include "optim/groups.h"
#include "optim/optimizer.h"
#include "optim/schedules.h"

namespace thinwire::optim {

struct LambOptions {
  double coefficient_min = 0.01;  // of |w| / |d|; > 0
  double coefficient_max = 10;    // >= coefficient_min
  double coefficient_beta = 0.9;  // of the mean that is frozen, in [0, 1)
  double factor_min = 0.5;        // > 0
  double factor_max = 4;          // >= factor_min
  double factor_threshold = 0.1;  // in (0, 1)
};

class OneBitLamb final : public Optimizer {
 public:
  // PolicyError for a layer that starts later (start=). The freeze rule watches the compressed
  // layers.
  static std::shared_ptr<OneBitLamb> make(GradientReducer& reducer, std::vector<Member> members,
                                          std::vector<AdamOptions> groups,
                                          const FreezeOptions& freeze = {},
                                          const LambOptions& lamb = {});
  // lr, eps and weight_decay from the next step() on; betas from the next reduction on.
  void set_options(std::vector<AdamOptions> groups) { groups_.set(decoupled(std::move(groups))); }
  // Applied steps before the variance froze; 0 while it has not.
  std::int64_t frozen_after() const { return freeze_.state().frozen_after; }

 private:
  OneBitLamb(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups,
             const FreezeOptions& freeze, const LambOptions& lamb);
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
  std::string settings_text() const override;

  void update_frozen(std::size_t i, std::span<float> weights, TensorView reduced);
  void freeze();

  Groups<AdamOptions> groups_;
  FreezeRule freeze_;
  const LambOptions lamb_;
  // One a member: the running mean of coefficients, frozen later; the last factor; c_l.
  std::vector<double> coefficient_;
  std::vector<double> factor_;
  std::vector<double> scale_;
  Slot& m_;
  Slot& v_;
  Slot& fresh_;
};

}  // namespace thinwire::optim
