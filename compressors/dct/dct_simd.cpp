#include "compressors/dct/dct_kernels.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/dct/dct_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {
namespace {

// Tiles side by side: row j of an array of kRow floats a row holds element j of 16 tiles. Each lane
// does what the reference does with one tile, so the number of lanes in a vector changes nothing.
constexpr std::ptrdiff_t kRow = kDctTogether;
// Marks coefficients that are not sent, among their codes: a NaN.
constexpr std::uint32_t kDropped = 0xFFFFFFFF;
// Transforms up to this size stay in registers.
constexpr int kSmall = 16;

using VI32 = hn::Vec<I32>;

HWY_INLINE std::ptrdiff_t lanes() { return static_cast<std::ptrdiff_t>(hn::Lanes(F32())); }

// ---- Transforms of a vector of tiles.

HWY_INLINE void rotate(const DctTwiddles& twiddles, int j, VF32 p, VF32 q, VF32& a, VF32& b) {
  const VF32 c = hn::Set(F32(), twiddles.cos[j]);
  const VF32 s = hn::Set(F32(), twiddles.sin[j]);
  a = hn::Add(hn::Mul(c, p), hn::Mul(s, q));
  const VF32 cq = hn::Mul(c, q);
  const VF32 sp = hn::Mul(s, p);
  b = j % 2 == 0 ? hn::Sub(cq, sp) : hn::Sub(sp, cq);
}

template <int kN>
HWY_INLINE void small_dct4(const VF32* x, VF32* y);

template <int kN>
HWY_INLINE void small_dct2(const VF32* x, VF32* y) {
  if constexpr (kN == 1) {
    y[0] = x[0];
  } else {
    constexpr int kHalf = kN / 2;
    VF32 sums[kHalf];
    VF32 differences[kHalf];
    for (int j = 0; j < kHalf; ++j) {
      sums[j] = hn::Add(x[j], x[kN - 1 - j]);
      differences[j] = hn::Sub(x[j], x[kN - 1 - j]);
    }
    VF32 even[kHalf];
    VF32 odd[kHalf];
    small_dct2<kHalf>(sums, even);
    small_dct4<kHalf>(differences, odd);
    for (int k = 0; k < kHalf; ++k) {
      y[2 * k] = even[k];
      y[2 * k + 1] = odd[k];
    }
  }
}

template <int kN>
HWY_INLINE void small_dct4(const VF32* x, VF32* y) {
  if constexpr (kN == 1) {
    y[0] = x[0];
  } else {
    constexpr int kHalf = kN / 2;
    const DctTwiddles twiddles = dct_twiddles(kN);
    VF32 a[kHalf];
    VF32 b[kHalf];
    for (int j = 0; j < kHalf; ++j) rotate(twiddles, j, x[j], x[kN - 1 - j], a[j], b[j]);
    VF32 even[kHalf];
    VF32 odd[kHalf];
    small_dct2<kHalf>(a, even);
    small_dct2<kHalf>(b, odd);
    y[0] = hn::Mul(hn::Set(F32(), kDctSqrt2), even[0]);
    y[kN - 1] = hn::Mul(hn::Set(F32(), -kDctSqrt2), odd[0]);
    for (int k = 1; k < kHalf; ++k) {
      y[2 * k - 1] = hn::Sub(even[k], odd[kHalf - k]);
      y[2 * k] = hn::Add(even[k], odd[kHalf - k]);
    }
  }
}

template <int kN>
HWY_INLINE void small_inverse(const VF32* y, VF32* x) {
  if constexpr (kN == 1) {
    x[0] = y[0];
  } else {
    constexpr int kHalf = kN / 2;
    VF32 even[kHalf];
    VF32 odd[kHalf];
    for (int k = 0; k < kHalf; ++k) {
      even[k] = y[2 * k];
      odd[k] = y[2 * k + 1];
    }
    VF32 sums[kHalf];
    VF32 differences[kHalf];
    small_inverse<kHalf>(even, sums);
    small_dct4<kHalf>(odd, differences);
    for (int j = 0; j < kHalf; ++j) {
      x[j] = hn::Add(sums[j], differences[j]);
      x[kN - 1 - j] = hn::Sub(sums[j], differences[j]);
    }
  }
}

enum class Transform { kDct2, kDct4, kInverse };

template <Transform kKind, int kN>
HWY_NOINLINE void transform_small(const float* in, std::ptrdiff_t in_step, float* out,
                                  std::ptrdiff_t out_step) {
  VF32 x[kN];
  VF32 y[kN];
  for (int j = 0; j < kN; ++j) x[j] = hn::Load(F32(), in + j * in_step);
  if constexpr (kKind == Transform::kDct2) small_dct2<kN>(x, y);
  if constexpr (kKind == Transform::kDct4) small_dct4<kN>(x, y);
  if constexpr (kKind == Transform::kInverse) small_inverse<kN>(x, y);
  for (int j = 0; j < kN; ++j) hn::Store(y[j], F32(), out + j * out_step);
}

// n <= kSmall.
template <Transform kKind>
void transform_small(const float* in, std::ptrdiff_t in_step, float* out, std::ptrdiff_t out_step,
                     int n) {
  switch (n) {
    case 1:
      return transform_small<kKind, 1>(in, in_step, out, out_step);
    case 2:
      return transform_small<kKind, 2>(in, in_step, out, out_step);
    case 4:
      return transform_small<kKind, 4>(in, in_step, out, out_step);
    case 8:
      return transform_small<kKind, 8>(in, in_step, out, out_step);
    default:
      return transform_small<kKind, kSmall>(in, in_step, out, out_step);
  }
}

// Element j is at in + j * in_step; steps may be negative. `in` is overwritten: each level of the
// recursion computes its halves from one array into the other.
void dct4(float* in, std::ptrdiff_t in_step, float* out, std::ptrdiff_t out_step, int n);

void dct2(float* in, std::ptrdiff_t in_step, float* out, std::ptrdiff_t out_step, int n) {
  if (n <= kSmall) return transform_small<Transform::kDct2>(in, in_step, out, out_step, n);
  const int half = n / 2;
  float* low = in;
  float* high = in + (n - 1) * in_step;  // the differences stay there, in reverse
  for (int j = 0; j < half; ++j, low += in_step, high -= in_step) {
    const VF32 p = hn::Load(F32(), low);
    const VF32 q = hn::Load(F32(), high);
    hn::Store(hn::Add(p, q), F32(), low);
    hn::Store(hn::Sub(p, q), F32(), high);
  }
  dct2(in, in_step, out, 2 * out_step, half);
  dct4(in + (n - 1) * in_step, -in_step, out + out_step, 2 * out_step, half);
}

void dct4(float* in, std::ptrdiff_t in_step, float* out, std::ptrdiff_t out_step, int n) {
  if (n <= kSmall) return transform_small<Transform::kDct4>(in, in_step, out, out_step, n);
  const int half = n / 2;
  const DctTwiddles twiddles = dct_twiddles(n);
  for (int j = 0; j < half; ++j) {
    const VF32 p = hn::Load(F32(), in + j * in_step);
    const VF32 q = hn::Load(F32(), in + (n - 1 - j) * in_step);
    VF32 a;
    VF32 b;
    rotate(twiddles, j, p, q, a, b);
    hn::Store(a, F32(), out + j * out_step);
    hn::Store(b, F32(), out + (half + j) * out_step);
  }
  float* even = in;
  float* odd = in + half * in_step;
  dct2(out, out_step, even, in_step, half);
  dct2(out + half * out_step, out_step, odd, in_step, half);
  const VF32 sqrt2 = hn::Set(F32(), kDctSqrt2);
  hn::Store(hn::Mul(sqrt2, hn::Load(F32(), even)), F32(), out);
  hn::Store(hn::Neg(hn::Mul(sqrt2, hn::Load(F32(), odd))), F32(), out + (n - 1) * out_step);
  for (int k = 1; k < half; ++k) {
    const VF32 p = hn::Load(F32(), even + k * in_step);
    const VF32 q = hn::Load(F32(), odd + (half - k) * in_step);
    hn::Store(hn::Sub(p, q), F32(), out + (2 * k - 1) * out_step);
    hn::Store(hn::Add(p, q), F32(), out + 2 * k * out_step);
  }
}

void inverse(float* in, std::ptrdiff_t in_step, float* out, std::ptrdiff_t out_step, int n) {
  if (n <= kSmall) return transform_small<Transform::kInverse>(in, in_step, out, out_step, n);
  const int half = n / 2;
  float* low = out;
  float* high = out + (n - 1) * out_step;
  inverse(in, 2 * in_step, out, out_step, half);
  dct4(in + in_step, 2 * in_step, high, -out_step, half);
  for (int j = 0; j < half; ++j, low += out_step, high -= out_step) {
    const VF32 p = hn::Load(F32(), low);
    const VF32 q = hn::Load(F32(), high);
    hn::Store(hn::Add(p, q), F32(), low);
    hn::Store(hn::Sub(p, q), F32(), high);
  }
}

// ---- Between tiles one after the other and tiles side by side.
//
// The index of an element in the tensor order is tile * n + j, side by side j * 16 + tile: its bits
// rotated by four. Interleaving the four quarters of an array rotates them by two.

HWY_INLINE void interleave_quarters(const float* in, std::ptrdiff_t quarter, float* out) {
  const F32 df;
  for (std::ptrdiff_t i = 0; i < quarter; i += lanes()) {
    hn::StoreInterleaved4(hn::Load(df, in + i), hn::Load(df, in + quarter + i),
                          hn::Load(df, in + 2 * quarter + i), hn::Load(df, in + 3 * quarter + i),
                          df, out + 4 * i);
  }
}

HWY_INLINE void separate_quarters(const float* in, std::ptrdiff_t quarter, float* out) {
  const F32 df;
  for (std::ptrdiff_t i = 0; i < quarter; i += lanes()) {
    VF32 a;
    VF32 b;
    VF32 c;
    VF32 d;
    hn::LoadInterleaved4(df, in + 4 * i, a, b, c, d);
    hn::Store(a, df, out + i);
    hn::Store(b, df, out + quarter + i);
    hn::Store(c, df, out + 2 * quarter + i);
    hn::Store(d, df, out + 3 * quarter + i);
  }
}

// What a call of for_each_dct_run works on: `tiles` tiles, three arrays of 16 * shape.tile floats.
struct Run {
  Run(const DctShape& of_run, std::int64_t first, int count, float* scratch)
      : shape(of_run), begin(first), tiles(count), size(kRow * of_run.tile) {
    for (int i = 0; i < 3; ++i) array[i] = scratch + i * size;
  }
  bool full() const { return tiles == kDctTogether; }
  std::ptrdiff_t quarter() const { return size / 4; }

