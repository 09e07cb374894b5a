#include "compressors/lowrank/lowrank_kernels.h"

#include <algorithm>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/lowrank/lowrank_simd.cpp"
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

// A tile of v is loaded once, as fp32, and then serves all columns of the factors: 16 KiB.
constexpr std::int64_t kTileRows = 4;
constexpr std::int64_t kTileColumns = 1024;
// Columns of the factors whose products share a load of the tile: as many as the registers hold.
constexpr int kTogether = hn::MaxLanes(F32()) >= 16 ? 4 : 2;
// The columns that project_right sums into stay in the second-level cache: at most 512 KiB.
constexpr std::int64_t kPanelFloats = 131'072;

HWY_INLINE std::int64_t lanes() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

struct Tile {
  alignas(64) float values[kTileRows][kTileColumns];
};

// Rows and columns of the matrix under a tile.
struct Place {
  std::int64_t row = 0;
  std::int64_t rows = 0;
  std::int64_t column = 0;
  std::int64_t columns = 0;

  std::int64_t padded() const { return LowRankFactor::stride_of(columns); }
};

// The elements under row r of a tile, of a matrix of n: those from `begin` on.
struct Run {
  std::int64_t begin = 0;
  std::int64_t size = 0;

  Run(const Place& place, std::int64_t r, std::int64_t columns, std::int64_t n)
      : begin((place.row + r) * columns + place.column),
        size(r < place.rows ? std::clamp<std::int64_t>(n - begin, 0, place.columns) : 0) {}
};

// Calls f(place) for the tiles of columns [begin, end), row blocks outside.
template <typename F>
HWY_INLINE void for_each_tile(std::int64_t rows, std::int64_t begin, std::int64_t end, F&& f) {
  for (std::int64_t row = 0; row < rows; row += kTileRows) {
    for (std::int64_t column = begin; column < end; column += kTileColumns) {
      f(Place{row, std::min(kTileRows, rows - row), column, std::min(kTileColumns, end - column)});
    }
  }
}

// Calls f(j, how many columns from j, as a constant) until all `rank` columns have had their turn.
template <typename F>
HWY_INLINE void for_each_group(int rank, F&& f) {
  int j = 0;
  for (; j + kTogether <= rank; j += kTogether) {
    f(j, std::integral_constant<int, kTogether>());
  }
  for (; j < rank; ++j) f(j, std::integral_constant<int, 1>());
}

// v under the tile, bounded; zeros in the rows and columns that the matrix does not have.
template <typename T>
HWY_NOINLINE void load_tile(const LowRankMatrix& v, const T* grad, const Place& place, Tile& tile) {
  const F32 df;
  const VF32 decay = hn::Set(df, v.decay);
  const VF32 most = hn::Set(df, kLowRankBound);
  const VF32 least = hn::Set(df, -kLowRankBound);
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    float* values = tile.values[r];
    const Run run(place, r, v.columns, v.grad.elements);
    const T* from = grad + run.begin;
    const float* residual = v.residual == nullptr ? nullptr : v.residual + run.begin;
    std::int64_t c = 0;
    for (; c + lanes() <= run.size; c += lanes()) {
      const VF32 x = load_sum(from + c, residual == nullptr ? nullptr : residual + c, decay);
      // x - x is 0, or NaN where x is not finite.
      hn::Store(hn::Add(hn::Clamp(x, least, most), hn::Sub(x, x)), df, values + c);
    }
    for (; c < run.size; ++c) {
      float x = to_float(from[c]);
      if (residual != nullptr) x += v.decay * residual[c];
      values[c] = std::clamp(x, -kLowRankBound, kLowRankBound) + (x - x);
    }
    std::fill_n(values + c, place.padded() - c, 0.0F);
  }
}

template <LowRankSums kSums>
HWY_INLINE VF32 add_product(VF32 a, VF32 b, VF32 sum) {
  return kSums == LowRankSums::kFast ? hn::MulAdd(a, b, sum) : hn::Add(sum, hn::Mul(a, b));
}

