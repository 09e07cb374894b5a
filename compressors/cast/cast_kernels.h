// The inner loops of the cast codecs on plain pointers. Pure functions, thread-safe; the caller
// owns all memory. cast_simd.cpp and cast_reference.cpp give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compressors/core/tensor_view.h"

namespace thinwire {

struct CastEncode {
  TensorView grad;
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;       // n values, 64-byte aligned, or null; may equal residual
  std::byte* codes = nullptr;  // 2 n bytes, any alignment
  DType type = DType::kBF16;   // kBF16 or kF16
};

// Returns whether all v were finite; if not, codes and next are unspecified.
bool cast_encode(const CastEncode& args);
// out[i] = codes[i], rounded to out's dtype.
void cast_decode(const std::byte* codes, DType type, TensorView out);
// out[i] += weight * codes[i].
void cast_accumulate(const std::byte* codes, DType type, float weight, float* out, std::int64_t n);

}  // namespace thinwire
