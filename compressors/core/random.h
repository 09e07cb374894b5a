// Counter-based randomness: Philox4x32-10 (Salmon et al., SC 2011). A stream is fixed by
// (key hash, step, sender); the i-th block depends on nothing else, so any thread or SIMD lane may
// compute it. Pure functions, thread-safe.
#pragma once

#include <array>
#include <cstdint>

namespace thinwire {

struct RandomStream {
  std::uint64_t key = 0;      // see random_stream()
  std::uint64_t counter = 0;  // high half of the Philox counter
};

// `sender` is -1 where all ranks must draw the same.
RandomStream random_stream(std::uint64_t key_hash, std::uint64_t step, std::int32_t sender);

// Block i of the stream: four independent uniform 32-bit words.
std::array<std::uint32_t, 4> random_block(const RandomStream& stream, std::uint64_t i);

}  // namespace thinwire