// ---- v times right: dot products along the rows of the tile.

template <LowRankSums kSums, int kColumns>
HWY_NOINLINE void add_dots(const Tile& tile, const Place& place, const LowRankFactor& right, int j,
                           float (*sums)[kMaxLowRank]) {
  // Exact sums have 16 lanes on every target.
  constexpr int kParts =
      kSums == LowRankSums::kFast ? 1 : static_cast<int>(kLowRankLanes / hn::MaxLanes(F32()));
  const F32 df;
  const float* factor[kColumns];
  for (int k = 0; k < kColumns; ++k) factor[k] = right.column(j + k) + place.column;
  VF32 sum[kTileRows][kColumns][kParts];
  for (auto& row : sum) {
    for (auto& parts : row) {
      for (VF32& x : parts) x = hn::Zero(df);
    }
  }
  for (std::int64_t c = 0; c < place.padded(); c += kParts * lanes()) {
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t at = c + part * lanes();
      VF32 b[kColumns];
      for (int k = 0; k < kColumns; ++k) b[k] = hn::Load(df, factor[k] + at);
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        const VF32 v = hn::Load(df, tile.values[r] + at);
        for (int k = 0; k < kColumns; ++k) {
          sum[r][k][part] = add_product<kSums>(v, b[k], sum[r][k][part]);
        }
      }
    }
  }
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    for (int k = 0; k < kColumns; ++k) {
      if constexpr (kSums == LowRankSums::kFast) {
        sums[r][j + k] += hn::GetLane(hn::SumOfLanes(df, sum[r][k][0]));
      } else {
        alignas(64) float all[kLowRankLanes];
        for (int part = 0; part < kParts; ++part) {
          hn::Store(sum[r][k][part], df, all + part * lanes());
        }
        sums[r][j + k] += lowrank_total(all);
      }
    }
  }
}

template <LowRankSums kSums>
void project_left_by(const LowRankMatrix& v, const LowRankFactor& right,
                     const LowRankFactor& left) {
  Tile tile;
  float sums[kTileRows][kMaxLowRank];
  for (int j = 0; j < left.rank; ++j) {
    std::fill(left.column(j) + left.length, left.column(j) + left.stride(), 0.0F);
  }
  visit(v.grad, [&](const auto* grad) {
    for_each_tile(v.rows(), 0, v.columns, [&](const Place& place) {
      if (place.column == 0) std::fill_n(&sums[0][0], kTileRows * kMaxLowRank, 0.0F);
      load_tile(v, grad, place, tile);
      for_each_group(left.rank,
                     [&](int j, auto n) { add_dots<kSums, n()>(tile, place, right, j, sums); });
      if (place.column + place.columns < v.columns) return;
      for (std::int64_t r = 0; r < place.rows; ++r) {
        for (int j = 0; j < left.rank; ++j) left.column(j)[place.row + r] = sums[r][j];
      }
    });
  });
}

void project_left(const LowRankMatrix& v, const LowRankFactor& right, const LowRankFactor& left,
                  LowRankSums sums) {
  sums == LowRankSums::kFast ? project_left_by<LowRankSums::kFast>(v, right, left)
                             : project_left_by<LowRankSums::kExact>(v, right, left);
}

// ---- v^T times left: the tile's rows, weighted, added to the columns of right.

