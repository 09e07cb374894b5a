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

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

constexpr std::int64_t kGroup = kQuantizeGroup;
constexpr std::int64_t kMaxBlock = 4096;

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

// One plane: bits [kShift, kShift + kWidth) of 64 codes, one a byte, into 8 * kWidth bytes.
template <int kWidth, int kShift>
HWY_INLINE void pack_plane(const std::uint8_t* codes, std::uint8_t* out) {
  constexpr std::size_t kBytes = 8 * kWidth;
  using D = hn::CappedTag < std::uint8_t, kBytes<32 ? kBytes : 32>;
  const D d;
  const auto mask = hn::Set(d, static_cast<std::uint8_t>((1U << kWidth) - 1));
  for (std::size_t j = 0; j < kBytes; j += hn::Lanes(d)) {
    const auto part = [&](std::size_t k) HWY_ATTR {
      return hn::And(hn::ShiftRight<kShift>(hn::LoadU(d, codes + j + k * kBytes)), mask);
    };
    auto byte = part(0);
    if constexpr (kWidth == 4) {
      byte = hn::Or(byte, hn::ShiftLeft<4>(part(1)));
    } else if constexpr (kWidth == 2) {
      byte = hn::Or(byte, hn::ShiftLeft<2>(part(1)));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<4>(part(2)), hn::ShiftLeft<6>(part(3))));
    } else if constexpr (kWidth == 1) {
      byte = hn::Or(byte, hn::ShiftLeft<1>(part(1)));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<2>(part(2)), hn::ShiftLeft<3>(part(3))));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<4>(part(4)), hn::ShiftLeft<5>(part(5))));
      byte = hn::Or(byte, hn::Or(hn::ShiftLeft<6>(part(6)), hn::ShiftLeft<7>(part(7))));
    }
    hn::StoreU(byte, d, out + j);
  }
}

// The inverse of pack_plane: ORs the plane into the codes.
template <int kWidth, int kShift>
HWY_INLINE void unpack_plane(const std::uint8_t* in, std::uint8_t* codes) {
  constexpr std::size_t kBytes = 8 * kWidth;
  using D = hn::CappedTag < std::uint8_t, kBytes<32 ? kBytes : 32>;
  const D d;
  const auto mask = hn::Set(d, static_cast<std::uint8_t>((1U << kWidth) - 1));
  for (std::size_t j = 0; j < kBytes; j += hn::Lanes(d)) {
    const auto byte = hn::LoadU(d, in + j);
    const auto put = [&](std::size_t k, hn::Vec<D> bits) HWY_ATTR {
      std::uint8_t* to = codes + j + k * kBytes;
      const auto part = hn::ShiftLeft<kShift>(hn::And(bits, mask));
      hn::StoreU(kShift == 0 ? part : hn::Or(part, hn::LoadU(d, to)), d, to);
    };
    put(0, byte);
    if constexpr (kWidth == 4) {
      put(1, hn::ShiftRight<4>(byte));
    } else if constexpr (kWidth == 2) {
      put(1, hn::ShiftRight<2>(byte));
      put(2, hn::ShiftRight<4>(byte));
      put(3, hn::ShiftRight<6>(byte));
    } else if constexpr (kWidth == 1) {
      put(1, hn::ShiftRight<1>(byte));
      put(2, hn::ShiftRight<2>(byte));
      put(3, hn::ShiftRight<3>(byte));
      put(4, hn::ShiftRight<4>(byte));
      put(5, hn::ShiftRight<5>(byte));
      put(6, hn::ShiftRight<6>(byte));
      put(7, hn::ShiftRight<7>(byte));
    }
  }
}

template <int kBits>
HWY_INLINE void pack_group(const std::uint8_t* codes, std::uint8_t* out) {
  if constexpr (kBits == 8) {
    std::memcpy(out, codes, kGroup);
  } else {
    constexpr int k4 = kBits & 4;
    constexpr int k2 = kBits & 2;
    if constexpr (k4 != 0) pack_plane<4, 0>(codes, out);
    if constexpr (k2 != 0) pack_plane<2, k4>(codes, out + 8 * k4);
    if constexpr ((kBits & 1) != 0) pack_plane<1, k4 + k2>(codes, out + 8 * (k4 + k2));
  }
}

