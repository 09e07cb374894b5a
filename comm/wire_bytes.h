// What a message costs on an Ethernet wire, and what the usual algorithms send: the arithmetic
// behind Communicator::sent_bytes() (comm/ALGORITHMS.md). Pure functions, thread-safe. All counts
// are bytes sent by one rank; acknowledgements are not counted.
#pragma once

#include <algorithm>
#include <cstdint>

namespace thinwire {

// TCP over IPv4 over Ethernet, MTU 1500: 1448 bytes of data a segment beside 14 (Ethernet) + 20
// (IPv4) + 20 (TCP) + 12 (timestamps) bytes of headers.
inline constexpr std::uint64_t kSegmentDataBytes = 1448;
inline constexpr std::uint64_t kSegmentHeaderBytes = 66;

// One message of `bytes`, the transport's own header included. A message begins a new segment.
constexpr std::uint64_t tcp_wire_bytes(std::uint64_t bytes) {
  const std::uint64_t segments = (bytes + kSegmentDataBytes - 1) / kSegmentDataBytes;
  return bytes + segments * kSegmentHeaderBytes;
}

// How a transport frames a message: `header` bytes before it on the same stream, and
// `control_bytes` in `control_messages` separate small ones.
struct MessageFraming {
  std::uint64_t header = 0;
  std::uint64_t control_bytes = 0;
  std::uint64_t control_messages = 0;
};

// Gloo's TCP transport: a preamble of six 8-byte words before the data, and two preambles alone
// that say "ready to send" and "ready to receive".
inline constexpr MessageFraming kGlooFraming{
    .header = 48, .control_bytes = 2 * 48, .control_messages = 2};

// `count` messages of `bytes` each.
constexpr std::uint64_t messages_wire_bytes(std::uint64_t count, std::uint64_t bytes,
                                            const MessageFraming& framing) {
  return count * (tcp_wire_bytes(bytes + framing.header) + framing.control_bytes +
                  framing.control_messages * kSegmentHeaderBytes);
}

// Ring allreduce of `bytes` over P ranks: P - 1 steps of reduce-scatter and P - 1 of allgather, a
// P-th of the data each.
constexpr std::uint64_t ring_allreduce_wire_bytes(std::uint64_t bytes, int ranks,
                                                  const MessageFraming& framing = {}) {
  if (ranks < 2 || bytes == 0) {
    return 0;
  }
  const auto p = static_cast<std::uint64_t>(ranks);
  return messages_wire_bytes(2 * (p - 1), (bytes + p - 1) / p, framing);
}

// The same as Gloo does it: in segments of at most 1 MiB, at least two a rank.
constexpr std::uint64_t gloo_allreduce_wire_bytes(std::uint64_t bytes, int ranks) {
  if (ranks < 2 || bytes == 0) {
    return 0;
  }
  const auto p = static_cast<std::uint64_t>(ranks);
  const std::uint64_t segments = std::max<std::uint64_t>(2, ((bytes >> 20U) + p) / p);
  return messages_wire_bytes(2 * (p - 1) * segments, (bytes + p * segments - 1) / (p * segments),
                             kGlooFraming);
}

// Allgather of `bytes` a rank, by a ring or directly: P - 1 messages.
constexpr std::uint64_t allgather_wire_bytes(std::uint64_t bytes, int ranks,
                                             const MessageFraming& framing = {}) {
  if (ranks < 2 || bytes == 0) {
    return 0;
  }
  return messages_wire_bytes(static_cast<std::uint64_t>(ranks) - 1, bytes, framing);
}

// Direct all-to-all of blocks of `bytes`: P - 1 messages.
constexpr std::uint64_t alltoall_wire_bytes(std::uint64_t block, int ranks,
                                            const MessageFraming& framing = {}) {
  return allgather_wire_bytes(block, ranks, framing);
}

}  // namespace thinwire
