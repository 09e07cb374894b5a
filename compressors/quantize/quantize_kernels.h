// The inner loops of the quantisers on plain pointers, and the layout of a block (FORMAT.md). Pure
// functions, thread-safe; the caller owns all memory. quantize_simd.cpp and quantize_reference.cpp
// give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

// Codes are packed in groups of 64 elements; the last group of a tensor is filled up with zeros.
inline constexpr std::int64_t kQuantizeGroup = 64;
inline constexpr std::int64_t kQuantizeScaleBytes = 4;

constexpr std::int64_t quantize_group_bytes(int bits) { return bits * kQuantizeGroup / 8; }
// Bytes of a block of `elements` elements: scale, then groups.
constexpr std::int64_t quantize_block_bytes(int bits, std::int64_t elements) {
  const std::int64_t groups = (elements + kQuantizeGroup - 1) / kQuantizeGroup;
  return kQuantizeScaleBytes + groups * quantize_group_bytes(bits);
}
// Bytes of all blocks of an n-element tensor.
constexpr std::int64_t quantize_bytes(int bits, std::int64_t block, std::int64_t n) {
  const std::int64_t rest = n % block;
  return n / block * quantize_block_bytes(bits, block) +
         (rest == 0 ? 0 : quantize_block_bytes(bits, rest));
}

// Largest magnitude of a code; 1 bit holds only a sign.
constexpr int quantize_levels(int bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

// Blocks whose maximum (mean for 1 bit to nearest) is below this send a scale of 0 and stay in the
// residual whole: the reciprocal of the scale must not overflow.
inline constexpr float kQuantizeTiny = 0x1p-100F;
// Scales are made from at most this, so that levels * scale never rounds to Inf.
inline constexpr float kQuantizeHuge = 0x1.fffff0p127F;
// Adding this rounds a small float to an integer, ties to even, in the low bits of the sum.
inline constexpr float kQuantizeMagic = 0x1.8p23F;

struct QuantizeScale {
  float scale = 0;    // on the wire
  float inverse = 0;  // what v is multiplied by
};
constexpr QuantizeScale quantize_scale(float base, int levels) {
  if (base < kQuantizeTiny) return {};
  const float bounded = base < kQuantizeHuge ? base : kQuantizeHuge;
  return {bounded / static_cast<float>(levels), static_cast<float>(levels) / bounded};
}
// Sums of 1-bit blocks add |v| * 2^-12 in 16 lanes (element i in lane i % 16, in order), then halve
// the lanes four times; this is the mean of `elements` <= 4096 of them.
inline constexpr int kQuantizeLanes = 16;
inline constexpr float kQuantizeMeanUnit = 0x1p-12F;
constexpr float quantize_mean(const float* lanes, std::int64_t elements) {
  float sum[kQuantizeLanes] = {};
  for (int j = 0; j < kQuantizeLanes; ++j) sum[j] = lanes[j];
  for (int half = kQuantizeLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0] * (4096.0F / static_cast<float>(elements));
}

struct QuantizeEncode {
  TensorView grad = {};
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;        // n values, 64-byte aligned, or null; may equal residual
  std::byte* blocks = nullptr;  // quantize_bytes(bits, block, n) bytes, any alignment
  int bits = 8;
  std::int64_t block = 256;  // a multiple of 64, at most 4096
  bool stochastic = false;
  RandomStream random = {};  // when stochastic
};

// Returns whether all v were finite; if not, blocks and next are unspecified.
bool quantize_encode(const QuantizeEncode& args);
// Both return false, with `out` unspecified, when a scale is negative, NaN or Inf.
bool quantize_decode(const std::byte* blocks, int bits, std::int64_t block, TensorView out);
bool quantize_accumulate(const std::byte* blocks, int bits, std::int64_t block, float weight,
                         float* out, std::int64_t n);

}  // namespace thinwire