// Signed integers of a group, one a byte.
template <int kBits>
HWY_INLINE void unpack_group(const std::uint8_t* in, std::uint8_t* codes) {
  if constexpr (kBits == 8) {
    std::memcpy(codes, in, kGroup);
    return;
  } else {
    constexpr int k4 = kBits & 4;
    constexpr int k2 = kBits & 2;
    if constexpr (k4 != 0) unpack_plane<4, 0>(in, codes);
    if constexpr (k2 != 0) unpack_plane<2, k4>(in + 8 * k4, codes);
    if constexpr ((kBits & 1) != 0) unpack_plane<1, k4 + k2>(in + 8 * (k4 + k2), codes);
  }
  const hn::CappedTag<std::uint8_t, 64> d;
  for (std::size_t j = 0; j < kGroup; j += hn::Lanes(d)) {
    const auto code = hn::LoadU(d, codes + j);
    if constexpr (kBits == 1) {  // 0 is +1, 1 is -1
      hn::StoreU(hn::Sub(hn::Set(d, 1), hn::Add(code, code)), d, codes + j);
    } else {
      const auto sign = hn::Set(d, static_cast<std::uint8_t>(1U << (kBits - 1)));
      hn::StoreU(hn::Sub(hn::Xor(code, sign), sign), d, codes + j);
    }
  }
}

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

struct Block {
  QuantizeScale scale;
  int bits;
  const float* values;  // whole groups
  const float* noise;   // as many, when stochastic
  std::uint8_t* codes;  // one a byte
  float* rest;          // what the codes leave of the values, or null
  std::int64_t n;       // a multiple of 64
};

template <bool kStochastic, bool kStream>
HWY_NOINLINE void quantize_signs(const Block& block) {
  const F32 df;
  const U32 du;
  const VF32 inverse = hn::Set(df, block.scale.inverse);
  const auto unit = hn::BitCast(du, hn::Set(df, block.scale.scale));
  const auto sign_bit = hn::Set(du, kSignBit32);
  for (std::int64_t i = 0; i < block.n; i += lanes()) {
    const VF32 v = hn::Load(df, block.values + i);
    auto sign = hn::And(hn::BitCast(du, v), sign_bit);
    if constexpr (kStochastic) {
      const VF32 twice = hn::Mul(hn::Set(df, 2.0F), hn::Load(df, block.noise + i));
      const VF32 sum = hn::Add(hn::Mul(v, inverse), twice);
      // A sum of 0 is positive whatever its sign bit.
      sign = hn::IfThenElseZero(hn::RebindMask(du, hn::Lt(sum, hn::Zero(df))), sign_bit);
    }
    hn::StoreU(hn::U8FromU32(hn::ShiftRight<31>(sign)), U8(), block.codes + i);
    if (block.rest == nullptr) continue;
    const VF32 rest = hn::Sub(v, hn::BitCast(df, hn::Or(unit, sign)));
    if constexpr (kStream) {
      hn::Stream(rest, df, block.rest + i);
    } else {
      hn::StoreU(rest, df, block.rest + i);
    }
  }
}

template <bool kStochastic, bool kStream>
HWY_NOINLINE void quantize_levels_of(const Block& block) {
  const F32 df;
  const U32 du;
  const VF32 inverse = hn::Set(df, block.scale.inverse);
  const VF32 unit = hn::Set(df, block.scale.scale);
  const VF32 magic = hn::Set(df, kQuantizeMagic);
  const auto levels = static_cast<float>(quantize_levels(block.bits));
  const VF32 least = hn::Set(df, kQuantizeMagic - levels);
  const VF32 most = hn::Set(df, kQuantizeMagic + levels);
  const VU32 mask = hn::Set(du, (1U << block.bits) - 1);
  for (std::int64_t i = 0; i < block.n; i += lanes()) {
    const VF32 v = hn::Load(df, block.values + i);
    VF32 rounded = hn::Mul(v, inverse);
    if constexpr (kStochastic) {
      rounded = hn::Add(hn::Add(rounded, hn::Load(df, block.noise + i)), magic);
      rounded = hn::Min(hn::Max(rounded, least), most);
    } else {
      rounded = hn::Add(rounded, magic);
    }
    hn::StoreU(hn::U8FromU32(hn::And(hn::BitCast(du, rounded), mask)), U8(), block.codes + i);
    if (block.rest == nullptr) continue;
    const VF32 rest = hn::Sub(v, hn::Mul(hn::Sub(rounded, magic), unit));
    if constexpr (kStream) {
      hn::Stream(rest, df, block.rest + i);
    } else {
      hn::StoreU(rest, df, block.rest + i);
    }
  }
}

