// What an exchange puts on the network, as a list of transfers, so that thousands of ranks need not
// hold its data: recorded from one rank's exchange, started again by any rank of a group. One
// thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "comm/communicator.h"
#include "comm/exchange.h"

namespace thinwire {

struct RecordedTransfer {
  enum class Verb : std::uint64_t { kAllreduce, kAllgather, kAlltoall };
  Verb verb = Verb::kAllreduce;
  std::uint64_t bytes = 0;  // of the tensor, of a rank's part, of a block
};

// A group of `ranks` of which only the first is there: the others send what it sends. Every verb is
// done at once, and its transfer is appended to `log`, which outlives the communicator.
std::unique_ptr<Communicator> make_recorder(int ranks, std::vector<RecordedTransfer>& log);

// Starts the transfer and waits for it, over memory whose contents do not matter: as much as
// memory_bytes() says of it.
void replay(Communicator& comm, const RecordedTransfer& transfer, std::span<std::byte> memory);
std::size_t memory_bytes(const RecordedTransfer& transfer, int ranks);

}  // namespace thinwire
