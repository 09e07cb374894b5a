// The DDP communication hook: hands each bucket of gradients to a GradientReducer and gives DDP a
// future that holds the same buffer with the result. Called by autograd's thread, never takes the
// GIL, copies no gradient. The buffer is kept alive until the reduction is done.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <torch/csrc/distributed/c10d/comm.hpp>
#include <unordered_map>
#include <vector>

#include "comm/reducer.h"
#include "integrations/torch/csrc/gradient_handover.h"

namespace thinwire {

class DdpHook final : public c10d::CommHookInterface {
 public:
  // parameters[i] is layer i of the reducer's table. `handover`, over the same parameters, may be
  // null: every gradient is read from its bucket then.
  DdpHook(std::shared_ptr<GradientReducer> reducer, const std::vector<at::Tensor>& parameters,
          std::shared_ptr<GradientHandover> handover);

  // Errors of use throw here, as HookError; errors of the exchange come with the future.
  c10::intrusive_ptr<c10::ivalue::Future> runHook(c10d::GradBucket& bucket) override;
  at::Tensor parseHookResult(const c10::IValue& result) override;

 private:
  Bucket describe(c10d::GradBucket& bucket) const;

  std::shared_ptr<GradientReducer> reducer_;
  std::shared_ptr<GradientHandover> handover_;
  // By identity: names, order and buckets may change, the parameter objects do not.
  std::unordered_map<const c10::TensorImpl*, std::size_t> layer_of_;
  std::vector<at::Tensor> parameters_;  // keeps the identities valid
};

// Element type of a gradient; kOther for what is none of ours.
DType dtype_of(const at::Tensor& tensor);

}  // namespace thinwire
