#include "compressors/adaptive/error_curves_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/adaptive/error_curves_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "compressors/core/convert-inl.h"
#include "compressors/quantize/quantize_scales.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

constexpr int kParts = static_cast<int>(kQuantizeLanes / hn::MaxLanes(F32()));

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

// Calls f(part, values) for all vectors of a block; part: where its lanes are among the 16.
template <typename F>
HWY_INLINE void for_each_vector(const float* values, F&& f) {
  for (std::int64_t i = 0; i < kErrorBlock; i += kQuantizeLanes) {
    for (int part = 0; part < kParts; ++part) {
      f(part, hn::LoadU(F32(), values + i + part * lanes()));
    }
  }
}

HWY_INLINE float total(const VF32* sums) {
  alignas(64) float all[kQuantizeLanes];
  for (int part = 0; part < kParts; ++part) hn::Store(sums[part], F32(), all + part * lanes());
  return quantize_add_lanes(all);
}

HWY_INLINE std::uint32_t largest_of(const float* values) {
  auto largest = hn::Zero(I32());
  for_each_vector(values, [&](int, VF32 v) { largest = hn::Max(largest, magnitude_bits(v)); });
  return static_cast<std::uint32_t>(hn::GetLane(hn::MaxOfLanes(I32(), largest)));
}

// Sum of f(v, inverse of a step), for so many levels.
template <typename F>
HWY_INLINE float sum(const float* values, float largest, int levels, F&& f) {
  const VF32 inverse = hn::Set(F32(), static_cast<float>(levels) / largest);
  VF32 sums[kParts];
  for (VF32& s : sums) s = hn::Zero(F32());
  for_each_vector(values,
                  [&](int part, VF32 v) { sums[part] = hn::Add(sums[part], f(v, inverse)); });
  return total(sums);
}

void errors_of_blocks(const float* values, std::size_t blocks, BlockErrors* out) {
  const VF32 magic = hn::Set(F32(), kQuantizeMagic);
  for (; blocks > 0; --blocks, values += kErrorBlock, ++out) {
    out->largest = largest_of(values);
    const float largest = std::bit_cast<float>(out->largest);
    if (out->largest >= kInfBits32 || largest < kQuantizeTiny) continue;
    out->magnitudes =
        sum(values, largest, 1, [](VF32 v, VF32 inverse) { return hn::Abs(hn::Mul(v, inverse)); });
    out->squares = sum(values, largest, 1, [](VF32 v, VF32 inverse) {
      const VF32 x = hn::Mul(v, inverse);
      return hn::Mul(x, x);
    });
    out->bf16 = sum(values, largest, 1, [](VF32 v, VF32 inverse) {
      const VF32 error = hn::Mul(hn::Sub(v, float_from_bf16_bits(bf16_bits<true>(v))), inverse);
      return hn::Mul(error, error);
    });
    for (std::size_t j = 0; j < out->rounding.size(); ++j) {
      const int levels = quantize_levels(kErrorLeastBits + static_cast<int>(j));
      out->rounding[j] = sum(values, largest, levels, [&](VF32 v, VF32 inverse) {
        const VF32 x = hn::Mul(v, inverse);
        const VF32 error = hn::Sub(x, hn::Sub(hn::Add(x, magic), magic));
        return hn::Mul(error, error);
      });
    }
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(errors_of_blocks);

void block_errors(const float* values, std::size_t blocks, BlockErrors* out) {
  HWY_DYNAMIC_DISPATCH(errors_of_blocks)(values, blocks, out);
}

}  // namespace thinwire
#endif  // HWY_ONCE
