// ReducerState: what a reducer remembers from step to step on one rank, by keys of layers, and how
// it is carried over to another number of ranks. Plain values; pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace thinwire {

enum class ReduceOp : std::uint8_t { kMean, kSum };

// A part of a memory, under its key. Restored bit for bit.
struct StateEntry {
  std::string key;  // StateKey::text()
  std::vector<float> values;
};
struct ReducerState {
  int version = 1;
  int rank = 0;
  int world_size = 1;
  std::uint64_t step = 0;
  double loss_scale = 1;
  std::string policy;
  // Of a policy that chooses codecs: what it had chosen, a spec a layer.
  std::vector<std::string> codecs = {};
  std::vector<StateEntry> entries;
};

// The state of `rank` of `world_size` ranks from those of all ranks of a job, in any order. For as
// many ranks: what that rank saved. For another number: the pending update of every element is kept
// to one rounding. It is (1/P) sum of the workers' residuals + the owner's for kMean, the sum of
// all for kSum; every rank gets an equal part of it as its worker's residual, and owners begin with
// nothing. Velocities likewise; a codec's own state is that of one of the old ranks.
// InvalidArgument, naming the rank and the field, when a rank is missing or there twice, or the
// states are of different steps, versions or policies.
ReducerState reshard(std::span<const ReducerState> states, int rank, int world_size, ReduceOp op);

}  // namespace thinwire
