#include "compressors/dct/dctcols_kernels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/dct/dctcols_simd.cpp"
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

using Index = std::int64_t;

constexpr Index kHalf = kDctHalf;
constexpr Index kLine = kDctLine;
// A square of columns and rows that is turned at once.
constexpr Index kSquare = kHalf * kHalf;

HWY_INLINE Index lanes() { return static_cast<Index>(hn::Lanes(F32())); }

// ---- Complex vectors: the same lane of a line's two halves.

struct Complex {
  VF32 re;
  VF32 im;
};
HWY_INLINE Complex load(const float* line) {
  return {hn::Load(F32(), line), hn::Load(F32(), line + kHalf)};
}
HWY_INLINE void store(const Complex& x, float* line) {
  hn::Store(x.re, F32(), line);
  hn::Store(x.im, F32(), line + kHalf);
}
HWY_INLINE Complex operator+(const Complex& a, const Complex& b) {
  return {hn::Add(a.re, b.re), hn::Add(a.im, b.im)};
}
HWY_INLINE Complex operator-(const Complex& a, const Complex& b) {
  return {hn::Sub(a.re, b.re), hn::Sub(a.im, b.im)};
}
// a - i b and a + i b.
HWY_INLINE Complex minus_i(const Complex& a, const Complex& b) {
  return {hn::Add(a.re, b.im), hn::Sub(a.im, b.re)};
}
HWY_INLINE Complex plus_i(const Complex& a, const Complex& b) {
  return {hn::Sub(a.re, b.im), hn::Add(a.im, b.re)};
}
// x times cos - i sin, or cos + i sin, of a pair of them.
HWY_INLINE Complex turn_back(const Complex& x, const float* pair) {
  const VF32 c = hn::Set(F32(), pair[0]);
  const VF32 s = hn::Set(F32(), pair[1]);
  return {hn::Add(hn::Mul(c, x.re), hn::Mul(s, x.im)), hn::Sub(hn::Mul(c, x.im), hn::Mul(s, x.re))};
}
HWY_INLINE Complex turn(const Complex& x, const float* pair) {
  const VF32 c = hn::Set(F32(), pair[0]);
  const VF32 s = hn::Set(F32(), pair[1]);
  return {hn::Sub(hn::Mul(c, x.re), hn::Mul(s, x.im)), hn::Add(hn::Mul(c, x.im), hn::Mul(s, x.re))};
}

// ---- Discrete Fourier transforms of a vector of row pairs.

// In place, for an odd prime p; `root(t)` is the pair of the angle 2 pi t / p.
template <typename Root>
HWY_INLINE void odd_butterfly(Complex* x, int p, Root&& root) {
  constexpr int kMaxPairs = kMaxDctRadix / 2;
  const int pairs = p / 2;
  Complex sums[kMaxPairs];
  Complex differences[kMaxPairs];
  Complex total = x[0];
  for (int q = 1; q <= pairs; ++q) {
    sums[q - 1] = x[q] + x[p - q];
    differences[q - 1] = x[q] - x[p - q];
    total = total + sums[q - 1];
  }
  for (int k = 1; k <= pairs; ++k) {
    Complex even = x[0];
    Complex odd = {hn::Zero(F32()), hn::Zero(F32())};
    for (int q = 1, at = k; q <= pairs; ++q, at = at + k < p ? at + k : at + k - p) {
      const VF32 c = hn::Set(F32(), root(at)[0]);
      const VF32 s = hn::Set(F32(), root(at)[1]);
      even = even + Complex{hn::Mul(c, sums[q - 1].re), hn::Mul(c, sums[q - 1].im)};
      odd = odd + Complex{hn::Mul(s, differences[q - 1].re), hn::Mul(s, differences[q - 1].im)};
    }
    x[k] = minus_i(even, odd);
    x[p - k] = plus_i(even, odd);
  }
  x[0] = total;
}

HWY_INLINE void four_butterfly(Complex* x) {
  const Complex a = x[0] + x[2];
  const Complex b = x[0] - x[2];
  const Complex c = x[1] + x[3];
  const Complex d = x[1] - x[3];
  x[0] = a + c;
  x[1] = minus_i(b, d);
  x[2] = a - c;
  x[3] = plus_i(b, d);
}

