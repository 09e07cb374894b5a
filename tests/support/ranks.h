// Ranks for the contract suites: P communicators of one group, each on its own thread, or this
// process as one of P.
#pragma once

#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "comm/communicator.h"

namespace thinwire::testing {

using RankWork = std::function<void(Communicator&)>;

struct Ranks {
  std::string label;
  int size = 1;
  // Runs the work on every rank of a fresh group and returns when all ranks of this process are
  // through; rethrows the first exception of the lowest rank that threw.
  std::function<void(const RankWork&)> run;
};

inline std::ostream& operator<<(std::ostream& out, const Ranks& ranks) {
  return out << ranks.label << " x " << ranks.size;
}

// `size` threads; `make(rank)` is called on the rank's own thread.
Ranks thread_ranks(std::string label, int size,
                   std::function<std::function<std::unique_ptr<Communicator>(int)>()> make_group);

// Loopback groups of 1, 2, 3, 4 and 7 ranks.
std::vector<Ranks> loopback_ranks();

}  // namespace thinwire::testing
