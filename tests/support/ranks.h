// Ranks for the contract suites: P communicators of one group, each on its own thread, or this
// process as one of P.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <ostream>
#include <span>
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

// Long enough for 7 ranks on a loaded machine; only failures ever wait for it.
Deadline soon();

// Every rank's bytes, in rank order.
std::vector<std::byte> gather_bytes(Communicator& comm, std::span<const std::byte> mine);

// Whether all ranks hold the same bytes.
bool same_on_all_ranks(Communicator& comm, std::span<const std::byte> mine);

}  // namespace thinwire::testing
