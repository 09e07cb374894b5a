// Loopback: P ranks as threads of one process. The rank that comes last to a collective carries it
// out for all, in rank order, so sums are identical and reproducible. Made for tests and for
// programs that try the library without a network; peers can be made to die (kill) and bytes to be
// damaged in flight (corrupt).
//
// LoopbackGroup is thread-safe; each communicator obeys comm/communicator.h. The group's state is
// shared, so communicators may outlive the LoopbackGroup.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>

#include "comm/communicator.h"

namespace thinwire {

class LoopbackHub;

class LoopbackGroup {
 public:
  // `size` >= 1.
  explicit LoopbackGroup(int size);
  ~LoopbackGroup();

  // The communicator of `rank` in [0, size), once a rank. Destroying it leaves the group: what the
  // others still wait for from this rank fails at once.
  std::unique_ptr<Communicator> communicator(int rank);

  enum class Death {
    kSilent,     // as when a host loses power: peers learn it by their deadline
    kConnection  // as when a process is killed: peers' transfers fail at once
  };
  // From now on every verb of `rank` throws and it answers no roll call.
  void kill(int rank, Death death = Death::kSilent);

  // Called with what travels from `sender` to `receiver` (not equal) before it arrives; may change
  // the bytes. For allgather and alltoall only. Set it while nothing is in flight.
  using Tamper = std::function<void(int sender, int receiver, std::span<std::byte> bytes)>;
  void tamper(Tamper tamper);

 private:
  std::shared_ptr<LoopbackHub> hub_;
};

}  // namespace thinwire
