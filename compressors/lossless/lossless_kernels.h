// The inner loops of the lossless codec on plain pointers, and the layout of a chunk (FORMAT.md).
// Pure functions, thread-safe; the caller owns all memory. lossless_simd.cpp and
// lossless_reference.cpp give the same bits.
//
// A value's bits are turned left by one, which brings the exponent together: its byte, the highest,
// is the value's symbol (fp16: five bits of exponent and three of mantissa), and all below it, the
// rest of the mantissa and the sign, is its raw part.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/tensor_view.h"
#include "compressors/lossless/lossless_code.h"

namespace thinwire::lossless {

// Elements that share a code: their symbols and two bytes of each value lie in a second-level
// cache.
inline constexpr std::int64_t kChunk = 65536;

// Bytes of the raw parts of n values: for fp32 the lower halves, then the bytes above them; else a
// byte a value.
constexpr std::int64_t raw_bytes(DType type, std::int64_t n) {
  return n * (static_cast<std::int64_t>(size_bytes(type)) - 1);
}
// Least symbol of a value that is not finite.
constexpr std::size_t first_nonfinite(DType type) { return type == DType::kF16 ? 0xF8 : 0xFF; }

// fp32, bf16 or fp16 values into symbols and raw parts.
void split(TensorView values, std::byte* raw, std::uint8_t* symbols);
// The values of `type` again, as they are in an `out` of the same dtype, else rounded once.
// `past_caches`, with an `out` at a multiple of 64 bytes: what is not rounded is written around the
// caches, and hwy::FlushStream() must follow the last.
void join(DType type, const std::byte* raw, const std::uint8_t* symbols, TensorView out,
          bool past_caches);
// out[i] += weight * value.
void accumulate(DType type, const std::byte* raw, const std::uint8_t* symbols, float weight,
                float* out, std::int64_t n);
// v = grad + decay * residual. `v` and grad do not overlap.
void add_residual(TensorView grad, const float* residual, float decay, float* v);

// Symbols are coded in four streams, each a quarter of the chunk, so that four run at once.
inline constexpr std::size_t kStreams = 4;
using Streams = std::array<std::size_t, kStreams>;  // one number each
// First symbol of stream s of n symbols; stream kStreams begins at n.
constexpr std::int64_t stream_begin(std::int64_t n, std::size_t s) {
  const std::int64_t begin = static_cast<std::int64_t>(s) * ((n + 3) / 4);
  return begin < n ? begin : n;
}

// Adds to `counts` how often each stream has each symbol.
void count_symbols(std::span<const std::uint8_t> symbols, std::array<Counts, kStreams>& counts);
// Writes the streams, one behind the other, of exactly `sizes` bytes.
void encode_streams(std::span<const std::uint8_t> symbols, const Codes& codes, const Streams& sizes,
                    std::byte* out);
// Turns a table of single symbols into one of as many as fit a window, at most four.
void extend_decode_table(DecodeTable& table);
// Fills `symbols` from streams of `sizes` bytes. False, with `symbols` unspecified, when a stream
// does not end where its last symbol does.
bool decode_streams(const std::byte* in, const Streams& sizes, const DecodeTable& table,
                    std::span<std::uint8_t> symbols);

}  // namespace thinwire::lossless
