// Freed memory stays with the process, up to what a step's gradients take.
#pragma once

#include <cstddef>

namespace thinwire {

// Gradients that are kept as residuals, and residuals that are freed instead, make the C library
// give memory back to the system and fault it in again in each step (of the char LSTM with 5.46 M
// parameters, 2 to 6 ms of processor time a rank). From now on it keeps up to twice `bytes` and
// 64 MiB of freed memory, and takes blocks of up to `largest_block` from it. Sizes of several calls
// add up. Does nothing where the user has set the allocator's thresholds (environment.h) and where
// the C library is not glibc. Thread-safe.
void keep_freed_memory(std::size_t bytes, std::size_t largest_block);

}  // namespace thinwire
