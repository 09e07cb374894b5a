#include "compressors/core/random.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace thinwire {
namespace {

// Multipliers and Weyl increments of Philox4x32 (Salmon et al., table 2).
constexpr std::uint32_t kMultiply0 = 0xD2511F53;
constexpr std::uint32_t kMultiply1 = 0xCD9E8D57;
constexpr std::uint32_t kWeyl0 = 0x9E3779B9;
constexpr std::uint32_t kWeyl1 = 0xBB67AE85;
constexpr int kRounds = 10;

std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); }

}  // namespace

RandomStream random_stream(std::uint64_t key_hash, std::uint64_t step, std::int32_t sender) {
  const std::array<std::uint64_t, 2> fields = {key_hash, step};
  // The sender has a counter range of its own: streams of two senders never overlap.
  return {.key = XXH3_64bits(fields.data(), sizeof(fields)),
          .counter = static_cast<std::uint32_t>(sender)};
}

Dither make_dither(std::uint64_t key_hash, std::uint64_t step, std::int32_t sender) {
  constexpr std::uint64_t kDither = 0x52455349445541;
  const auto block = random_block(random_stream(key_hash ^ kDither, step, sender), 0);
  return {.first = block[0], .second = block[1]};
}

std::array<std::uint32_t, 4> random_block(const RandomStream& stream, std::uint64_t i) {
  std::array<std::uint32_t, 4> c = {low(i), high(i), low(stream.counter), high(stream.counter)};
  std::uint32_t k0 = low(stream.key);
  std::uint32_t k1 = high(stream.key);
  for (int round = 0; round < kRounds; ++round) {
    const std::uint64_t p0 = std::uint64_t{kMultiply0} * c[0];
    const std::uint64_t p1 = std::uint64_t{kMultiply1} * c[2];
    c = {high(p1) ^ c[1] ^ k0, low(p1), high(p0) ^ c[3] ^ k1, low(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return c;
}

}  // namespace thinwire