template <LowRankSums kSums, int kColumns>
HWY_NOINLINE void add_rows(const Tile& tile, const Place& place, const LowRankFactor& left, int j,
                           const LowRankFactor& right) {
  const F32 df;
  float* sums[kColumns];
  VF32 weight[kTileRows][kColumns];
  for (int k = 0; k < kColumns; ++k) {
    sums[k] = right.column(j + k) + place.column;
    // Rows beyond the last are zeros in the tile and in the factor's padding.
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      weight[r][k] = hn::Set(df, left.column(j + k)[place.row + r]);
    }
  }
  for (std::int64_t c = 0; c < place.padded(); c += lanes()) {
    VF32 v[kTileRows];
    for (std::int64_t r = 0; r < kTileRows; ++r) v[r] = hn::Load(df, tile.values[r] + c);
    for (int k = 0; k < kColumns; ++k) {
      VF32 sum = hn::Load(df, sums[k] + c);
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        sum = add_product<kSums>(v[r], weight[r][k], sum);
      }
      hn::Store(sum, df, sums[k] + c);
    }
  }
}

template <LowRankSums kSums>
void project_right_by(const LowRankMatrix& v, const LowRankFactor& left,
                      const LowRankFactor& right) {
  Tile tile;
  std::fill_n(right.data, right.rank * right.stride(), 0.0F);
  const std::int64_t panel = std::max(kPanelFloats / right.rank / kTileColumns, std::int64_t{1});
  visit(v.grad, [&](const auto* grad) {
    for (std::int64_t begin = 0; begin < v.columns; begin += panel * kTileColumns) {
      const std::int64_t end = std::min(begin + panel * kTileColumns, v.columns);
      for_each_tile(v.rows(), begin, end, [&](const Place& place) {
        load_tile(v, grad, place, tile);
        for_each_group(right.rank,
                       [&](int j, auto n) { add_rows<kSums, n()>(tile, place, left, j, right); });
      });
    }
  });
}

void project_right(const LowRankMatrix& v, const LowRankFactor& left, const LowRankFactor& right,
                   LowRankSums sums) {
  sums == LowRankSums::kFast ? project_right_by<LowRankSums::kFast>(v, left, right)
                             : project_right_by<LowRankSums::kExact>(v, left, right);
}

// ---- left times right^T.

// tile (+)= the products of columns j to j + kColumns, one after the other, no fma.
template <int kColumns>
HWY_NOINLINE void add_products(const LowRankFactor& left, const LowRankFactor& right,
                               const Place& place, int j, Tile& tile) {
  const F32 df;
  const float* factor[kColumns];
  VF32 weight[kTileRows][kColumns];
  for (int k = 0; k < kColumns; ++k) {
    factor[k] = right.column(j + k) + place.column;
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      weight[r][k] = hn::Set(df, left.column(j + k)[place.row + r]);
    }
  }
  for (std::int64_t c = 0; c < place.padded(); c += lanes()) {
    VF32 b[kColumns];
    for (int k = 0; k < kColumns; ++k) b[k] = hn::Load(df, factor[k] + c);
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      VF32 sum = j == 0 ? hn::Zero(df) : hn::Load(df, tile.values[r] + c);
      for (int k = 0; k < kColumns; ++k) sum = hn::Add(sum, hn::Mul(weight[r][k], b[k]));
      hn::Store(sum, df, tile.values[r] + c);
    }
  }
}

// Calls use(run, values of M^) for the rows of all tiles, n elements in all.
template <typename F>
HWY_INLINE void for_each_product(const LowRankFactor& left, const LowRankFactor& right,
                                 std::int64_t n, F&& use) {
  Tile tile;
  for_each_tile(left.length, 0, right.length, [&](const Place& place) {
    for_each_group(left.rank, [&](int j, auto columns) {
      add_products<columns()>(left, right, place, j, tile);
    });
    for (std::int64_t r = 0; r < place.rows; ++r) {
      use(Run(place, r, right.length, n), tile.values[r]);
    }
  });
}

