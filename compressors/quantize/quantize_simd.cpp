#include "compressors/quantize/quantize_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/quantize/quantize_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"
#include "compressors/core/random-inl.h"
#include "compressors/quantize/quantize_codes-inl.h"
#include "compressors/quantize/quantize_pack-inl.h"
#include "compressors/quantize/quantize_rotation-inl.h"
#include "compressors/quantize/quantize_scales.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

constexpr std::int64_t kMaxUnit = kMaxRotation;
static_assert(kMaxQuantizeBlock <= kMaxUnit);

// Elements ahead of those being read that are fetched: a unit is read, then coded and written, and
// meanwhile nothing else would ask memory for the next. Measured: 1.3 times as fast for q4 and q8.
constexpr std::int64_t kAhead = 1024;

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

constexpr std::int64_t whole_groups(std::int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

// Uniform in (-0.5, 0.5) for the 64 elements of a group.
HWY_NOINLINE void group_noise(const RandomStream& stream, std::uint64_t group, float* out) {
  const F32 df;
  for (std::int64_t lane = 0; lane < 16; lane += lanes()) {
    VU32 words[4];
    random_words(stream, 16 * group + static_cast<std::uint64_t>(lane), words);
    for (std::int64_t w = 0; w < 4; ++w) {
      const auto bits = hn::BitCast(I32(), hn::ShiftRight<8>(words[w]));
      const VF32 uniform = hn::Mul(hn::ConvertTo(df, bits), hn::Set(df, 0x1p-24F));
      hn::StoreU(hn::Add(uniform, hn::Set(df, 0x1p-25F - 0.5F)), df, out + 16 * w + lane);
    }
  }
}

// Reads v = gradient + decay * residual of n <= 4096 elements into values, zero-filled up to whole
// groups; returns the largest magnitude, or a negative number when some v is not finite.
template <typename T>
HWY_NOINLINE float read_block(const T* grad, const float* residual, float decay, std::int64_t n,
                              float* HWY_RESTRICT values) {
  const F32 df;
  const std::int64_t step = lanes();
  const VF32 factor = hn::Set(df, decay);
  auto largest = hn::Zero(I32());
  std::int64_t i = 0;
  for (; i + step <= n; i += step) {
    hwy::Prefetch(grad + i + kAhead);
    if (residual != nullptr) hwy::Prefetch(residual + i + kAhead);
    const VF32 v = load_sum(grad + i, residual == nullptr ? nullptr : residual + i, factor);
    largest = hn::Max(largest, magnitude_bits(v));
    hn::Store(v, df, values + i);
  }
  const std::int64_t whole = (n + kGroup - 1) / kGroup * kGroup;
  if (i < whole) {
    std::fill(values + i, values + whole, 0.0F);
    for (; i < n; ++i) {
      float v = to_float(grad[i]);
      if (residual != nullptr) v += decay * residual[i];
      values[i] = v;
    }
    for (std::int64_t j = whole - kGroup; j < whole; j += step) {
      largest = hn::Max(largest, magnitude_bits(hn::Load(df, values + j)));
    }
  }
  // As integers: a maximum of floats says nothing about NaN.
  const std::int32_t bits = hn::GetLane(hn::MaxOfLanes(I32(), largest));
  return bits < static_cast<std::int32_t>(kInfBits32) ? std::bit_cast<float>(bits) : -1.0F;
}

// Mean magnitude of n values, zero-filled up to whole groups.
HWY_NOINLINE float mean_of(const float* HWY_RESTRICT values, std::int64_t n) {
  const F32 df;
  const VF32 unit = hn::Set(df, kQuantizeMeanUnit);
  alignas(64) float sums[kQuantizeLanes] = {};
  for (std::int64_t k = 0; k < kQuantizeLanes; k += lanes()) {
    VF32 sum = hn::Zero(df);
    for (std::int64_t j = k; j < n; j += kQuantizeLanes) {
      sum = hn::Add(sum, hn::Mul(hn::Abs(hn::Load(df, values + j)), unit));
    }
    hn::Store(sum, df, sums + k);
  }
  return quantize_mean(sums, n);
}

// The rest of these read n values, zero-filled up to whole groups.

HWY_NOINLINE float largest_of(const float* HWY_RESTRICT values, std::int64_t n) {
  const F32 df;
  VF32 largest = hn::Zero(df);
  for (std::int64_t i = 0; i < n; i += lanes()) {
    largest = hn::Max(largest, hn::Abs(hn::Load(df, values + i)));
  }
  return hn::GetLane(hn::MaxOfLanes(df, largest));
}

// Sum of (v / largest)^2.
HWY_NOINLINE float squares_of(const float* HWY_RESTRICT values, std::int64_t n, float largest) {
  if (largest < kQuantizeTiny) return 0;
  const F32 df;
  const VF32 inverse = hn::Set(df, 1.0F / quantize_square_unit(largest));
  alignas(64) float sums[kQuantizeLanes] = {};
  for (std::int64_t k = 0; k < kQuantizeLanes; k += lanes()) {
    VF32 sum = hn::Zero(df);
    for (std::int64_t j = k; j < n; j += kQuantizeLanes) {
      const VF32 x = hn::Mul(hn::Load(df, values + j), inverse);
      sum = hn::Add(sum, hn::Mul(x, x));
    }
    hn::Store(sum, df, sums + k);
  }
  return quantize_add_lanes(sums);
}

// Without what fills up the last group.
HWY_NOINLINE QuantizeRange range_of(const float* HWY_RESTRICT values, std::int64_t n, int bits) {
  const F32 df;
  VF32 least = hn::Set(df, values[0]);
  VF32 largest = least;
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    const VF32 v = hn::Load(df, values + i);
    least = hn::Min(least, v);
    largest = hn::Max(largest, v);
  }
  float low = hn::GetLane(hn::MinOfLanes(df, least));
  float high = hn::GetLane(hn::MaxOfLanes(df, largest));
  for (; i < n; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  return quantize_range(low, high, bits);
}

// ---- Encoding.

// Everything of a unit fits in L1 or nearly so.
struct Scratch {
  alignas(64) float values[kMaxUnit];
  alignas(64) float rotated[kMaxUnit];
  alignas(64) float kept[kMaxUnit];
  alignas(64) float noise[kMaxUnit];
  alignas(64) std::uint8_t codes[kMaxUnit + kGroup];
};

// The codes of a record of n values, of which `largest` is the largest magnitude; its scales to
// `out`.
template <bool kStochastic, bool kRest>
HWY_NOINLINE void write_record(const QuantizeShape& shape, const Block& block, std::int64_t n,
                               float largest, std::uint8_t* out) {
  const std::int64_t whole = whole_groups(n);
  switch (shape.kind) {
    case QuantizeKind::kMaxAbs:
    case QuantizeKind::kQsgd:
    case QuantizeKind::kTernGrad: {
      float base = largest;
      if (shape.kind == QuantizeKind::kQsgd) {
        base = quantize_norm(base, squares_of(block.values, n, base));
      } else if (shape.kind == QuantizeKind::kTernGrad) {
        base = quantize_clip(base, squares_of(block.values, n, base), n);
      } else if (shape.bits == 1 && !kStochastic) {
        base = mean_of(block.values, n);
      }
      const QuantizeScale scale = quantize_scale(base, quantize_levels(shape.bits));
      std::memcpy(out, &scale.scale, sizeof scale.scale);
      if (shape.bits == 1) {
        return write_codes<kStochastic, kRest>(SignCoder(scale), block, 0, whole);
      }
      return write_codes<kStochastic, kRest>(LevelCoder(scale, shape.bits), block, 0, whole);
    }
    case QuantizeKind::kMaxMin: {
      const QuantizeRange range = range_of(block.values, n, shape.bits);
      std::memcpy(out, &range.least, sizeof range.least);
      std::memcpy(out + sizeof range.least, &range.largest, sizeof range.largest);
      return write_codes<kStochastic, kRest>(StepCoder(range, shape.bits), block, 0, whole);
    }
    case QuantizeKind::kNatural: {
      const QuantizePowers powers = quantize_powers_of(largest, shape.bits);
      out[0] = static_cast<std::uint8_t>(powers.base);
      if constexpr (kStochastic) {
        write_codes<true, kRest>(PowerCoder(powers, shape.bits), block, 0, whole);
      }
      return;
    }
    case QuantizeKind::kMx:
      break;
  }
  const MxFormat format = mx_format(shape.element);
  for (std::int64_t at = 0; at < n; at += shape.block) {
    const std::int64_t end = std::min(at + shape.block, whole);
    const float of_block = largest_of(block.values + at, std::min(end, n) - at);
    const std::uint8_t scale = mx_scale(format, of_block, kStochastic);
    *out++ = scale;
    write_codes<kStochastic, kRest>(MxCoder(format, scale), block, at, end);
  }
}

// The record of the n values at `block.values`, the first of which is element `begin` of the
// tensor.
template <bool kRest>
void encode_record(const QuantizeEncode& args, Scratch& scratch, const Block& block,
                   std::int64_t begin, std::int64_t n, float largest, std::uint8_t* out) {
  if (args.stochastic) {
    for (std::int64_t i = 0; i < n; i += kGroup) {
      group_noise(args.random, static_cast<std::uint64_t>((begin + i) / kGroup), scratch.noise + i);
    }
  }
  args.stochastic ? write_record<true, kRest>(args.shape, block, n, largest, out)
                  : write_record<false, kRest>(args.shape, block, n, largest, out);
  out += args.shape.head_bytes(n);
  if (args.shape.kind == QuantizeKind::kTernGrad) return pack_trits(scratch.codes, n, out);
  const std::int64_t whole = whole_groups(n);
  std::fill(scratch.codes + n, scratch.codes + whole, std::uint8_t{0});
  with_bits(args.shape.bits,
            [&](auto bits) { pack_groups<bits.value>(scratch.codes, whole, out); });
}

// The unit of n elements that begins at `begin`, without rotation: one record.
void encode_plain(const QuantizeEncode& args, Scratch& scratch, std::int64_t begin, std::int64_t n,
                  float largest, bool stream, std::uint8_t* out) {
  float* next = args.next == nullptr ? nullptr : args.next + begin;
  const bool in_place = next != nullptr && whole_groups(n) == n;
  const Block block{scratch.values, scratch.noise, scratch.codes,
                    in_place || next == nullptr ? next : scratch.kept, stream && in_place};
  encode_record<true>(args, scratch, block, begin, n, largest, out);
  if (next != nullptr && !in_place) std::copy(scratch.kept, scratch.kept + n, next);
}

HWY_NOINLINE void write_rest(const float* HWY_RESTRICT values, const float* HWY_RESTRICT sent,
                             std::int64_t n, bool stream, float* next) {
  const F32 df;
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    const VF32 rest = hn::Sub(hn::Load(df, values + i), hn::Load(df, sent + i));
    stream ? hn::Stream(rest, df, next + i) : hn::StoreU(rest, df, next + i);
  }
  for (; i < n; ++i) next[i] = values[i] - sent[i];
}

