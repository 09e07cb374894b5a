// A tensor's memory, not owned: pointer, element count, dtype. Any alignment that the dtype's size
// allows is accepted everywhere; elements are contiguous. Shapes live with the layer table, since
// only the low-rank codecs need them.
#pragma once

#include <cstdint>
#include <span>

#include "compressors/core/dtype.h"

namespace thinwire {

enum class Device : std::uint8_t { kCpu = 0, kCuda = 1 };

struct TensorView {
  void* data = nullptr;
  std::int64_t elements = 0;
  DType dtype = DType::kF32;

  std::size_t bytes() const { return static_cast<std::size_t>(elements) * size_bytes(dtype); }
  // [begin, end) in elements.
  TensorView slice(std::int64_t begin, std::int64_t end) const {
    return {static_cast<char*>(data) + begin * static_cast<std::int64_t>(size_bytes(dtype)),
            end - begin, dtype};
  }
};

inline TensorView view(std::span<float> values) {
  return {values.data(), static_cast<std::int64_t>(values.size()), DType::kF32};
}

}  // namespace thinwire
