// The inner loops of the quantisers on plain pointers, and the layout of their records (FORMAT.md).
// Pure functions, thread-safe; the caller owns all memory. quantize_simd.cpp and
// quantize_reference.cpp give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"
#include "compressors/quantize/quantize.h"
#include "compressors/quantize/quantize_rotation.h"

namespace thinwire {

// Codes are packed in groups of 64 elements; the last group of a tensor is filled up with zeros.
inline constexpr std::int64_t kQuantizeGroup = 64;
// Trits in a byte: 3^5 = 243.
inline constexpr std::int64_t kQuantizeTrits = 5;

// What decides the layout.
struct QuantizeShape {
  QuantizeKind kind = QuantizeKind::kMaxAbs;
  int bits = 8;
  MxElement element = MxElement::kE4M3;
  std::int64_t block = 256;
  bool rotate = false;

  // Elements whose scales and codes stand together: a block, or the blocks of 256 elements.
  constexpr std::int64_t record() const { return kind == QuantizeKind::kMx ? kMaxMxBlock : block; }
  // Elements that are encoded together; a multiple of record().
  constexpr std::int64_t unit() const { return rotate ? rotation_elements(block) : record(); }
  // Bytes of the scales before the codes of a record of `elements` elements.
  constexpr std::int64_t head_bytes(std::int64_t elements) const {
    if (kind == QuantizeKind::kMx) return (elements + block - 1) / block;
    if (kind == QuantizeKind::kNatural) return 1;
    return kind == QuantizeKind::kMaxMin ? 8 : 4;
  }
  constexpr std::int64_t group_bytes() const { return bits * kQuantizeGroup / 8; }
  constexpr std::int64_t record_bytes(std::int64_t elements) const {
    if (kind == QuantizeKind::kTernGrad) {
      return head_bytes(elements) + (elements + kQuantizeTrits - 1) / kQuantizeTrits;
    }
    const std::int64_t groups = (elements + kQuantizeGroup - 1) / kQuantizeGroup;
    return head_bytes(elements) + groups * group_bytes();
  }
  // Bytes of the records of n elements.
  constexpr std::int64_t bytes(std::int64_t n) const {
    const std::int64_t rest = n % record();
    return n / record() * record_bytes(record()) + (rest == 0 ? 0 : record_bytes(rest));
  }
};

struct QuantizeEncode {
  TensorView grad = {};
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;         // n values, 64-byte aligned, or null; may equal residual
  std::byte* records = nullptr;  // shape.bytes(n) bytes, any alignment
  QuantizeShape shape = {};
  bool stochastic = false;
  RandomStream random = {};                    // when stochastic
  const QuantizeRotation* rotation = nullptr;  // when shape.rotate
};

// Returns whether all v were finite; if not, records and next are unspecified.
bool quantize_encode(const QuantizeEncode& args);
// Both return false, with `out` unspecified, at a scale that no encoder writes. `rotation`: the
// sender's, when shape.rotate.
bool quantize_decode(const std::byte* records, const QuantizeShape& shape,
                     const QuantizeRotation* rotation, TensorView out);
bool quantize_accumulate(const std::byte* records, const QuantizeShape& shape,
                         const QuantizeRotation* rotation, float weight, float* out,
                         std::int64_t n);

}  // namespace thinwire
