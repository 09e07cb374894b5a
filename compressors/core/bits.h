// Bits filled into bytes from the lowest up. Plain values over the caller's memory, which they do
// not own; one thread at a time.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "compressors/core/error.h"

namespace thinwire {

static_assert(std::endian::native == std::endian::little, "words are stored as they lie");

// Bits in, whole bytes out, the last one by finish().
class BitWriter {
 public:
  // Fewer than 8 bits wait in word_, so that this many more fit.
  static constexpr int kEarlyBits = 56;

  explicit BitWriter(std::byte* out) : begin_(out), out_(out) {}

  // length in [0, kEarlyBits]; bits above it are zero. Stores nothing beyond the bits put.
  void put(std::uint64_t bits, int length) {
    word_ |= bits << fill_;
    fill_ += length;
    const auto bytes = static_cast<std::size_t>(fill_ / 8);
    std::memcpy(out_, &word_, bytes);
    advance();
  }

  // The same, but stores a whole word: only where more bits than that are yet to come.
  void put_early(std::uint64_t bits, int length) {
    word_ |= bits << fill_;
    fill_ += length;
    std::memcpy(out_, &word_, sizeof word_);
    advance();
  }

  // Bytes written in all.
  std::size_t finish() {
    if (fill_ > 0) std::memcpy(out_, &word_, 1);
    return static_cast<std::size_t>(out_ - begin_) + (fill_ > 0 ? 1 : 0);
  }

 private:
  void advance() {
    out_ += fill_ / 8;
    // fill_ is below 64.
    word_ >>= fill_ & ~7;
    fill_ &= 7;
  }

  std::byte* begin_;
  std::byte* out_;
  std::uint64_t word_ = 0;
  int fill_ = 0;
};

// Bits read ahead of [data, end), never beyond. A copy of its own lets a loop keep it in registers.
struct BitReader {
  std::uint64_t buffer = 0;  // the next bit lowest; unspecified from bit `buffered` on
  int buffered = 0;          // how many
  const std::byte* data = nullptr;
  const std::byte* end = nullptr;

  // At least 56 bits ahead, or all there are.
  void refill() {
    if (end - data >= 8) [[likely]] {
      // Bits of the word above `buffered` are in the buffer too; the next refill ors the same
      // again.
      std::uint64_t word = 0;
      std::memcpy(&word, data, sizeof word);
      buffer |= word << buffered;
      const int bytes = (63 - buffered) / 8;
      data += bytes;
      buffered += 8 * bytes;
      return;
    }
    while (buffered <= 56 && data < end) {
      buffer |= static_cast<std::uint64_t>(*data++) << buffered;
      buffered += 8;
    }
  }

  // count in [0, buffered], below 64.
  void skip(int count) {
    buffer >>= count;
    buffered -= count;
  }

  // count in [0, 32]. CorruptPayload where there are fewer.
  std::uint64_t take(int count) {
    if (buffered < count) refill();
    if (buffered < count) {
      throw CorruptPayload(
          "bits cut short\nhint: sender and receiver must use the same codec, version and tensor");
    }
    const std::uint64_t value = buffer & ((std::uint64_t{1} << count) - 1);
    skip(count);
    return value;
  }

  // Whether the unused bits of the byte last read from are zero.
  bool padded_with_zeros() const {
    return (buffer & ((std::uint64_t{1} << (buffered % 8)) - 1)) == 0;
  }
};

}  // namespace thinwire