template <bool kStream, typename T>
HWY_NOINLINE void replace_run(const LowRankReconstruct& args, const Run& run, const float* values,
                              T* grad) {
  const F32 df;
  constexpr float kMost = lowrank_most<T>();
  const VF32 decay = hn::Set(df, args.v.decay);
  T* to = grad + run.begin;
  const float* residual = args.v.residual == nullptr ? nullptr : args.v.residual + run.begin;
  float* next = args.next == nullptr ? nullptr : args.next + run.begin;
  std::int64_t c = 0;
  for (; c + lanes() <= run.size; c += lanes()) {
    const VF32 v = load_sum(to + c, residual == nullptr ? nullptr : residual + c, decay);
    VF32 mean = hn::Load(df, values + c);
    if constexpr (std::is_same_v<T, FP16>) {
      mean = hn::Clamp(mean, hn::Set(df, -kMost), hn::Set(df, kMost));
    }
    store_float(mean, to + c);
    if (next == nullptr) continue;
    const VF32 rest = hn::Sub(v, load_float(to + c));
    kStream ? hn::Stream(rest, df, next + c) : hn::StoreU(rest, df, next + c);
  }
  for (; c < run.size; ++c) {
    float v = to_float(to[c]);
    if (residual != nullptr) v += args.v.decay * residual[c];
    to[c] = from_float<T>(std::clamp(values[c], -kMost, kMost));
    if (next != nullptr) next[c] = v - to_float(to[c]);
  }
}

void replace(const LowRankReconstruct& args) {
  // Rows of other lengths do not begin where a vector could be stored past the caches.
  const bool stream = writes_past_caches(args.v.grad, args.v.residual, args.next) &&
                      args.v.columns % kLowRankLanes == 0;
  visit(args.v.grad, [&](auto* grad) {
    for_each_product(args.left, args.right, args.v.grad.elements,
                     [&](const Run& run, const float* values) {
                       stream ? replace_run<true>(args, run, values, grad)
                              : replace_run<false>(args, run, values, grad);
                     });
  });
  if (stream) hwy::FlushStream();
}

template <typename T>
HWY_NOINLINE void subtract_run(const LowRankReconstruct& args, const Run& run, const float* values,
                               const T* grad) {
  const F32 df;
  const VF32 decay = hn::Set(df, args.v.decay);
  const T* from = grad + run.begin;
  const float* residual = args.v.residual == nullptr ? nullptr : args.v.residual + run.begin;
  float* next = args.next + run.begin;
  std::int64_t c = 0;
  for (; c + lanes() <= run.size; c += lanes()) {
    const VF32 v = load_sum(from + c, residual == nullptr ? nullptr : residual + c, decay);
    hn::StoreU(hn::Sub(v, hn::Load(df, values + c)), df, next + c);
  }
  for (; c < run.size; ++c) {
    float v = to_float(from[c]);
    if (residual != nullptr) v += args.v.decay * residual[c];
    next[c] = v - values[c];
  }
}

void subtract_product(const LowRankReconstruct& args) {
  visit(args.v.grad, [&](const auto* grad) {
    for_each_product(
        args.left, args.right, args.v.grad.elements,
        [&](const Run& run, const float* values) { subtract_run(args, run, values, grad); });
  });
}

template <typename T>
HWY_NOINLINE void decode_run(const Run& run, const float* values, T* out) {
  std::int64_t c = 0;
  for (; c + lanes() <= run.size; c += lanes()) {
    store_float(hn::Load(F32(), values + c), out + run.begin + c);
  }
  for (; c < run.size; ++c) out[run.begin + c] = from_float<T>(values[c]);
}

void decode(const LowRankFactor& left, const LowRankFactor& right, TensorView out) {
  visit(out, [&](auto* to) {
    for_each_product(left, right, out.elements,
                     [&](const Run& run, const float* values) { decode_run(run, values, to); });
  });
}

HWY_NOINLINE void add_run(const Run& run, const float* values, float weight, float* out) {
  const F32 df;
  const VF32 factor = hn::Set(df, weight);
  float* to = out + run.begin;
  std::int64_t c = 0;
  for (; c + lanes() <= run.size; c += lanes()) {
    const VF32 product = hn::Mul(factor, hn::Load(df, values + c));
    hn::StoreU(hn::Add(hn::LoadU(df, to + c), product), df, to + c);
  }
  for (; c < run.size; ++c) to[c] += weight * values[c];
}