void encode_rotated(const QuantizeEncode& args, Scratch& scratch, std::int64_t begin,
                    std::int64_t n, bool stream, std::uint8_t* out) {
  const QuantizeShape& shape = args.shape;
  rotate(*args.rotation, shape.unit(), n, scratch.values, scratch.rotated);
  std::fill(scratch.rotated + n, scratch.rotated + whole_groups(n), 0.0F);
  for (std::int64_t at = 0; at < n; at += shape.record()) {
    const std::int64_t size = std::min(shape.record(), n - at);
    const Block block{scratch.rotated + at, scratch.noise, scratch.codes,
                      args.next == nullptr ? nullptr : scratch.kept + at, false};
    encode_record<false>(args, scratch, block, begin + at, size, largest_of(block.values, size),
                         out);
    out += shape.record_bytes(size);
  }
  if (args.next == nullptr) return;
  rotate_back(*args.rotation, shape.unit(), n, scratch.kept);
  write_rest(scratch.values, scratch.kept, n, stream, args.next + begin);
}

bool encode(const QuantizeEncode& args) {
  Scratch scratch;
  auto* out = reinterpret_cast<std::uint8_t*>(args.records);
  const std::int64_t unit = args.shape.unit();
  const std::int64_t n = args.grad.elements;
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  for (std::int64_t begin = 0; begin < n; begin += unit) {
    const std::int64_t size = std::min(unit, n - begin);
    const float* residual = args.residual == nullptr ? nullptr : args.residual + begin;
    const float largest = visit(args.grad, [&](const auto* grad) {
      return read_block(grad + begin, residual, args.decay, size, scratch.values);
    });
    if (largest < 0) return false;
    if (args.shape.rotate) {
      encode_rotated(args, scratch, begin, size, stream, out);
    } else {
      encode_plain(args, scratch, begin, size, largest, stream, out);
    }
    out += args.shape.bytes(size);
  }
  if (stream) hwy::FlushStream();
  return true;
}

