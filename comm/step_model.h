// StepModel: what a step would cost if a layer travelled by this codec or by that one, from the
// network's and the codecs' measured speeds. Plain arithmetic: the same numbers give the same
// result on every rank.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "comm/link_model.h"
#include "comm/policy.h"
#include "compressors/adaptive/codec_speeds.h"
#include "compressors/core/spec.h"

namespace thinwire {

// The collective that a layer's bodies go through (comm/bucket_layout.h).
enum class Route : std::uint8_t { kDense, kSparse, kRequantising, kLinear };
inline constexpr std::size_t kRoutes = 4;

// One layer's part of a step, in seconds.
struct LayerCost {
  Route route = Route::kDense;
  double fixed = 0;  // of the route: a bucket pays it once for all layers that take it
  double work = 0;   // encode and decode
  double wire = 0;   // of the bytes
  double sent = 0;   // bytes a rank sends

  double seconds() const { return work + wire; }
};

// gathered: of Policy::Choice.
LayerCost layer_cost(const Layer& layer, const Codec& codec, bool gathered, const CodecSpeed& speed,
                     const LinkModel& link, int ranks);

// A bucket of the step: its layers, and when its gradients are there, in seconds before the last
// bucket's (so the last one's is 0, the others' are below).
struct BucketReady {
  std::vector<std::size_t> layers;
  double ready = 0;
};

struct StepCost {
  double exposed = 0;  // seconds from the last gradient to the last result
  double work = 0;     // of all layers
  double sent = 0;     // bytes
};

// Buckets are served one after another. `costs[i]`: layer i's.
StepCost step_cost(std::span<const BucketReady> buckets, std::span<const LayerCost> costs);

}  // namespace thinwire
