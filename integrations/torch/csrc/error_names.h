// Which class of thinwire.errors mirrors a C++ exception. Pure, thread-safe.
#pragma once

#include <exception>

#include "comm/communicator.h"
#include "compressors/core/error.h"

namespace thinwire {

inline const char* python_class_of(const std::exception& error) {
  const auto is = [&error]<typename T>(T*) { return dynamic_cast<const T*>(&error) != nullptr; };
  if (is(static_cast<PeerLost*>(nullptr))) return "PeerLost";
  if (is(static_cast<PolicyError*>(nullptr))) return "PolicyError";
  if (is(static_cast<CorruptPayload*>(nullptr))) return "CorruptPayload";
  if (is(static_cast<MismatchError*>(nullptr))) return "MismatchError";
  if (is(static_cast<NonFiniteError*>(nullptr))) return "NonFiniteError";
  if (is(static_cast<NotAvailable*>(nullptr))) return "NotAvailable";
  if (is(static_cast<InvalidArgument*>(nullptr))) return "InvalidArgument";
  if (is(static_cast<TransportError*>(nullptr))) return "TransportError";
  return "Error";
}

}  // namespace thinwire
