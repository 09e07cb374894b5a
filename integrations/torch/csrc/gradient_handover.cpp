#include "integrations/torch/csrc/gradient_handover.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/grad_mode.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <utility>

#include "integrations/torch/csrc/freed_memory.h"

namespace thinwire {
namespace {

// Nobody else can reach the tensor's memory, and all of it is the tensor's: no view of it, no part
// of something larger, nothing foreign (NumPy's, say) that became a tensor. A gradient often is a
// view itself, of a tensor that lives on in it alone: that of nn.Linear's weight is a transposed
// product.
bool owns_its_memory(const at::Tensor& tensor) {
  const at::Storage& storage = tensor.storage();
  const bool of_a_base = tensor.is_view();
  return (!of_a_base || tensor._base().use_count() == 1) &&
         storage.use_count() == (of_a_base ? 2U : 1U) && storage.nbytes() == tensor.nbytes() &&
         storage.data_ptr().get_deleter() == at::getCPUAllocator()->raw_deleter();
}

}  // namespace

class GradientHandover::Hook final : public torch::autograd::FunctionPreHook {
 public:
  Hook(std::weak_ptr<GradientHandover> handover, std::size_t index)
      : handover_(std::move(handover)), index_(index) {}

  torch::autograd::variable_list operator()(
      const torch::autograd::variable_list& gradients) override {
    const std::shared_ptr<GradientHandover> handover = handover_.lock();
    if (!handover || gradients.size() != 1) {
      return gradients;
    }
    return {handover->keep(index_, gradients[0])};
  }

 private:
  std::weak_ptr<GradientHandover> handover_;
  std::size_t index_;
};

std::shared_ptr<GradientHandover> GradientHandover::make(
    const std::vector<at::Tensor>& parameters) {
  auto handover = std::make_shared<GradientHandover>();
  handover->slots_.reserve(parameters.size());
  std::size_t bytes = 0;
  std::size_t largest = 0;
  for (const at::Tensor& parameter : parameters) {
    bytes += parameter.nbytes();
    largest = std::max(largest, parameter.nbytes());
    auto accumulator = torch::autograd::impl::grad_accumulator(parameter);
    accumulator->add_pre_hook(std::make_unique<Hook>(handover, handover->slots_.size()));
    Slot& slot = handover->slots_.emplace_back();
    slot.parameter = parameter;
    slot.accumulator = std::move(accumulator);
  }
  keep_freed_memory(bytes, largest);
  return handover;
}

void GradientHandover::arm(bool reduces) {
  const std::lock_guard lock(mutex_);
  armed_ = reduces;
  for (Slot& slot : slots_) {
    slot.fresh.reset();
  }
}

void GradientHandover::disarm() {
  const std::lock_guard lock(mutex_);
  armed_ = false;
}

void GradientHandover::set_place(std::size_t index, const at::Tensor& bucket, std::int64_t begin) {
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[index];
  if (!slot.parameter.is_contiguous()) {
    return;
  }
  const auto* data = static_cast<const char*>(bucket.const_data_ptr()) +
                     begin * static_cast<std::int64_t>(bucket.element_size());
  if (!slot.place.defined() || slot.place.const_data_ptr() != data) {
    slot.place = bucket.narrow(0, begin, slot.parameter.numel()).view(slot.parameter.sizes());
  }
}

at::Tensor GradientHandover::take(std::size_t index) {
  const std::lock_guard lock(mutex_);
  return std::exchange(slots_[index].fresh, {});
}

bool GradientHandover::may_keep(const Slot& slot, const at::Tensor& gradient) const {
  // Autograd's own rule for taking a gradient over: whoever else holds it might change it.
  const bool ours = gradient.defined() && gradient.use_count() == 1;
  return ours && armed_ && slot.place.defined() && !slot.parameter.grad().defined() &&
         !at::GradMode::is_enabled() && !gradient.requires_grad() &&
         gradient.layout() == at::kStrided && gradient.options().type_equal(slot.place.options()) &&
         gradient.sizes() == slot.place.sizes() && gradient.is_contiguous() &&
         owns_its_memory(gradient) &&
         torch::autograd::impl::post_acc_grad_hooks(slot.parameter) == nullptr &&
         slot.accumulator->pre_hooks().size() == 1 &&  // this one
         slot.accumulator->post_hooks().size() == 1;   // DDP's
}

at::Tensor GradientHandover::keep(std::size_t index, const at::Tensor& gradient) {
  const std::lock_guard lock(mutex_);
  Slot& slot = slots_[index];
  if (slot.fresh.defined()) {
    // A second gradient in one backward is added to param.grad, where the first must be.
    const at::Tensor first = std::exchange(slot.fresh, {});
    if (slot.parameter.grad().defined()) {
      slot.parameter.mutable_grad().copy_(first);
    }
    return gradient;
  }
  if (!may_keep(slot, gradient)) {
    return gradient;
  }
  slot.fresh = gradient;
  return slot.place.detach();  // a handle of its own, which autograd takes over without a copy
}

}  // namespace thinwire
