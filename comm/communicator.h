// Communicator: the verbs a transport offers to the collectives. One object is one private group
// of P ranks; the group's members call the verbs in the same order. Verbs start a transfer and
// return at once; the memory stays the caller's and must outlive the transfer. All ranks wait for
// their transfers in the same order: one may move on only while its receiver waits. One thread at a
// time per Communicator, except abort(), which any thread may call.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "compressors/core/error.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

using Clock = std::chrono::steady_clock;
using Deadline = Clock::time_point;

// The transport failed or the deadline passed. After it the group is unusable but for roll_call()
// and abort().
struct TransportError : Error {
  using Error::Error;
};

// One transfer in flight. Destroying it before it is done is an error of the caller unless the
// communicator was aborted.
class Transfer {
 public:
  virtual ~Transfer() = default;
  // Never blocks; may make progress. A failed transfer is done, too: wait() then throws.
  virtual bool done() = 0;
  // Blocks until done; TransportError on failure or when `deadline` passes.
  virtual void wait(Deadline deadline) = 0;
};

struct CommunicatorTraits {
  // allreduce_sum gives bit-identical results on all ranks.
  bool identical_allreduce = false;
  // A failed group can be abandoned by abort() and the process goes on. MPI: false, the reducer's
  // watchdog reports and the program is ended by the transport.
  bool survives_failure = true;
};

class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::string name() const = 0;  // "loopback", "mpi", "gloo", "c10d:gloo"
  virtual CommunicatorTraits traits() const = 0;

  // In-place sum over ranks; fp32 or fp64.
  virtual std::unique_ptr<Transfer> allreduce_sum(TensorView data) = 0;
  // Every rank's `in` to all, in rank order: out.size() == size() * in.size(), equal everywhere.
  virtual std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                              std::span<std::byte> out) = 0;
  // Block p of `in` goes to rank p; block p of `out` came from rank p. Equal block sizes,
  // in.size() == out.size() == size() * block.
  virtual std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                             std::span<std::byte> out) = 0;

  // After a failure: who is missing? Every survivor calls it; each says "present" over a channel
  // that does not depend on the failed transfers and looks for the others until `grace` passes.
  // Returns the ranks that did not answer, ascending; empty when the transport cannot know.
  virtual std::vector<int> roll_call(std::chrono::milliseconds grace) = 0;

  // Ends transfers in flight with TransportError; idempotent, never throws.
  virtual void abort() noexcept = 0;

  // Bytes this rank has put on the network since construction: payload, the transport's message
  // headers, and the TCP/IP and Ethernet headers of each segment. Computed from the transport's
  // algorithm (comm/ALGORITHMS.md), as if every rank were a host of its own.
  virtual std::uint64_t sent_bytes() const = 0;
};

}  // namespace thinwire
