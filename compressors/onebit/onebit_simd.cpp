#include "compressors/onebit/onebit_kernels.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/onebit/onebit_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"
#include "compressors/onebit/onebit_runs.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

constexpr std::int64_t kGroup = kOneBitGroup;
constexpr std::uint64_t kAll = ~std::uint64_t{0};

using F64 = hn::CappedTag<double, 8>;
using VF64 = hn::Vec<F64>;
constexpr std::size_t kParts = kOneBitLanes / hn::MaxLanes(F64());

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

HWY_INLINE std::uint64_t bits_of(hn::Mask<F32> mask) {
  std::uint16_t bits = 0;  // of at most 16 lanes
  hn::StoreMaskBits(F32(), mask, reinterpret_cast<std::uint8_t*>(&bits));
  return bits;
}
// Lane i: bit j + i of the word.
HWY_INLINE hn::Mask<F32> mask_at(std::uint64_t word, std::int64_t j) {
  const U32 du;
  const auto lane_bit = hn::Shl(hn::Set(du, 1U), hn::Iota(du, 0U));
  const auto bits = hn::Set(du, static_cast<std::uint32_t>(word >> j));
  return hn::RebindMask(F32(), hn::TestBit(bits, lane_bit));
}

// v of the group at `base`, zero-filled beyond its `size` elements.
template <typename T>
HWY_INLINE void read_group(const OneBitEncode& args, const T* grad, std::int64_t base,
                           std::int64_t size, float* values) {
  const float* residual = args.residual == nullptr ? nullptr : args.residual + base;
  if (size == kGroup) {
    const VF32 decay = hn::Set(F32(), args.decay);
    for (std::int64_t j = 0; j < kGroup; j += lanes()) {
      const float* of_residual = residual == nullptr ? nullptr : residual + j;
      hn::Store(load_sum(grad + base + j, of_residual, decay), F32(), values + j);
    }
    return;
  }
  std::fill_n(values, kGroup, 0.0F);
  for (std::int64_t i = 0; i < size; ++i) {
    values[i] = to_float(grad[base + i]);
    if (residual != nullptr) values[i] += args.decay * residual[i];
  }
}

// Values of blocks up to this many elements are kept between the two passes: 16 KiB, in L1.
constexpr std::int64_t kKept = 4096;
// Elements between what is read and what is fetched into the caches, at least; 1.3 times as fast
// as the processor's own prefetching alone.
constexpr std::int64_t kAhead = 1024;

template <typename T>
HWY_INLINE void prefetch_group(const OneBitEncode& args, const T* grad, std::int64_t base) {
  if (base + kGroup > args.grad.elements) return;
  constexpr auto kLine = static_cast<std::int64_t>(64 / sizeof(T));
  for (std::int64_t j = 0; j < kGroup; j += kLine) hwy::Prefetch(grad + base + j);
  if (args.residual == nullptr) return;
  for (std::int64_t j = 0; j < kGroup; j += 16) hwy::Prefetch(args.residual + base + j);
}

