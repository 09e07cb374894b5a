#include "compressors/dct/dctcols.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "compressors/dct/dctcols_kernels.h"
#include "compressors/dct/dctcols_reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;
using Shape = std::vector<std::int64_t>;

constexpr double kUnit = 0x1p-24;  // of roundings to nearest fp32

double norm(const auto& values) {
  double sum = 0;
  for (const auto x : values) sum += static_cast<double>(x) * static_cast<double>(x);
  return std::sqrt(sum);
}
double distance(const auto& a, const auto& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
  }
  return std::sqrt(sum);
}

// Bytes aligned to 64.
class Bytes {
 public:
  explicit Bytes(std::size_t size) : storage_(size + 63), size_(size) {}
  std::span<std::byte> span() {
    void* data = storage_.data();
    std::size_t space = storage_.size();
    return {static_cast<std::byte*>(std::align(64, size_, data, space)), size_};
  }

 private:
  std::vector<std::byte> storage_;
  std::size_t size_;
};

// A matrix whose tables are filled and whose columns are chosen.
class Transform {
 public:
  Transform(const Shape& shape, std::int64_t chosen)
      : matrix_(dct_matrix(shape)),
        state_(dct_tables_bytes(matrix_.columns, chosen)),
        tables_(dct_tables(state_.span(), matrix_.columns, chosen)) {
    dct_fill_tables(tables_);
    std::vector<std::uint32_t> all(static_cast<std::size_t>(matrix_.columns));
    std::iota(all.begin(), all.end(), 0U);
    // First and last, and others between.
    for (std::size_t c = 0; c < tables_.chosen.size(); ++c) {
      tables_.chosen[c] =
          all[c * (all.size() - 1) / std::max<std::size_t>(tables_.chosen.size() - 1, 1)];
    }
  }

  const DctMatrix& matrix() const { return matrix_; }
  const DctTables& tables() const { return tables_; }

  Floats project(Floats values) const {
    Floats out(tables_.chosen.size() * static_cast<std::size_t>(matrix_.rows));
    EXPECT_TRUE(dctcols_project({.grad = view(values), .matrix = matrix_}, tables_, out.data()));
    return out;
  }
  Floats restore(const Floats& columns) const {
    Floats grad(static_cast<std::size_t>(matrix_.rows * matrix_.columns));
    dctcols_absorb({.grad = view(grad), .matrix = matrix_}, tables_, columns.data(), nullptr);
    return grad;
  }

 private:
  DctMatrix matrix_;
  Bytes state_;
  DctTables tables_;
};

// Bound of ||computed - exact|| / ||x||. A level of radix p multiplies by twiddles (3 u: two
// products, a sum, entries off by u) and by p^(1/2) times an orthogonal matrix: additions for p = 2
// and 4, else sums of p products, at most (p + 2) u of the terms' norms, themselves p^(1/2) times
// the result's. A convolution is two transforms of its size and three products; its spectrum has
// the first one's error, and magnitudes up to 2 times their mean for a chirp. Before and after: one
// product by a post, halves added, and entries off by u.
double relative_bound(const DctTables& tables) {
  double transform = 0;
  for (int level = 0; level < tables.fft.levels; ++level) {
    const double p = tables.fft.radices[static_cast<std::size_t>(level)];
    transform += 3 + (p == 2 || p == 4 ? 2 : (p + 2) * std::sqrt(p));
  }
  if (tables.convolves()) transform = 2 * (3 * transform + 9);
  return kUnit * (transform + 8);
}

class DctColsTransform : public testing::TestWithParam<Shape> {};

