// The inner loops of the cosine transform on plain pointers, and the layout of a tile's record
// (FORMAT.md). Pure functions, thread-safe; the caller owns all memory. dct_simd.cpp and
// dct_reference.cpp give the same bits.
//
// The transform of n = 2^m elements is n^(1/2) times the orthonormal one, in the recursive
// factorisation into sums, differences and rotations of Plonka and Tasche (Fast and numerically
// stable algorithms for discrete cosine transforms, Linear Algebra Appl. 394, 2005).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "compressors/core/tensor_view.h"
#include "compressors/dct/dct.h"

namespace thinwire {

// Tiles that are transformed side by side.
inline constexpr int kDctTogether = 16;
// Bounds what enters a transform, so that neither it nor v - decoded can overflow: |decoded| is at
// most 4096^(1/2) * 2^96 and roundings, below 2^103, half the last place of the largest finite
// value.
inline constexpr float kDctClip = 0x1p96F;
// Bits of 2^103, above all coefficients that a sender can have: 4096^(1/2) * 2^96 and roundings.
inline constexpr std::uint32_t kDctLimitBits = (127U + 103U) << 23;

inline constexpr float kDctSqrt2 = 0x1.6a09e6p0F;
// 2^(-m/2) for n = 2^m.
constexpr float dct_scale(int tile) {
  const int m = std::countr_zero(static_cast<unsigned>(tile));
  const float power = std::bit_cast<float>((127U - static_cast<unsigned>(m) / 2) << 23);
  return m % 2 == 0 ? power : power * (kDctSqrt2 / 2);
}

// Rotations of the transforms of n elements: cos and sin of (2 j + 1) pi / (4 n) for j in
// [0, n/2), nearest fp32. n: a power of two in [2, kMaxDctTile / 2].
struct DctTwiddles {
  const float* cos;
  const float* sin;
};
DctTwiddles dct_twiddles(int n);

// Sending 8 bits: coefficients are multiples of a scale, which has the 8 bits of a bf16 so that the
// products are exact.
struct DctScale {
  std::uint16_t bits = 0;  // of the bf16, on the wire
  float scale = 0;
  float inverse = 0;
};
// `largest`: bits of the tile's largest magnitude. Below 2^-100 nothing is sent: the inverse must
// not overflow.
DctScale dct_q8_scale(std::uint32_t largest);
// Adding this rounds a small float to an integer, ties to even, in the low bits of the sum.
inline constexpr float kDctMagic = 0x1.8p23F;

struct DctShape {
  int tile = 64;
  int keep = 32;  // in [1, tile]
  DctValues values = DctValues::kBF16;

  int index_bits() const { return std::countr_zero(static_cast<unsigned>(tile)); }
  // Positions are a bitmap or indices, whichever is shorter; nothing where all are kept.
  bool bitmap() const { return tile <= keep * index_bits(); }
  int position_bytes() const {
    if (keep == tile) return 0;
    return ((bitmap() ? tile : keep * index_bits()) + 7) / 8;
  }
  int value_bytes() const {
    if (values == DctValues::kF32) return 4 * keep;
    return values == DctValues::kBF16 ? 2 * keep : 2 + keep;
  }
  std::int64_t record_bytes() const { return position_bytes() + value_bytes(); }
};

// Calls f(shape, begin, tiles) for the tiles of n elements in order, at most kDctTogether a call;
// stops at the first that returns false. What no whole tile holds is cut into tiles of decreasing
// powers of two, of which the same share is kept, rounded up.
template <typename F>
bool for_each_dct_run(const DctShape& shape, std::int64_t n, F&& f) {
  const std::int64_t whole = n / shape.tile * shape.tile;
  std::int64_t begin = 0;
  while (begin < whole) {
    const std::int64_t left = (whole - begin) / shape.tile;
    const int tiles = left < kDctTogether ? static_cast<int>(left) : kDctTogether;
    if (!f(shape, begin, tiles)) return false;
    begin += std::int64_t{shape.tile} * tiles;
  }
  for (int tile = shape.tile / 2; tile > 0; tile /= 2) {
    if (((n - whole) & tile) == 0) continue;
    const int keep = (shape.keep * tile + shape.tile - 1) / shape.tile;
    if (!f(DctShape{tile, keep, shape.values}, begin, 1)) return false;
    begin += tile;
  }
  return true;
}

// Bytes of the records of n elements.
std::int64_t dct_bytes(const DctShape& shape, std::int64_t n);
// Scratch of all kernels for n elements, in floats.
std::size_t dct_scratch_floats(const DctShape& shape, std::int64_t n);

struct DctEncode {
  TensorView grad = {};
  const float* residual = nullptr;  // n values or null
  float decay = 1.0F;
  float* next = nullptr;         // n values or null; may equal residual or grad.data
  std::byte* records = nullptr;  // dct_bytes(shape, n) bytes, any alignment
  DctShape shape = {};
  float* scratch = nullptr;  // dct_scratch_floats(shape, n), 64-byte aligned
};

// Returns whether all v were finite; if not, records and next are unspecified.
bool dct_encode(const DctEncode& args);
// Both return false, with `out` unspecified, at a record that no encoder writes.
bool dct_decode(const std::byte* records, const DctShape& shape, float* scratch, TensorView out);
bool dct_accumulate(const std::byte* records, const DctShape& shape, float* scratch, float weight,
                    float* out, std::int64_t n);

}  // namespace thinwire
