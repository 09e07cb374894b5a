// Zeroed memory for what is read and written in every step: 64-byte aligned; from 2 MiB on aligned
// to that, and advised to be of huge pages (Linux), without which everything still works.
#pragma once

#include <cstddef>
#include <memory>

namespace thinwire {

struct FreePages {
  void operator()(std::byte* pages) const;
};
using Pages = std::unique_ptr<std::byte, FreePages>;

// They are there already: page faults do not belong into a step. Null for 0 bytes; std::bad_alloc.
// Thread-safe.
Pages allocate_pages(std::size_t bytes);

}  // namespace thinwire