TEST_P(DctColsTransform, IsTheOrthonormalOneOfTheSmallerSideAndItsInverse) {
  const Shape shape = GetParam();
  const std::int64_t m = dct_matrix(shape).columns;
  for (const std::int64_t r : {std::min<std::int64_t>(m, 5), m}) {
    const Transform transform(shape, r);
    const DctMatrix& matrix = transform.matrix();
    const double bound = relative_bound(transform.tables());
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kEqual, Pattern::kSpike}) {
      SCOPED_TRACE(testing::Message() << name(pattern) << " m=" << m << " r=" << r);
      const Floats values = make_values(pattern, matrix.rows * matrix.columns, 1);
      const Floats columns = transform.project(values);
      const auto exact = dctcols_project_reference(values, matrix, transform.tables().chosen);
      EXPECT_LE(distance(columns, exact), bound * norm(values));
      const Floats grad = transform.restore(columns);
      const auto restored = dctcols_restore_reference(columns, matrix, transform.tables().chosen);
      EXPECT_LE(distance(grad, restored), bound * norm(columns));
      if (r == m) {
        EXPECT_LE(distance(grad, values), 2.001 * bound * norm(values));
      }
    }
  }
}

TEST_P(DctColsTransform, HasTheSameBitsOnEverySimdTarget) {
  const Shape shape = GetParam();
  const std::int64_t m = dct_matrix(shape).columns;
  const auto step = [&] {
    const Transform transform(shape, (m + 1) / 2);
    const DctMatrix& matrix = transform.matrix();
    Floats values = make_values(Pattern::kNormal, matrix.rows * m, 2);
    Floats sketch(static_cast<std::size_t>(kMaxDctSketches * m));
    EXPECT_TRUE(dctcols_sketch({.grad = view(values), .matrix = matrix}, random_stream(1, 2, -1),
                               kMaxDctSketches, sketch.data()));
    const Floats columns = transform.project(values);
    return std::tuple(sketch, columns, transform.restore(columns));
  };
  const auto expected = step();
  for_each_simd_target([&] { EXPECT_EQ(step(), expected); });
}

// Fours, a two, threes, fives, larger primes; primes and products that are convolved; both sides.
INSTANTIATE_TEST_SUITE_P(Sizes, DctColsTransform,
                         testing::Values(Shape{1, 1}, Shape{40, 2}, Shape{3, 33}, Shape{48, 4},
                                         Shape{35, 5}, Shape{8, 16}, Shape{64, 64}, Shape{61, 70},
                                         Shape{70, 67}, Shape{96, 128}, Shape{130, 120},
                                         Shape{134, 140}, Shape{131, 1009}));

// The rows' signs in the sketch are +-1, as many of the one as of the other, and independent.
TEST(DctCols, SketchesHaveRandomSigns) {
  for (const Shape& shape : {Shape{1200, 2}, Shape{2, 1200}}) {
    const DctMatrix matrix = dct_matrix(shape);
    const std::int64_t n = matrix.rows;
    std::vector<std::vector<double>> signs(kMaxDctSketches);
    for (std::int64_t i = 0; i < n; ++i) {
      Floats values(static_cast<std::size_t>(2 * n));
      values[static_cast<std::size_t>(matrix.transposed ? i : 2 * i)] = 1;
      Floats sketch(2 * kMaxDctSketches);
      dctcols_sketch({.grad = view(values), .matrix = matrix}, random_stream(7, 8, -1),
                     kMaxDctSketches, sketch.data());
      for (std::size_t q = 0; q < kMaxDctSketches; ++q) {
        ASSERT_EQ(std::fabs(sketch[2 * q]), 1);
        ASSERT_EQ(sketch[2 * q + 1], 0);
        signs[q].push_back(static_cast<double>(sketch[2 * q]));
      }
    }
    const double sigma = std::sqrt(static_cast<double>(n));
    for (std::size_t q = 0; q < kMaxDctSketches; ++q) {
      EXPECT_LE(std::fabs(std::accumulate(signs[q].begin(), signs[q].end(), 0.0)), 5 * sigma);
      for (std::size_t p = 0; p < q; ++p) {
        const double dot =
            std::inner_product(signs[q].begin(), signs[q].end(), signs[p].begin(), 0.0);
        EXPECT_LE(std::fabs(dot), 5 * sigma);
      }
    }
  }
}

// ---- The codec.

