// Scratch of exactly the size asked for, aligned to 64, so that sanitizers see overruns.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <span>

namespace thinwire {

class Scratch {
 public:
  explicit Scratch(std::size_t bytes)
      : data_(static_cast<std::byte*>(std::aligned_alloc(64, (bytes + 127) / 64 * 64))),
        bytes_(bytes) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::span<std::byte> span() { return {data_, bytes_}; }

 private:
  std::byte* data_;
  std::size_t bytes_;
};

}  // namespace thinwire
