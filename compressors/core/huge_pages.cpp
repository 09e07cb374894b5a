#include "compressors/core/huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <cstring>
#include <new>

namespace thinwire {
namespace {

constexpr std::size_t kAlignmentBytes = 64;
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

}  // namespace

void FreePages::operator()(std::byte* pages) const { std::free(pages); }

Pages allocate_pages(std::size_t bytes) {
  if (bytes == 0) return nullptr;
  const bool huge = bytes >= kHugePageBytes;
  const std::size_t alignment = huge ? kHugePageBytes : kAlignmentBytes;
  const std::size_t padded = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, padded);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) (void)madvise(data, padded, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, padded);
  return Pages(static_cast<std::byte*>(data));
}

}  // namespace thinwire