// The block's sum of |v| or v^2, not finite when some v is not: neither can overflow in fp64. Its
// runs' links are written, and its values to `kept` unless that is null.
template <OneBitScale kScale, typename T>
HWY_NOINLINE double measure(const OneBitEncode& args, const T* grad, std::int64_t begin,
                            std::int64_t end, OneBitRunWriter& runs, float* kept) {
  const F32 df;
  const F64 d64;
  const hn::Rebind<float, F64> narrow;
  VF64 sums[kParts];
  for (VF64& sum : sums) sum = hn::Zero(d64);
  alignas(64) float group[kGroup];
  runs.begin_block(begin);
  for (std::int64_t base = begin; base < end; base += kGroup) {
    float* values = kept == nullptr ? group : kept + (base - begin);
    if (kept == nullptr) prefetch_group(args, grad, base + kAhead);
    read_group(args, grad, base, std::min(kGroup, end - base), values);
    std::uint64_t nonzero = 0;
    for (std::int64_t j = 0; j < kGroup; j += lanes()) {
      const VF32 v = hn::Load(df, values + j);
      nonzero |= bits_of(hn::Ne(v, hn::Zero(df))) << j;
    }
    runs.see(base, nonzero);
    for (std::int64_t j = 0; j < kGroup; j += kOneBitLanes) {
      for (std::size_t part = 0; part < kParts; ++part) {
        const float* from = values + j + part * hn::Lanes(d64);
        const VF64 v = hn::PromoteTo(d64, hn::Load(narrow, from));
        // Squares of fp32 values are exact in fp64.
        sums[part] = kScale == OneBitScale::kL2 ? hn::MulAdd(v, v, sums[part])
                                                : hn::Add(sums[part], hn::Abs(v));
      }
    }
  }
  runs.end_block(end);
  alignas(64) double all[kOneBitLanes];
  for (std::size_t part = 0; part < kParts; ++part) {
    hn::Store(sums[part], d64, all + part * hn::Lanes(d64));
  }
  return onebit_total(all);
}

// Signs of the elements that are sent; rest: what the scale leaves of them, zero elsewhere.
template <bool kMasked, bool kStream>
HWY_INLINE std::uint64_t split_group(const float* values, std::uint64_t sent, float scale,
                                     float* rest) {
  const F32 df;
  const VF32 plus = hn::Set(df, scale);
  const VF32 minus = hn::Neg(plus);
  std::uint64_t signs = 0;
  for (std::int64_t j = 0; j < kGroup; j += lanes()) {
    const VF32 v = hn::Load(df, values + j);
    const auto negative = hn::Lt(v, hn::Zero(df));
    signs |= bits_of(negative) << j;
    VF32 left = hn::Sub(v, hn::IfThenElse(negative, minus, plus));
    if constexpr (kMasked) left = hn::IfThenElseZero(mask_at(sent, j), left);
    if constexpr (kStream) {
      hn::Stream(left, df, rest + j);
    } else {
      hn::StoreU(left, df, rest + j);
    }
  }
  return signs;
}

// Writes the bytes of which any bit is sent; the others belong to a run.
void write_some(std::uint64_t signs, std::uint64_t sent, std::int64_t size, std::byte* out) {
  for (std::int64_t byte = 0; 8 * byte < size; ++byte) {
    if ((sent >> 8 * byte & 0xFF) == 0) continue;
    out[byte] = static_cast<std::byte>((signs & sent) >> 8 * byte & 0xFF);
  }
}

template <bool kStream, typename T>
HWY_NOINLINE void write_block(const OneBitEncode& args, const T* grad, std::int64_t begin,
                              std::int64_t end, float scale, OneBitRunReader runs, std::byte* signs,
                              float* kept) {
  alignas(64) float group[kGroup];
  // The next block, to be measured, while this one is written.
  const std::int64_t ahead = kept == nullptr ? kAhead : std::max(kAhead, end - begin);
  for (std::int64_t base = begin; base < end; base += kGroup) {
    const std::int64_t size = std::min(kGroup, end - base);
    prefetch_group(args, grad, base + ahead);
    float* values = kept == nullptr ? group : kept + (base - begin);
    if (kept == nullptr) read_group(args, grad, base, size, values);
    const bool in_place = args.next != nullptr && size == kGroup;
    float* rest = in_place ? args.next + base : values;
    const std::uint64_t sent = runs.sent(base);
    if (sent == kAll && size == kGroup) {
      const std::uint64_t word = split_group<false, kStream>(values, sent, scale, rest);
      std::memcpy(signs + base / 8, &word, sizeof(word));
    } else {
      const std::uint64_t word = split_group<true, kStream>(values, sent, scale, rest);
      write_some(word, sent, size, signs + base / 8);
    }
    if (args.next != nullptr && !in_place) std::copy_n(values, size, args.next + base);
  }
}

