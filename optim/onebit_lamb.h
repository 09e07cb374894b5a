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

#include "optim/frozen_variance.h"

namespace thinwire::optim {

struct LambOptions {
  double coefficient_min = 0.01;  // of |w| / |d|; > 0
  double coefficient_max = 10;    // >= coefficient_min
  double coefficient_beta = 0.9;  // of the mean that is frozen, in [0, 1)
  double factor_min = 0.5;        // > 0
  double factor_max = 4;          // >= factor_min
  double factor_threshold = 0.1;  // in (0, 1)
};

class OneBitLamb final : public FrozenVariance {
 public:
  static std::shared_ptr<OneBitLamb> make(GradientReducer& reducer, std::vector<Member> members,
                                          std::vector<AdamOptions> groups,
                                          const FreezeOptions& freeze = {},
                                          const LambOptions& lamb = {});

 private:
  OneBitLamb(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups,
             const FreezeOptions& freeze, const LambOptions& lamb);
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  double momentum_factor(std::size_t i) const override { return scale_[i]; }
  double momentum_factor(const OptimizerState& state, std::size_t i) const override;
  void froze() override;
  void save(Numbers& numbers) const override;
  void load(const Numbers& numbers) override;
  std::string settings_text() const override;

  void update_frozen(std::size_t i, std::span<float> weights, TensorView reduced);

  const LambOptions lamb_;
  // One a member: the running mean of coefficients, frozen later; the last factor; c_l.
  std::vector<double> coefficient_;
  std::vector<double> factor_;
  std::vector<double> scale_;
  Slot& fresh_;
};

}  // namespace thinwire::optim
