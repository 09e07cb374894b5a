#include "compressors/topk/topk_values.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "compressors/core/convert.h"
#include "compressors/core/error.h"
#include "compressors/topk/topk_kernels.h"

namespace thinwire {
namespace {

using topk::kMagnitudeMask;
constexpr std::uint32_t kSteps = 127;

std::uint32_t bits_of(float value) { return std::bit_cast<std::uint32_t>(value); }
float float_of(std::uint32_t bits) { return std::bit_cast<float>(bits); }

template <typename T>
T load(const std::byte* data) {
  T value;
  std::memcpy(&value, data, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* data, T value) {
  std::memcpy(data, &value, sizeof value);
}

void check_finite(bool finite) {
  if (!finite) {
    throw CorruptPayload(
        "topk body: a value is not finite\n"
        "hint: sender and receiver must use the same codec, version and tensor");
  }
}

std::size_t blocks(std::size_t count) { return (count + kTopKBlock - 1) / kTopKBlock; }

// Scales are linear in the bits of the magnitude, which makes them linear in the value inside an
// octave and logarithmic across octaves: one outlier costs the rest little.
struct Scale {
  std::uint32_t low;    // bits
  std::uint32_t range;  // bits between low and the block's upper end
};

// Rounded down; by way of signed integers, for which there are vector instructions.
std::uint32_t whole(double x) { return static_cast<std::uint32_t>(static_cast<std::int32_t>(x)); }
double real(std::uint32_t x) { return static_cast<std::int32_t>(x); }

// 8 bits: 127 steps from end to end, so that `low` is exact.
struct Fine {
  static constexpr int kBits = 8;

  static std::uint32_t step(Scale scale, std::uint32_t magnitude, double steps_per_bit) {
    return std::min(whole(real(magnitude - scale.low) * steps_per_bit + 0.5), kSteps);
  }
  static double steps_per_bit(Scale scale) {
    return scale.range == 0 ? 0.0 : double{kSteps} / scale.range;
  }
  static std::uint32_t magnitude(Scale scale, std::uint32_t step) {
    // (range * step + 63) / 127, rounded down: half more keeps the product clear of whole numbers.
    constexpr double kMore = 63.5;
    return scale.low + whole((real(scale.range) * real(step) + kMore) * (1.0 / kSteps));
  }
};

// 4 and 2 bits: equal bins, each decoded to its middle, but to no more than 1.5 times its lower
// end: what is missing is less than the value, however wide a bin is.
template <int kWidth>
struct Coarse {
  static constexpr int kBits = kWidth;
  static constexpr std::uint32_t kBins = 1U << (kWidth - 1);

  static std::uint32_t step(Scale scale, std::uint32_t magnitude, double steps_per_bit) {
    return std::min(whole(real(magnitude - scale.low) * steps_per_bit), kBins - 1);
  }
  static double steps_per_bit(Scale scale) {
    return scale.range == 0 ? 0.0 : double{kBins} / scale.range;
  }
  static std::uint32_t magnitude(Scale scale, std::uint32_t step) {
    const std::uint32_t begin = scale.low + scale.range / kBins * step;
    return std::min(begin + scale.range / (2 * kBins), bits_of(1.5F * float_of(begin)));
  }
};

std::size_t scaled_bytes(std::size_t bits, std::size_t count) {
  return sizeof(std::uint32_t) + blocks(count) * sizeof(std::uint16_t) + (count * bits + 7) / 8;
}

Scale block_scale(std::uint32_t low, std::uint16_t high) {
  const std::uint32_t end = static_cast<std::uint32_t>(high) << 16;
  return {.low = low, .range = end > low ? end - low : 0};
}

// The upper half of the largest magnitude's bits, rounded up.
std::uint16_t upper_end(std::span<const float> block) {
  std::uint32_t most = 0;
  for (const float value : block) most = std::max(most, bits_of(value) & kMagnitudeMask);
  return static_cast<std::uint16_t>(std::min<std::uint32_t>((most + 0xFFFF) >> 16, kMaxBF16));
}

// One code an entry, sign above step; leaves in the values what is missing of them.
template <typename Code>
void code_block(Scale scale, std::span<float> block, std::uint8_t* codes) {
  const double steps_per_bit = Code::steps_per_bit(scale);
  for (std::size_t i = 0; i < block.size(); ++i) {
    const std::uint32_t bits = bits_of(block[i]);
    const std::uint32_t sign = bits & ~kMagnitudeMask;
    const std::uint32_t step = Code::step(scale, bits & kMagnitudeMask, steps_per_bit);
    codes[i] = static_cast<std::uint8_t>(sign >> (32 - Code::kBits) | step);
    block[i] -= float_of(sign | Code::magnitude(scale, step));
  }
}

template <typename Code>
void round_scaled(std::uint32_t low, std::span<float> block) {
  std::array<std::uint8_t, kTopKBlock> codes;
  code_block<Code>(block_scale(low, upper_end(block)), block, codes.data());
}

void round_bf16(std::span<float> values) {
  for (float& value : values) value -= to_float(to_bf16_saturated(value));
}

// Codes of kBits, the first one lowest in its byte.
template <typename Code>
void write_scaled(std::uint32_t low, std::span<float> values, std::byte* out) {
  constexpr int kBits = Code::kBits;
  constexpr std::size_t kCodesAByte = 8 / kBits;
  store(out, low);
  std::byte* ends = out + sizeof low;
  std::byte* codes = ends + blocks(values.size()) * sizeof(std::uint16_t);
  for (std::size_t first = 0; first < values.size(); first += kTopKBlock) {
    const auto block = values.subspan(first, std::min(kTopKBlock, values.size() - first));
    const std::uint16_t high = upper_end(block);
    store(ends, high);
    ends += sizeof high;
    std::array<std::uint8_t, kTopKBlock> block_codes = {};
    code_block<Code>(block_scale(low, high), block, block_codes.data());
    for (std::size_t i = 0; i < block.size(); i += kCodesAByte) {
      std::uint32_t byte = 0;
      for (std::size_t j = 0; j < kCodesAByte; ++j) {
        byte |= static_cast<std::uint32_t>(block_codes[i + j]) << (j * kBits);
      }
      *codes++ = static_cast<std::byte>(byte);
    }
  }
}

template <typename Code>
void read_scaled(std::span<const std::byte> section, std::size_t count, std::size_t first,
                 std::span<float> out) {
  constexpr int kBits = Code::kBits;
  constexpr std::size_t kCodesAByte = 8 / kBits;
  constexpr std::uint32_t kSign = 1U << (kBits - 1);
  const auto low = load<std::uint32_t>(section.data());
  check_finite(low < kInfBits32);
  const std::byte* ends = section.data() + sizeof low;
  const std::byte* codes = ends + blocks(count) * sizeof(std::uint16_t) + first / kCodesAByte;
  ends += first / kTopKBlock * sizeof(std::uint16_t);
  for (std::size_t at = 0; at < out.size(); at += kTopKBlock) {
    const auto high = load<std::uint16_t>(ends);
    ends += sizeof high;
    check_finite(high <= kMaxBF16);
    const Scale scale = block_scale(low, high);
    const auto block = out.subspan(at, std::min(kTopKBlock, out.size() - at));
    for (std::size_t i = 0; i < block.size(); ++i) {
      const auto byte = std::to_integer<std::uint32_t>(codes[i / kCodesAByte]);
      const std::uint32_t code = byte >> (i % kCodesAByte * kBits) & (2 * kSign - 1);
      const std::uint32_t magnitude = Code::magnitude(scale, code & (kSign - 1));
      block[i] = float_of((code & kSign) << (32 - kBits) | magnitude);
    }
    codes += kTopKBlock / kCodesAByte;
  }
}

void write_ternary(std::span<float> values, std::byte* out) {
  double sum = 0;
  for (const float value : values) sum += std::fabs(double{value});
  const auto mean = static_cast<float>(sum / static_cast<double>(values.size()));
  store(out, mean);
  out += sizeof mean;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint32_t sign = bits_of(values[i]) & ~kMagnitudeMask;
    if (i % 8 == 0) out[i / 8] = std::byte{0};
    out[i / 8] |= static_cast<std::byte>(sign >> 31 << (i % 8));
    values[i] -= float_of(sign | bits_of(mean));
  }
}

void read_ternary(std::span<const std::byte> section, std::size_t first, std::span<float> out) {
  const auto mean = load<std::uint32_t>(section.data());
  check_finite(mean < kInfBits32);
  const std::byte* signs = section.data() + sizeof mean;
  for (float& value : out) {
    const auto byte = std::to_integer<std::uint32_t>(signs[first / 8]);
    value = float_of(mean | (byte >> (first % 8) & 1) << 31);
    ++first;
  }
}

}  // namespace

std::size_t topk_value_bytes(TopKValues kind, std::size_t count) {
  if (count == 0) return 0;
  switch (kind) {
    case TopKValues::kF32:
      return 4 * count;
    case TopKValues::kBF16:
      return 2 * count;
    case TopKValues::kQ8:
      return scaled_bytes(8, count);
    case TopKValues::kQ4:
      return scaled_bytes(4, count);
    case TopKValues::kQ2:
      return scaled_bytes(2, count);
    case TopKValues::kTernary:
      return sizeof(float) + (count + 7) / 8;
  }
  return 0;
}

std::uint32_t least_magnitude(std::span<const float> values) {
  std::uint32_t least = kInfBits32;
  for (const float value : values) least = std::min(least, bits_of(value) & kMagnitudeMask);
  return least;
}

void round_topk_block(TopKValues kind, std::uint32_t low, std::span<float> block) {
  switch (kind) {
    case TopKValues::kBF16:
      return round_bf16(block);
    case TopKValues::kQ8:
      return round_scaled<Fine>(low, block);
    case TopKValues::kQ4:
      return round_scaled<Coarse<4>>(low, block);
    case TopKValues::kQ2:
      return round_scaled<Coarse<2>>(low, block);
    case TopKValues::kF32:
    case TopKValues::kTernary:
      std::fill(block.begin(), block.end(), 0.0F);
  }
}

void write_topk_values(TopKValues kind, std::uint32_t low, std::span<float> values,
                       std::span<std::byte> out) {
  if (values.empty()) return;
  std::byte* to = out.data();
  switch (kind) {
    case TopKValues::kF32:
      std::memcpy(to, values.data(), values.size_bytes());
      std::fill(values.begin(), values.end(), 0.0F);
      return;
    case TopKValues::kBF16:
      for (const float value : values) {
        store(to, to_bf16_saturated(value));
        to += sizeof(BF16);
      }
      return round_bf16(values);
    case TopKValues::kQ8:
      return write_scaled<Fine>(low, values, to);
    case TopKValues::kQ4:
      return write_scaled<Coarse<4>>(low, values, to);
    case TopKValues::kQ2:
      return write_scaled<Coarse<2>>(low, values, to);
    case TopKValues::kTernary:
      return write_ternary(values, to);
  }
}

void read_topk_values(TopKValues kind, std::span<const std::byte> section, std::size_t count,
                      std::size_t first, std::span<float> out) {
  if (out.empty()) return;
  std::uint32_t most = 0;
  switch (kind) {
    case TopKValues::kF32:
      std::memcpy(out.data(), section.data() + 4 * first, out.size_bytes());
      break;
    case TopKValues::kBF16: {
      const std::byte* from = section.data() + 2 * first;
      for (float& value : out) {
        value = to_float(load<BF16>(from));
        from += sizeof(BF16);
      }
      break;
    }
    case TopKValues::kQ8:
      return read_scaled<Fine>(section, count, first, out);
    case TopKValues::kQ4:
      return read_scaled<Coarse<4>>(section, count, first, out);
    case TopKValues::kQ2:
      return read_scaled<Coarse<2>>(section, count, first, out);
    case TopKValues::kTernary:
      return read_ternary(section, first, out);
  }
  for (const float value : out) most = std::max(most, bits_of(value) & kMagnitudeMask);
  check_finite(most < kInfBits32);
}

}  // namespace thinwire
