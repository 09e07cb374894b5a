// The words of a PeerLost. Pure functions, thread-safe.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {

struct LossReport {
  int rank = 0;  // who reports
  int world_size = 1;
  std::uint64_t step = 0;
  std::vector<int> absent = {};           // by the roll call; empty: unknown
  std::vector<std::string> blocked = {};  // layers that wait
  std::chrono::duration<double> waited{0};
  std::chrono::milliseconds deadline{0};
  std::string cause;  // what the transport said
};

PeerLost peer_lost(const LossReport& report);

}  // namespace thinwire