  DctShape shape;
  std::int64_t begin;
  int tiles;
  std::ptrdiff_t size;
  float* array[3];
};

// Reads v, bounded and scaled, of the run's tiles to array[0], side by side; false when some v is
// not finite.
template <typename T>
HWY_NOINLINE bool load_run(const DctEncode& args, const T* grad, const Run& run) {
  const F32 df;
  const float* residual = args.residual == nullptr ? nullptr : args.residual + run.begin;
  grad += run.begin;
  const float scale = dct_scale(run.shape.tile);
  float* rows = run.array[0];
  if (!run.full()) {
    std::fill(rows, rows + run.size, 0.0F);
    for (std::ptrdiff_t i = 0; i < std::ptrdiff_t{run.tiles} * run.shape.tile; ++i) {
      float v = to_float(grad[i]);
      if (residual != nullptr) v += args.decay * residual[i];
      if (!is_finite(v)) return false;
      rows[i % run.shape.tile * kRow + i / run.shape.tile] =
          std::clamp(v, -kDctClip, kDctClip) * scale;
    }
    return true;
  }
  const VF32 decay = hn::Set(df, args.decay);
  const VF32 most = hn::Set(df, kDctClip);
  const VF32 least = hn::Set(df, -kDctClip);
  const VF32 factor = hn::Set(df, scale);
  VI32 largest = hn::Zero(I32());
  const std::ptrdiff_t quarter = run.quarter();
  const auto load = [&](std::ptrdiff_t i) HWY_ATTR {
    const VF32 v = load_sum(grad + i, residual == nullptr ? nullptr : residual + i, decay);
    largest = hn::Max(largest, magnitude_bits(v));
    return hn::Mul(hn::Min(hn::Max(v, least), most), factor);
  };
  for (std::ptrdiff_t i = 0; i < quarter; i += lanes()) {
    const VF32 a = load(i);
    const VF32 b = load(quarter + i);
    const VF32 c = load(2 * quarter + i);
    const VF32 d = load(3 * quarter + i);
    hn::StoreInterleaved4(a, b, c, d, df, run.array[1] + 4 * i);
  }
  interleave_quarters(run.array[1], quarter, rows);
  return hn::GetLane(hn::MaxOfLanes(I32(), largest)) < static_cast<std::int32_t>(kInfBits32);
}

// Calls vector(i, values) or one(i, value) for all values of the run's tiles, i counted from its
// begin; `rows` holds them side by side, before they are scaled; both arrays are overwritten.
template <typename Vector, typename One>
HWY_INLINE void unload_run(const Run& run, float* rows, float* other, Vector&& vector, One&& one) {
  const F32 df;
  const float scale = dct_scale(run.shape.tile);
  if (!run.full()) {
    for (std::ptrdiff_t i = 0; i < std::ptrdiff_t{run.tiles} * run.shape.tile; ++i) {
      one(i, rows[i % run.shape.tile * kRow + i / run.shape.tile] * scale);
    }
    return;
  }
  const std::ptrdiff_t quarter = run.quarter();
  separate_quarters(rows, quarter, other);
  const VF32 factor = hn::Set(df, scale);
  for (std::ptrdiff_t i = 0; i < quarter; i += lanes()) {
    VF32 a;
    VF32 b;
    VF32 c;
    VF32 d;
    hn::LoadInterleaved4(df, other + 4 * i, a, b, c, d);
    vector(i, hn::Mul(a, factor));
    vector(quarter + i, hn::Mul(b, factor));
    vector(2 * quarter + i, hn::Mul(c, factor));
    vector(3 * quarter + i, hn::Mul(d, factor));
  }
}

// ---- Selection in one vector of tiles.

// Magnitudes in [least, above) tie; those from `above` on are fewer than to be kept.
struct Bounds {
  VI32 least;
  VI32 above;
  VI32 from_above;  // how many are >= above
};

// Bisects between 0 and the largest magnitude, all as bits: first by value, which suits what is
// near-normal, then by bits, which ends after 31 steps whatever the values are.
HWY_NOINLINE void find_bounds(const float* magnitudes, VI32 largest, const DctShape& shape,
                              Bounds& bounds) {
  constexpr int kByValue = 8;
  const I32 di;
  const F32 df;
  const VI32 one = hn::Set(di, 1);
  const VI32 keep = hn::Set(di, shape.keep);
  VI32 low = hn::Zero(di);
  VI32 high = hn::Add(largest, one);
  VI32 from_low = hn::Set(di, shape.tile);
  VI32 from_high = hn::Zero(di);
  for (int step = 0;; ++step) {
    const auto open = hn::And(hn::Gt(from_low, keep), hn::Gt(hn::Sub(high, low), one));
    if (hn::AllFalse(di, open)) break;
    VI32 middle = hn::Add(low, hn::ShiftRight<1>(hn::Sub(high, low)));
    if (step < kByValue) {
      const VF32 sum = hn::Add(hn::BitCast(df, low), hn::BitCast(df, high));
      middle = hn::BitCast(di, hn::Mul(sum, hn::Set(df, 0.5F)));
    }
    const VI32 below = hn::Sub(middle, one);
    VI32 count = hn::Zero(di);
    for (std::ptrdiff_t j = 0; j < shape.tile; ++j) {
      const VI32 magnitude = hn::BitCast(di, hn::Load(df, magnitudes + j * kRow));
      count = hn::Sub(count, hn::VecFromMask(di, hn::Gt(magnitude, below)));
    }
    const auto enough = hn::Gt(keep, count);
    low = hn::IfThenElse(enough, low, middle);
    from_low = hn::IfThenElse(enough, from_low, count);
    high = hn::IfThenElse(enough, middle, high);
    from_high = hn::IfThenElse(enough, count, from_high);
  }
  bounds = {low, high, from_high};
}

// Rounds the kept coefficients as they are sent, zeroes the others, and writes their codes, or
// kDropped, over the magnitudes.
template <DctValues kValues>
HWY_NOINLINE void round_kept(float* coefficients, float* codes, const DctShape& shape,
                             const Bounds& bounds, VF32 scale, VF32 inverse) {
  const F32 df;
  const I32 di;
  const U32 du;
  const VF32 magic = hn::Set(df, kDctMagic);
  VI32 ties = hn::Sub(hn::Set(di, shape.keep), bounds.from_above);
  for (std::ptrdiff_t j = 0; j < shape.tile; ++j) {
    const VF32 x = hn::Load(df, coefficients + j * kRow);
    const VI32 magnitude = hn::BitCast(di, hn::Load(df, codes + j * kRow));
    const auto larger = hn::Not(hn::Gt(bounds.above, magnitude));
    const auto tie =
        hn::AndNot(hn::Or(larger, hn::Gt(bounds.least, magnitude)), hn::Gt(ties, hn::Zero(di)));
    ties = hn::Add(ties, hn::VecFromMask(di, tie));
    const auto kept = hn::RebindMask(du, hn::Or(larger, tie));
    VU32 code = hn::BitCast(du, x);
    VF32 rounded = x;
    if constexpr (kValues == DctValues::kBF16) {
      code = bf16_bits<false>(x);
      rounded = float_from_bf16_bits(code);
    } else if constexpr (kValues == DctValues::kQ8) {
      const VF32 shifted = hn::Add(hn::Mul(x, inverse), magic);
      code = hn::And(hn::BitCast(du, shifted), hn::Set(du, 0xFFU));
      rounded = hn::Mul(hn::Sub(shifted, magic), scale);
    }
    hn::Store(hn::IfThenElseZero(hn::RebindMask(df, kept), rounded), df, coefficients + j * kRow);
    code = hn::IfThenElse(kept, code, hn::Set(du, kDropped));
    hn::Store(hn::BitCast(df, code), df, codes + j * kRow);
  }
}

// The kept coefficients of a run, as they are sent, in `coefficients`; codes and scales.
void choose(const Run& run, float* coefficients, float* codes, DctScale* scales) {
  const F32 df;
  const I32 di;
  for (std::ptrdiff_t lane = 0; lane < kRow; lane += lanes()) {
    VI32 largest = hn::Zero(di);
    for (std::ptrdiff_t j = 0; j < run.shape.tile; ++j) {
      const VF32 magnitude = hn::Abs(hn::Load(df, coefficients + lane + j * kRow));
      largest = hn::Max(largest, hn::BitCast(di, magnitude));
      hn::Store(magnitude, df, codes + lane + j * kRow);
    }
    Bounds bounds;
    find_bounds(codes + lane, largest, run.shape, bounds);
    if (run.shape.values == DctValues::kF32) {
      round_kept<DctValues::kF32>(coefficients + lane, codes + lane, run.shape, bounds,
                                  hn::Zero(df), hn::Zero(df));
    } else if (run.shape.values == DctValues::kBF16) {
      round_kept<DctValues::kBF16>(coefficients + lane, codes + lane, run.shape, bounds,
                                   hn::Zero(df), hn::Zero(df));
    } else {
      alignas(64) std::uint32_t bits[kDctTogether];
      alignas(64) float scale[kDctTogether];
      alignas(64) float inverse[kDctTogether];
      hn::Store(hn::BitCast(U32(), largest), U32(), bits);
      for (std::ptrdiff_t i = 0; i < lanes(); ++i) {
        scales[lane + i] = dct_q8_scale(bits[i]);
        scale[i] = scales[lane + i].scale;
        inverse[i] = scales[lane + i].inverse;
      }
      round_kept<DctValues::kQ8>(coefficients + lane, codes + lane, run.shape, bounds,
                                 hn::Load(df, scale), hn::Load(df, inverse));
    }
  }
}

// ---- Records.

// A tile's positions as a bitmap, and its codes or coefficients one after the other.
struct Record {
  std::uint64_t bitmap[kMaxDctTile / 64];
  alignas(64) std::uint32_t words[kMaxDctTile + kDctTogether];  // stores of whole vectors
};

// Calls f(position) for every set bit, ascending.
template <typename F>
HWY_INLINE void for_each_bit(const std::uint64_t* bitmap, int bits, F&& f) {
  for (int base = 0; base < bits; base += 64) {
    for (std::uint64_t word = bitmap[base / 64]; word != 0; word &= word - 1) {
      f(base + static_cast<int>(hwy::Num0BitsBelowLS1Bit_Nonzero64(word)));
    }
  }
}

void gather_codes(const float* codes, int tile, Record& record) {
  const U32 du;
  std::fill_n(record.bitmap, (tile + 63) / 64, std::uint64_t{0});
  std::size_t count = 0;
  int j = 0;
  for (; j + static_cast<int>(lanes()) <= tile; j += static_cast<int>(lanes())) {
    const VU32 code = hn::BitCast(du, hn::Load(F32(), codes + j));
    const auto kept = hn::Ne(code, hn::Set(du, kDropped));
    std::uint8_t bits[8] = {};
    hn::StoreMaskBits(du, kept, bits);
    record.bitmap[j / 64] |= (bits[0] | std::uint64_t{bits[1]} << 8) << j % 64;
    count += hn::CompressStore(code, kept, du, record.words + count);
  }
  for (; j < tile; ++j) {
    const auto code = std::bit_cast<std::uint32_t>(codes[j]);
    record.bitmap[j / 64] |= std::uint64_t{code != kDropped} << j % 64;
    record.words[count] = code;
    count += code != kDropped ? 1 : 0;
  }
}

void write_positions(const Record& record, const DctShape& shape, std::uint8_t* out) {
  if (shape.keep == shape.tile) return;
  if (shape.bitmap()) {
    for (int i = 0; i < shape.position_bytes(); ++i) {
      out[i] = static_cast<std::uint8_t>(record.bitmap[i / 8] >> i % 8 * 8);
    }
    return;
  }
  std::uint64_t pending = 0;
  int bits = 0;
  for_each_bit(record.bitmap, shape.tile, [&](int position) {
    pending |= static_cast<std::uint64_t>(position) << bits;
    for (bits += shape.index_bits(); bits >= 8; bits -= 8, pending >>= 8) {
      *out++ = static_cast<std::uint8_t>(pending);
    }
  });
  if (bits > 0) *out = static_cast<std::uint8_t>(pending);
}

// The lower bytes of `count` words; not one copy, which costs more than such short loops.
template <typename T>
HWY_INLINE void narrow(const std::uint32_t* words, int count, std::uint8_t* out) {
  for (int i = 0; i < count; ++i) {
    const T part = static_cast<T>(words[i]);
    std::memcpy(out + i * static_cast<int>(sizeof part), &part, sizeof part);
  }
}

void write_codes(const Record& record, const DctShape& shape, const DctScale& scale,
                 std::uint8_t* out) {
  if (shape.values == DctValues::kF32) return narrow<std::uint32_t>(record.words, shape.keep, out);
  if (shape.values == DctValues::kBF16) return narrow<std::uint16_t>(record.words, shape.keep, out);
  std::memcpy(out, &scale.bits, sizeof scale.bits);
  narrow<std::uint8_t>(record.words, shape.keep, out + sizeof scale.bits);
}

// Writes the records of the run, whose codes stand side by side in array[from]; overwrites it and
// array[other].
void write_records(const Run& run, int from, int other, const DctScale* scales, std::uint8_t* out) {
  const int tile = run.shape.tile;
  float* codes = run.array[from];
  if (run.full()) {
    separate_quarters(codes, run.quarter(), run.array[other]);
    separate_quarters(run.array[other], run.quarter(), codes);
  } else {
    for (std::ptrdiff_t i = 0; i < std::ptrdiff_t{run.tiles} * tile; ++i) {
      std::memcpy(run.array[other] + i, codes + i % tile * kRow + i / tile, sizeof(float));
    }
    codes = run.array[other];
  }
  Record record;
  for (int t = 0; t < run.tiles; ++t) {
    gather_codes(codes + std::ptrdiff_t{t} * tile, tile, record);
    write_positions(record, run.shape, out);
    write_codes(record, run.shape, scales[t], out + run.shape.position_bytes());
    out += run.shape.record_bytes();
  }
}

// False when no encoder writes these positions.
bool read_positions(const std::uint8_t* in, const DctShape& shape, Record& record) {
  if (shape.keep == shape.tile) {
    std::fill_n(record.bitmap, (shape.tile + 63) / 64, ~std::uint64_t{0});
    if (shape.tile < 64) record.bitmap[0] >>= 64 - shape.tile;
    return true;
  }
  if (shape.bitmap()) {
    std::size_t count = 0;
    for (int i = 0; i < shape.tile; i += 64) {
      std::uint64_t word = 0;
      if (shape.tile >= 64) {
        std::memcpy(&word, in + i / 8, sizeof word);
      } else {
        for (int j = 0; j < shape.tile; j += 8) word |= std::uint64_t{in[j / 8]} << j;
        word &= (std::uint64_t{1} << shape.tile) - 1;
      }
      record.bitmap[i / 64] = word;
      count += hwy::PopCount(word);
    }
    return count == static_cast<std::size_t>(shape.keep);
  }
  std::fill_n(record.bitmap, (shape.tile + 63) / 64, std::uint64_t{0});
  std::uint64_t pending = 0;
  int bits = 0;
  int previous = -1;
  for (int i = 0; i < shape.keep; ++i) {
    for (; bits < shape.index_bits(); bits += 8) pending |= std::uint64_t{*in++} << bits;
    const auto index = static_cast<int>(pending & (static_cast<std::uint64_t>(shape.tile) - 1));
    pending >>= shape.index_bits();
    bits -= shape.index_bits();
    if (index <= previous) return false;
    previous = index;
    record.bitmap[index / 64] |= std::uint64_t{1} << index % 64;
  }
  return true;
}

// The coefficients' bits to record.words; false when no encoder writes these.
bool read_values(const std::uint8_t* in, const DctShape& shape, Record& record) {
  std::uint32_t largest = 0;
  if (shape.values == DctValues::kQ8) {
    BF16 scale{};
    std::memcpy(&scale, in, sizeof scale);
    in += sizeof scale;
    for (int i = 0; i < shape.keep; ++i) {
      const auto code = static_cast<float>(static_cast<std::int8_t>(in[i]));
      record.words[i] = std::bit_cast<std::uint32_t>(code * to_float(scale));
    }
    return scale.bits < kDctLimitBits >> 16;
  }
  if (shape.values == DctValues::kBF16) {
    for (int i = 0; i < shape.keep; ++i) {
      std::uint16_t bits = 0;
      std::memcpy(&bits, in + 2 * i, sizeof bits);
      record.words[i] = static_cast<std::uint32_t>(bits) << 16;
    }
  } else {
    std::memcpy(record.words, in, static_cast<std::size_t>(shape.value_bytes()));
  }
  for (int i = 0; i < shape.keep; ++i) largest = std::max(largest, record.words[i] & ~kSignBit32);
  return largest < kDctLimitBits;
}

// Reads the run's records to `rows`, side by side; false at one that no encoder writes.
bool read_records(const std::uint8_t* in, const Run& run, float* rows) {
  Record record;
  std::fill(rows, rows + run.size, 0.0F);
  for (int t = 0; t < run.tiles; ++t, in += run.shape.record_bytes()) {
    if (!read_positions(in, run.shape, record) ||
        !read_values(in + run.shape.position_bytes(), run.shape, record)) {
      return false;
    }
    const std::uint32_t* word = record.words;
    for_each_bit(record.bitmap, run.shape.tile, [&](int position) {
      std::memcpy(rows + position * kRow + t, word++, sizeof(float));
    });
  }
  return true;
}

// ---- Kernels.

template <typename T>
HWY_NOINLINE void write_residuals(const DctEncode& args, const T* grad, const Run& run, float* rows,
                                  float* other, bool stream) {
  const F32 df;
  grad += run.begin;
  const float* residual = args.residual == nullptr ? nullptr : args.residual + run.begin;
  float* next = args.next + run.begin;
  const VF32 decay = hn::Set(df, args.decay);
  unload_run(
      run, rows, other,
      [&](std::ptrdiff_t i, VF32 decoded) HWY_ATTR {
        const VF32 v = load_sum(grad + i, residual == nullptr ? nullptr : residual + i, decay);
        const VF32 rest = hn::Sub(v, decoded);
        stream ? hn::Stream(rest, df, next + i) : hn::StoreU(rest, df, next + i);
      },
      [&](std::ptrdiff_t i, float decoded) {
        float v = to_float(grad[i]);
        if (residual != nullptr) v += args.decay * residual[i];
        next[i] = v - decoded;
      });
}

bool encode(const DctEncode& args) {
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  auto* out = reinterpret_cast<std::uint8_t*>(args.records);
  DctScale scales[kDctTogether];
  const bool finite = for_each_dct_run(
      args.shape, args.grad.elements, [&](const DctShape& shape, std::int64_t begin, int tiles) {
        const Run run(shape, begin, tiles, args.scratch);
        float* const* array = run.array;
        const bool good =
            visit(args.grad, [&](const auto* grad) { return load_run(args, grad, run); });
        if (!good) return false;
        for (std::ptrdiff_t lane = 0; lane < kRow; lane += lanes()) {
          dct2(array[0] + lane, kRow, array[1] + lane, kRow, shape.tile);
        }
        choose(run, array[1], array[0], scales);
        write_records(run, 0, 2, scales, out);
        out += shape.record_bytes() * tiles;
        if (args.next == nullptr) return true;
        for (std::ptrdiff_t lane = 0; lane < kRow; lane += lanes()) {
          inverse(array[1] + lane, kRow, array[0] + lane, kRow, shape.tile);
        }
        visit(args.grad, [&](const auto* grad) {
          write_residuals(args, grad, run, array[0], array[1], stream);
        });
        return true;
      });
  if (stream) hwy::FlushStream();
  return finite;
}

// Calls use(run, values side by side, before they are scaled, spare array).
template <typename F>
HWY_INLINE bool decode_runs(const std::byte* records, const DctShape& shape, float* scratch,
                            std::int64_t n, F&& use) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(records);
  return for_each_dct_run(shape, n, [&](const DctShape& of_run, std::int64_t begin, int tiles) {
    const Run run(of_run, begin, tiles, scratch);
    if (!read_records(in, run, run.array[0])) return false;
    in += of_run.record_bytes() * tiles;
    for (std::ptrdiff_t lane = 0; lane < kRow; lane += lanes()) {
      inverse(run.array[0] + lane, kRow, run.array[1] + lane, kRow, of_run.tile);
    }
    use(run, run.array[1], run.array[0]);
    return true;
  });
}