// One level: outputs k, k + part, ..., k + (p - 1) part for k < part, from inputs k + q in_step,
// all in lines. kRadix: p, or 0 for any odd one. `in` may be `out` where in_step is `part`.
template <int kRadix>
HWY_NOINLINE void butterflies(const DctFft& fft, int radix, const float* in, Index in_step,
                              float* out, Index part) {
  const int p = kRadix == 0 ? radix : kRadix;
  const Index turns = fft.size / (part * p);  // of the roots, for the twiddle of q = k = 1
  const Index root_step = fft.size / p;
  for (Index k = 0; k < part; ++k) {
    Complex x[kRadix == 0 ? kMaxDctRadix : kRadix];
    x[0] = load(in + k * kLine);
    for (int q = 1; q < p; ++q) {
      x[q] = load(in + (k + q * in_step) * kLine);
      if (k != 0) x[q] = turn_back(x[q], fft.roots + 2 * q * k * turns);
    }
    if constexpr (kRadix == 4) {
      four_butterfly(x);
    } else if constexpr (kRadix == 2) {
      const Complex sum = x[0] + x[1];
      x[1] = x[0] - x[1];
      x[0] = sum;
    } else {
      odd_butterfly(x, p, [&](int t) { return fft.roots + 2 * t * root_step; });
    }
    for (int q = 0; q < p; ++q) store(x[q], out + (k + q * part) * kLine);
  }
}

// out = the transform of the n values that lie in_step lines apart from `in` on; n is the product
// of the radices from `level` on.
void fft_level(const DctFft& fft, int level, const float* in, Index in_step, float* out, Index n) {
  if (n == 1) return store(load(in), out);
  const int p = fft.radices[static_cast<std::size_t>(level)];
  const Index part = n / p;
  if (part > 1) {
    for (int q = 0; q < p; ++q) {
      fft_level(fft, level + 1, in + q * in_step * kLine, p * in_step, out + q * part * kLine,
                part);
    }
    in = out;
    in_step = part;
  }
  switch (p) {
    case 2:
      return butterflies<2>(fft, p, in, in_step, out, part);
    case 3:
      return butterflies<3>(fft, p, in, in_step, out, part);
    case 4:
      return butterflies<4>(fft, p, in, in_step, out, part);
    case 5:
      return butterflies<5>(fft, p, in, in_step, out, part);
    default:
      return butterflies<0>(fft, p, in, in_step, out, part);
  }
}

void fft(const DctTables& tables) {
  for (Index lane = 0; lane < kHalf; lane += lanes()) {
    fft_level(tables.fft, 0, tables.lines[0] + lane, 1, tables.lines[1] + lane, tables.fft.size);
  }
}

// With jk = (j^2 + k^2 - (k - j)^2) / 2 the transform is a convolution between two products.
void convolve(const DctTables& tables, Index lane) {
  const Index m = tables.columns;
  const Index size = tables.fft.size;
  float* a = tables.lines[0] + lane;
  float* b = tables.lines[1] + lane;
  for (Index j = 0; j < m; ++j) {
    store(turn_back(load(a + j * kLine), tables.chirp + 2 * j), a + j * kLine);
  }
  for (Index j = m; j < size; ++j) store({hn::Zero(F32()), hn::Zero(F32())}, a + j * kLine);
  fft_level(tables.fft, 0, a, 1, b, size);
  for (Index j = 0; j < size; ++j) {
    store(turn(load(b + j * kLine), tables.spectrum + 2 * j), b + j * kLine);
  }
  fft_level(tables.fft, 0, b, 1, a, size);
  for (Index k = 0; k < m; ++k) {
    const Index line = (size - k) % size;  // the inverse transform
    store(turn_back(load(a + line * kLine), tables.chirp + 2 * k), b + k * kLine);
  }
}

void transform(const DctTables& tables) {
  if (!tables.convolves()) return fft(tables);
  for (Index lane = 0; lane < kHalf; lane += lanes()) convolve(tables, lane);
}

// ---- Between rows one after the other and rows side by side.

