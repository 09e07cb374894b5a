// How often operator new was called in this process. Thread-safe.
#pragma once

#include <cstdint>

namespace thinwire {

std::int64_t allocations();

}  // namespace thinwire
