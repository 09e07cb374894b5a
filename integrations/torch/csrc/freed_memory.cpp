#include "integrations/torch/csrc/freed_memory.h"

#include <malloc.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "compressors/core/environment.h"

namespace thinwire {

void keep_freed_memory(std::size_t bytes, std::size_t largest_block) {
#ifdef __GLIBC__
  if (environment_sets_malloc()) {
    return;
  }
  constexpr std::size_t kBeside = std::size_t{64} << 20U;
  constexpr std::size_t kUsualLargest = std::size_t{32} << 20U;  // what glibc goes up to by itself
  constexpr std::size_t kAlignment = 4096;  // more than an allocator adds to a block
  constexpr auto kMost = static_cast<std::size_t>(std::numeric_limits<int>::max());
  static std::mutex mutex;
  static std::size_t all = 0;
  static std::size_t largest = kUsualLargest;
  const std::lock_guard lock(mutex);
  all += bytes;
  largest = std::max(largest, largest_block + kAlignment);
  mallopt(M_MMAP_THRESHOLD, static_cast<int>(std::min(largest, kMost)));
  mallopt(M_TRIM_THRESHOLD, static_cast<int>(std::min(2 * all + kBeside, kMost)));
#else
  static_cast<void>(bytes);
  static_cast<void>(largest_block);
#endif
}

}  // namespace thinwire
