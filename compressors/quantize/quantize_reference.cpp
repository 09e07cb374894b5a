#include "compressors/quantize/quantize_reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "compressors/core/codec_support.h"
#include "compressors/quantize/quantize_scales.h"

namespace thinwire {
namespace {

// Units are at most a rotation.
constexpr std::int64_t kMaxUnit = kMaxRotation;

// ---- Where codes stand.

// The code of element e of a group is cut, low bits first, into planes of 4, 2 and 1 bits as `bits`
// needs (8 bits: one plane). A plane of width w is 8 * w bytes; byte j holds the elements
// j, j + 8w, j + 16w, ..., low bits first. Calls f(byte offset in the group, shift in the byte,
// shift in the code, width) for each plane of element e.
template <typename F>
void for_each_plane(int bits, std::int64_t e, F&& f) {
  std::int64_t offset = 0;
  int shift = 0;
  for (const int width : {8, 4, 2, 1}) {
    if ((bits & width) == 0) continue;
    const std::int64_t plane_bytes = 8 * width;
    f(offset + e % plane_bytes, static_cast<int>(e / plane_bytes) * width, shift, width);
    offset += plane_bytes;
    shift += width;
  }
}

void write_bits(std::byte* codes, const QuantizeShape& shape, std::int64_t i, unsigned code) {
  std::byte* group = codes + i / kQuantizeGroup * shape.group_bytes();
  for_each_plane(shape.bits, i % kQuantizeGroup,
                 [&](std::int64_t at, int byte_shift, int code_shift, int width) {
                   const unsigned part = code >> code_shift & ((1U << width) - 1);
                   group[at] |= static_cast<std::byte>(part << byte_shift);
                 });
}

unsigned read_bits(const std::byte* codes, const QuantizeShape& shape, std::int64_t i) {
  const std::byte* group = codes + i / kQuantizeGroup * shape.group_bytes();
  unsigned code = 0;
  for_each_plane(shape.bits, i % kQuantizeGroup,
                 [&](std::int64_t at, int byte_shift, int code_shift, int width) {
                   const unsigned byte = std::to_integer<unsigned>(group[at]);
                   code |= (byte >> byte_shift & ((1U << width) - 1)) << code_shift;
                 });
  return code;
}

constexpr unsigned kPowersOf3[] = {1, 3, 9, 27, 81};

// Byte j of a record of s bytes holds c + 1 of elements j, j + s, j + 2 s, ..., the first lowest.
void write_trits(std::byte* codes, std::int64_t n, const unsigned* in) {
  const std::int64_t bytes = (n + kQuantizeTrits - 1) / kQuantizeTrits;
  for (std::int64_t i = 0; i < n; ++i) {
    const unsigned trit = (in[i] + 1) & 3;
    codes[i % bytes] = static_cast<std::byte>(std::to_integer<unsigned>(codes[i % bytes]) +
                                              trit * kPowersOf3[i / bytes]);
  }
}

unsigned read_trit(const std::byte* codes, std::int64_t n, std::int64_t i) {
  const std::int64_t bytes = (n + kQuantizeTrits - 1) / kQuantizeTrits;
  unsigned rest = std::to_integer<unsigned>(codes[i % bytes]);
  for (std::int64_t digit = kQuantizeTrits - 1;; --digit) {
    const unsigned trit = std::min(rest / kPowersOf3[digit], 2U);
    if (digit == i / bytes) return (trit + 3) & 3;
    rest -= trit * kPowersOf3[digit];
  }
}

// ---- Codes of one block.

// Uniform in (-0.5, 0.5), symmetric, for element i of the tensor.
float noise(const RandomStream& stream, std::int64_t i) {
  const auto group = static_cast<std::uint64_t>(i / kQuantizeGroup);
  const auto word = static_cast<std::size_t>(i % kQuantizeGroup / 16);
  const auto lane = static_cast<std::uint64_t>(i % 16);
  const std::uint32_t bits = random_block(stream, 16 * group + lane)[word] >> 8;
  return static_cast<float>(bits) * 0x1p-24F + (0x1p-25F - 0.5F);
}

float largest_of(const float* values, std::int64_t n) {
  float largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
  return largest;
}

float squares_of(const float* values, std::int64_t n, float largest) {
  if (largest < kQuantizeTiny) return 0;
  const float inverse = 1.0F / quantize_square_unit(largest);
  float lanes[kQuantizeLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = values[i] * inverse;
    lanes[i % kQuantizeLanes] += x * x;
  }
  return quantize_add_lanes(lanes);
}

float mean_of(const float* values, std::int64_t n) {
  float lanes[kQuantizeLanes] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    lanes[i % kQuantizeLanes] += std::fabs(values[i]) * kQuantizeMeanUnit;
  }
  return quantize_mean(lanes, n);
}

int level_of(int bits, unsigned code) {
  if (bits == 1) return code == 0 ? 1 : -1;
  const unsigned sign = 1U << (bits - 1);
  return static_cast<int>(code ^ sign) - static_cast<int>(sign);
}

unsigned round_level(const QuantizeEncode& args, const QuantizeScale& scale, float v, float u) {
  const int bits = args.shape.bits;
  if (bits == 1) {
    if (!args.stochastic) return std::bit_cast<std::uint32_t>(v) >> 31;
    return v * scale.inverse + 2.0F * u < 0.0F ? 1 : 0;
  }
  float rounded = 0;
  if (args.stochastic) {
    const auto levels = static_cast<float>(quantize_levels(bits));
    rounded = (v * scale.inverse + u) + kQuantizeMagic;
    rounded = std::min(std::max(rounded, kQuantizeMagic - levels), kQuantizeMagic + levels);
  } else {
    rounded = v * scale.inverse + kQuantizeMagic;
  }
  return std::bit_cast<std::uint32_t>(rounded) & ((1U << bits) - 1);
}

float step_value(const QuantizeRange& range, unsigned code) {
  return range.least + static_cast<float>(code) * range.step;
}

unsigned round_step(const QuantizeEncode& args, const QuantizeRange& range, float v, float u) {
  float rounded = (v - range.least) * range.inverse;
  if (args.stochastic) rounded += u;
  rounded += kQuantizeMagic;
  const auto steps = static_cast<float>((1 << args.shape.bits) - 1);
  rounded = std::min(std::max(rounded, kQuantizeMagic), kQuantizeMagic + steps);
  return std::bit_cast<std::uint32_t>(rounded) & 0xFF;
}

float power_value(const QuantizePowers& powers, int bits, unsigned code) {
  const unsigned sign = 1U << (bits - 1);
  const unsigned j = code & (sign - 1);
  const float value = j == 0 ? 0 : std::bit_cast<float>((powers.base + j - 1) << 23);
  return (code & sign) != 0 ? -value : value;
}

unsigned round_power(const QuantizePowers& powers, int bits, float v, float u) {
  const float a = std::min(std::fabs(v), powers.top);
  const std::uint32_t exponent = std::bit_cast<std::uint32_t>(a) >> 23;
  const float gap = std::bit_cast<float>(std::max(exponent, powers.base) << 23);
  const bool below = exponent < powers.base;
  const float over = below ? a : a - gap;
  const unsigned up = u * gap + 0.5F * gap < over ? 1 : 0;
  const unsigned j = (below ? 0 : exponent - powers.base + 1) + up;
  return j | std::bit_cast<std::uint32_t>(v) >> 31 << (bits - 1);
}

float mx_value(const MxFormat& format, unsigned code, float unit) {
  const int shift = 23 - format.mantissa;
  const unsigned sign = 1U << (format.bits - 1);
  const unsigned magnitude = code & (sign - 1);
  const std::uint32_t bias = static_cast<std::uint32_t>(127 - format.bias) << 23;
  float value = std::bit_cast<float>((magnitude << shift) + bias);
  if (magnitude >> format.mantissa == 0) {  // subnormal
    const float one = std::bit_cast<float>(bias + (1U << 23));
    value = std::bit_cast<float>((magnitude << shift) + bias + (1U << 23)) - one;
  }
  return ((code & sign) != 0 ? -value : value) * unit;
}

unsigned round_mx(const QuantizeEncode& args, const MxFormat& format, float v, float inverse,
                  float u) {
  const float x = v * inverse;
  float a = std::fabs(x);
  const std::uint32_t smallest = static_cast<std::uint32_t>(128 - format.bias) << 23;
  const std::uint32_t exponent = std::max(std::bit_cast<std::uint32_t>(a) & kInfBits32, smallest);
  const auto mantissa = static_cast<std::uint32_t>(format.mantissa);
  const float magic = std::bit_cast<float>((exponent + ((23 - mantissa) << 23)) | 0x400000U);
  if (args.stochastic) a += u * std::bit_cast<float>(exponent - (mantissa << 23));
  const std::uint32_t steps =
      std::bit_cast<std::uint32_t>(a + magic) - std::bit_cast<std::uint32_t>(magic);
  const std::uint32_t code = steps + ((exponent - smallest) >> (23 - mantissa));
  const std::uint32_t sign = std::bit_cast<std::uint32_t>(x) >> 31;
  return std::min(code, mx_largest_code(format)) | sign << (format.bits - 1);
}

// ---- Records.

// v of one unit; false when one is not finite.
template <typename T>
bool read_unit(const QuantizeEncode& args, const T* grad, std::int64_t begin, std::int64_t n,
               float* values) {
  bool finite = true;
  for (std::int64_t i = 0; i < n; ++i) {
    float v = to_float(grad[begin + i]);
    if (args.residual != nullptr) v += args.decay * args.residual[begin + i];
    finite = finite && is_finite(v);
    values[i] = v;
  }
  return finite;
}

QuantizeScale scale_of(const QuantizeEncode& args, const float* values, std::int64_t n) {
  float base = largest_of(values, n);
  if (args.shape.kind == QuantizeKind::kQsgd) {
    base = quantize_norm(base, squares_of(values, n, base));
  } else if (args.shape.kind == QuantizeKind::kTernGrad) {
    base = quantize_clip(base, squares_of(values, n, base), n);
  } else if (args.shape.bits == 1 && !args.stochastic) {
    base = mean_of(values, n);
  }
  return quantize_scale(base, quantize_levels(args.shape.bits));
}

// Scales and codes of n values, the first of which is element `begin` of the tensor.
void write_record(const QuantizeEncode& args, const float* values, std::int64_t begin,
                  std::int64_t n, std::byte* out) {
  const QuantizeShape& shape = args.shape;
  const auto u = [&](std::int64_t i) {
    return args.stochastic ? noise(args.random, begin + i) : 0;
  };
  unsigned codes[kMaxUnit];
  std::byte* in_bytes = out + shape.head_bytes(n);
  std::fill(in_bytes, out + shape.record_bytes(n), std::byte{0});
  switch (shape.kind) {
    case QuantizeKind::kMaxAbs:
    case QuantizeKind::kQsgd:
    case QuantizeKind::kTernGrad: {
      const QuantizeScale scale = scale_of(args, values, n);
      std::memcpy(out, &scale.scale, sizeof scale.scale);
      for (std::int64_t i = 0; i < n; ++i) codes[i] = round_level(args, scale, values[i], u(i));
      if (shape.kind == QuantizeKind::kTernGrad) return write_trits(in_bytes, n, codes);
      break;
    }
    case QuantizeKind::kMaxMin: {
      const auto [least, largest] = std::minmax_element(values, values + n);
      const QuantizeRange range = quantize_range(*least, *largest, shape.bits);
      std::memcpy(out, &range.least, sizeof range.least);
      std::memcpy(out + sizeof range.least, &range.largest, sizeof range.largest);
      for (std::int64_t i = 0; i < n; ++i) codes[i] = round_step(args, range, values[i], u(i));
      break;
    }
    case QuantizeKind::kNatural: {
      const QuantizePowers powers = quantize_powers_of(largest_of(values, n), shape.bits);
      out[0] = static_cast<std::byte>(powers.base);
      for (std::int64_t i = 0; i < n; ++i) {
        codes[i] = round_power(powers, shape.bits, values[i], u(i));
      }
      break;
    }
    case QuantizeKind::kMx: {
      const MxFormat format = mx_format(shape.element);
      for (std::int64_t at = 0; at < n; at += shape.block) {
        const std::int64_t size = std::min(shape.block, n - at);
        const std::uint8_t scale = mx_scale(format, largest_of(values + at, size), args.stochastic);
        out[at / shape.block] = std::byte{scale};
        for (std::int64_t i = at; i < at + size; ++i) {
          codes[i] = round_mx(args, format, values[i], mx_inverse(scale), u(i));
        }
      }
      break;
    }
  }
  for (std::int64_t i = 0; i < n; ++i) write_bits(in_bytes, shape, i, codes[i]);
}

// False at a scale that no encoder writes.
bool read_record(const std::byte* in, const QuantizeShape& shape, std::int64_t n, float* values) {
  const std::byte* codes = in + shape.head_bytes(n);
  switch (shape.kind) {
    case QuantizeKind::kMaxAbs:
    case QuantizeKind::kQsgd:
    case QuantizeKind::kTernGrad: {
      float scale = 0;
      if (!read_scale(shape, in, scale)) return false;
      for (std::int64_t i = 0; i < n; ++i) {
        const unsigned code = shape.kind == QuantizeKind::kTernGrad ? read_trit(codes, n, i)
                                                                    : read_bits(codes, shape, i);
        values[i] = static_cast<float>(level_of(shape.bits, code)) * scale;
      }
      return true;
    }
    case QuantizeKind::kMaxMin: {
      QuantizeRange range;
      if (!read_range(shape, in, range)) return false;
      for (std::int64_t i = 0; i < n; ++i) {
        values[i] = step_value(range, read_bits(codes, shape, i));
      }
      return true;
    }
    case QuantizeKind::kNatural: {
      QuantizePowers powers;
      if (!read_powers(shape, std::to_integer<std::uint8_t>(in[0]), powers)) return false;
      for (std::int64_t i = 0; i < n; ++i) {
        values[i] = power_value(powers, shape.bits, read_bits(codes, shape, i));
      }
      return true;
    }
    case QuantizeKind::kMx: {
      for (std::int64_t i = 0; i < n; ++i) {
        const auto scale = std::to_integer<std::uint8_t>(in[i / shape.block]);
        if (!mx_valid(shape, scale)) return false;
        values[i] = mx_value(mx_format(shape.element), read_bits(codes, shape, i), mx_unit(scale));
      }
      return true;
    }
  }
  return false;
}

// ---- Rotation.

void hadamard(float* x, std::int64_t n) {
  for (std::int64_t half = 1; half < n; half *= 2) {
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

float flip(float x, std::uint32_t sign) {
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(x) ^ sign);
}

void rotate(const QuantizeRotation& rotation, std::int64_t unit, std::int64_t n, float* values) {
  for_each_rotation(unit, n, [&](std::int64_t begin, std::int64_t size) {
    float* x = values + begin;
    const float scale = rotation_scale(size);
    for (std::int64_t i = 0; i < size; ++i) {
      const float bounded = std::clamp(x[i], -kRotationClip, kRotationClip);
      x[i] = flip(bounded * scale, rotation.sign(i));
    }
    hadamard(x, size);
  });
}

void rotate_back(const QuantizeRotation& rotation, std::int64_t unit, std::int64_t n,
                 float* values) {
  for_each_rotation(unit, n, [&](std::int64_t begin, std::int64_t size) {
    float* x = values + begin;
    hadamard(x, size);
    const float scale = rotation_scale(size);
    for (std::int64_t i = 0; i < size; ++i) x[i] = flip(x[i] * scale, rotation.sign(i));
  });
}

// ---- Units.

// Calls f(begin, elements) for the records of a unit of n elements.
template <typename F>
bool for_each_record(const QuantizeShape& shape, std::int64_t n, F&& f) {
  for (std::int64_t begin = 0; begin < n; begin += shape.record()) {
    if (!f(begin, std::min(shape.record(), n - begin))) return false;
  }
  return true;
}

bool read_values(const std::byte* records, const QuantizeShape& shape,
                 const QuantizeRotation* rotation, std::int64_t n, float* values) {
  const bool good = for_each_record(shape, n, [&](std::int64_t begin, std::int64_t size) {
    return read_record(records + shape.bytes(begin), shape, size, values + begin);
  });
  if (good && shape.rotate) rotate_back(*rotation, shape.unit(), n, values);
  return good;
}

// Calls f(index in the tensor, decoded value); false at a scale that no encoder wrote.
template <typename F>
bool for_each_value(const std::byte* records, const QuantizeShape& shape,
                    const QuantizeRotation* rotation, std::int64_t n, F&& f) {
  for (std::int64_t begin = 0; begin < n; begin += shape.unit()) {
    const std::int64_t size = std::min(shape.unit(), n - begin);
    float values[kMaxUnit];
    if (!read_values(records + shape.bytes(begin), shape, rotation, size, values)) return false;
    for (std::int64_t i = 0; i < size; ++i) f(begin + i, values[i]);
  }
  return true;
}

}  // namespace

bool quantize_encode_reference(const QuantizeEncode& args) {
  const QuantizeShape& shape = args.shape;
  return visit(args.grad, [&](auto* grad) {
    for (std::int64_t begin = 0; begin < args.grad.elements; begin += shape.unit()) {
      const std::int64_t n = std::min(shape.unit(), args.grad.elements - begin);
      float v[kMaxUnit];
      if (!read_unit(args, grad, begin, n, v)) return false;
      float values[kMaxUnit];
      std::copy(v, v + n, values);
      if (shape.rotate) rotate(*args.rotation, shape.unit(), n, values);
      std::byte* out = args.records + shape.bytes(begin);
      for_each_record(shape, n, [&](std::int64_t at, std::int64_t size) {
        write_record(args, values + at, begin + at, size, out + shape.bytes(at));
        return true;
      });
      if (args.next == nullptr) continue;
      read_values(out, shape, args.rotation, n, values);
      for (std::int64_t i = 0; i < n; ++i) args.next[begin + i] = v[i] - values[i];
    }
    return true;
  });
}

bool quantize_decode_reference(const std::byte* records, const QuantizeShape& shape,
                               const QuantizeRotation* rotation, TensorView out) {
  return visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    return for_each_value(records, shape, rotation, out.elements,
                          [&](std::int64_t i, float x) { values[i] = from_float<T>(x); });
  });
}

bool quantize_accumulate_reference(const std::byte* records, const QuantizeShape& shape,
                                   const QuantizeRotation* rotation, float weight, float* out,
                                   std::int64_t n) {
  return for_each_value(records, shape, rotation, n,
                        [&](std::int64_t i, float x) { out[i] += weight * x; });
}

}  // namespace thinwire