template <OneBitScale kScale, typename T>
bool encode_typed(const OneBitEncode& args, const T* grad) {
  const std::int64_t n = args.grad.elements;
  const std::int64_t block = onebit_block(args.block, n);
  std::byte* scales = args.body + kOneBitFirstBytes;
  std::byte* signs = scales + kOneBitScaleBytes * onebit_scales(args.block, n);
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  OneBitRunWriter runs(args.body, signs, n);
  alignas(64) float values[kKept];
  float* kept = block <= kKept ? values : nullptr;
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = std::min(begin + block, n);
    const double total = measure<kScale>(args, grad, begin, end, runs, kept);
    if (!std::isfinite(total)) return false;
    const float scale = onebit_scale(kScale, total, end - begin - runs.masked());
    std::memcpy(scales, &scale, sizeof(scale));
    scales += kOneBitScaleBytes;
    const OneBitRunReader of_block(signs, n, runs.block_first());
    if (stream) {
      write_block<true>(args, grad, begin, end, scale, of_block, signs, kept);
    } else {
      write_block<false>(args, grad, begin, end, scale, of_block, signs, kept);
    }
  }
  if (stream) hwy::FlushStream();
  return true;
}

bool encode(const OneBitEncode& args) {
  return visit(args.grad, [&](const auto* grad) {
    return args.scale == OneBitScale::kL2 ? encode_typed<OneBitScale::kL2>(args, grad)
                                          : encode_typed<OneBitScale::kL1>(args, grad);
  });
}

HWY_INLINE float scale_at(const OneBitBody& body, std::int64_t index) {
  float scale = 0;
  std::memcpy(&scale, body.scales + kOneBitScaleBytes * index, sizeof(scale));
  return scale;
}
HWY_INLINE std::uint64_t signs_at(const OneBitBody& body, std::int64_t base, std::int64_t size) {
  std::uint64_t word = 0;
  if (size == kGroup) {
    std::memcpy(&word, body.signs + base / 8, sizeof(word));
  } else {
    std::memcpy(&word, body.signs + base / 8, static_cast<std::size_t>(size + 7) / 8);
  }
  return word;
}

// Elements j and on of a group: plus or minus `unit`, `masked` in runs.
template <bool kMasked>
HWY_INLINE VF32 values_at(std::uint64_t signs, std::uint64_t sent, std::int64_t j, VF32 unit,
                          VF32 masked) {
  const VF32 values = hn::IfThenElse(mask_at(signs, j), hn::Neg(unit), unit);
  return kMasked ? hn::IfThenElse(mask_at(sent, j), values, masked) : values;
}

template <bool kMasked, typename T>
HWY_INLINE void decode_group(std::uint64_t signs, std::uint64_t sent, float scale, T* out) {
  const VF32 unit = hn::Set(F32(), scale);
  for (std::int64_t j = 0; j < kGroup; j += lanes()) {
    store_float(values_at<kMasked>(signs, sent, j, unit, hn::Zero(F32())), out + j);
  }
}

template <typename T>
void decode_typed(const OneBitBody& body, std::int64_t block, T* out, std::int64_t n) {
  OneBitRunReader runs(body.signs, n, body.first_run);
  const std::int64_t length = onebit_block(block, n);
  std::int64_t index = 0;
  for (std::int64_t begin = 0; begin < n; begin += length, ++index) {
    const std::int64_t end = std::min(begin + length, n);
    const float scale = scale_at(body, index);
    for (std::int64_t base = begin; base < end; base += kGroup) {
      const std::int64_t size = std::min(kGroup, end - base);
      const std::uint64_t signs = signs_at(body, base, size);
      const std::uint64_t sent = runs.sent(base);
      T tail[kGroup];
      T* to = size == kGroup ? out + base : tail;
      if (sent == kAll) {
        decode_group<false>(signs, sent, scale, to);
      } else {
        decode_group<true>(signs, sent, scale, to);
      }
      if (size < kGroup) std::copy_n(tail, size, out + base);
    }
  }
}

void decode(const OneBitBody& body, std::int64_t block, TensorView out) {
  visit(out, [&](auto* values) { decode_typed(body, block, values, out.elements); });
}

