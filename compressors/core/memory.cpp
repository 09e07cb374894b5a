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
float* allocate_generation(std::int64_t elements) {
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
  return static_cast<float*>(data);
}

}  // namespace

void Memory::Free::operator()(float* p) const { std::free(p); }

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
  generations_[0].reset(allocate_generation(elements));
  if (options_.transactional) generations_[1].reset(allocate_generation(elements));
}

Memory::~Memory() = default;
Memory::Memory(Memory&&) noexcept = default;
Memory& Memory::operator=(Memory&&) noexcept = default;

std::size_t Memory::bytes() const {
  return generation_bytes(elements_) * (options_.transactional ? 2 : 1);
}

std::span<const float> Memory::current() const {
  return {generations_[current_].get(), static_cast<std::size_t>(elements_)};
}

std::span<float> Memory::next() {
  written_ = true;
  const int next = options_.transactional ? 1 - current_ : current_;
  return {generations_[next].get(), static_cast<std::size_t>(elements_)};
}

void Memory::commit() {
  if (!written_) return;
  if (options_.transactional) current_ = 1 - current_;
  written_ = false;
}

void Memory::rollback() {
  if (!written_) return;
  if (!options_.transactional) {
    throw InvalidArgument(
        "rollback of a memory that keeps one generation and was written\n"
        "hint: use transactional=on where steps may be taken back");
  }
  written_ = false;
}

void Memory::scale(float factor) {
  if (written_) throw InvalidArgument("memory scaled inside a step\nhint: commit() first");
  for (float* p = generations_[current_].get(); float& value : std::span(p, current().size())) {
    value *= factor;
  }
}

void Memory::restore(std::span<const float> residual) {
  if (written_) throw InvalidArgument("memory restored inside a step\nhint: commit() first");
  if (residual.size() != current().size()) {
    throw InvalidArgument("residual to restore has " + std::to_string(residual.size()) +
                          " elements, expected " + std::to_string(elements_));
  }
  std::copy(residual.begin(), residual.end(), generations_[current_].get());
}

void Memory::clear() {
  if (written_) throw InvalidArgument("memory cleared inside a step\nhint: commit() first");
  std::fill_n(generations_[current_].get(), elements_, 0.0F);
}

}  // namespace thinwire
