// The paragraph a reducer logs before its first step. Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "comm/policy.h"

namespace thinwire {

// Bytes that this rank's message of one step holds for the layer: the codec's slot, all rounds of a
// linear codec (the mean over the steps), or the fp32 values of a dense layer. Of a layer that is
// encoded with others of its bucket (PayloadCodec::joint): as if it were alone, since buckets are
// not known beforehand.
std::size_t message_bytes(const Layer& layer, const Codec& codec);

struct MemoryForecast {
  std::size_t residual_bytes = 0;  // all generations, workers' and owners'
  std::size_t buffer_bytes = 0;    // messages out and in, about
};
MemoryForecast forecast_memory(const std::vector<Layer>& layers, const Plan& plan, int world_size);

std::string summarise(const std::vector<Layer>& layers, const Policy& policy, const Plan& plan,
                      int world_size);

}  // namespace thinwire
