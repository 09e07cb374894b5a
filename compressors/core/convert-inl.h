// SIMD loads and stores of gradients of any dtype as fp32, bit-identical to convert.h on every
// target. Per-target include, inside HWY_BEFORE_NAMESPACE.. of a *_simd.cpp file only.
#if defined(THINWIRE_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THINWIRE_CONVERT_INL_H_
#undef THINWIRE_CONVERT_INL_H_
#else
#define THINWIRE_CONVERT_INL_H_
#endif

#include <hwy/highway.h>

#include "compressors/core/convert.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// At most 16 lanes, so that 16, 32 and 64 are multiples of the lane count.
using F32 = hn::CappedTag<float, 16>;
using U32 = hn::RebindToUnsigned<F32>;
using I32 = hn::RebindToSigned<F32>;
using U16 = hn::Rebind<std::uint16_t, F32>;
using U8 = hn::Rebind<std::uint8_t, F32>;
using VF32 = hn::Vec<F32>;
using VU32 = hn::Vec<U32>;

HWY_INLINE VU32 load_bits16(const void* p) {
  return hn::PromoteTo(U32(), hn::LoadU(U16(), static_cast<const std::uint16_t*>(p)));
}

HWY_INLINE void store_bits16(VU32 bits, void* p) {
  hn::StoreU(hn::DemoteTo(U16(), hn::BitCast(I32(), bits)), U16(), static_cast<std::uint16_t*>(p));
}

HWY_INLINE VF32 float_from_bf16_bits(VU32 bits) {
  return hn::BitCast(F32(), hn::ShiftLeft<16>(bits));
}

HWY_INLINE VF32 float_from_fp16_bits(VU32 bits) {
  const U32 du;
  const auto sign = hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000U)));
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFU));
  const auto shifted = hn::ShiftLeft<13>(magnitude);
  const auto normal = hn::Add(shifted, hn::Set(du, 112U << 23));
  const auto special = hn::Or(shifted, hn::Set(du, kInfBits32));
  const F32 df;
  const auto tiny = hn::BitCast(
      du,
      hn::Sub(hn::BitCast(df, hn::Add(magnitude, hn::Set(du, 0x3F000000U))), hn::Set(df, 0.5F)));
  auto out = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 0x0400U)), tiny, normal);
  out = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x7BFFU)), special, out);
  return hn::BitCast(df, hn::Or(sign, out));
}

// IEEE 754 round to nearest even; finite values saturate when kSaturate, and then NaN and Inf give
// some finite value.
template <bool kSaturate>
HWY_INLINE VU32 bf16_bits(VF32 x) {
  const U32 du;
  auto bits = hn::BitCast(du, x);
  const auto magnitude = hn::And(bits, hn::Set(du, ~kSignBit32));
  if (kSaturate) {
    const I32 di;
    // Above this bound the rounding below would carry into the exponent of Inf.
    const auto bounded = hn::Min(hn::BitCast(di, magnitude), hn::Set(di, 0x7F7F7FFF));
    bits = hn::Or(hn::BitCast(du, bounded), hn::And(bits, hn::Set(du, kSignBit32)));
  }
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1U));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, odd), hn::Set(du, 0x7FFFU)));
  if (kSaturate) return rounded;
  const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40U));
  return hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, kInfBits32)), nan, rounded);
}

template <bool kSaturate>
HWY_INLINE VU32 fp16_bits(VF32 x) {
  const U32 du;
  const F32 df;
  const auto bits = hn::BitCast(du, x);
  const auto sign = hn::ShiftRight<16>(hn::And(bits, hn::Set(du, kSignBit32)));
  const auto magnitude = hn::And(bits, hn::Set(du, ~kSignBit32));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1U));
  const auto normal = hn::ShiftRight<13>(
      hn::Add(hn::Sub(magnitude, hn::Set(du, 112U << 23)), hn::Add(odd, hn::Set(du, 0xFFFU))));
  const auto tiny = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5F))),
                            hn::Set(du, 0x3F000000U));
  auto half = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 0x38800000U)), tiny, normal);
  const auto large = hn::Set(du, kSaturate ? std::uint32_t{kMaxFP16} : 0x7C00U);
  half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, 0x477FEFFFU)), large, half);
  if (!kSaturate) {
    const auto nan =
        hn::Or(hn::Set(du, 0x7E00U), hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 0x3FFU)));
    half = hn::IfThenElse(hn::Gt(magnitude, hn::Set(du, kInfBits32)), nan, half);
  }
  return hn::Or(sign, half);
}

// dithered_bf16(), as the upper halves of each.
HWY_INLINE VU32 dithered_bf16_bits(VF32 x, VU32 noise) {
  const F32 df;
  const float most = to_float(BF16{kMaxBF16});
  const VF32 bounded = hn::Clamp(x, hn::Set(df, -most), hn::Set(df, most));
  return hn::Add(hn::BitCast(U32(), bounded), noise);
}

HWY_INLINE VF32 load_float(const float* p) { return hn::LoadU(F32(), p); }
HWY_INLINE VF32 load_float(const BF16* p) { return float_from_bf16_bits(load_bits16(p)); }
HWY_INLINE VF32 load_float(const FP16* p) { return float_from_fp16_bits(load_bits16(p)); }
HWY_INLINE VF32 load_float(const double* p) {
  // Through memory: one rounding a value, whatever the target's conversions are.
  alignas(64) float values[hn::MaxLanes(F32())];
  for (std::size_t i = 0; i < hn::Lanes(F32()); ++i) values[i] = static_cast<float>(p[i]);
  return hn::Load(F32(), values);
}

HWY_INLINE void store_float(VF32 x, float* p) { hn::StoreU(x, F32(), p); }
HWY_INLINE void store_float(VF32 x, BF16* p) { store_bits16(bf16_bits<false>(x), p); }
HWY_INLINE void store_float(VF32 x, FP16* p) { store_bits16(fp16_bits<false>(x), p); }
HWY_INLINE void store_float(VF32 x, double* p) {
  alignas(64) float values[hn::MaxLanes(F32())];
  hn::Store(x, F32(), values);
  for (std::size_t i = 0; i < hn::Lanes(F32()); ++i) p[i] = static_cast<double>(values[i]);
}

HWY_INLINE void store_zero(float* p) { hn::StoreU(hn::Zero(F32()), F32(), p); }
HWY_INLINE void store_zero(BF16* p) {
  hn::StoreU(hn::Zero(U16()), U16(), reinterpret_cast<std::uint16_t*>(p));
}
HWY_INLINE void store_zero(FP16* p) { store_zero(reinterpret_cast<BF16*>(p)); }
HWY_INLINE void store_zero(double* p) {
  for (std::size_t i = 0; i < hn::Lanes(F32()); ++i) p[i] = 0.0;
}

// v = gradient + decay * residual, two roundings; the gradient alone when residual is null.
template <typename T>
HWY_INLINE VF32 load_sum(const T* gradient, const float* residual, VF32 decay) {
  const VF32 g = load_float(gradient);
  if (residual == nullptr) return g;
  return hn::Add(g, hn::Mul(decay, hn::LoadU(F32(), residual)));
}

// Bits of |x| as signed integers: at least kInfBits32 for NaN and Inf only.
HWY_INLINE hn::Vec<I32> magnitude_bits(VF32 x) { return hn::BitCast(I32(), hn::Abs(x)); }

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();
#endif
