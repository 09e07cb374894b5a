// Prefix codes over bytes: Huffman's lengths, bounded, and the canonical code that they stand for.
// Codes are filled into a stream from the lowest bit up, their first bit lowest. Pure functions,
// thread-safe; the same input gives the same code everywhere.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace thinwire::lossless {

inline constexpr std::size_t kSymbols = 256;
// Keeps the decoder's table within half of a first-level cache.
inline constexpr int kMaxLength = 11;

using Counts = std::array<std::uint32_t, kSymbols>;
using Lengths = std::array<std::uint8_t, kSymbols>;  // bits; 0: the symbol has no code

// Lengths in [1, kMaxLength] for symbols that occur; at least two must. Complete: the sum of
// 2^-length is 1.
Lengths code_lengths(const Counts& counts);
// Whether every sequence of bits is a sequence of codes, and in one way.
bool is_complete(const Lengths& lengths);

// The codes, first bit lowest: of equal length in the order of the symbols, shorter ones first.
struct Code {
  std::uint16_t bits = 0;
  std::uint16_t length = 0;
};
using Codes = std::array<Code, kSymbols>;
Codes make_codes(const Lengths& lengths);

// What the next kMaxLength bits of a stream begin with: as many whole codes as fit, at most four.
// 64 bits, the members from the lowest up.
struct alignas(8) Decoded {
  // The bits of some codes, lowest as shifts take them, and how many these are, as one number, so
  // that both add up at once.
  using Run = std::uint16_t;
  static constexpr Run run(int symbols, int bits) { return static_cast<Run>(bits | symbols << 8); }

  Run all;
  Run first;
  std::uint32_t symbols;  // a byte each, the first lowest; those beyond count() are unspecified

  std::uint32_t count() const { return all >> 8U; }   // [1, 4]
  std::uint32_t bits() const { return all & 0xFFU; }  // [1, kMaxLength]
  std::uint32_t first_bits() const { return first & 0xFFU; }
};
static_assert(sizeof(Decoded) == 8);
using DecodeTable = std::array<Decoded, std::size_t{1} << kMaxLength>;
// Every window's first symbol alone, all being first. `lengths` must be complete.
void fill_decode_table(const Lengths& lengths, DecodeTable& table);

}  // namespace thinwire::lossless
