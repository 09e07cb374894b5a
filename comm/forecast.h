// Forecast: what a policy would make of a model's steps on a network, without a job: from the
// codecs' speeds on this machine, the link, and what the model's gradients lose, or usual ones.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "comm/collective_cost.h"
#include "comm/policy.h"
#include "compressors/adaptive/codec_speeds.h"

namespace thinwire {

struct ForecastJob {
  std::vector<Layer> layers;  // in the model's order; gradients come in the reverse one
  int ranks = 2;
  Link link = {};
  // From the first gradient to the last, in seconds: layers' gradients are ready in proportion to
  // their elements, in buckets as PyTorch's DDP makes them, 1 MiB and then 25 MiB.
  double backward_seconds = 0;
  // One a layer, or none at all; of as many elements, or of none: then it is a usual one. Borrowed.
  std::vector<TensorView> gradients = {};
};

struct Forecast {
  double exposed = 0;  // seconds that communication adds to a step whose cores are idle otherwise
  double work = 0;     // seconds of encoding and decoding, exposed or not
  double sent = 0;     // bytes a rank sends in a step
  Plan plan;           // `auto` has chosen
  std::vector<double> layer_seconds;  // work and wire, one a layer
  std::vector<double> layer_sent;
};

// PolicyError as Plan::make(); InvalidArgument for fewer than two ranks, a link that is no positive
// finite speed and latency, or a gradient that does not fit its layer, which is named, or
// is not finite. Measures the
// speeds that `speeds` lacks.
Forecast forecast(const ForecastJob& job, const Policy& policy, CodecSpeeds& speeds);

}  // namespace thinwire
