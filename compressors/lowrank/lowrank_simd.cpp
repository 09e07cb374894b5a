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

// Calls f(place) for the tiles of columns [begin, end), row blocks outside.
template <typename F>
HWY_INLINE void for_each_tile(const LowRankMatrix& v, std::int64_t begin, std::int64_t end, F&& f) {
  for (std::int64_t row = 0; row < v.rows; row += kTileRows) {
    for (std::int64_t column = begin; column < end; column += kTileColumns) {
      f(Place{row, std::min(kTileRows, v.rows - row), column,
              std::min(kTileColumns, end - column)});
    }
  }
}

// kLowRankScale * v under the tile; zeros in the rows and columns that the matrix does not have.
template <typename T>
HWY_NOINLINE void load_tile(const LowRankMatrix& v, const T* grad, const Place& place, Tile& tile) {
  const F32 df;
  const VF32 decay = hn::Set(df, v.decay);
  const VF32 scale = hn::Set(df, kLowRankScale);
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    float* values = tile.values[r];
    if (r >= place.rows) {
      std::fill_n(values, place.padded(), 0.0F);
      continue;
    }
    const std::int64_t at = (place.row + r) * v.columns + place.column;
    const T* from = grad + at;
    const float* residual = v.residual == nullptr ? nullptr : v.residual + at;
    std::int64_t c = 0;
    for (; c + lanes() <= place.columns; c += lanes()) {
      const float* of_residual = residual == nullptr ? nullptr : residual + c;
      hn::Store(hn::Mul(scale, load_sum(from + c, of_residual, decay)), df, values + c);
    }
    for (; c < place.columns; ++c) {
      float x = to_float(from[c]);
      if (residual != nullptr) x += v.decay * residual[c];
      values[c] = kLowRankScale * x;
    }
    std::fill_n(values + c, place.padded() - c, 0.0F);
  }
}

// ---- v times right: dot products along the rows of the tile.

template <int kColumns>
HWY_NOINLINE void add_dots(const Tile& tile, const Place& place, const LowRankFactor& right, int j,
                           float (*sums)[kMaxLowRank]) {
  const F32 df;
  const float* factor[kColumns];
  for (int k = 0; k < kColumns; ++k) factor[k] = right.column(j + k) + place.column;
  VF32 sum[kTileRows][kColumns];
  for (auto& row : sum) {
    for (VF32& x : row) x = hn::Zero(df);
  }
  for (std::int64_t c = 0; c < place.padded(); c += lanes()) {
    VF32 b[kColumns];
    for (int k = 0; k < kColumns; ++k) b[k] = hn::Load(df, factor[k] + c);
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      const VF32 v = hn::Load(df, tile.values[r] + c);
      for (int k = 0; k < kColumns; ++k) sum[r][k] = hn::MulAdd(v, b[k], sum[r][k]);
    }
  }
  for (std::int64_t r = 0; r < kTileRows; ++r) {
    for (int k = 0; k < kColumns; ++k) sums[r][j + k] += hn::GetLane(hn::SumOfLanes(df, sum[r][k]));
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

void project_left(const LowRankMatrix& v, const LowRankFactor& right, const LowRankFactor& left) {
  Tile tile;
  float sums[kTileRows][kMaxLowRank];
  for (int j = 0; j < left.rank; ++j) {
    std::fill(left.column(j) + left.length, left.column(j) + left.stride(), 0.0F);
  }
  visit(v.grad, [&](const auto* grad) {
    for_each_tile(v, 0, v.columns, [&](const Place& place) {
      if (place.column == 0) std::fill_n(&sums[0][0], kTileRows * kMaxLowRank, 0.0F);
      load_tile(v, grad, place, tile);
      for_each_group(left.rank, [&](int j, auto n) { add_dots<n()>(tile, place, right, j, sums); });
      if (place.column + place.columns < v.columns) return;
      for (std::int64_t r = 0; r < place.rows; ++r) {
        for (int j = 0; j < left.rank; ++j) left.column(j)[place.row + r] = sums[r][j];
      }
    });
  });
}

// ---- v^T times left: the tile's rows, weighted, added to the columns of right.

template <int kColumns>
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
      for (std::int64_t r = 0; r < kTileRows; ++r) sum = hn::MulAdd(v[r], weight[r][k], sum);
      hn::Store(sum, df, sums[k] + c);
    }
  }
}

