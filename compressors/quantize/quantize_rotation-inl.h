// The rotation in vectors, the same bits as the reference's. Per-target include, inside
// quantize_simd.cpp only.
#if defined(THINWIRE_QUANTIZE_ROTATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef THINWIRE_QUANTIZE_ROTATION_INL_H_
#undef THINWIRE_QUANTIZE_ROTATION_INL_H_
#else
#define THINWIRE_QUANTIZE_ROTATION_INL_H_
#endif

#include <algorithm>
#include <bit>
#include <type_traits>

#include "compressors/core/convert-inl.h"
#include "compressors/quantize/quantize_rotation.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

HWY_INLINE VF32 flip(VF32 x, VU32 sign) {
  return hn::BitCast(F32(), hn::Xor(hn::BitCast(U32(), x), sign));
}

// Butterflies of neighbours kHalf apart in one vector: a + b in the lower, a - b in the upper.
template <int kHalf, class V>
HWY_INLINE V butterfly(V x) {
  const U32 du;
  const F32 df;
  V other = x;
#if HWY_TARGET != HWY_SCALAR
  if constexpr (kHalf == 1) other = hn::Shuffle2301(x);
  if constexpr (kHalf == 2) other = hn::Shuffle1032(x);
  if constexpr (kHalf == 4) other = hn::SwapAdjacentBlocks(x);
  if constexpr (kHalf == 8) other = hn::ConcatLowerUpper(df, x, x);
#endif
  const auto upper = hn::And(hn::Iota(du, 0), hn::Set(du, std::uint32_t{kHalf}));
  constexpr int kShift = 31 - std::countr_zero(static_cast<unsigned>(kHalf));
  return hn::Add(other, flip(x, hn::ShiftLeft<kShift>(upper)));
}

HWY_INLINE VF32 butterflies(VF32 x) {
  constexpr std::size_t kLanes = hn::MaxLanes(F32());
  if constexpr (kLanes >= 2) x = butterfly<1>(x);
  if constexpr (kLanes >= 4) x = butterfly<2>(x);
  if constexpr (kLanes >= 8) x = butterfly<4>(x);
  if constexpr (kLanes >= 16) x = butterfly<8>(x);
  return x;
}

// All stages of 16 vectors.
HWY_NOINLINE void hadamard16(float* x) {
  const F32 df;
  const std::ptrdiff_t step = static_cast<std::ptrdiff_t>(hn::Lanes(df));
  VF32 row[16];
  HWY_UNROLL(16)
  for (int j = 0; j < 16; ++j) row[j] = butterflies(hn::LoadU(df, x + j * step));
  const auto stage = [&](auto half) HWY_ATTR {
    HWY_UNROLL(8)
    for (int j = 0; j < 8; ++j) {
      const int low = j / half.value * 2 * half.value + j % half.value;
      const VF32 a = row[low];
      const VF32 b = row[low + half.value];
      row[low] = hn::Add(a, b);
      row[low + half.value] = hn::Sub(a, b);
    }
  };
  stage(std::integral_constant<int, 1>());
  stage(std::integral_constant<int, 2>());
  stage(std::integral_constant<int, 4>());
  stage(std::integral_constant<int, 8>());
  HWY_UNROLL(16)
  for (int j = 0; j < 16; ++j) hn::StoreU(row[j], df, x + j * step);
}