// out[16 j + i] = rows[i][j] for i and j in [0, 16).
HWY_INLINE void turn_square(const float* const* rows, float* out) {
  const F32 df;
  alignas(64) float quarters[kSquare];  // [r][j][q]: row r + 4 q
  for (Index r = 0; r < 4; ++r) {
    for (Index j = 0; j < kHalf; j += lanes()) {
      hn::StoreInterleaved4(hn::Load(df, rows[r] + j), hn::Load(df, rows[r + 4] + j),
                            hn::Load(df, rows[r + 8] + j), hn::Load(df, rows[r + 12] + j), df,
                            quarters + r * 4 * kHalf + 4 * j);
    }
  }
  for (Index i = 0; i < 4 * kHalf; i += lanes()) {
    hn::StoreInterleaved4(hn::Load(df, quarters + i), hn::Load(df, quarters + 4 * kHalf + i),
                          hn::Load(df, quarters + 8 * kHalf + i),
                          hn::Load(df, quarters + 12 * kHalf + i), df, out + 4 * i);
  }
}

// v = grad + decay * residual, bounded; notes what is not finite.
template <typename T>
class Values {
 public:
  Values(const DctColsInput& input, const T* grad)
      : grad_(grad), residual_(input.residual), decay_(input.decay) {}

  // Values [i, i + count) to `out`, which is aligned.
  HWY_INLINE void load(Index i, Index count, float* out) {
    const F32 df;
    const VF32 most = hn::Set(df, kDctColsClip);
    Index j = 0;
    for (; j + lanes() <= count; j += lanes()) {
      const VF32 v = load_sum(grad_ + i + j, residual_ == nullptr ? nullptr : residual_ + i + j,
                              hn::Set(df, decay_));
      largest_ = hn::Max(largest_, magnitude_bits(v));
      hn::Store(hn::Min(hn::Max(v, hn::Neg(most)), most), df, out + j);
    }
    for (; j < count; ++j) {
      float v = to_float(grad_[i + j]);
      if (residual_ != nullptr) v += decay_ * residual_[i + j];
      all_finite_ = all_finite_ && is_finite(v);
      out[j] = std::min(std::max(v, -kDctColsClip), kDctColsClip);
    }
  }
  bool finite() const {
    return all_finite_ &&
           hn::GetLane(hn::MaxOfLanes(I32(), largest_)) < static_cast<std::int32_t>(kInfBits32);
  }

 private:
  const T* grad_;
  const float* residual_;
  float decay_;
  hn::Vec<I32> largest_ = hn::Zero(I32());
  bool all_finite_ = true;
};

// Lines of the columns of rows [first, first + 32), zeros where there are no such rows. Returns
// whether all values were finite.
template <typename T>
HWY_NOINLINE bool load_lines(const DctColsInput& input, const T* grad, Index first,
                             const DctTables& tables) {
  const F32 df;
  const auto [n, m, transposed] = input.matrix;
  Values<T> values(input, grad);
  float* lines = tables.lines[0];
  if (transposed) {
    const Index here = std::min(kLine, n - first);
    for (Index j = 0; j < m; ++j) {
      float* line = lines + tables.line_of(j) * kLine;
      values.load(j * n + first, here, line);
      std::fill(line + here, line + kLine, 0.0F);
    }
    return values.finite();
  }
  for (Index half = 0; half < kLine; half += kHalf) {
    const Index here = std::clamp(n - first - half, Index{0}, kHalf);
    alignas(64) float square[kSquare] = {};
    alignas(64) float turned[kSquare];
    const float* rows[kHalf];
    for (Index i = 0; i < kHalf; ++i) rows[i] = square + i * kHalf;
    for (Index begin = 0; begin < m; begin += kHalf) {
      const Index width = std::min(kHalf, m - begin);
      for (Index i = 0; i < here; ++i) {
        values.load((first + half + i) * m + begin, width, square + i * kHalf);
      }
      turn_square(rows, turned);
      for (Index j = 0; j < width; ++j) {
        float* line = lines + tables.line_of(begin + j) * kLine + half;
        for (Index i = 0; i < kHalf; i += lanes()) {
          hn::Store(hn::Load(df, turned + j * kHalf + i), df, line + i);
        }
      }
    }
  }
  return values.finite();
}

// Where the reconstruction goes.
template <typename T>
class Results {
 public:
  // `stream`: `next` is written past the caches; all ranges are aligned.
  Results(const DctColsInput& input, T* grad, float* next, bool stream)
      : grad_(grad), residual_(input.residual), decay_(input.decay), next_(next), stream_(stream) {}