struct Rank {
  Rank(const LinearCodec& codec, const Shape& its_shape, const Floats& values)
      : shape(its_shape),
        grad(values),
        memory(static_cast<std::int64_t>(values.size()), {.needs = codec.memory_needs(shape)}),
        state(codec.round_state_bytes(shape)) {}
  LinearCodec::Tensor tensor() {
    return {.grad = view(grad), .shape = shape, .memory = &memory, .round_state = state.span()};
  }
  std::vector<std::uint32_t> chosen(std::int64_t rank) {
    const auto columns = dct_tables(state.span(), dct_matrix(shape).columns, rank).chosen;
    return {columns.begin(), columns.end()};
  }

  Shape shape;
  Floats grad;
  Memory memory;
  Bytes state;
};

void run(const LinearCodec& codec, std::vector<Rank>& ranks, std::uint64_t step) {
  for (int round = 0; round < codec.rounds(step); ++round) {
    const auto n = static_cast<std::size_t>(codec.round_elements(ranks[0].shape, round, step));
    Floats mean(n);
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      Floats sent(n);
      codec.project({.step = step, .sender = static_cast<int>(r), .key_hash = 5}, round,
                    ranks[r].tensor(), sent);
      for (std::size_t i = 0; i < n; ++i) mean[i] += sent[i] / static_cast<float>(ranks.size());
    }
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      codec.absorb({.step = step, .sender = static_cast<int>(r), .key_hash = 5}, round, mean,
                   ranks[r].tensor());
    }
  }
}

// Rows in the span of the given columns of the basis.
Floats spanned(const Shape& shape, const std::vector<std::uint32_t>& columns, std::uint64_t seed) {
  const DctMatrix matrix = dct_matrix(shape);
  const auto weights =
      make_values(Pattern::kNormal, matrix.rows * static_cast<std::int64_t>(columns.size()), seed);
  const auto values = dctcols_restore_reference(weights, matrix, columns);
  return {values.begin(), values.end()};
}

TEST(DctCols, FindsTheColumnsThatSpanTheMeanAndRestoresItExactly) {
  const std::vector<std::uint32_t> columns = {0, 7, 31, 32};
  const auto codec = make_dctcols_codec({.rank = 4});
  for (const Shape& shape : {Shape{50, 33}, Shape{33, 50}, Shape{67, 4, 20}}) {
    std::vector<Rank> ranks;
    std::vector<double> mean(
        static_cast<std::size_t>(dct_matrix(shape).rows * dct_matrix(shape).columns));
    for (std::uint64_t r = 0; r < 3; ++r) {
      const Floats values = spanned(shape, columns, 10 + r);
      ranks.emplace_back(*codec, shape, values);
      for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += static_cast<double>(values[i]) / 3;
    }
    run(*codec, ranks, 3);
    for (Rank& rank : ranks) {
      EXPECT_EQ(rank.chosen(4), columns);
      EXPECT_EQ(rank.grad, ranks[0].grad);
      EXPECT_LE(distance(rank.grad, mean), 1e-5 * norm(mean));
    }
  }
}

// What stays is never more than there was, and at most 1 - r/m of it on the average, where no
// column is better than another; where energy falls off it is near to what the best columns leave.
TEST(DctCols, LeavesLittle) {
  const Shape shape = {96, 64};
  const DctMatrix matrix = dct_matrix(shape);
  std::vector<std::uint32_t> all(64);
  std::iota(all.begin(), all.end(), 0U);
  for (const std::int64_t rank : {4, 16, 60}) {
    const auto codec = make_dctcols_codec({.rank = rank});
    for (const bool falls_off : {false, true}) {
      double left = 0;
      double best = 0;
      const int trials = 20;
      for (std::uint64_t trial = 0; trial < trials; ++trial) {
        Floats weights = make_values(Pattern::kNormal, 96 * 64, 90 + trial);
        std::vector<double> energies(64);
        for (std::size_t k = 0; k < 64; ++k) {
          for (std::size_t i = 96 * k; i < 96 * (k + 1); ++i) {
            if (falls_off) weights[i] *= std::exp2(-static_cast<float>(k * 37 % 64) / 8);
            energies[k] += static_cast<double>(weights[i]) * static_cast<double>(weights[i]);
          }
        }
        const auto values = dctcols_restore_reference(weights, matrix, all);
        std::vector<Rank> ranks;
        ranks.emplace_back(*codec, shape, Floats(values.begin(), values.end()));
        run(*codec, ranks, trial);
        const double share = std::pow(norm(ranks[0].memory.next()) / norm(values), 2);
        EXPECT_LE(share, 1 + 1e-5);
        left += share / trials;
        std::sort(energies.begin(), energies.end());
        best += std::accumulate(energies.begin(), energies.end() - rank, 0.0) /
                std::pow(norm(values), 2) / trials;
      }
      SCOPED_TRACE(testing::Message() << "rank " << rank << (falls_off ? " falling off" : ""));
      EXPECT_LE(left, 1.0 - static_cast<double>(rank) / 64);
      if (falls_off) {
        EXPECT_LE(left, best + 0.35 * (1 - best));
      }
    }
  }
}

