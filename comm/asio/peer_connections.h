// PeerConnections: a TCP connection to each peer, for blocks of bytes that the operating system's
// buffers take whole. The thread that sends also receives, and no lock is held in a system call:
// why that matters where ranks share cores stands in comm/ALGORITHMS.md, "Transports".
//
// Blocks between two ranks arrive in the order in which they were sent; sizes are known to both. No
// send waits: a block that the buffers have no room for is only announced, and its receiver is told
// to fetch it elsewhere.
//
// One thread at a time, except abort(). Blocks, receipts and what is to be called are the caller's
// until the receipt is no longer pending, or until after abort() no call is running. All ranks have
// the same byte order. A program that is started by exec does not inherit the connections; a forked
// one does, and keeps them open.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
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

  // Listens at `host`, an IPv4 or IPv6 address of this host. `room_bytes` are what may be on their
  // way to a peer; 0: what the system's buffer holds, 1 MiB or its limit (net.core.wmem_max).
  PeerConnections(int rank, int size, const std::string& host, std::size_t room_bytes = 0);
  // Closes the connections; what was sent still arrives.
  ~PeerConnections();

  // What peers need to connect: host, port and a word that tells this group's members from
  // strangers.
  const std::string& address() const;
  // Collective, with every rank's address() in rank order. TransportError names the ranks that
  // could not be reached or did not come before the deadline.
  void connect(const std::vector<std::string>& addresses, Deadline deadline);

  // Sends the block and returns true, or announces it and returns false.
  bool send(int peer, std::span<const std::byte> block);
  // Takes the next block from that peer. `receipt` becomes kHere or, where it was only announced,
  // kElsewhere; then `elsewhere` is called, by the call that reads the announcement.
  void receive(int peer, std::span<std::byte> block, Receipt& receipt,
               std::function<void()> elsewhere);

  // Takes what has come; never blocks.
  void poll();
  // Blocks until `receipt` is no longer pending. TransportError when the deadline passes, a peer of
  // which a block is expected has closed its connection or sent something else, or after abort().
  void wait(const Receipt& receipt, Deadline deadline);
  // Blocks until the buffers hold all that was sent: at once, but where there was less room than
  // was said. TransportError as above.
  void flush(Deadline deadline);
  bool flushed() const;
  // The connection is of no use any more.
  bool failed(int peer) const;

  // Shuts all connections, here and at the peers. From any thread once connected; idempotent.
  void abort() noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire
