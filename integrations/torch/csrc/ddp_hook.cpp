#include "integrations/torch/csrc/ddp_hook.h"

#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>

#include <string>
#include <utility>

#include "integrations/torch/csrc/hook_error.h"

namespace thinwire {

DType dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    case at::kDouble:
      return DType::kF64;
    default:
      return DType::kOther;
  }
}

DdpHook::DdpHook(std::shared_ptr<GradientReducer> reducer,
                 const std::vector<at::Tensor>& parameters,
                 std::shared_ptr<GradientHandover> handover)
    : reducer_(std::move(reducer)), handover_(std::move(handover)), parameters_(parameters) {
  layer_of_.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    layer_of_.emplace(parameters[i].unsafeGetTensorImpl(), i);
  }
}

Bucket DdpHook::describe(c10d::GradBucket& bucket) const {
  const at::Tensor& buffer = bucket.getBuffer();
  const std::vector<at::Tensor> parameters = bucket.getParameters();
  if (!buffer.is_contiguous() || buffer.is_sparse() || !buffer.device().is_cpu()) {
    throw InvalidArgument("bucket " + std::to_string(bucket.getIndex()) +
                          ": expected a dense contiguous CPU buffer, got " + buffer.toString() +
                          " on " + buffer.device().str() +
                          "\nhint: sparse and CUDA gradients are not part of this version");
  }
  const DType dtype = dtype_of(buffer);
  const TensorView whole{buffer.data_ptr(), buffer.numel(), dtype};

  Bucket described;
  described.last = bucket.isLast();
  described.layers.reserve(parameters.size());
  std::int64_t begin = 0;  // DDP packs the gradients without gaps
  for (const at::Tensor& parameter : parameters) {
    const auto found = layer_of_.find(parameter.unsafeGetTensorImpl());
    const std::int64_t end = begin + parameter.numel();
    if (found == layer_of_.end() || end > whole.elements) {
      throw InvalidArgument(
          "bucket " + std::to_string(bucket.getIndex()) +
          ": a parameter that the model did not have when compress() was called"
          "\nhint: call thinwire.torch.compress() after the last change of the model's parameters");
    }
    BucketLayer& layer =
        described.layers.emplace_back(BucketLayer{found->second, whole.slice(begin, end), {}});
    if (handover_) {
      if (const at::Tensor fresh = handover_->take(layer.layer); fresh.defined()) {
        layer.source = {fresh.data_ptr(), fresh.numel(), dtype};
        layer.owner = std::make_shared<at::Tensor>(fresh);
      }
      handover_->set_place(layer.layer, buffer, begin);
    }
    begin = end;
  }
  if (begin != whole.elements) {
    throw InvalidArgument("bucket " + std::to_string(bucket.getIndex()) + ": expected " +
                          std::to_string(begin) + " elements, got " +
                          std::to_string(whole.elements) +
                          "\nhint: this PyTorch packs its buckets in a way thinwire does not know");
  }
  if (handover_ && described.last) {
    handover_->disarm();
  }
  return described;
}

c10::intrusive_ptr<c10::ivalue::Future> DdpHook::runHook(c10d::GradBucket& bucket) {
  auto future = c10::make_intrusive<c10::ivalue::Future>(c10::TensorType::get());
  try {
    reducer_->reduce(describe(bucket),
                     [future, buffer = bucket.getBuffer()](const std::exception_ptr& error) {
                       if (error) {
                         future->setError(std::make_exception_ptr(HookError(error)));
                       } else {
                         future->markCompleted(c10::IValue(buffer));
                       }
                     });
  } catch (...) {
    throw HookError(std::current_exception());
  }
  return future;
}

at::Tensor DdpHook::parseHookResult(const c10::IValue& result) {
  return c10d::detail::parseCppCommHookResult(result);
}

}  // namespace thinwire
