// PeerConnections: a TCP connection to each peer, for blocks of bytes that the operating system's
// buffers take whole. The thread that sends also receives: nothing is handed to another thread and
// no lock is held in a system call, where the wake-up of its peer may take the core away from a
// sender (Gloo's network thread then spins until that sender is scheduled again: a tenth of a step
// of 50 ms with four ranks on two cores).
//
// Blocks between two ranks arrive in the order in which they were sent; sizes are known to both. No
// send waits: a block that the buffers have no room for is only announced, and its receiver is told
// to fetch it elsewhere. So no order of sends and receives, here or over another transport, makes
// ranks wait for each other's reading.
//
// One thread at a time, except abort(). Blocks and receipts are the caller's until the block is
// here or elsewhere, or until abort(). All ranks have the same byte order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/wire_bytes.h"

namespace thinwire {

// One header of two 4-byte words, in the block's own segment.
inline constexpr MessageFraming kPeerFraming{.header = 8};

// The address that Gloo takes: of the first interface in GLOO_SOCKET_IFNAME, else of this host's
// name where it is one of this host, else the loopback interface. TransportError where the
// interface has none.
std::string default_peer_host();

class PeerConnections {
 public:
  enum class Receipt : std::uint8_t { kPending, kHere, kElsewhere };

  // Listens at `host`, an IPv4 or IPv6 address of this host.
  PeerConnections(int rank, int size, const std::string& host);
  // Closes the connections; what was sent still arrives.
  ~PeerConnections();

  // What peers need to connect: host, port and a word that tells this group's members from
  // strangers.
  const std::string& address() const;
  // Collective, with every rank's address() in rank order. TransportError names the rank that could
  // not be reached or did not come before the deadline.
  void connect(const std::vector<std::string>& addresses, Deadline deadline);

  // Sends the block and returns true, or announces it and returns false.
  bool send(int peer, std::span<const std::byte> block);
  // Takes the next block from that peer. `receipt` becomes kHere or, where it was only announced,
  // kElsewhere.
  void receive(int peer, std::span<std::byte> block, Receipt& receipt);

  // Takes what has come; never blocks.
  void poll();
  // Blocks until `receipt`, of a block of `peer`, is no longer pending. TransportError when the
  // deadline passes, that peer has closed its connection or sent something else than this rank
  // expects, or after abort().
  void wait(int peer, const Receipt& receipt, Deadline deadline);

  // Shuts all connections, here and at the peers. From any thread; idempotent.
  void abort() noexcept;

 private:
  class Connections;
  std::unique_ptr<Connections> connections_;
};

}  // namespace thinwire
