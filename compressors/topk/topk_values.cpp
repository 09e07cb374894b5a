#include "compressors/topk/topk_values.h"

#include <algorithm>
#include <bit>
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

// The 8-bit scale is linear in the bits of the magnitude, which makes it linear in the value inside
// an octave and logarithmic across octaves: one outlier costs the rest little, and `low` is exact.
struct Scale {
  std::uint32_t low;    // bits
  std::uint32_t range;  // bits between low and the block's upper end

  std::uint32_t magnitude(std::uint32_t step) const {
    return low + static_cast<std::uint32_t>((std::uint64_t{range} * step + kSteps / 2) / kSteps);
  }
};

Scale block_scale(std::uint32_t low, std::uint16_t high) {
  const std::uint32_t end = static_cast<std::uint32_t>(high) << 16;
  return {.low = low, .range = end > low ? end - low : 0};
}

void write_q8(std::span<float> values, std::byte* out) {
  std::uint32_t low = kInfBits32;
  for (const float value : values) low = std::min(low, bits_of(value) & kMagnitudeMask);
  store(out, low);
  std::byte* ends = out + sizeof low;
  std::byte* codes = ends + blocks(values.size()) * sizeof(std::uint16_t);
  for (std::size_t first = 0; first < values.size(); first += kTopKBlock) {
    const auto block = values.subspan(first, std::min(kTopKBlock, values.size() - first));
    std::uint32_t most = 0;
    for (const float value : block) most = std::max(most, bits_of(value) & kMagnitudeMask);
    const auto high =
        static_cast<std::uint16_t>(std::min<std::uint32_t>((most + 0xFFFF) >> 16, kMaxBF16));
    store(ends, high);
    ends += sizeof high;
    const Scale scale = block_scale(low, high);
    const double steps_per_bit = scale.range == 0 ? 0.0 : double{kSteps} / scale.range;
    for (float& value : block) {
      const std::uint32_t bits = bits_of(value);
      const double position = ((bits & kMagnitudeMask) - low) * steps_per_bit;
      const auto step = std::min(static_cast<std::uint32_t>(position + 0.5), kSteps);
      const std::uint32_t sign = bits & ~kMagnitudeMask;
      *codes++ = static_cast<std::byte>(sign >> 24 | step);
      value -= float_of(sign | scale.magnitude(step));
    }
  }
}

void read_q8(std::span<const std::byte> section, std::size_t count, std::size_t first,
             std::span<float> out) {
  const auto low = load<std::uint32_t>(section.data());
  check_finite(low < kInfBits32);
  const std::byte* ends = section.data() + sizeof low;
  const std::byte* codes = ends + blocks(count) * sizeof(std::uint16_t) + first;
  ends += first / kTopKBlock * sizeof(std::uint16_t);
  for (std::size_t at = 0; at < out.size(); at += kTopKBlock) {
    const auto high = load<std::uint16_t>(ends);
    ends += sizeof high;
    check_finite(high <= kMaxBF16);
    const Scale scale = block_scale(low, high);
    for (float& value : out.subspan(at, std::min(kTopKBlock, out.size() - at))) {
      const auto code = std::to_integer<std::uint32_t>(*codes++);
      value = float_of((code & 0x80) << 24 | scale.magnitude(code & 0x7F));
    }
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
      return sizeof(std::uint32_t) + blocks(count) * sizeof(std::uint16_t) + count;
  }
  return 0;
}

void write_topk_values(TopKValues kind, std::span<float> values, std::span<std::byte> out) {
  if (values.empty()) return;
  std::byte* to = out.data();
  switch (kind) {
    case TopKValues::kF32:
      std::memcpy(to, values.data(), values.size_bytes());
      std::fill(values.begin(), values.end(), 0.0F);
      return;
    case TopKValues::kBF16:
      for (float& value : values) {
        const BF16 rounded = to_bf16_saturated(value);
        store(to, rounded);
        to += sizeof rounded;
        value -= to_float(rounded);
      }
      return;
    case TopKValues::kQ8:
      write_q8(values, to);
      return;
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
      read_q8(section, count, first, out);
      return;
  }
  for (const float value : out) most = std::max(most, bits_of(value) & kMagnitudeMask);
  check_finite(most < kInfBits32);
}

}  // namespace thinwire
