// OptimizerState: what an optimizer remembers from step to step on one rank, and how it is carried
// over to another number of ranks. Plain values; pure functions.
#pragma once

#include <map>
#include <span>
#include <string>
#include <vector>

#include "comm/reducer_state.h"

namespace thinwire::optim {

using Numbers = std::map<std::string, std::vector<double>>;

// What an optimizer remembers on one rank, its reducer's state included.
struct OptimizerState {
  int version = 1;
  std::string method;
  Numbers numbers;                 // counters and schedules, as on all ranks
  std::vector<StateEntry> shared;  // SLOT/NAME, the same on all ranks
  std::vector<StateEntry> local;   // SLOT/NAME, this rank's own
  ReducerState reducer;
};

// The state of `rank` of `world_size` ranks from those of all ranks of a job. For as many ranks:
// what that rank saved. For another number: what ranks share, the mean of what is their own, and
// the reducers' states as reshard() of comm/reducer_state.h says. InvalidArgument as there.
OptimizerState reshard(std::span<const OptimizerState> states, int rank, int world_size);

}  // namespace thinwire::optim