// One group of the bodies that are summed together.
struct Group {
  std::size_t bodies;
  std::array<std::uint64_t, kOneBitTogether> signs;
  std::array<std::uint64_t, kOneBitTogether> sent;
  std::array<float, kOneBitTogether> units;  // weight * scale
  float masked;                              // weight * 0
};

template <bool kMasked, bool kStream>
HWY_INLINE void sum_group(const Group& group, bool fresh, float* out) {
  const F32 df;
  const VF32 masked = hn::Set(df, group.masked);
  for (std::int64_t j = 0; j < kGroup; j += lanes()) {
    VF32 sum = fresh ? hn::Zero(df) : hn::LoadU(df, out + j);
    for (std::size_t i = 0; i < group.bodies; ++i) {
      const VF32 unit = hn::Set(df, group.units[i]);
      sum = hn::Add(sum, values_at<kMasked>(group.signs[i], group.sent[i], j, unit, masked));
    }
    if constexpr (kStream) {
      hn::Stream(sum, df, out + j);
    } else {
      hn::StoreU(sum, df, out + j);
    }
  }
}

template <bool kStream>
void sum_typed(std::span<const OneBitBody> bodies, std::int64_t block, float weight, bool fresh,
               float* out, std::int64_t n) {
  std::array<OneBitRunReader, kOneBitTogether> runs;
  for (std::size_t i = 0; i < bodies.size(); ++i) {
    runs[i] = OneBitRunReader(bodies[i].signs, n, bodies[i].first_run);
  }
  Group group = {};
  group.bodies = bodies.size();
  group.masked = weight * 0.0F;
  const std::int64_t length = onebit_block(block, n);
  std::int64_t index = 0;
  for (std::int64_t begin = 0; begin < n; begin += length, ++index) {
    const std::int64_t end = std::min(begin + length, n);
    for (std::size_t i = 0; i < bodies.size(); ++i) {
      group.units[i] = weight * scale_at(bodies[i], index);
    }
    for (std::int64_t base = begin; base < end; base += kGroup) {
      const std::int64_t size = std::min(kGroup, end - base);
      std::uint64_t sent = kAll;
      for (std::size_t i = 0; i < bodies.size(); ++i) {
        group.signs[i] = signs_at(bodies[i], base, size);
        group.sent[i] = runs[i].sent(base);
        sent &= group.sent[i];
      }
      if (size == kGroup) {
        sent == kAll ? sum_group<false, kStream>(group, fresh, out + base)
                     : sum_group<true, kStream>(group, fresh, out + base);
      } else {
        float tail[kGroup] = {};
        if (!fresh) std::copy_n(out + base, size, tail);
        sum_group<true, false>(group, fresh, tail);
        std::copy_n(tail, size, out + base);
      }
    }
  }
  if (kStream) hwy::FlushStream();
}

void sum(std::span<const OneBitBody> bodies, std::int64_t block, float weight, bool fresh,
         std::span<float> out) {
  const auto n = static_cast<std::int64_t>(out.size());
  const bool stream = fresh && out.size_bytes() >= kStreamBytes &&
                      reinterpret_cast<std::uintptr_t>(out.data()) % 64 == 0;
  if (stream) {
    sum_typed<true>(bodies, block, weight, fresh, out.data(), n);
  } else {
    sum_typed<false>(bodies, block, weight, fresh, out.data(), n);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(encode);
HWY_EXPORT(decode);
HWY_EXPORT(sum);

bool onebit_encode(const OneBitEncode& args) { return HWY_DYNAMIC_DISPATCH(encode)(args); }
void onebit_decode(const OneBitBody& body, std::int64_t block, TensorView out) {
  HWY_DYNAMIC_DISPATCH(decode)(body, block, out);
}
void onebit_sum(std::span<const OneBitBody> bodies, std::int64_t block, float weight, bool fresh,
                std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(sum)(bodies, block, weight, fresh, out);
}

}  // namespace thinwire
#endif  // HWY_ONCE
