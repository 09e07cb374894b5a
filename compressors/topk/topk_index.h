// Positions of a sparse selection as bytes: Rice-coded gaps (Golomb 1966, Rice 1979), long ones as
// they are, or a bitmap, whichever is shorter. Layout in FORMAT.md, "topk". Pure functions and
// plain values, thread-safe; the caller owns all memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/bits.h"

namespace thinwire {

struct TopKIndexCoding {
  bool bitmap = false;
  int parameter = 0;  // b, the low bits of a gap that are sent plainly; in [0, 31]
  std::uint64_t bits = 0;

  std::size_t bytes() const { return static_cast<std::size_t>((bits + 7) / 8); }
};

// The bytes that a slot plans for `count` of `n` positions, 0 <= count <= n < 2^32: what
// independent positions take, and six standard deviations more; at most a bitmap. The same on every
// host.
std::size_t plan_topk_indices(std::int64_t n, std::int64_t count);

// The shorter of a bitmap and the gaps of the ascending `indices`, all < n, at the parameter that
// is found from log2(n / count) downhill.
TopKIndexCoding choose_topk_coding(std::int64_t n, std::span<const std::uint32_t> indices);

// Writes the indices to `out` (coding.bytes() long).
void write_topk_indices(const TopKIndexCoding& coding, std::int64_t n,
                        std::span<const std::uint32_t> indices, std::span<std::byte> out);

// Reads `count` ascending indices < n in batches. Any bytes are accepted: CorruptPayload as soon as
// they cannot have been written for these n, count and coding. O(count) time, for a bitmap O(n /
// 64) more; no allocation.
class TopKIndexReader {
 public:
  // bitmap: `parameter` is not looked at.
  TopKIndexReader(bool bitmap, int parameter, std::int64_t n, std::int64_t count,
                  std::span<const std::byte> bytes);

  // Fills out[0, min(out.size(), those left)) and returns how many. After the last one the unused
  // bits of its byte (of the bitmap) are checked to be zero.
  std::size_t next(std::span<std::uint32_t> out);

 private:
  std::uint64_t read_gap(BitReader& bits) const;
  std::size_t next_gaps(std::span<std::uint32_t> out);
  std::size_t next_bits(std::span<std::uint32_t> out);

  bool bitmap_;
  int parameter_;
  std::uint64_t n_;
  std::uint64_t left_;          // indices not yet handed out
  std::uint64_t position_ = 0;  // gaps: the lowest index that may come next; bitmap: word's first
  BitReader bits_;
};

}  // namespace thinwire
