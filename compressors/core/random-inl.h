// core/random.h's blocks, a vector at a time, bit-identical on every target. Per-target include,
// inside HWY_BEFORE_NAMESPACE.. of a *_simd.cpp file only.
#if defined(THINWIRE_RANDOM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THINWIRE_RANDOM_INL_H_
#undef THINWIRE_RANDOM_INL_H_
#else
#define THINWIRE_RANDOM_INL_H_
#endif

#include <hwy/highway.h>

#include "compressors/core/convert-inl.h"
#include "compressors/core/random.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

// first, first + 1, ... hn::Iota with a variable makes GCC store it lane by lane, and load that.
HWY_INLINE VU32 numbers_from(std::uint32_t first) {
  return hn::Add(hn::Iota(U32(), 0), hn::Set(U32(), first));
}

// dither_word() of Lanes(U32()) consecutive words from `first`.
HWY_INLINE VU32 dither_words(const Dither& dither, std::uint32_t first) {
  const U32 du;
  VU32 x = hn::Xor(numbers_from(first), hn::Set(du, dither.first));
  x = hn::Mul(hn::Xor(x, hn::ShiftRight<16>(x)), hn::Set(du, 0x7FEB352DU));
  x = hn::Add(hn::Xor(x, hn::ShiftRight<15>(x)), hn::Set(du, dither.second));
  x = hn::Mul(x, hn::Set(du, 0x846CA68BU));
  return hn::Xor(x, hn::ShiftRight<16>(x));
}

// dither_bits() of elements [element, element + lanes) and of those 16 further on; `element` is
// less than 16 above a multiple of 32, and so is the last one.
struct DitherPair {
  VU32 low;
  VU32 high;
};
HWY_INLINE DitherPair dither_pair(const Dither& dither, std::uint32_t element) {
  const VU32 words = dither_words(dither, element / 32 * 16 + element % 16);
  return {hn::And(words, hn::Set(U32(), 0xFFFFU)), hn::ShiftRight<16>(words)};
}

// Philox4x32-10 for Lanes(U32()) consecutive blocks from `first`; words[w] is the w-th word of
// each.
#if HWY_TARGET == HWY_SCALAR
HWY_INLINE void random_words(const RandomStream& stream, std::uint64_t first, VU32 words[4]) {
  const auto block = random_block(stream, first);
  for (std::size_t w = 0; w < 4; ++w) words[w] = hn::Set(U32(), block[w]);
}
#else
HWY_INLINE void random_words(const RandomStream& stream, std::uint64_t first, VU32 words[4]) {
  const U32 du;
  const hn::Repartition<std::uint64_t, U32> dw;
  const auto low = [](std::uint64_t x) { return static_cast<std::uint32_t>(x); };
  const auto high = [](std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32); };
  VU32 c0 = numbers_from(low(first));
  VU32 c1 = hn::Set(du, high(first));
  VU32 c2 = hn::Set(du, low(stream.counter));
  VU32 c3 = hn::Set(du, high(stream.counter));
  std::uint32_t k0 = low(stream.key);
  std::uint32_t k1 = high(stream.key);
  const VU32 m0 = hn::Set(du, 0xD2511F53U);
  const VU32 m1 = hn::Set(du, 0xCD9E8D57U);
  const auto multiply = [&](VU32 a, VU32 m, VU32& lo, VU32& hi) HWY_ATTR {
    const auto even = hn::MulEven(a, m);
    const auto odd = hn::MulEven(hn::BitCast(du, hn::ShiftRight<32>(hn::BitCast(dw, a))), m);
    lo = hn::OddEven(hn::BitCast(du, hn::ShiftLeft<32>(odd)), hn::BitCast(du, even));
    hi = hn::OddEven(hn::BitCast(du, odd), hn::BitCast(du, hn::ShiftRight<32>(even)));
  };
  for (int round = 0; round < 10; ++round) {
    VU32 lo0;
    VU32 hi0;
    VU32 lo1;
    VU32 hi1;
    multiply(c0, m0, lo0, hi0);
    multiply(c2, m1, lo1, hi1);
    c0 = hn::Xor(hn::Xor(hi1, c1), hn::Set(du, k0));
    c1 = lo1;
    c2 = hn::Xor(hn::Xor(hi0, c3), hn::Set(du, k1));
    c3 = lo0;
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}
#endif

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#endif  // include guard
