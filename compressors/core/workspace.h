// Carves aligned arrays out of the caller's scratch bytes. Not thread-safe; owns nothing.
#pragma once

#include <cstddef>
#include <span>

#include "compressors/core/error.h"

namespace thinwire {

class Workspace {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit Workspace(std::span<std::byte> bytes) : bytes_(bytes) {}

  // Bytes that take<T>(count) consumes at most.
  template <typename T>
  static constexpr std::size_t bytes_for(std::size_t count) {
    return (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

  // Uninitialised; InvalidArgument when the scratch is too small.
  template <typename T>
  std::span<T> take(std::size_t count) {
    const std::size_t size = bytes_for<T>(count);
    if (size > bytes_.size()) {
      throw InvalidArgument("workspace too small: " + std::to_string(size) + " bytes needed, " +
                            std::to_string(bytes_.size()) +
                            " left\nhint: give the codec workspace_bytes(n) bytes");
    }
    auto* data = reinterpret_cast<T*>(bytes_.data());
    bytes_ = bytes_.subspan(size);
    return {data, count};
  }

 private:
  std::span<std::byte> bytes_;
};

}  // namespace thinwire
