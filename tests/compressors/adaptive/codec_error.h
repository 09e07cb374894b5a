// The error that a codec really makes. For tests.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "compressors/core/memory.h"
#include "compressors/core/spec.h"

namespace thinwire {

inline double norm_of(std::span<const float> values) {
  double sum = 0;
  for (const float x : values) sum += double{x} * double{x};
  return std::sqrt(sum);
}

// ||new residual|| / ||v|| of a fresh memory. A linear codec first finds the subspace in some steps
// of the same v, each from no residual.
inline double codec_error(const std::string& spec, std::vector<float> v,
                          std::span<const std::int64_t> shape) {
  constexpr std::uint64_t kWarmSteps = 6;
  const Codec codec = make_codec(spec);
  if (codec.is_none()) return 0;
  const auto n = static_cast<std::int64_t>(v.size());
  const double norm = norm_of(v);
  std::vector<std::byte> storage;
  const auto scratch = [&](std::size_t bytes) -> std::span<std::byte> {
    storage.resize(bytes + 64);
    const auto past = reinterpret_cast<std::uintptr_t>(storage.data()) % 64;
    return {storage.data() + (64 - past) % 64, bytes};
  };
  if (codec.payload) {
    Memory memory(n, {.needs = codec.payload->memory_needs(n)});
    std::vector<std::byte> body(codec.payload->slot_bytes(n));
    const Context ctx{.workspace = scratch(codec.payload->workspace_bytes(n)), .shape = shape};
    (void)codec.payload->encode(ctx, view(v), &memory, body);
    memory.commit();
    return norm_of(memory.current()) / norm;
  }
  Memory memory(n, {.needs = codec.linear->memory_needs(shape)});
  const std::span<std::byte> state = scratch(codec.linear->round_state_bytes(shape));
  double error = 0;
  for (std::uint64_t step = 0; step < kWarmSteps; ++step) {
    std::vector<float> grad = v;
    const LinearCodec::Tensor tensor{
        .grad = view(grad), .shape = shape, .memory = &memory, .round_state = state};
    const Context ctx{.step = step};
    for (int round = 0; round < codec.linear->rounds(step); ++round) {
      std::vector<float> wire(
          static_cast<std::size_t>(codec.linear->round_elements(shape, round, step)));
      codec.linear->project(ctx, round, tensor, wire);
      codec.linear->absorb(ctx, round, wire, tensor);
    }
    memory.commit();
    error = norm_of(memory.current()) / norm;
    memory.restore(std::vector<float>(v.size()));
  }
  return error;
}

}  // namespace thinwire
