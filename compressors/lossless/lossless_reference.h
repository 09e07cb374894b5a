// The lossless codec's loops one element at a time: the oracle of lossless_simd.cpp and the ends of
// its loops. Pure functions.
#pragma once

#include "compressors/lossless/lossless_kernels.h"

namespace thinwire::lossless {

void split_reference(TensorView values, std::byte* raw, std::uint8_t* symbols);
void join_reference(DType type, const std::byte* raw, const std::uint8_t* symbols, TensorView out);
void accumulate_reference(DType type, const std::byte* raw, const std::uint8_t* symbols,
                          float weight, float* out, std::int64_t n);
void add_residual_reference(TensorView grad, const float* residual, float decay, float* v);

void extend_decode_table_reference(DecodeTable& table);

// A stream being written: `used` bits, fewer than 8, wait for their byte.
struct StreamWriter {
  std::byte* out = nullptr;
  std::uint64_t bits = 0;
  std::uint32_t used = 0;
};
// Writes the codes and, in the last byte, zeros.
void finish_stream(StreamWriter writer, std::span<const std::uint8_t> symbols, const Codes& codes);

// A stream being read: its next bit is bit `bit` of *in.
struct StreamReader {
  const std::byte* in = nullptr;
  const std::byte* end = nullptr;
  std::uint32_t bit = 0;  // [0, 7]
};
// Decodes the symbols left; whether the stream ends with the byte of the last one.
bool finish_stream(StreamReader reader, const DecodeTable& table, std::span<std::uint8_t> symbols);

}  // namespace thinwire::lossless