  // grad[i + j] = x[j], rounded; next[i + j] = v - that. x is aligned.
  HWY_INLINE void write(const float* x, Index i, Index count) const {
    const F32 df;
    const VF32 most = hn::Set(df, kMost);
    Index j = 0;
    for (; j + lanes() <= count; j += lanes()) {
      T* grad = grad_ + i + j;
      VF32 v = hn::Zero(df);
      if (next_ != nullptr) {
        v = load_sum(grad, residual_ == nullptr ? nullptr : residual_ + i + j, hn::Set(df, decay_));
      }
      store_float(hn::Min(hn::Max(hn::Load(df, x + j), hn::Neg(most)), most), grad);
      if (next_ == nullptr) continue;
      const VF32 rest = hn::Sub(v, load_float(grad));
      stream_ ? hn::Stream(rest, df, next_ + i + j) : hn::StoreU(rest, df, next_ + i + j);
    }
    for (; j < count; ++j) {
      float v = to_float(grad_[i + j]);
      if (residual_ != nullptr) v += decay_ * residual_[i + j];
      grad_[i + j] = from_float<T>(std::min(std::max(x[j], -kMost), kMost));
      if (next_ != nullptr) next_[i + j] = v - to_float(grad_[i + j]);
    }
  }

 private:
  static constexpr float kMost =
      std::is_same_v<T, FP16> ? to_float(FP16{kMaxFP16}) : std::numeric_limits<float>::max();
  T* grad_;
  const float* residual_;
  float decay_;
  float* next_;
  bool stream_;
};

// Writes rows [first, first + 32), which an inverse transform has left in lines[1].
template <typename T>
HWY_NOINLINE void unload_lines(const DctMatrix& matrix, Index first, const DctTables& tables,
                               const Results<T>& results) {
  const Index n = matrix.rows;
  const Index m = matrix.columns;
  const auto line_at = [&](Index j) {
    const Index line = tables.line_of(j);
    return tables.lines[1] + (line == 0 ? 0 : m - line) * kLine;
  };
  if (matrix.transposed) {
    const Index here = std::min(kLine, n - first);
    for (Index j = 0; j < m; ++j) results.write(line_at(j), j * n + first, here);
    return;
  }
  for (Index half = 0; half < kLine; half += kHalf) {
    const Index here = std::clamp(n - first - half, Index{0}, kHalf);
    alignas(64) float square[kSquare];
    const float* columns[kHalf];
    for (Index begin = 0; begin < m; begin += kHalf) {
      const Index width = std::min(kHalf, m - begin);
      for (Index j = 0; j < kHalf; ++j) columns[j] = line_at(begin + std::min(j, width - 1)) + half;
      turn_square(columns, square);
      for (Index i = 0; i < here; ++i) {
        results.write(square + i * kHalf, (first + half + i) * m + begin, width);
      }
    }
  }
}

// ---- Sketches.

// Rows of the matrix whose signs are kept at a time, and columns of four rows that stay in the
// first cache.
constexpr Index kChunk = 512;
constexpr int kRowsTogether = 4;

// of[q][i]: +-1 for row first + i of the matrix.
struct Signs {
  float of[kMaxDctSketches][kChunk];

  void draw(const RandomStream& stream, Index first, Index count, int sketches) {
    constexpr int kWordRows = 32;
    constexpr Index kBlocks = kMaxDctSketches / 4;  // of random words, for 32 rows
    std::array<std::uint32_t, 4> words{};
    for (Index i = 0; i < count; i += kWordRows) {
      for (int q = 0; q < sketches; ++q) {
        const Index block = (first + i) / kWordRows * kBlocks + q / 4;
        if (q % 4 == 0) words = random_block(stream, static_cast<std::uint64_t>(block));
        const std::uint32_t word = words[static_cast<std::size_t>(q % 4)];
        for (int bit = 0; bit < kWordRows; ++bit) {
          of[q][i + bit] = (word >> bit & 1) != 0 ? -1.0F : 1.0F;
        }
      }
    }
  }
};

