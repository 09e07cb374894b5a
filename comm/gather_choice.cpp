#include "comm/gather_choice.h"

#include "comm/collective_cost.h"
#include "comm/exchange.h"

namespace thinwire {
namespace {

// Of a usual bucket, that a rank sends to all instead of to owners: the wire time of the latencies
// that it saves, or less, from 1 Gbit/s on (as ReducerOptions::ride_along_bytes).
constexpr double kMostGatheredBytes = 65'536;

}  // namespace

bool GatherChoice::add(const Codec& codec, std::int64_t n, bool split) {
  gradient_bytes_ += static_cast<double>(n) * sizeof(float);
  linear_ = linear_ || codec.linear;
  if (codec.payload == nullptr) return false;
  if (gathers(*codec.payload, n, ranks_)) {
    gathered_bytes_ += static_cast<double>(codec.payload->slot_bytes(n)) * (ranks_ - 1);
    return true;
  }
  (codec.payload->traits().sparse && !split ? allgathers_ : requantises_) = true;
  return false;
}

bool GatherChoice::worth_it() const {
  return !requantises_ && (allgathers_ || linear_) &&
         share_of_usual_bucket(gradient_bytes_) * gathered_bytes_ <= kMostGatheredBytes;
}

}  // namespace thinwire
