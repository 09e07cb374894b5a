// What every codec call gets besides the data. Plain values; a Context belongs to one call on one
// thread, the memory it points to belongs to the caller. This version's codecs start no threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "compressors/core/tensor_view.h"

namespace thinwire {

// Names what is encoded, independent of buckets, ranks and processes: shards, outer steps and
// federated clients are other streams or ranges of the same parameter.
struct Key {
  std::string_view stream = "grad";
  std::string_view parameter;
  std::int64_t begin = 0;  // [begin, end) in elements of the parameter
  std::int64_t end = 0;

  // XXH3 over all fields; the same on every platform.
  std::uint64_t hash() const;
};

struct Context {
  Device device = Device::kCpu;
  void* device_stream = nullptr;        // cudaStream_t on Device::kCuda
  int threads = 1;                      // codecs give the same bytes for any count
  std::span<std::byte> workspace = {};  // at least workspace_bytes(n), aligned to 64
  std::uint64_t step = 0;
  std::int32_t sender = 0;      // process rank, or client id
  std::int32_t world_size = 1;  // P, of those whose gradients are averaged
  float loss_scale = 1;         // what the gradient comes multiplied by; > 0
  std::uint64_t key_hash = 0;
  std::string_view parameter = {};  // for messages only
  // Of the whole tensor that is encoded, where the caller knows it; looked at by lowrank alone.
  std::span<const std::int64_t> shape = {};
};

}  // namespace thinwire
