// What is said when a peer is lost.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "comm/communicator.h"
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

// After a transport's failure: where the transport survives it, aborts; then fills in report.absent
// by the roll call, and leaves it empty where that fails, too.
PeerLost lost_peer(Communicator& comm, LossReport report, std::chrono::milliseconds grace);

}  // namespace thinwire