void project_right(const LowRankMatrix& v, const LowRankFactor& left, const LowRankFactor& right) {
  Tile tile;
  std::fill_n(right.data, right.rank * right.stride(), 0.0F);
  const std::int64_t panel = std::max(kPanelFloats / right.rank / kTileColumns, std::int64_t{1});
  visit(v.grad, [&](const auto* grad) {
    for (std::int64_t begin = 0; begin < v.columns; begin += panel * kTileColumns) {
      const std::int64_t end = std::min(begin + panel * kTileColumns, v.columns);
      for_each_tile(v, begin, end, [&](const Place& place) {
        load_tile(v, grad, place, tile);
        for_each_group(right.rank,
                       [&](int j, auto n) { add_rows<n()>(tile, place, left, j, right); });
      });
    }
  });
}

// ---- left times right^T.

// tile += the products of columns j to j + kColumns, one after the other, no fma.
template <int kColumns>
HWY_NOINLINE void add_products(const LowRankReconstruct& args, const Place& place, int j,
                               Tile& tile) {
  const F32 df;
  const float* factor[kColumns];
  VF32 weight[kTileRows][kColumns];
  for (int k = 0; k < kColumns; ++k) {
    factor[k] = args.right.column(j + k) + place.column;
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      weight[r][k] = hn::Set(df, args.left.column(j + k)[place.row + r]);
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

template <bool kStream, typename T>
HWY_NOINLINE void store_tile(const LowRankReconstruct& args, T* grad, const Place& place,
                             const Tile& tile) {
  const F32 df;
  constexpr float kMost = lowrank_most<T>();
  constexpr float kMostRest = lowrank_most<float>();
  const VF32 decay = hn::Set(df, args.v.decay);
  const VF32 scale = hn::Set(df, kLowRankUnscale);
  for (std::int64_t r = 0; r < place.rows; ++r) {
    const float* values = tile.values[r];
    const std::int64_t at = (place.row + r) * args.v.columns + place.column;
    T* to = grad + at;
    const float* residual = args.v.residual == nullptr ? nullptr : args.v.residual + at;
    float* next = args.next == nullptr ? nullptr : args.next + at;
    std::int64_t c = 0;
    for (; c + lanes() <= place.columns; c += lanes()) {
      const VF32 v = load_sum(to + c, residual == nullptr ? nullptr : residual + c, decay);
      const VF32 mean = hn::Mul(scale, hn::Load(df, values + c));
      store_float(hn::Clamp(mean, hn::Set(df, -kMost), hn::Set(df, kMost)), to + c);
      if (next == nullptr) continue;
      const VF32 rest = hn::Clamp(hn::Sub(v, load_float(to + c)), hn::Set(df, -kMostRest),
                                  hn::Set(df, kMostRest));
      if constexpr (kStream) {
        hn::Stream(rest, df, next + c);
      } else {
        hn::StoreU(rest, df, next + c);
      }
    }
    for (; c < place.columns; ++c) {
      float v = to_float(to[c]);
      if (residual != nullptr) v += args.v.decay * residual[c];
      to[c] = from_float<T>(std::clamp(kLowRankUnscale * values[c], -kMost, kMost));
      if (next != nullptr) next[c] = std::clamp(v - to_float(to[c]), -kMostRest, kMostRest);
    }
  }
}

void reconstruct(const LowRankReconstruct& args) {
  // Rows of other lengths do not begin where a vector could be stored past the caches.
  const bool stream = writes_past_caches(args.v.grad, args.v.residual, args.next) &&
                      args.v.columns % kLowRankLanes == 0;
  Tile tile;
  visit(args.v.grad, [&](auto* grad) {
    for_each_tile(args.v, 0, args.v.columns, [&](const Place& place) {
      for_each_group(args.left.rank,
                     [&](int j, auto n) { add_products<n()>(args, place, j, tile); });
      stream ? store_tile<true>(args, grad, place, tile)
             : store_tile<false>(args, grad, place, tile);
    });
  });
  if (stream) hwy::FlushStream();
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
HWY_EXPORT(reconstruct);
HWY_EXPORT(orthonormalise);

void lowrank_project_left(const LowRankMatrix& v, const LowRankFactor& right,
                          const LowRankFactor& left) {
  HWY_DYNAMIC_DISPATCH(project_left)(v, right, left);
}
void lowrank_project_right(const LowRankMatrix& v, const LowRankFactor& left,
                           const LowRankFactor& right) {
  HWY_DYNAMIC_DISPATCH(project_right)(v, left, right);
}
void lowrank_reconstruct(const LowRankReconstruct& args) {
  HWY_DYNAMIC_DISPATCH(reconstruct)(args);
}
void lowrank_orthonormalise(const LowRankFactor& factor, const RandomStream& stream) {
  HWY_DYNAMIC_DISPATCH(orthonormalise)(factor, stream);
}

}  // namespace thinwire
#endif  // HWY_ONCE
