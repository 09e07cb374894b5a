// Values to codes and back, a vector at a time, for each kind. Per-target include, inside
// quantize_simd.cpp only.
#if defined(THINWIRE_QUANTIZE_CODES_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THINWIRE_QUANTIZE_CODES_INL_H_
#undef THINWIRE_QUANTIZE_CODES_INL_H_
#else
#define THINWIRE_QUANTIZE_CODES_INL_H_
#endif

#include <bit>

#include "compressors/core/convert-inl.h"
#include "compressors/quantize/quantize_scales.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

struct Block {
  const float* values;  // whole groups
  const float* noise;   // as many, when stochastic
  std::uint8_t* codes;  // one a byte
  float* kept;          // what the codes leave of the values, or stand for; or null
  bool stream;          // keeps the rest past the caches
};

// ---- Coders: round() gives the code of v and what it stands for.

// 1 bit.
struct SignCoder {
  VF32 inverse;
  VU32 unit;
  explicit SignCoder(const QuantizeScale& scale)
      : inverse(hn::Set(F32(), scale.inverse)),
        unit(hn::BitCast(U32(), hn::Set(F32(), scale.scale))) {}

  template <bool kStochastic>
  HWY_INLINE VU32 round(VF32 v, VF32 noise, VF32& value) const {
    const U32 du;
    const F32 df;
    const auto sign_bit = hn::Set(du, kSignBit32);
    VU32 sign = hn::And(hn::BitCast(du, v), sign_bit);
    if constexpr (kStochastic) {
      const VF32 sum = hn::Add(hn::Mul(v, inverse), hn::Mul(hn::Set(df, 2.0F), noise));
      // A sum of 0 is positive whatever its sign bit.
      sign = hn::IfThenElseZero(hn::RebindMask(du, hn::Lt(sum, hn::Zero(df))), sign_bit);
    }
    value = hn::BitCast(df, hn::Or(unit, sign));
    return hn::ShiftRight<31>(sign);
  }
};

// Integers times a scale.
struct LevelCoder {
  VF32 inverse;
  VF32 unit;
  VF32 least;
  VF32 most;
  VU32 mask;
  LevelCoder(const QuantizeScale& scale, int bits)
      : inverse(hn::Set(F32(), scale.inverse)),
        unit(hn::Set(F32(), scale.scale)),
        least(hn::Set(F32(), kQuantizeMagic - static_cast<float>(quantize_levels(bits)))),
        most(hn::Set(F32(), kQuantizeMagic + static_cast<float>(quantize_levels(bits)))),
        mask(hn::Set(U32(), (1U << bits) - 1)) {}

  template <bool kStochastic>
  HWY_INLINE VU32 round(VF32 v, VF32 noise, VF32& value) const {
    const VF32 magic = hn::Set(F32(), kQuantizeMagic);
    VF32 rounded = hn::Mul(v, inverse);
    if constexpr (kStochastic) {
      rounded = hn::Add(hn::Add(rounded, noise), magic);
      rounded = hn::Min(hn::Max(rounded, least), most);
    } else {
      rounded = hn::Add(rounded, magic);
    }
    value = hn::Mul(hn::Sub(rounded, magic), unit);
    return hn::And(hn::BitCast(U32(), rounded), mask);
  }
};

// Equal steps from a least value.
struct StepCoder {
  VF32 least;
  VF32 step;
  VF32 inverse;
  VF32 most;
  StepCoder(const QuantizeRange& range, int bits)
      : least(hn::Set(F32(), range.least)),
        step(hn::Set(F32(), range.step)),
        inverse(hn::Set(F32(), range.inverse)),
        most(hn::Set(F32(), kQuantizeMagic + static_cast<float>((1 << bits) - 1))) {}

  template <bool kStochastic>
  HWY_INLINE VU32 round(VF32 v, VF32 noise, VF32& value) const {
    const VF32 magic = hn::Set(F32(), kQuantizeMagic);
    VF32 rounded = hn::Mul(hn::Sub(v, least), inverse);
    if constexpr (kStochastic) rounded = hn::Add(rounded, noise);
    rounded = hn::Min(hn::Max(hn::Add(rounded, magic), magic), most);
    value = hn::Add(least, hn::Mul(hn::Sub(rounded, magic), step));
    return hn::And(hn::BitCast(U32(), rounded), hn::Set(U32(), 0xFFU));
  }
};

