// Adam and AdamW over reduced gradients, as torch.optim.Adam and AdamW. With a policy whose codecs
// feed errors back it is Adam with error feedback, whose variance sees the compressed gradients:
// 1-bit codecs want OneBitAdam instead.
#pragma once

#include "optim/groups.h"
#include "optim/optimizer.h"

namespace thinwire::optim {

class Adam final : public Optimizer {
 public:
  static std::shared_ptr<Adam> make(GradientReducer& reducer, std::vector<Member> members,
                                    std::vector<AdamOptions> groups);
  void set_options(std::vector<AdamOptions> groups) { groups_.set(std::move(groups)); }

 private:
  Adam(GradientReducer& reducer, std::vector<Member> members, std::vector<AdamOptions> groups);
  void update(std::size_t i, std::span<float> weights, TensorView reduced) override;
  std::vector<std::string> options_text() const override { return groups_.text(); }

  Groups<AdamOptions> groups_;
  Slot& m_;
  Slot& v_;
};

}  // namespace thinwire::optim
