#include "comm/step_model.h"

#include <algorithm>

#include "comm/summary.h"

namespace thinwire {

namespace {

Route route_of(const Codec& codec, bool gathered) {
  if (codec.is_none()) return Route::kDense;
  if (codec.linear) return Route::kLinear;
  return gathered || codec.payload->traits().sparse ? Route::kSparse : Route::kRequantising;
}

double route_seconds(Route route, const Codec& codec, const LinkModel& link) {
  switch (route) {
    case Route::kDense:
      return link[Verb::kAllreduce].fixed;
    case Route::kSparse:
      return link[Verb::kAllgather].fixed;
    case Route::kRequantising:
      return link[Verb::kAlltoall].fixed + link[Verb::kAllgather].fixed;
    case Route::kLinear:
      return codec.linear->rounds(0) * link[Verb::kAllreduce].fixed;
  }
  return 0;
}

}  // namespace

LayerCost layer_cost(const Layer& layer, const Codec& codec, bool gathered, const CodecSpeed& speed,
                     const LinkModel& link, int ranks) {
  const auto n = static_cast<double>(layer.elements());
  const double p = ranks;
  const std::size_t bytes = message_bytes(layer, codec);
  LayerCost cost;
  cost.route = route_of(codec, gathered);
  cost.fixed = route_seconds(cost.route, codec, link);
  const auto send = [&](Verb verb, double sent) {
    cost.sent += sent;
    cost.wire += link[verb].per_byte * sent;
  };
  switch (cost.route) {
    case Route::kDense:
    case Route::kLinear:
      cost.work = n * (speed.encode + speed.decode);
      send(Verb::kAllreduce, sent_payload(Verb::kAllreduce, bytes, ranks));
      break;
    case Route::kSparse:
      cost.work = n * (speed.encode + speed.decode + (p - 1) * speed.decode_more);
      send(Verb::kAllgather, sent_payload(Verb::kAllgather, bytes, ranks));
      break;
    case Route::kRequantising:
      // Every rank sums and encodes anew the range that it owns, and decodes all ranges.
      cost.work =
          n * (1 + 1 / p) * (speed.encode + speed.decode) + n / p * (p - 1) * speed.decode_more;
      send(Verb::kAlltoall, sent_payload(Verb::kAlltoall, bytes, ranks));
      send(Verb::kAllgather, sent_payload(Verb::kAllgather, bytes, ranks) / p);
      break;
  }
  return cost;
}

StepCost step_cost(std::span<const BucketReady> buckets, std::span<const LayerCost> costs) {
  StepCost step;
  double finish = buckets.empty() ? 0 : buckets.front().ready;
  for (const BucketReady& bucket : buckets) {
    finish = std::max(finish, bucket.ready);
    std::array<double, kRoutes> fixed{};
    for (const std::size_t layer : bucket.layers) {
      double& seconds = fixed[static_cast<std::size_t>(costs[layer].route)];
      seconds = std::max(seconds, costs[layer].fixed);
      finish += costs[layer].seconds();
      step.work += costs[layer].work;
      step.sent += costs[layer].sent;
    }
    // Few dense values ride along with a sparse message.
    if (fixed[static_cast<std::size_t>(Route::kSparse)] > 0) {
      fixed[static_cast<std::size_t>(Route::kDense)] = 0;
    }
    for (const double seconds : fixed) finish += seconds;
  }
  step.exposed = std::max(0.0, finish);
  return step;
}

}  // namespace thinwire