// Signed integers, one a byte.
struct LevelReader {
  VF32 unit;
  explicit LevelReader(float scale) : unit(hn::Set(F32(), scale)) {}
  HWY_INLINE VF32 value(const std::uint8_t* codes) const {
    const hn::Rebind<std::int8_t, F32> d8;
    const auto code = hn::LoadU(d8, reinterpret_cast<const std::int8_t*>(codes));
    return hn::Mul(hn::ConvertTo(F32(), hn::PromoteTo(I32(), code)), unit);
  }
};

HWY_INLINE VU32 load_codes(const std::uint8_t* codes) {
  return hn::PromoteTo(U32(), hn::LoadU(U8(), codes));
}

struct StepReader {
  VF32 least;
  VF32 step;
  explicit StepReader(const QuantizeRange& range)
      : least(hn::Set(F32(), range.least)), step(hn::Set(F32(), range.step)) {}
  HWY_INLINE VF32 value(const std::uint8_t* codes) const {
    const auto code = hn::ConvertTo(F32(), hn::BitCast(I32(), load_codes(codes)));
    return hn::Add(least, hn::Mul(code, step));
  }
};

// A sign bit and j: 0, or the power of two of exponent base + j - 1.
struct PowerReader {
  VU32 below;  // the smallest exponent less one
  VU32 mask;
  int sign_shift;
  PowerReader(const QuantizePowers& powers, int bits)
      : below(hn::Set(U32(), powers.base - 1)),
        mask(hn::Set(U32(), (1U << (bits - 1)) - 1)),
        sign_shift(32 - bits) {}
  HWY_INLINE VF32 value_of(VU32 code) const {
    const U32 du;
    const VU32 j = hn::And(code, mask);
    const VU32 power = hn::ShiftLeft<23>(hn::Add(below, j));
    const VU32 magnitude = hn::IfThenZeroElse(hn::Eq(j, hn::Zero(du)), power);
    const VU32 sign = hn::AndNot(mask, code);
    return hn::BitCast(F32(), hn::Or(magnitude, hn::ShiftLeftSame(sign, sign_shift)));
  }
  HWY_INLINE VF32 value(const std::uint8_t* codes) const { return value_of(load_codes(codes)); }
};

struct PowerCoder {
  PowerReader reader;
  VF32 top;
  VU32 base;
  PowerCoder(const QuantizePowers& powers, int bits)
      : reader(powers, bits), top(hn::Set(F32(), powers.top)), base(hn::Set(U32(), powers.base)) {}

  template <bool kStochastic>
  HWY_INLINE VU32 round(VF32 v, VF32 noise, VF32& value) const {
    static_assert(kStochastic);
    const F32 df;
    const U32 du;
    const VF32 a = hn::Min(hn::Abs(v), top);
    const VU32 exponent = hn::ShiftRight<23>(hn::BitCast(du, a));
    const VF32 gap = hn::BitCast(df, hn::ShiftLeft<23>(hn::Max(exponent, base)));
    const auto below = hn::Lt(exponent, base);
    const VF32 over = hn::IfThenElse(hn::RebindMask(df, below), a, hn::Sub(a, gap));
    const VF32 half = hn::Mul(hn::Set(df, 0.5F), gap);
    const auto up = hn::Lt(hn::Add(hn::Mul(noise, gap), half), over);
    const VU32 one = hn::Set(du, 1U);
    const VU32 floor = hn::IfThenZeroElse(below, hn::Add(hn::Sub(exponent, base), one));
    const VU32 j = hn::Add(floor, hn::IfThenElseZero(hn::RebindMask(du, up), one));
    const VU32 sign = hn::ShiftRight<31>(hn::BitCast(du, v));
    const VU32 code = hn::Or(j, hn::ShiftLeftSame(sign, 31 - reader.sign_shift));
    value = reader.value_of(code);
    return code;
  }
};

