// Counter-based randomness: Dither for what is rounded in every step, else Philox4x32-10 (Salmon et
// al., SC 2011). A stream is fixed by (key hash, step, sender); the i-th block depends on nothing
// else, so any thread or SIMD lane may compute it. Pure functions, thread-safe.
#pragma once

#include <array>
#include <cstdint>

namespace thinwire {

struct RandomStream {
  std::uint64_t key = 0;      // see random_stream()
  std::uint64_t counter = 0;  // high half of the Philox counter
};

// `sender` is -1 where all ranks must draw the same.
RandomStream random_stream(std::uint64_t key_hash, std::uint64_t step, std::int32_t sender);

// Block i of the stream: four independent uniform 32-bit words.
std::array<std::uint32_t, 4> random_block(const RandomStream& stream, std::uint64_t i);

// Random bits for rounding, so cheap that the pass which rounds stays bound by memory: a keyed hash
// of the element's number, by Wellons' 32-bit finaliser "lowbias32" (2018), of which two elements
// 16 apart take a half each. Of one key the bits of different elements pass for independent; it is
// not for what is sent.
struct Dither {
  std::uint32_t first = 0;  // see make_dither()
  std::uint32_t second = 0;
};

// `sender` as above. Apart from every random_stream() of the same arguments.
Dither make_dither(std::uint64_t key_hash, std::uint64_t step, std::int32_t sender);

// Of elements 32 i + j and 32 i + j + 16, j < 16: the low and the high half of word 16 i + j.
constexpr std::uint32_t dither_word(const Dither& dither, std::uint32_t word) {
  std::uint32_t x = word ^ dither.first;
  x = (x ^ (x >> 16)) * 0x7FEB352DU;
  x = ((x ^ (x >> 15)) + dither.second) * 0x846CA68BU;
  return x ^ (x >> 16);
}

// 16 random bits.
constexpr std::uint32_t dither_bits(const Dither& dither, std::uint32_t element) {
  const std::uint32_t word = dither_word(dither, element / 32 * 16 + element % 16);
  return element % 32 < 16 ? word & 0xFFFF : word >> 16;
}

}  // namespace thinwire
