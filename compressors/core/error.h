// The exception family. Every message says what happened, which rank and tensor (where known),
// what was expected, what was got, and after a line "hint: " what to do. Thread-safe to throw and
// copy.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace thinwire {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The caller broke a precondition: wrong dtype, size, state or order of calls.
struct InvalidArgument : Error {
  using Error::Error;
};

// A policy or codec spec that cannot be read or cannot be obeyed.
struct PolicyError : Error {
  using Error::Error;
};

// Bytes that no encoder of this version wrote, or damaged ones. The output of the failed decode is
// unspecified; memory, plans and communicators are untouched.
struct CorruptPayload : Error {
  using Error::Error;
};

// Ranks disagree on version, policy or layer table. Nothing was exchanged but the handshake.
struct MismatchError : Error {
  using Error::Error;
};

// NaN or Inf in a gradient under nonfinite=error. Raised on every rank at the same step.
struct NonFiniteError : Error {
  using Error::Error;
};

// A peer died or did not answer before the deadline. Memory is at a committed step.
struct PeerLost : Error {
  PeerLost(const std::string& what, std::vector<int> lost_ranks, std::uint64_t at_step)
      : Error(what), ranks(std::move(lost_ranks)), step(at_step) {}
  std::vector<int> ranks;  // those that did not answer the roll call; empty when unknown
  std::uint64_t step;
};

// Known to the design, not in this version.
struct NotAvailable : Error {
  using Error::Error;
};

}  // namespace thinwire
