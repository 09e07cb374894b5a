// GradientHandover: takes fresh gradients to the reducer without DDP's copy of them into its
// bucket.
//
// With gradient_as_bucket_view=True DDP wants param.grad to lie in its bucket, and copies every
// gradient there that autograd has put elsewhere: all of them, when the optimizer sets gradients to
// None. A bucket that is compressed is read once and then overwritten, so the copy is work for
// nothing. Here a hook in front of each parameter's AccumulateGrad keeps the fresh gradient aside
// and gives autograd the place in the bucket instead; DDP finds param.grad where it wants it and
// copies nothing; the reducer reads the gradient aside and writes the result to the place.
//
// It is done only where DDP is about to reduce that gradient (armed after a synchronising forward,
// disarmed by the last bucket), nothing has been accumulated, nobody else holds the gradient or its
// memory (so that the reducer may keep it as the residual), and nobody looks at param.grad during
// backward (post-accumulate hooks, further hooks of the node); otherwise the gradient passes
// through as if this were not there. Buckets that DDP has rebuilt, and unused parameters, need no
// case of their own: what was not kept aside is read from the bucket. Until its bucket is reduced,
// and after a backward that failed on the way, param.grad of a kept gradient holds the bytes of the
// step before.
//
// Called by the thread that runs autograd; a lock makes reentrant backward passes safe. Keeps a
// gradient until take(), and the places' storage.
#pragma once

#include <ATen/ATen.h>

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace thinwire {

class GradientHandover : public std::enable_shared_from_this<GradientHandover> {
 public:
  // Hooks every parameter's AccumulateGrad. The hooks do nothing once this is gone.
  static std::shared_ptr<GradientHandover> make(const std::vector<at::Tensor>& parameters);

  // After each forward of the model: whether DDP will reduce the gradients of its backward. Forgets
  // what an earlier backward left.
  void arm(bool reduces);
  // The step's last bucket is on its way.
  void disarm();

  // Where DDP wants the gradient of parameter `index` from the next backward on: its part of
  // `bucket`, at element `begin`.
  void set_place(std::size_t index, const at::Tensor& bucket, std::int64_t begin);
  // The gradient kept aside for parameter `index`, contiguous; undefined when it lies in the
  // bucket.
  at::Tensor take(std::size_t index);

 private:
  // The kind of pointer differs between PyTorch's versions.
  using NodePointer =
      decltype(torch::autograd::impl::grad_accumulator(std::declval<const at::Tensor&>()));
  struct Slot {
    at::Tensor parameter;
    NodePointer accumulator;
    at::Tensor place;
    at::Tensor fresh;
  };
  class Hook;

  bool may_keep(const Slot& slot, const at::Tensor& gradient) const;
  // What AccumulateGrad gets in place of `gradient`.
  at::Tensor keep(std::size_t index, const at::Tensor& gradient);

  std::mutex mutex_;
  std::vector<Slot> slots_;
  bool armed_ = false;
};

}  // namespace thinwire