// ---- Decoding.

template <class Reader>
HWY_NOINLINE void read_all(const Reader& reader, const std::uint8_t* codes, std::int64_t n,
                           float* values) {
  read_codes(reader, codes, 0, n, values);
}

// The values of a record, in whole groups; false at a scale that no encoder writes.
bool read_record(const std::uint8_t* in, const QuantizeShape& shape, std::int64_t n,
                 float* values) {
  alignas(64) std::uint8_t codes[kMaxUnit + kGroup];
  const std::uint8_t* packed = in + shape.head_bytes(n);
  const std::int64_t whole = whole_groups(n);
  const bool integers = shape.kind == QuantizeKind::kMaxAbs || shape.kind == QuantizeKind::kQsgd;
  if (shape.kind == QuantizeKind::kTernGrad) {
    unpack_trits(packed, n, codes);
  } else {
    with_bits(shape.bits, [&](auto bits) {
      integers ? unpack_groups<bits.value, true>(packed, n, codes)
               : unpack_groups<bits.value, false>(packed, n, codes);
    });
  }
  switch (shape.kind) {
    case QuantizeKind::kMaxAbs:
    case QuantizeKind::kQsgd:
    case QuantizeKind::kTernGrad: {
      float scale = 0;
      if (!read_scale(shape, in, scale)) return false;
      read_all(LevelReader(scale), codes, whole, values);
      return true;
    }
    case QuantizeKind::kMaxMin: {
      QuantizeRange range;
      if (!read_range(shape, in, range)) return false;
      read_all(StepReader(range), codes, whole, values);
      return true;
    }
    case QuantizeKind::kNatural: {
      QuantizePowers powers;
      if (!read_powers(shape, in[0], powers)) return false;
      read_all(PowerReader(powers, shape.bits), codes, whole, values);
      return true;
    }
    case QuantizeKind::kMx:
      break;
  }
  const MxFormat format = mx_format(shape.element);
  for (std::int64_t at = 0; at < n; at += shape.block) {
    const std::uint8_t scale = *in++;
    if (!mx_valid(shape, scale)) return false;
    read_codes(MxReader(format, mx_unit(scale)), codes, at, std::min(at + shape.block, whole),
               values);
  }
  return true;
}

