// Conversions between fp32 and the 16-bit types, one value at a time: the scalar reference of
// convert-inl.h and the code of loop tails. Pure functions, thread-safe, the same bits everywhere.
#pragma once

#include <bit>
#include <cstdint>

namespace thinwire {

// Storage of one bf16 or fp16 value; distinct types, so that kernels can be templated on them.
struct BF16 {
  std::uint16_t bits;
};
struct FP16 {
  std::uint16_t bits;
};

inline constexpr std::uint32_t kSignBit32 = 0x80000000;
inline constexpr std::uint32_t kInfBits32 = 0x7F800000;
// Largest finite values.
inline constexpr std::uint16_t kMaxBF16 = 0x7F7F;
inline constexpr std::uint16_t kMaxFP16 = 0x7BFF;  // 65504

constexpr bool is_finite(float x) {
  return (std::bit_cast<std::uint32_t>(x) & ~kSignBit32) < kInfBits32;
}

constexpr float to_float(float x) { return x; }
constexpr float to_float(double x) { return static_cast<float>(x); }
constexpr float to_float(BF16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}
constexpr float to_float(FP16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  const std::uint32_t magnitude = x.bits & 0x7FFFU;
  if (magnitude >= 0x7C00) return std::bit_cast<float>(sign | kInfBits32 | magnitude << 13);
  if (magnitude >= 0x0400) return std::bit_cast<float>(sign | ((magnitude << 13) + (112U << 23)));
  // Subnormal: 0.5 + magnitude * 2^-24 is exact, and so is the difference.
  const float value = std::bit_cast<float>(0x3F000000 + magnitude) - 0.5F;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(value));
}

// Round to nearest, ties to even, as IEEE 754: overflow gives Inf, NaN stays a quiet NaN.
constexpr BF16 to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & ~kSignBit32) > kInfBits32) return {static_cast<std::uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
// Away from zero with the probability that makes the expected value x, where `noise` is uniform in
// [0, 2^16); finite values stay finite, NaN gives anything.
constexpr BF16 dithered_bf16(float x, std::uint32_t noise) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sum = (bits & ~kSignBit32) + noise;
  constexpr std::uint32_t kMost = std::uint32_t{kMaxBF16} << 16;
  const std::uint32_t bounded = sum < kMost ? sum : kMost;
  return {static_cast<std::uint16_t>((bounded | (bits & kSignBit32)) >> 16)};
}
constexpr FP16 to_fp16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits & kSignBit32) >> 16;
  const std::uint32_t magnitude = bits & ~kSignBit32;
  std::uint32_t half = 0;
  if (magnitude > kInfBits32) {
    half = 0x7E00 | (magnitude >> 13 & 0x3FF);
  } else if (magnitude >= 0x477FF000) {  // 65520 and more round to Inf
    half = 0x7C00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(magnitude) + 0.5F) - 0x3F000000;
  } else {
    half = (magnitude - (112U << 23) + 0xFFF + (magnitude >> 13 & 1)) >> 13;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

// The same rounding for finite x, but what would become Inf becomes the largest finite value.
constexpr BF16 to_bf16_saturated(float x) {
  const BF16 y = to_bf16(x);
  if ((y.bits & 0x7FFFU) < 0x7F80) return y;
  return {static_cast<std::uint16_t>((y.bits & 0x8000U) | kMaxBF16)};
}
constexpr FP16 to_fp16_saturated(float x) {
  const FP16 y = to_fp16(x);
  if ((y.bits & 0x7FFFU) < 0x7C00) return y;
  return {static_cast<std::uint16_t>((y.bits & 0x8000U) | kMaxFP16)};
}

// One rounding from fp32 to the storage type T.
template <typename T>
constexpr T from_float(float x);
template <>
constexpr float from_float<float>(float x) {
  return x;
}
template <>
constexpr double from_float<double>(float x) {
  return x;
}
template <>
constexpr BF16 from_float<BF16>(float x) {
  return to_bf16(x);
}
template <>
constexpr FP16 from_float<FP16>(float x) {
  return to_fp16(x);
}

}  // namespace thinwire