template <bool kStochastic>
void quantize_block(const Block& block, bool stream) {
  if (block.bits == 1) {
    stream ? quantize_signs<kStochastic, true>(block) : quantize_signs<kStochastic, false>(block);
  } else {
    stream ? quantize_levels_of<kStochastic, true>(block)
           : quantize_levels_of<kStochastic, false>(block);
  }
}

template <int kBits>
HWY_NOINLINE void pack_groups(const std::uint8_t* codes, std::int64_t n, std::uint8_t* out) {
  for (std::int64_t i = 0; i < n; i += kGroup) {
    pack_group<kBits>(codes + i, out);
    out += quantize_group_bytes(kBits);
  }
}
template <int kBits>
HWY_NOINLINE void unpack_groups(const std::uint8_t* in, std::int64_t n, std::uint8_t* codes) {
  for (std::int64_t i = 0; i < n; i += kGroup) {
    unpack_group<kBits>(in, codes + i);
    in += quantize_group_bytes(kBits);
  }
}

// Calls f(std::integral_constant<int, bits>).
template <typename F>
HWY_INLINE void with_bits(int bits, F&& f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

// Everything of a block fits in L1: 4096 values and their noise, codes and tail.
struct Scratch {
  alignas(64) float values[kMaxBlock];
  alignas(64) float noise[kMaxBlock];
  alignas(64) float tail[kMaxBlock];
  alignas(64) std::uint8_t codes[kMaxBlock];
};

// Scale and codes of the block of `size` values that begins at `begin`.
void encode_block(const QuantizeEncode& args, Scratch& scratch, std::int64_t begin,
                  std::int64_t size, QuantizeScale scale, bool stream, std::uint8_t* out) {
  std::memcpy(out, &scale.scale, sizeof(float));
  const std::int64_t whole = (size + kGroup - 1) / kGroup * kGroup;
  float* next = args.next == nullptr ? nullptr : args.next + begin;
  const bool in_place = next != nullptr && whole == size;
  const Block block{scale,         args.bits,     scratch.values,
                    scratch.noise, scratch.codes, in_place || next == nullptr ? next : scratch.tail,
                    whole};
  if (args.stochastic) {
    for (std::int64_t i = 0; i < size; i += kGroup) {
      group_noise(args.random, static_cast<std::uint64_t>((begin + i) / kGroup), scratch.noise + i);
    }
    quantize_block<true>(block, stream && in_place);
  } else {
    quantize_block<false>(block, stream && in_place);
  }
  if (next != nullptr && !in_place) std::copy(scratch.tail, scratch.tail + size, next);
  std::fill(scratch.codes + size, scratch.codes + whole, std::uint8_t{0});
  with_bits(args.bits, [&](auto bits) {
    pack_groups<bits.value>(scratch.codes, whole, out + kQuantizeScaleBytes);
  });
}

bool encode(const QuantizeEncode& args) {
  Scratch scratch;
  auto* out = reinterpret_cast<std::uint8_t*>(args.blocks);
  const std::int64_t n = args.grad.elements;
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  for (std::int64_t begin = 0; begin < n; begin += args.block) {
    const std::int64_t size = std::min(args.block, n - begin);
    const float* residual = args.residual == nullptr ? nullptr : args.residual + begin;
    float base = visit(args.grad, [&](const auto* grad) {
      return read_block(grad + begin, residual, args.decay, size, scratch.values);
    });
    if (base < 0) return false;
    if (args.bits == 1 && !args.stochastic) base = mean_of(scratch.values, size);
    const QuantizeScale scale = quantize_scale(base, quantize_levels(args.bits));
    encode_block(args, scratch, begin, size, scale, stream, out);
    out += quantize_block_bytes(args.bits, size);
  }
  if (stream) hwy::FlushStream();
  return true;
}

// Calls use(begin, size, scale, signed codes) for every block in order; false at a scale that no
// encoder wrote.
template <typename F>
HWY_INLINE bool for_each_block(const std::byte* blocks, int bits, std::int64_t block,
                               std::int64_t n, F&& use) {
  alignas(64) std::uint8_t codes[kMaxBlock];
  const auto* in = reinterpret_cast<const std::uint8_t*>(blocks);
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t size = std::min(block, n - begin);
    float scale = 0;
    std::memcpy(&scale, in, sizeof(scale));
    if (std::bit_cast<std::uint32_t>(scale) >= kInfBits32) return false;
    with_bits(bits, [&](auto b) { unpack_groups<b.value>(in + kQuantizeScaleBytes, size, codes); });
    use(begin, size, scale, reinterpret_cast<const std::int8_t*>(codes));
    in += quantize_block_bytes(bits, size);
  }
  return true;
}

