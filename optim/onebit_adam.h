// 1-bit Adam (Tang et al., ICML 2021, arXiv 2102.02888): AdamW on uncompressed gradients until the
// variance is stable, then its variance is frozen, and what is exchanged, compressed with error
// feedback on both sides, is the momentum. Made for the policy onebit; any codec that feeds errors
// back will do. Layers that the policy leaves uncompressed stay with AdamW, and so does everything
// on one rank.
//
// Weight decay is decoupled. Where the variance of an element is zero when it freezes, no gradient
// has come yet, and none is taken from then on (mask).
#pragma once

#include "optim/frozen_variance.h"

namespace thinwire::optim {

class OneBitAdam final : public FrozenVariance {
 public:
  static std::shared_ptr<OneBitAdam> make(GradientReducer& reducer, std::vector<Member> members,
                                          std::vector<AdamOptions> groups,
                                          const FreezeOptions& freeze = {});

 private:
  OneBitAdam(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups,
             const FreezeOptions& freeze);
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
};

}  // namespace thinwire::optim