// Stages `half` and, when kTwo, 2 * half of n values; half is a multiple of the lanes.
template <bool kTwo>
HWY_NOINLINE void hadamard_stages(float* x, std::int64_t half, std::int64_t n) {
  const F32 df;
  const auto step = static_cast<std::int64_t>(hn::Lanes(df));
  for (std::int64_t i = 0; i < n; i += (kTwo ? 4 : 2) * half) {
    for (std::int64_t j = i; j < i + half; j += step) {
      const VF32 a = hn::LoadU(df, x + j);
      const VF32 b = hn::LoadU(df, x + j + half);
      const VF32 sum = hn::Add(a, b);
      const VF32 difference = hn::Sub(a, b);
      if constexpr (kTwo) {
        const VF32 c = hn::LoadU(df, x + j + 2 * half);
        const VF32 d = hn::LoadU(df, x + j + 3 * half);
        const VF32 sum2 = hn::Add(c, d);
        const VF32 difference2 = hn::Sub(c, d);
        hn::StoreU(hn::Add(sum, sum2), df, x + j);
        hn::StoreU(hn::Add(difference, difference2), df, x + j + half);
        hn::StoreU(hn::Sub(sum, sum2), df, x + j + 2 * half);
        hn::StoreU(hn::Sub(difference, difference2), df, x + j + 3 * half);
      } else {
        hn::StoreU(sum, df, x + j);
        hn::StoreU(difference, df, x + j + half);
      }
    }
  }
}

// In stages of ascending distance, as the reference.
HWY_INLINE void hadamard(float* x, std::int64_t n) {
  const F32 df;
  const auto step = static_cast<std::int64_t>(hn::Lanes(df));
  std::int64_t half = 1;
  if (n >= 16 * step) {
    for (std::int64_t i = 0; i < n; i += 16 * step) hadamard16(x + i);
    half = 16 * step;
  } else if (n >= step) {
    for (std::int64_t i = 0; i < n; i += step) {
      hn::StoreU(butterflies(hn::LoadU(df, x + i)), df, x + i);
    }
    half = step;
  } else {
    for (; half < n; half *= 2) {
      for (std::int64_t i = 0; i < n; i += 2 * half) {
        for (std::int64_t j = i; j < i + half; ++j) {
          const float a = x[j];
          const float b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
      }
    }
  }
  for (; 4 * half <= n; half *= 4) hadamard_stages<true>(x, half, n);
  if (half < n) hadamard_stages<false>(x, half, n);
}

// out[i] = in[i] * scale, with the sign of element i turned; kClip: bounded before.
template <bool kClip>
HWY_NOINLINE void scale_and_turn(const QuantizeRotation& rotation, std::int64_t n, const float* in,
                                 float* out) {
  const F32 df;
  const U32 du;
  const auto step = static_cast<std::int64_t>(hn::Lanes(df));
  const float scale = rotation_scale(n);
  std::int64_t i = 0;
  for (; i + step <= n; i += step) {
    const std::int64_t word = i / kRotationSignsTogether * kRotationColumns + i % kRotationColumns;
    const auto shift = static_cast<int>(i % kRotationSignsTogether / kRotationColumns);
    const auto words = hn::LoadU(du, rotation.words.data() + word);
    const auto sign = hn::And(hn::ShiftLeftSame(words, shift), hn::Set(du, kSignBit32));
    VF32 x = hn::LoadU(df, in + i);
    if constexpr (kClip) {
      x = hn::Min(hn::Max(x, hn::Set(df, -kRotationClip)), hn::Set(df, kRotationClip));
    }
    hn::StoreU(flip(hn::Mul(x, hn::Set(df, scale)), sign), df, out + i);
  }
  for (; i < n; ++i) {
    float x = in[i];
    if constexpr (kClip) x = std::clamp(x, -kRotationClip, kRotationClip);
    out[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(x * scale) ^ rotation.sign(i));
  }
}

// The rotated values of a unit of n elements; `out` may not be `in`.
void rotate(const QuantizeRotation& rotation, std::int64_t unit, std::int64_t n, const float* in,
            float* out) {
  for_each_rotation(unit, n, [&](std::int64_t begin, std::int64_t size) {
    scale_and_turn<true>(rotation, size, in + begin, out + begin);
    hadamard(out + begin, size);
  });
}

void rotate_back(const QuantizeRotation& rotation, std::int64_t unit, std::int64_t n,
                 float* values) {
  for_each_rotation(unit, n, [&](std::int64_t begin, std::int64_t size) {
    hadamard(values + begin, size);
    scale_and_turn<false>(rotation, size, values + begin, values + begin);
  });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();
#endif