template <typename T>
HWY_NOINLINE bool load_chunk(const DctColsInput& input, const T* grad, Index i, Index count,
                             float* out) {
  Values<T> values(input, grad);
  values.load(i, count, out);
  return values.finite();
}

// sums[j] += the sum of signs[r] * rows[r][j] over four rows, in order; products are exact.
HWY_NOINLINE void add_rows(const float rows[kRowsTogether][kChunk], const float* signs, Index count,
                           float* sums) {
  const F32 df;
  Index j = 0;
  for (; j + lanes() <= count; j += lanes()) {
    VF32 sum = hn::LoadU(df, sums + j);
    for (int r = 0; r < kRowsTogether; ++r) {
      sum = hn::MulAdd(hn::Load(df, rows[r] + j), hn::Set(df, signs[r]), sum);
    }
    hn::StoreU(sum, df, sums + j);
  }
  for (; j < count; ++j) {
    for (int r = 0; r < kRowsTogether; ++r) sums[j] += rows[r][j] * signs[r];
  }
}

// The sum of signs[i] * values[i], count a multiple of 16: in 16 lanes, lanes added in halves.
HWY_NOINLINE float signed_sum(const float* values, const float* signs, Index count) {
  const F32 df;
  alignas(64) float sum[kHalf];
  for (Index lane = 0; lane < kHalf; lane += lanes()) {
    VF32 total = hn::Zero(df);
    for (Index i = lane; i < count; i += kHalf) {
      total = hn::MulAdd(hn::Load(df, values + i), hn::Load(df, signs + i), total);
    }
    hn::Store(total, df, sum + lane);
  }
  for (Index half = kHalf / 2; half > 0; half /= 2) {
    for (Index l = 0; l < half; ++l) sum[l] += sum[l + half];
  }
  return sum[0];
}

bool sketch(const DctColsInput& input, const RandomStream& stream, int sketches, float* out) {
  const Index n = input.matrix.rows;
  const Index m = input.matrix.columns;
  alignas(64) Signs signs;
  alignas(64) float rows[kRowsTogether][kChunk] = {};
  bool finite = true;
  const auto load = [&](Index i, Index count, float* to) {
    finite &=
        visit(input.grad, [&](const auto* grad) { return load_chunk(input, grad, i, count, to); });
  };
  std::fill_n(out, sketches * m, 0.0F);
  for (Index first = 0; first < n; first += kChunk) {
    const Index count = std::min(kChunk, n - first);
    signs.draw(stream, first, count, sketches);
    if (input.matrix.transposed) {
      const Index whole = (count + kHalf - 1) / kHalf * kHalf;
      for (Index j = 0; j < m; ++j) {
        load(j * n + first, count, rows[0]);
        std::fill(rows[0] + count, rows[0] + whole, 0.0F);
        for (int q = 0; q < sketches; ++q) {
          out[q * m + j] += signed_sum(rows[0], signs.of[q], whole);
        }
      }
      continue;
    }
    for (Index i = 0; i < count; i += kRowsTogether) {
      const Index here = std::min<Index>(kRowsTogether, count - i);
      for (Index begin = 0; begin < m; begin += kChunk) {
        const Index width = std::min(kChunk, m - begin);
        for (Index r = 0; r < here; ++r) load((first + i + r) * m + begin, width, rows[r]);
        for (Index r = here; r < kRowsTogether; ++r) std::fill_n(rows[r], width, 0.0F);
        for (int q = 0; q < sketches; ++q) {
          add_rows(rows, signs.of[q] + i, width, out + q * m + begin);
        }
      }
    }
  }
  return finite;
}

// ---- Columns.

// Of rows [first, first + here), the chosen columns of what a transform has left in lines[1].
void take_columns(const DctMatrix& matrix, Index first, const DctTables& tables, float* out) {
  const F32 df;
  const Index here = std::min(kLine, matrix.rows - first);
  alignas(64) float column[kLine];
  out += first;
  for (const Index k : tables.chosen) {
    const float* line = tables.lines[1] + k * kLine;
    const float* mirror = tables.lines[1] + (k == 0 ? 0 : matrix.columns - k) * kLine;
    const VF32 c = hn::Set(df, tables.posts[2 * k]);
    const VF32 s = hn::Set(df, tables.posts[2 * k + 1]);
    float* to = here == kLine ? out : column;
    for (Index lane = 0; lane < kHalf; lane += lanes()) {
      const Complex a = load(line + lane);
      const Complex b = load(mirror + lane);
      hn::StoreU(hn::Add(hn::Mul(c, hn::Add(a.re, b.re)), hn::Mul(s, hn::Sub(a.im, b.im))), df,
                 to + lane);
      hn::StoreU(hn::Add(hn::Mul(c, hn::Add(a.im, b.im)), hn::Mul(s, hn::Sub(b.re, a.re))), df,
                 to + kHalf + lane);
    }
    if (here != kLine) std::copy_n(column, here, out);
    out += matrix.rows;
  }
}

