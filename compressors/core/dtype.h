// Element types. Pure values, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace thinwire {

// The numeric value is part of the payload format (FORMAT.md) and never changes.
enum class DType : std::uint8_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kF64 = 3,
  kOther = 255,  // integers, booleans, complex: carried untouched, never compressed
};

constexpr std::size_t size_bytes(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF64:
      return 8;
    case DType::kOther:
      return 1;
  }
  return 0;
}

constexpr bool is_16_bit(DType dtype) { return dtype == DType::kBF16 || dtype == DType::kF16; }

constexpr std::string_view name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "fp32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "fp16";
    case DType::kF64:
      return "fp64";
    case DType::kOther:
      return "other";
  }
  return "invalid";
}

}  // namespace thinwire