template <typename T>
HWY_NOINLINE void write_values(const Run& run, float* rows, float* other, T* out) {
  unload_run(
      run, rows, other, [&](std::ptrdiff_t i, VF32 x) HWY_ATTR { store_float(x, out + i); },
      [&](std::ptrdiff_t i, float x) { out[i] = from_float<T>(x); });
}

bool decode(const std::byte* records, const DctShape& shape, float* scratch, TensorView out) {
  return visit(out, [&](auto* values) {
    return decode_runs(records, shape, scratch, out.elements,
                       [&](const Run& run, float* rows, float* other) {
                         write_values(run, rows, other, values + run.begin);
                       });
  });
}

HWY_NOINLINE void add_values(const Run& run, float* rows, float* other, float weight, float* out) {
  const F32 df;
  const VF32 factor = hn::Set(df, weight);
  unload_run(
      run, rows, other,
      [&](std::ptrdiff_t i, VF32 x) HWY_ATTR {
        hn::StoreU(hn::Add(hn::LoadU(df, out + i), hn::Mul(factor, x)), df, out + i);
      },
      [&](std::ptrdiff_t i, float x) { out[i] += weight * x; });
}

bool accumulate(const std::byte* records, const DctShape& shape, float* scratch, float weight,
                float* out, std::int64_t n) {
  return decode_runs(records, shape, scratch, n, [&](const Run& run, float* rows, float* other) {
    add_values(run, rows, other, weight, out + run.begin);
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

bool dct_encode(const DctEncode& args) { return HWY_DYNAMIC_DISPATCH(encode)(args); }
bool dct_decode(const std::byte* records, const DctShape& shape, float* scratch, TensorView out) {
  return HWY_DYNAMIC_DISPATCH(decode)(records, shape, scratch, out);
}
bool dct_accumulate(const std::byte* records, const DctShape& shape, float* scratch, float weight,
                    float* out, std::int64_t n) {
  return HWY_DYNAMIC_DISPATCH(accumulate)(records, shape, scratch, weight, out, n);
}

}  // namespace thinwire
#endif  // HWY_ONCE