// The transpose of that, into lines[0].
void put_columns(const DctMatrix& matrix, Index first, const DctTables& tables, const float* in) {
  const F32 df;
  float* lines = tables.lines[0];
  std::fill_n(lines, matrix.columns * kLine, 0.0F);
  const Index here = std::min(kLine, matrix.rows - first);
  alignas(64) float column[kLine] = {};
  in += first;
  for (const Index k : tables.chosen) {
    float* line = lines + k * kLine;
    float* mirror = lines + (k == 0 ? 0 : matrix.columns - k) * kLine;
    const VF32 c = hn::Set(df, tables.posts[2 * k]);
    const VF32 s = hn::Set(df, tables.posts[2 * k + 1]);
    if (here != kLine) std::copy_n(in, here, column);
    const float* from = here == kLine ? in : column;
    for (Index lane = 0; lane < kHalf; lane += lanes()) {
      const VF32 a = hn::LoadU(df, from + lane);
      const VF32 b = hn::LoadU(df, from + kHalf + lane);
      const VF32 ca = hn::Mul(c, a);
      const VF32 cb = hn::Mul(c, b);
      const VF32 sa = hn::Mul(s, a);
      const VF32 sb = hn::Mul(s, b);
      store(load(line + lane) + Complex{hn::Sub(ca, sb), hn::Add(cb, sa)}, line + lane);
      store(load(mirror + lane) + Complex{hn::Add(ca, sb), hn::Sub(cb, sa)}, mirror + lane);
    }
    in += matrix.rows;
  }
}

bool project(const DctColsInput& input, const DctTables& tables, float* out) {
  bool finite = true;
  for (Index first = 0; first < input.matrix.rows; first += kLine) {
    finite &=
        visit(input.grad, [&](const auto* grad) { return load_lines(input, grad, first, tables); });
    transform(tables);
    take_columns(input.matrix, first, tables, out);
  }
  return finite;
}

void absorb(const DctColsInput& input, const DctTables& tables, const float* mean, float* next) {
  const DctMatrix& matrix = input.matrix;
  const bool stream = writes_past_caches(input.grad, input.residual, next) &&
                      (matrix.transposed ? matrix.rows : matrix.columns) % kHalf == 0;
  for (Index first = 0; first < matrix.rows; first += kLine) {
    put_columns(matrix, first, tables, mean);
    transform(tables);
    visit(input.grad, [&](auto* grad) {
      unload_lines(matrix, first, tables, Results(input, grad, next, stream));
    });
  }
  if (stream) hwy::FlushStream();
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(fft);
HWY_EXPORT(transform);
HWY_EXPORT(sketch);
HWY_EXPORT(project);
HWY_EXPORT(absorb);

void dctcols_fft(const DctTables& tables) { HWY_DYNAMIC_DISPATCH(fft)(tables); }
void dctcols_transform(const DctTables& tables) { HWY_DYNAMIC_DISPATCH(transform)(tables); }
bool dctcols_sketch(const DctColsInput& input, const RandomStream& stream, int sketches,
                    float* out) {
  return HWY_DYNAMIC_DISPATCH(sketch)(input, stream, sketches, out);
}
bool dctcols_project(const DctColsInput& input, const DctTables& tables, float* out) {
  return HWY_DYNAMIC_DISPATCH(project)(input, tables, out);
}
void dctcols_absorb(const DctColsInput& input, const DctTables& tables, const float* mean,
                    float* next) {
  HWY_DYNAMIC_DISPATCH(absorb)(input, tables, mean, next);
}

}  // namespace thinwire
#endif  // HWY_ONCE