TEST(DctCols, ChosenColumnsStayUntilTheNextChoice) {
  const Shape shape = {40, 30};
  const auto codec = make_dctcols_codec({.rank = 3, .refresh = 4});
  EXPECT_EQ(codec->period(), 4);
  std::vector<Rank> ranks;
  ranks.emplace_back(*codec, shape, spanned(shape, {2, 9, 20}, 1));
  ranks.emplace_back(*codec, shape, spanned(shape, {2, 9, 20}, 2));
  const auto step = [&](std::uint64_t at, const std::vector<std::uint32_t>& columns) {
    for (Rank& rank : ranks) {
      rank.memory.clear();
      if (at > 8) rank.memory.restore_state(Floats{3, 10, 21});
      rank.grad = spanned(shape, columns, at);
    }
    EXPECT_EQ(codec->rounds(at), at % 4 == 0 ? 2 : 1);
    run(*codec, ranks, at);
    EXPECT_EQ(ranks[0].grad, ranks[1].grad);
    EXPECT_EQ(ranks[0].chosen(3), ranks[1].chosen(3));
    const auto state = ranks[0].memory.next_state();
    EXPECT_TRUE(
        std::equal(state.begin(), state.end(), ranks[0].chosen(3).begin(),
                   [](float x, std::uint32_t k) { return x == static_cast<float>(k + 1); }));
    for (Rank& rank : ranks) rank.memory.commit();
    return ranks[0].chosen(3);
  };
  const std::vector<std::uint32_t> first = {2, 9, 20};
  const std::vector<std::uint32_t> second = {0, 5, 29};
  EXPECT_EQ(step(8, first), first);
  EXPECT_EQ(step(9, second), first);
  EXPECT_EQ(step(11, second), first);
  EXPECT_EQ(step(12, second), second);
  // Without columns to keep, the same random ones on all ranks.
  for (Rank& rank : ranks) rank.memory.clear();
  run(*codec, ranks, 13);
  EXPECT_EQ(ranks[0].chosen(3), ranks[1].chosen(3));
  EXPECT_EQ(ranks[0].chosen(3).size(), 3U);
}

TEST(DctCols, GainsWhereItSendsLessThanHalf) {
  const auto codec = make_dctcols_codec({.rank = 8});
  const auto gains = [&](const Shape& shape) { return codec->gains(shape); };
  EXPECT_FALSE(gains({}));
  EXPECT_FALSE(gains({100000}));
  EXPECT_FALSE(gains({100000, 1}));
  EXPECT_FALSE(gains({100000, 16}));  // 8 n + 2 m of 16 n
  EXPECT_TRUE(gains({100000, 17}));
  EXPECT_TRUE(gains({17, 100000}));
  EXPECT_FALSE(gains({20, 20}));  // 200 of 400
  EXPECT_TRUE(gains({21, 21}));
  const Shape shape = {64, 3, 3, 3};
  EXPECT_EQ(codec->round_elements(shape, 0, 0), 2 * 27);
  EXPECT_EQ(codec->round_elements(shape, 1, 0), 8 * 64);
  EXPECT_THROW(make_dctcols_codec({.rank = 0}), InvalidArgument);
  EXPECT_THROW(make_dctcols_codec({.refresh = 0}), InvalidArgument);
}

}  // namespace
}  // namespace thinwire