HWY_INLINE VF32 load_codes(const std::int8_t* codes) {
  const hn::Rebind<std::int8_t, F32> d8;
  return hn::ConvertTo(F32(), hn::PromoteTo(I32(), hn::LoadU(d8, codes)));
}

template <typename T>
HWY_NOINLINE void write_block(const std::int8_t* codes, float scale, std::int64_t n, T* out) {
  const VF32 unit = hn::Set(F32(), scale);
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    store_float(hn::Mul(load_codes(codes + i), unit), out + i);
  }
  for (; i < n; ++i) out[i] = from_float<T>(static_cast<float>(codes[i]) * scale);
}

bool decode(const std::byte* blocks, int bits, std::int64_t block, TensorView out) {
  return visit(out, [&](auto* values) {
    return for_each_block(
        blocks, bits, block, out.elements,
        [&](std::int64_t begin, std::int64_t size, float scale, const std::int8_t* codes) {
          write_block(codes, scale, size, values + begin);
        });
  });
}

HWY_NOINLINE void add_block(const std::int8_t* codes, float scale, float weight, std::int64_t n,
                            float* out) {
  const F32 df;
  const VF32 unit = hn::Set(df, scale);
  const VF32 factor = hn::Set(df, weight);
  std::int64_t i = 0;
  for (; i + lanes() <= n; i += lanes()) {
    const VF32 product = hn::Mul(factor, hn::Mul(load_codes(codes + i), unit));
    hn::StoreU(hn::Add(hn::LoadU(df, out + i), product), df, out + i);
  }
  for (; i < n; ++i) out[i] += weight * (static_cast<float>(codes[i]) * scale);
}

bool accumulate(const std::byte* blocks, int bits, std::int64_t block, float weight, float* out,
                std::int64_t n) {
  return for_each_block(
      blocks, bits, block, n,
      [&](std::int64_t begin, std::int64_t size, float scale, const std::int8_t* codes) {
        add_block(codes, scale, weight, size, out + begin);
      });
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(encode);
HWY_EXPORT(decode);
HWY_EXPORT(accumulate);

bool quantize_encode(const QuantizeEncode& args) { return HWY_DYNAMIC_DISPATCH(encode)(args); }
bool quantize_decode(const std::byte* blocks, int bits, std::int64_t block, TensorView out) {
  return HWY_DYNAMIC_DISPATCH(decode)(blocks, bits, block, out);
}
bool quantize_accumulate(const std::byte* blocks, int bits, std::int64_t block, float weight,
                         float* out, std::int64_t n) {
  return HWY_DYNAMIC_DISPATCH(accumulate)(blocks, bits, block, weight, out, n);
}

}  // namespace thinwire
#endif  // HWY_ONCE
