#include "compressors/core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::size_t kAlignmentBytes = 64;
constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

std::size_t generation_bytes(std::int64_t elements) {
  return static_cast<std::size_t>(elements) * sizeof(float);
}

// Zeroed: the first generation must read as zeros, and page faults belong here, not into a step.
std::shared_ptr<float> allocate_generation(std::int64_t elements) {
  const std::size_t bytes = generation_bytes(elements);
  if (bytes == 0) return nullptr;
  const bool huge = bytes >= kHugePageBytes;
  const std::size_t alignment = huge ? kHugePageBytes : kAlignmentBytes;
  const std::size_t padded = (bytes + alignment - 1) / alignment * alignment;
  void* data = std::aligned_alloc(alignment, padded);
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  // Advice only: without huge pages everything still works.
  if (huge) (void)madvise(data, padded, MADV_HUGEPAGE);
#endif
  std::memset(data, 0, padded);
  return {static_cast<float*>(data), [](float* p) { std::free(p); }};
}

}  // namespace

Memory::Memory(std::int64_t elements, MemoryOptions options)
    : elements_(elements), options_(options) {
  if (elements < 0) {
    throw InvalidArgument("memory of " + std::to_string(elements) +
                          " elements: expected 0 or more");
  }
  if (!(options.decay >= 0.0F && options.decay <= 1.0F)) {
    throw InvalidArgument("memory with decay " + std::to_string(options.decay) +
                          ": expected a value in [0, 1]");
  }
  current_.data = allocate_generation(elements);
  if (options_.transactional) next_.data = allocate_generation(elements);
}

std::size_t Memory::bytes() const {
  return generation_bytes(elements_) * ((current_.data ? 1 : 0) + (next_.data ? 1 : 0));
}

std::span<const float> Memory::current() const { return {current_.data.get(), size()}; }

void Memory::adopt(std::shared_ptr<float> storage) {
  if (written_ || !options_.transactional) {
    throw InvalidArgument(std::string("memory given to a residual ") +
                          (written_ ? "inside a step\nhint: commit() first"
                                    : "that keeps one generation\nhint: use transactional=on"));
  }
  next_ = {.data = std::move(storage), .adopted = true};
}

std::span<float> Memory::next() {
  written_ = true;
  if (!options_.transactional) return {current_.data.get(), size()};
  if (!next_.data) next_ = {.data = allocate_generation(elements_)};
  return {next_.data.get(), size()};
}

void Memory::commit() {
  if (written_ && options_.transactional) std::swap(current_, next_);
  // Where memory is adopted, it will be again: a spare of one's own would lie idle.
  if (current_.adopted || next_.adopted) next_ = {};
  written_ = false;
}

void Memory::rollback() {
  if (written_ && !options_.transactional) {
    throw InvalidArgument(
        "rollback of a memory that keeps one generation and was written\n"
        "hint: use transactional=on where steps may be taken back");
  }
  if (next_.adopted) next_ = {};
  written_ = false;
}

void Memory::scale(float factor) {
  if (written_) throw InvalidArgument("memory scaled inside a step\nhint: commit() first");
  for (float& value : std::span(current_.data.get(), size())) value *= factor;
}

void Memory::restore(std::span<const float> residual) {
  if (written_) throw InvalidArgument("memory restored inside a step\nhint: commit() first");
  if (residual.size() != size()) {
    throw InvalidArgument("residual to restore has " + std::to_string(residual.size()) +
                          " elements, expected " + std::to_string(elements_));
  }
  std::copy(residual.begin(), residual.end(), current_.data.get());
}

void Memory::clear() {
  if (written_) throw InvalidArgument("memory cleared inside a step\nhint: commit() first");
  std::fill_n(current_.data.get(), elements_, 0.0F);
}

}  // namespace thinwire
