// The scales of each kind and their formulas, one block at a time: what quantize_simd.cpp and
// quantize_reference.cpp share. Pure functions, thread-safe.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "compressors/core/convert.h"
#include "compressors/quantize/quantize_kernels.h"

namespace thinwire {

// Largest magnitude of an integer code; 1 bit holds only a sign.
constexpr int quantize_levels(int bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

// Blocks whose maximum (mean for 1 bit to nearest) is below this send a scale of 0 and stay in the
// residual whole: the reciprocal of the scale must not overflow.
inline constexpr float kQuantizeTiny = 0x1p-100F;
// Scales are made from at most this, so that levels * scale never rounds to Inf.
inline constexpr float kQuantizeHuge = 0x1.fffff0p127F;
// Adding this rounds a small float to an integer, ties to even, in the low bits of the sum.
inline constexpr float kQuantizeMagic = 0x1.8p23F;

// ---- Sums: 16 lanes (element i in lane i % 16, in order), then the lanes are halved four times.
inline constexpr int kQuantizeLanes = 16;
constexpr float quantize_add_lanes(const float* lanes) {
  float sum[kQuantizeLanes] = {};
  for (int j = 0; j < kQuantizeLanes; ++j) sum[j] = lanes[j];
  for (int half = kQuantizeLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  }
  return sum[0];
}
// 1-bit blocks add |v| * 2^-12; this is the mean of `elements` <= 4096 of them.
inline constexpr float kQuantizeMeanUnit = 0x1p-12F;
constexpr float quantize_mean(const float* lanes, std::int64_t elements) {
  return quantize_add_lanes(lanes) * (4096.0F / static_cast<float>(elements));
}

// ---- Integers times a scale: kMaxAbs, kQsgd, kTernGrad.
struct QuantizeScale {
  float scale = 0;    // on the wire
  float inverse = 0;  // what v is multiplied by
};
constexpr QuantizeScale quantize_scale(float base, int levels) {
  if (base < kQuantizeTiny) return {};
  const float bounded = base < kQuantizeHuge ? base : kQuantizeHuge;
  return {bounded / static_cast<float>(levels), static_cast<float>(levels) / bounded};
}
// Squares are summed of v / this, which cannot overflow.
constexpr float quantize_square_unit(float largest) {
  return largest < 0x1p126F ? largest : 0x1p126F;
}
inline float quantize_norm(float largest, float squares) {
  return std::max(largest, quantize_square_unit(largest) * std::sqrt(squares));
}
// 2.5 sigma, sigma the root of the mean square; at most the largest magnitude.
inline float quantize_clip(float largest, float squares, std::int64_t elements) {
  const float sigma =
      quantize_square_unit(largest) * std::sqrt(squares / static_cast<float>(elements));
  return std::min(largest, 2.5F * sigma);
}

// ---- Steps from least to largest: kMaxMin.
// Bounds both ends, so that their difference is finite.
inline constexpr float kQuantizeRange = 0x1p126F;
struct QuantizeRange {
  float least = 0;  // on the wire
  float largest = 0;
  float step = 0;
  float inverse = 0;
};
inline QuantizeRange quantize_range(float least, float largest, int bits) {
  // + 0: of the two zeros the positive one, whichever the minimum found.
  QuantizeRange range{.least = std::clamp(least, -kQuantizeRange, kQuantizeRange) + 0.0F,
                      .largest = std::clamp(largest, -kQuantizeRange, kQuantizeRange) + 0.0F};
  const float length = range.largest - range.least;
  const auto steps = static_cast<float>((1 << bits) - 1);
  range.step = length / steps;
  range.inverse = length < kQuantizeTiny ? 0 : steps / length;
  return range;
}

// ---- Powers of two: kNatural. Code j > 0 has the magnitude 2^(base - 127 + j - 1).
struct QuantizePowers {
  std::uint32_t base = 1;  // on the wire: biased exponent of the smallest
  float top = 0;           // the largest
};
inline QuantizePowers quantize_powers(std::uint32_t base, int bits) {
  const auto levels = static_cast<std::uint32_t>(quantize_levels(bits));
  return {base, std::bit_cast<float>((base + levels - 1) << 23)};
}
// The largest power is the one next above the largest magnitude, where fp32 has it.
inline QuantizePowers quantize_powers_of(float largest, int bits) {
  if (largest < kQuantizeTiny) return {};
  const auto magnitude = std::bit_cast<std::uint32_t>(largest);
  const std::uint32_t above = std::min((magnitude + 0x7FFFFFU) >> 23, 254U);
  const auto levels = static_cast<std::uint32_t>(quantize_levels(bits));
  return quantize_powers(above > levels ? above - levels + 1 : 1, bits);
}

// ---- Small floats: kMx.
struct MxFormat {
  int bits;
  int mantissa;   // bits
  int bias;       // of the exponent
  int top;        // exponent of the largest value
  float largest;  // value
};
constexpr MxFormat mx_format(MxElement element) {
  switch (element) {
    case MxElement::kE4M3:
      return {8, 3, 7, 8, 448};
    case MxElement::kE5M2:
      return {8, 2, 15, 15, 57344};
    case MxElement::kE2M3:
      return {6, 3, 1, 2, 7.5F};
    case MxElement::kE3M2:
      return {6, 2, 3, 4, 28};
    case MxElement::kE2M1:
      break;
  }
  return {4, 1, 1, 2, 6};
}
// The code of the largest value.
constexpr std::uint32_t mx_largest_code(const MxFormat& format) {
  return (std::bit_cast<std::uint32_t>(format.largest) >> (23 - format.mantissa)) -
         static_cast<std::uint32_t>((127 - format.bias) << format.mantissa);
}
// Scale on the wire: a biased exponent (E8M0). The unit in the first place of the largest value
// becomes the element's largest; what then exceeds it is cut off, except when that would bring a
// bias in.
inline std::uint8_t mx_scale(const MxFormat& format, float largest, bool stochastic) {
  if (largest < kQuantizeTiny) return 0;
  const auto exponent = static_cast<int>(std::bit_cast<std::uint32_t>(largest) >> 23);
  int scale = exponent - format.top;
  const float unit = std::bit_cast<float>(static_cast<std::uint32_t>(scale) << 23);
  if (stochastic && largest > format.largest * unit) ++scale;
  return static_cast<std::uint8_t>(std::min(scale, 254 - format.top));
}
constexpr float mx_unit(std::uint8_t scale) {
  return std::bit_cast<float>(scale == 0 ? 0x00400000U : std::uint32_t{scale} << 23);
}
constexpr float mx_inverse(std::uint8_t scale) {
  return scale == 0 ? 0 : std::bit_cast<float>((254U - scale) << 23);
}

// ---- Reading: false at a scale that no encoder writes.
inline std::uint32_t quantize_limit(const QuantizeShape& shape) {
  return shape.rotate ? kRotationLimitBits : kInfBits32;
}
inline bool read_scale(const QuantizeShape& shape, const void* in, float& scale) {
  std::memcpy(&scale, in, sizeof scale);
  return std::bit_cast<std::uint32_t>(scale) < quantize_limit(shape);
}
inline bool read_range(const QuantizeShape& shape, const void* in, QuantizeRange& range) {
  float ends[2];
  std::memcpy(ends, in, sizeof ends);
  const float most = shape.rotate ? std::bit_cast<float>(kRotationLimitBits) : kQuantizeRange;
  if (!(std::fabs(ends[0]) <= most) || !(std::fabs(ends[1]) <= most)) return false;
  range = quantize_range(ends[0], ends[1], shape.bits);
  return true;
}
inline bool read_powers(const QuantizeShape& shape, std::uint8_t base, QuantizePowers& powers) {
  const auto levels = static_cast<std::uint32_t>(quantize_levels(shape.bits));
  // A base of 1 is what blocks of small values have, however many the powers.
  if (base == 0 || (base > 1 && base + levels > quantize_limit(shape) >> 23)) return false;
  powers = quantize_powers(base, shape.bits);
  return true;
}
inline bool mx_valid(const QuantizeShape& shape, std::uint8_t scale) {
  const int top = static_cast<int>(quantize_limit(shape) >> 23) - 1;
  return scale <= top - mx_format(shape.element).top;
}

}  // namespace thinwire
