// AlignedBuffer: bytes of one's own, aligned to 64 as codecs want their workspaces. Moves, does not
// copy.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <utility>

namespace thinwire {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  ~AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept
      : data_(std::move(other.data_)), size_(std::exchange(other.size_, 0)) {}
  AlignedBuffer& operator=(AlignedBuffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }
  // Zeroed.
  explicit AlignedBuffer(std::size_t bytes) : AlignedBuffer(uninitialized(bytes)) {
    if (bytes > 0) std::memset(data_.get(), 0, bytes);
  }
  static AlignedBuffer uninitialized(std::size_t bytes) {
    AlignedBuffer buffer;
    buffer.size_ = bytes;
    if (bytes > 0) buffer.data_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
    return buffer;
  }

  std::span<std::byte> bytes() const { return {data_.get(), size_}; }
  std::size_t size() const { return size_; }
  // The first `count` floats.
  std::span<float> floats(std::size_t count) const {
    return {reinterpret_cast<float*>(data_.get()), count};
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace thinwire