void add(const LowRankFactor& left, const LowRankFactor& right, float weight,
         std::span<float> out) {
  for_each_product(
      left, right, static_cast<std::int64_t>(out.size()),
      [&](const Run& run, const float* values) { add_run(run, values, weight, out.data()); });
}

// ---- Orthonormal columns.

using F64 = hn::CappedTag<double, 8>;
using VF64 = hn::Vec<F64>;
using Narrow = hn::Rebind<float, F64>;
constexpr std::size_t kParts = kLowRankLanes / hn::MaxLanes(F64());

HWY_INLINE VF64 load_wide(const float* p) { return hn::PromoteTo(F64(), hn::Load(Narrow(), p)); }
HWY_INLINE void store_narrow(VF64 x, float* p) {
  hn::Store(hn::DemoteTo(Narrow(), x), Narrow(), p);
}

double dot(const float* a, const float* b, std::int64_t n) {
  const F64 d;
  VF64 sums[kParts];
  for (VF64& sum : sums) sum = hn::Zero(d);
  for (std::int64_t i = 0; i < n; i += kLowRankLanes) {
    for (std::size_t part = 0; part < kParts; ++part) {
      const std::size_t at = static_cast<std::size_t>(i) + part * hn::Lanes(d);
      // Products of fp32 values are exact in fp64.
      sums[part] = hn::MulAdd(load_wide(a + at), load_wide(b + at), sums[part]);
    }
  }
  alignas(64) double all[kLowRankLanes];
  for (std::size_t part = 0; part < kParts; ++part) {
    hn::Store(sums[part], d, all + part * hn::Lanes(d));
  }
  return lowrank_total(all);
}

void subtract(double c, const float* a, float* b, std::int64_t n) {
  const VF64 factor = hn::Set(F64(), c);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F64()))) {
    store_narrow(hn::Sub(load_wide(b + i), hn::Mul(factor, load_wide(a + i))), b + i);
  }
}

void multiply(double c, float* a, std::int64_t n) {
  const VF64 factor = hn::Set(F64(), c);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F64()))) {
    store_narrow(hn::Mul(load_wide(a + i), factor), a + i);
  }
}

void orthonormalise(const LowRankFactor& factor, const RandomStream& stream) {
  lowrank_gram_schmidt(factor, stream, dot, subtract, multiply);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(project_left);
HWY_EXPORT(project_right);
HWY_EXPORT(replace);
HWY_EXPORT(subtract_product);
HWY_EXPORT(decode);
HWY_EXPORT(add);
HWY_EXPORT(orthonormalise);

void lowrank_project_left(const LowRankMatrix& v, const LowRankFactor& right,
                          const LowRankFactor& left, LowRankSums sums) {
  HWY_DYNAMIC_DISPATCH(project_left)(v, right, left, sums);
}
void lowrank_project_right(const LowRankMatrix& v, const LowRankFactor& left,
                           const LowRankFactor& right, LowRankSums sums) {
  HWY_DYNAMIC_DISPATCH(project_right)(v, left, right, sums);
}
void lowrank_replace(const LowRankReconstruct& args) { HWY_DYNAMIC_DISPATCH(replace)(args); }
void lowrank_subtract(const LowRankReconstruct& args) {
  HWY_DYNAMIC_DISPATCH(subtract_product)(args);
}
void lowrank_decode(const LowRankFactor& left, const LowRankFactor& right, TensorView out) {
  HWY_DYNAMIC_DISPATCH(decode)(left, right, out);
}
void lowrank_add(const LowRankFactor& left, const LowRankFactor& right, float weight,
                 std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(add)(left, right, weight, out);
}
void lowrank_orthonormalise(const LowRankFactor& factor, const RandomStream& stream) {
  HWY_DYNAMIC_DISPATCH(orthonormalise)(factor, stream);
}

}  // namespace thinwire
#endif  // HWY_ONCE
