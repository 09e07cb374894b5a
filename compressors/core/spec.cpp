#include "compressors/core/spec.h"

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

}  // namespace thinwire
