#include "optim/optimizer_state.h"

#include <algorithm>
#include <cstddef>

#include "compressors/core/error.h"

namespace thinwire::optim {

OptimizerState reshard(std::span<const OptimizerState> states, int rank, int world_size) {
  std::vector<ReducerState> reducers;
  for (const OptimizerState& state : states) {
    reducers.push_back(state.reducer);
  }
  const ReducerState reducer = reshard(reducers, rank, world_size, ReduceOp::kMean);
  for (const OptimizerState& state : states) {
    if (state.method != states.front().method || state.numbers != states.front().numbers) {
      throw InvalidArgument(
          "cannot carry the optimizers' states over: rank " + std::to_string(state.reducer.rank) +
          " saved " + state.method + " with other counters than rank " +
          std::to_string(states.front().reducer.rank) + " saved " + states.front().method +
          "\nhint: give the states that all ranks of one job saved at the same step");
    }
  }
  if (static_cast<std::size_t>(world_size) == states.size()) {
    return *std::find_if(states.begin(), states.end(),
                         [&](const OptimizerState& state) { return state.reducer.rank == rank; });
  }
  OptimizerState result = states.front();
  result.reducer = reducer;
  for (StateEntry& entry : result.local) {
    std::vector<double> sum(entry.values.size());
    for (const OptimizerState& state : states) {
      const auto found =
          std::find_if(state.local.begin(), state.local.end(),
                       [&](const StateEntry& other) { return other.key == entry.key; });
      if (found == state.local.end() || found->values.size() != sum.size()) {
        throw InvalidArgument("cannot carry the optimizers' states over: rank " +
                              std::to_string(state.reducer.rank) + " has no '" + entry.key +
                              "' of " + std::to_string(sum.size()) +
                              " values\nhint: give the states that all ranks of one job saved at "
                              "the same step");
      }
      for (std::size_t i = 0; i < sum.size(); ++i) {
        sum[i] += static_cast<double>(found->values[i]);
      }
    }
    for (std::size_t i = 0; i < sum.size(); ++i) {
      entry.values[i] = static_cast<float>(sum[i] / static_cast<double>(states.size()));
    }
  }
  return result;
}

}  // namespace thinwire::optim
