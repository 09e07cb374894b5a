#include "compressors/core/spec.h"

#include <algorithm>
#include <functional>
#include <numeric>

namespace thinwire {

const PayloadCodec* Codec::payload_at(std::uint64_t step) const {
  if (step < options.start_step) return nullptr;
  for (const WarmupStage& stage : warmup) {
    if (step - options.start_step < stage.end) return stage.payload.get();
  }
  return payload.get();
}

std::uint64_t Codec::phase_at(std::uint64_t step) const {
  if (step < options.start_step) return 0;
  std::uint64_t phase = options.start_step;
  for (const WarmupStage& stage : warmup) {
    if (step - options.start_step >= stage.end) phase = options.start_step + stage.end;
  }
  return phase;
}

std::size_t message_bytes(const Codec& codec, std::span<const std::int64_t> shape, DType dtype) {
  const std::int64_t n =
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  if (codec.payload) return codec.payload->slot_bytes(n);
  if (!codec.linear) return static_cast<std::size_t>(n) * size_bytes(dtype);
  const auto period = static_cast<std::uint64_t>(std::max<std::int64_t>(1, codec.linear->period()));
  std::int64_t elements = 0;
  for (std::uint64_t step = 0; step < period; ++step) {
    for (int round = 0; round < codec.linear->rounds(step); ++round) {
      elements += codec.linear->round_elements(shape, round, step);
    }
  }
  return static_cast<std::size_t>(elements) * sizeof(float) / period;
}

}  // namespace thinwire