// Small floats.
struct MxReader {
  VU32 bias;
  VU32 mask;
  VF32 one;  // twice the unit of subnormals' place
  VF32 unit;
  VU32 largest_subnormal;
  int shift;  // of the mantissa, to where fp32 has it
  int sign_shift;
  MxReader(const MxFormat& format, float scale)
      : bias(hn::Set(U32(), static_cast<std::uint32_t>(127 - format.bias) << 23)),
        mask(hn::Set(U32(), (1U << (format.bits - 1)) - 1)),
        one(hn::Set(F32(),
                    std::bit_cast<float>(static_cast<std::uint32_t>(128 - format.bias) << 23))),
        unit(hn::Set(F32(), scale)),
        largest_subnormal(hn::Set(U32(), (1U << format.mantissa) - 1)),
        shift(23 - format.mantissa),
        sign_shift(32 - format.bits) {}
  HWY_INLINE VF32 value_of(VU32 code) const {
    const U32 du;
    const F32 df;
    const VU32 magnitude = hn::And(code, mask);
    const VU32 shifted = hn::ShiftLeftSame(magnitude, shift);
    const VF32 normal = hn::BitCast(df, hn::Add(shifted, bias));
    const VF32 subnormal = hn::Sub(hn::BitCast(df, hn::Add(shifted, hn::BitCast(du, one))), one);
    const auto is_normal = hn::Gt(magnitude, largest_subnormal);
    const VF32 value = hn::IfThenElse(hn::RebindMask(df, is_normal), normal, subnormal);
    const VU32 sign = hn::ShiftLeftSame(hn::AndNot(mask, code), sign_shift);
    return hn::Mul(hn::BitCast(df, hn::Or(hn::BitCast(du, value), sign)), unit);
  }
  HWY_INLINE VF32 value(const std::uint8_t* codes) const { return value_of(load_codes(codes)); }
};

struct MxCoder {
  MxReader reader;
  VF32 inverse;
  VU32 smallest;  // exponent of the smallest normal float
  VU32 largest;   // code
  VU32 to_magic;  // exponents between a float and 2^23 of its steps
  VU32 to_step;   // between a float and its step
  MxCoder(const MxFormat& format, std::uint8_t scale)
      : reader(format, mx_unit(scale)),
        inverse(hn::Set(F32(), mx_inverse(scale))),
        smallest(hn::Set(U32(), static_cast<std::uint32_t>(128 - format.bias) << 23)),
        largest(hn::Set(U32(), mx_largest_code(format))),
        to_magic(hn::Set(U32(), static_cast<std::uint32_t>(23 - format.mantissa) << 23)),
        to_step(hn::Set(U32(), static_cast<std::uint32_t>(format.mantissa) << 23)) {}

  template <bool kStochastic>
  HWY_INLINE VU32 round(VF32 v, VF32 noise, VF32& value) const {
    const F32 df;
    const U32 du;
    const VF32 x = hn::Mul(v, inverse);
    VF32 a = hn::Abs(x);
    const VU32 exponent = hn::Max(hn::And(hn::BitCast(du, a), hn::Set(du, kInfBits32)), smallest);
    const VU32 magic = hn::Or(hn::Add(exponent, to_magic), hn::Set(du, 0x400000U));
    if constexpr (kStochastic) {
      const VU32 step = hn::Sub(exponent, to_step);
      a = hn::Add(a, hn::Mul(noise, hn::BitCast(df, step)));
    }
    const VU32 steps = hn::Sub(hn::BitCast(du, hn::Add(a, hn::BitCast(df, magic))), magic);
    const VU32 above = hn::ShiftRightSame(hn::Sub(exponent, smallest), reader.shift);
    const VU32 magnitude = hn::Min(hn::Add(steps, above), largest);
    const VU32 sign = hn::ShiftRight<31>(hn::BitCast(du, x));
    const VU32 code = hn::Or(magnitude, hn::ShiftLeftSame(sign, 31 - reader.sign_shift));
    value = reader.value_of(code);
    return code;
  }
};

// ---- Loops over [begin, end), whole vectors.

// kRest: keeps what the codes leave, else what they stand for.
template <bool kStochastic, bool kRest, class Coder>
HWY_INLINE void write_codes(const Coder& coder, const Block& block, std::int64_t begin,
                            std::int64_t end) {
  const F32 df;
  const auto step = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = begin; i < end; i += step) {
    const VF32 v = hn::LoadU(df, block.values + i);
    VF32 noise = v;
    if constexpr (kStochastic) noise = hn::LoadU(df, block.noise + i);
    VF32 value = v;
    const VU32 code = coder.template round<kStochastic>(v, noise, value);
    hn::StoreU(hn::U8FromU32(code), U8(), block.codes + i);
    if (block.kept == nullptr) continue;
    if constexpr (kRest) value = hn::Sub(v, value);
    block.stream ? hn::Stream(value, df, block.kept + i) : hn::StoreU(value, df, block.kept + i);
  }
}

template <class Reader>
HWY_INLINE void read_codes(const Reader& reader, const std::uint8_t* codes, std::int64_t begin,
                           std::int64_t end, float* values) {
  const auto step = static_cast<std::int64_t>(hn::Lanes(F32()));
  for (std::int64_t i = begin; i < end; i += step) {
    hn::StoreU(reader.value(codes + i), F32(), values + i);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();
#endif
