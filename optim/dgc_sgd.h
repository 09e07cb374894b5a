// Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887): SGD whose momentum is
// applied on each rank before a gradient is thinned by top-k, and forgotten where an entry is sent
// (momentum correction and factor masking). Both, local clipping and the density's warm-up happen
// in the codec (TopKMomentum, warmup=); after the exchange follow weight decay, with a momentum of
// its own, and the step. Layers without a top-k codec have their momentum after the exchange.
//
// With one rank nothing is thinned: it is Sgd.
#pragma once

#include "optim/groups.h"
#include "optim/optimizer.h"

namespace thinwire::optim {

struct DgcOptions {
  // Threshold of the local gradient's L2 norm without its loss scale, times P^(-1/2). 0: no
  // clipping.
  double clip = 0;
  bool clip_by_last = false;  // by the last step's norm, which saves a pass over the gradient
};

class DgcSgd final : public Optimizer {
 public:
  // The groups' momentum and nesterov are the codecs' and stay as they are given here. PolicyError
  // when a layer starts later than the others (start=), or has a top-k codec that takes no
  // momentum. InvalidArgument when ranks compress and no member has a top-k codec.
  static std::shared_ptr<DgcSgd> make(GradientReducer& reducer, std::vector<Member> members,
                                      std::vector<SgdOptions> groups, DgcOptions options = {});
  void set_options(std::vector<SgdOptions> groups);
  void check_plan(const Plan& plan) const override;

 private:
  DgcSgd(GradientReducer& reducer, std::vector<Member> members, std::vector<SgdOptions> groups,
         DgcOptions options);
  std::string codec_options(std::size_t layer, const Codec& codec) const override;
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  void adapt(OptimizerState& state) const override;
  void save(Numbers& numbers) const override;
  std::vector<std::string> options_text() const override { return groups_.text(); }
  std::string settings_text() const override;

  Groups<SgdOptions> groups_;
  const std::vector<SgdOptions> first_;
  const DgcOptions options_;
  std::vector<bool> corrects_;         // one a member: the codec has its momentum
  std::vector<std::size_t> group_of_;  // by layer; SIZE_MAX where its codec has no momentum
  Slot& velocity_;                     // of weight decay alone where the codec has the gradient's
};

}  // namespace thinwire::optim
