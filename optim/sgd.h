// SGD with momentum over reduced gradients, as torch.optim.SGD without dampening. With a policy
// whose codecs feed errors back it is EF-SGD (Karimireddy et al., ICML 2019, arXiv 1901.09847).
#pragma once

#include "optim/groups.h"
#include "optim/optimizer.h"

namespace thinwire::optim {

class Sgd final : public Optimizer {
 public:
  static std::shared_ptr<Sgd> make(GradientReducer& reducer, std::vector<Member> members,
                                   std::vector<SgdOptions> groups);
  void set_options(std::vector<SgdOptions> groups) { groups_.set(std::move(groups)); }

 private:
  Sgd(GradientReducer& reducer, std::vector<Member> members, std::vector<SgdOptions> groups);
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  std::vector<std::string> options_text() const override { return groups_.text(); }

  Groups<SgdOptions> groups_;
  Slot& velocity_;  // where a group has momentum
};

}  // namespace thinwire::optim
