#include "compressors/quantize/quantize_reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

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

void write_code(std::byte* codes, int bits, std::int64_t element, unsigned code) {
  std::byte* group = codes + element / kQuantizeGroup * quantize_group_bytes(bits);
  for_each_plane(bits, element % kQuantizeGroup,
                 [&](std::int64_t at, int byte_shift, int code_shift, int width) {
                   const unsigned part = code >> code_shift & ((1U << width) - 1);
                   group[at] |= static_cast<std::byte>(part << byte_shift);
                 });
}

int read_code(const std::byte* codes, int bits, std::int64_t element) {
  const std::byte* group = codes + element / kQuantizeGroup * quantize_group_bytes(bits);
  unsigned code = 0;
  for_each_plane(bits, element % kQuantizeGroup,
                 [&](std::int64_t at, int byte_shift, int code_shift, int width) {
                   const unsigned byte = std::to_integer<unsigned>(group[at]);
                   code |= (byte >> byte_shift & ((1U << width) - 1)) << code_shift;
                 });
  if (bits == 1) return code == 0 ? 1 : -1;
  const unsigned sign = 1U << (bits - 1);
  return static_cast<int>(code ^ sign) - static_cast<int>(sign);
}

// Uniform in (-0.5, 0.5), symmetric, for element i of the tensor.
float noise(const RandomStream& stream, std::int64_t i) {
  const auto group = static_cast<std::uint64_t>(i / kQuantizeGroup);
  const auto word = static_cast<std::size_t>(i % kQuantizeGroup / 16);
  const auto lane = static_cast<std::uint64_t>(i % 16);
  const std::uint32_t bits = random_block(stream, 16 * group + lane)[word] >> 8;
  return static_cast<float>(bits) * 0x1p-24F + (0x1p-25F - 0.5F);
}

// v of one block; false when one is not finite.
template <typename T>
bool read_block(const QuantizeEncode& args, const T* grad, std::int64_t begin, std::int64_t n,
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
  if (args.bits == 1 && !args.stochastic) {
    float lanes[kQuantizeLanes] = {};
    for (std::int64_t i = 0; i < n; ++i) {
      lanes[i % kQuantizeLanes] += std::fabs(values[i]) * kQuantizeMeanUnit;
    }
    return quantize_scale(quantize_mean(lanes, n), 1);
  }
  float largest = 0;
  for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(values[i]));
  return quantize_scale(largest, quantize_levels(args.bits));
}

unsigned code_of(const QuantizeEncode& args, const QuantizeScale& scale, float v,
                 std::int64_t element) {
  if (args.bits == 1) {
    if (!args.stochastic) return std::bit_cast<std::uint32_t>(v) >> 31;
    return v * scale.inverse + 2.0F * noise(args.random, element) < 0.0F ? 1 : 0;
  }
  float rounded = 0;
  if (args.stochastic) {
    const auto levels = static_cast<float>(quantize_levels(args.bits));
    rounded = (v * scale.inverse + noise(args.random, element)) + kQuantizeMagic;
    rounded = std::min(std::max(rounded, kQuantizeMagic - levels), kQuantizeMagic + levels);
  } else {
    rounded = v * scale.inverse + kQuantizeMagic;
  }
  return std::bit_cast<std::uint32_t>(rounded) & ((1U << args.bits) - 1);
}

// Calls f(index in the tensor, decoded value); false at a scale that no encoder wrote.
template <typename F>
bool for_each_value(const std::byte* blocks, int bits, std::int64_t block, std::int64_t n, F&& f) {
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t size = std::min(block, n - begin);
    float scale = 0;
    std::memcpy(&scale, blocks, sizeof(scale));
    if (std::bit_cast<std::uint32_t>(scale) >= kInfBits32) return false;
    const std::byte* codes = blocks + kQuantizeScaleBytes;
    for (std::int64_t i = 0; i < size; ++i) {
      f(begin + i, static_cast<float>(read_code(codes, bits, i)) * scale);
    }
    blocks += quantize_block_bytes(bits, size);
  }
  return true;
}

}  // namespace

bool quantize_encode_reference(const QuantizeEncode& args) {
  return visit(args.grad, [&](auto* grad) {
    std::byte* out = args.blocks;
    for (std::int64_t begin = 0; begin < args.grad.elements; begin += args.block) {
      const std::int64_t n = std::min(args.block, args.grad.elements - begin);
      float values[4096];
      if (!read_block(args, grad, begin, n, values)) return false;
      const QuantizeScale scale = scale_of(args, values, n);
      std::memcpy(out, &scale.scale, sizeof(float));
      std::byte* codes = out + kQuantizeScaleBytes;
      const std::int64_t bytes = quantize_block_bytes(args.bits, n);
      std::fill(codes, out + bytes, std::byte{0});
      for (std::int64_t i = 0; i < n; ++i) {
        write_code(codes, args.bits, i, code_of(args, scale, values[i], begin + i));
        if (args.next == nullptr) continue;
        const auto code = static_cast<float>(read_code(codes, args.bits, i));
        args.next[begin + i] = values[i] - code * scale.scale;
      }
      out += bytes;
    }
    return true;
  });
}

bool quantize_decode_reference(const std::byte* blocks, int bits, std::int64_t block,
                               TensorView out) {
  return visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    return for_each_value(blocks, bits, block, out.elements,
                          [&](std::int64_t i, float x) { values[i] = from_float<T>(x); });
  });
}

bool quantize_accumulate_reference(const std::byte* blocks, int bits, std::int64_t block,
                                   float weight, float* out, std::int64_t n) {
  return for_each_value(blocks, bits, block, n,
                        [&](std::int64_t i, float x) { out[i] += weight * x; });
}

}  // namespace thinwire
