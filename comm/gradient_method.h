// GradientMethod: what an optimizer has to say about how its gradients are reduced: when they are
// compressed, with which options, and what is reduced in their place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "comm/handshake.h"
#include "comm/policy.h"
#include "compressors/core/spec.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

// How all layers of a step travel.
enum class StepMode : std::uint8_t {
  kPolicy,  // as the policy says
  kDense,   // uncompressed
  // Not at all: the result is the rank's own gradient. With a loss scale, which all ranks change by
  // what they see, one byte a layer tells them where any has NaN or Inf: there all get NaN.
  kLocal,
};

// Called by one GradientReducer; implementations answer the same on every rank. One rank alone is
// asked about plans only.
class GradientMethod {
 public:
  virtual ~GradientMethod() = default;

  // What must be equal on all ranks; compared before the first step, and again after restore() and
  // set_policy().
  virtual std::vector<HandshakeField> fields() const = 0;

  // Options that a compressed layer's codec gets beside its own, ",momentum=0.9"; asked for once a
  // plan.
  virtual std::string codec_options(std::size_t /*layer*/, const Codec& /*codec*/) const {
    return {};
  }

  // Between steps: PolicyError, naming the layer, where the method cannot go on with another plan.
  virtual void check_plan(const Plan& /*plan*/) const {}
  // Between steps: the reducer's plan is another one now, which check_plan() let pass.
  virtual void plan_changed() {}

  // On the communication thread, before anything of a step.
  virtual StepMode begin_step() = 0;

  // On the communication thread: writes what is to be reduced in the place of a layer's gradient to
  // `out`, which is `gradient` itself or as long and of its dtype. False: nothing is written, the
  // gradient is reduced. Not called in steps of kLocal.
  virtual bool prepare(std::size_t layer, TensorView gradient, TensorView out) = 0;
};

}  // namespace thinwire
