// gather: small values of all ranks, on all ranks. Collective; blocks until the deadline.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace thinwire {

// Rank r's values stand at [r * mine.size(), (r + 1) * mine.size()). As many on every rank;
// TransportError as the transport gives it.
template <typename T>
std::vector<T> gather(Communicator& comm, std::span<const T> mine, Deadline deadline) {
  auto all = std::make_unique<std::vector<T>>(mine.size() * static_cast<std::size_t>(comm.size()));
  try {
    comm.allgather(std::as_bytes(mine), std::as_writable_bytes(std::span(*all)))->wait(deadline);
  } catch (...) {
    if (!comm.traits().survives_failure) {
      // The transport may still write to it: it cannot end what it has begun.
      static_cast<void>(all.release());
    }
    throw;
  }
  return std::move(*all);
}

}  // namespace thinwire