// Calls use(begin, elements, values) for every unit in order; false at a scale that no encoder
// writes.
template <typename F>
HWY_INLINE bool for_each_unit(const std::byte* records, const QuantizeShape& shape,
                              const QuantizeRotation* rotation, std::int64_t n, F&& use) {
  alignas(64) float values[kMaxUnit];
  const auto* in = reinterpret_cast<const std::uint8_t*>(records);
  for (std::int64_t begin = 0; begin < n; begin += shape.unit()) {
    const std::int64_t size = std::min(shape.unit(), n - begin);
    for (std::int64_t at = 0; at < size; at += shape.record()) {
      const std::int64_t elements = std::min(shape.record(), size - at);
      if (!read_record(in, shape, elements, values + at)) return false;
      in += shape.record_bytes(elements);
    }
    if (shape.rotate) rotate_back(*rotation, shape.unit(), size, values);
    use(begin, size, values);
  }
  return true;
}

template <typename T>
HWY_NOINLINE void write_values(const float* HWY_RESTRICT values, std::int64_t n, T* out) {
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) store_float(hn::Load(F32(), values + i), out + i);
  for (; i < n; ++i) out[i] = from_float<T>(values[i]);
}

bool decode(const std::byte* records, const QuantizeShape& shape, const QuantizeRotation* rotation,
            TensorView out) {
  return visit(out, [&](auto* to) {
    return for_each_unit(records, shape, rotation, out.elements,
                         [&](std::int64_t begin, std::int64_t n, const float* values) {
                           write_values(values, n, to + begin);
                         });
  });
}

HWY_NOINLINE void add_values(const float* HWY_RESTRICT values, float weight, std::int64_t n,
                             float* HWY_RESTRICT out) {
  const F32 df;
  const VF32 factor = hn::Set(df, weight);
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    const VF32 product = hn::Mul(factor, hn::Load(df, values + i));
    hn::StoreU(hn::Add(hn::LoadU(df, out + i), product), df, out + i);
  }
  for (; i < n; ++i) out[i] += weight * values[i];
}

bool accumulate(const std::byte* records, const QuantizeShape& shape,
                const QuantizeRotation* rotation, float weight, float* out, std::int64_t n) {
  return for_each_unit(records, shape, rotation, n,
                       [&](std::int64_t begin, std::int64_t size, const float* values) {
                         add_values(values, weight, size, out + begin);
                       });
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(encode);
HWY_EXPORT(decode);
HWY_EXPORT(accumulate);

bool quantize_encode(const QuantizeEncode& args) { return HWY_DYNAMIC_DISPATCH(encode)(args); }
bool quantize_decode(const std::byte* records, const QuantizeShape& shape,
                     const QuantizeRotation* rotation, TensorView out) {
  return HWY_DYNAMIC_DISPATCH(decode)(records, shape, rotation, out);
}
bool quantize_accumulate(const std::byte* records, const QuantizeShape& shape,
                         const QuantizeRotation* rotation, float weight, float* out,
                         std::int64_t n) {
  return HWY_DYNAMIC_DISPATCH(accumulate)(records, shape, rotation, weight, out, n);
}

}  // namespace thinwire
#endif  // HWY_ONCE
