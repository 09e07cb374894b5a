// Handshake: before anything else the ranks of a group compare what must be equal on all of them.
// Collective; called by one thread. Stateless.
#pragma once

#include <string>
#include <vector>

#include "comm/communicator.h"

namespace thinwire {

// One thing that must agree, in words for the message: {"policy", "topk:0.01"}.
struct HandshakeField {
  std::string name;
  std::string value;
};

// Allgathers a hash of the fields, and only where hashes differ the fields themselves.
// MismatchError on every rank, with the same text: each field that differs (at most eight), and who
// has which value. TransportError as the transport gives it.
void shake_hands(Communicator& comm, const std::vector<HandshakeField>& fields, Deadline deadline);

}  // namespace thinwire
