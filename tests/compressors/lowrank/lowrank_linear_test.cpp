// Laws of the low-rank linear codecs beyond the contract: kernels beside their reference, what the
// power iteration promises, what is kept.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "compressors/core/spec.h"
#include "compressors/lowrank/lowrank.h"
#include "compressors/lowrank/lowrank_reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;

const RandomStream kStream = random_stream(7, 1, -1);

// A factor with its memory.
class Factor {
 public:
  Factor(std::int64_t length, int rank)
      : values_(static_cast<std::size_t>(rank * LowRankFactor::stride_of(length)) + 16),
        view_{.length = length, .rank = rank} {
    void* data = values_.data();
    std::size_t space = values_.size() * sizeof(float);
    view_.data = static_cast<float*>(std::align(64, space - 64, data, space));
  }
  Factor(std::int64_t length, int rank, Pattern pattern, std::uint64_t seed)
      : Factor(length, rank) {
    for (int j = 0; j < rank; ++j) set(j, make_values(pattern, length, seed + 13 * j));
  }
  Factor(const Factor& from) : Factor(from.view_.length, from.view_.rank) {
    std::copy_n(from.view_.data, size(), view_.data);
  }
  Factor& operator=(const Factor&) = delete;
  ~Factor() = default;

  void set(int j, const Floats& column) { std::copy(column.begin(), column.end(), at(j)); }
  float* at(int j) const { return view_.column(j); }
  const LowRankFactor& view() const { return view_; }
  std::int64_t size() const { return view_.rank * view_.stride(); }
  bool same_bits(const Factor& other) const {
    return std::memcmp(view_.data, other.view_.data, static_cast<std::size_t>(4 * size())) == 0;
  }
  double dot(int j, int k) const {
    double sum = 0;
    for (std::int64_t i = 0; i < view_.length; ++i) {
      sum += static_cast<double>(at(j)[i]) * static_cast<double>(at(k)[i]);
    }
    return sum;
  }

 private:
  Floats values_;
  LowRankFactor view_;
};

void expect_orthonormal(const Factor& factor) {
  for (int j = 0; j < factor.view().rank; ++j) {
    for (int k = 0; k <= j; ++k) {
      ASSERT_NEAR(factor.dot(j, k), j == k ? 1 : 0, 1e-6) << j << ", " << k;
    }
    for (std::int64_t i = factor.view().length; i < factor.view().stride(); ++i) {
      ASSERT_EQ(factor.at(j)[i], 0.0F) << "padding";
    }
  }
}

double norm(const Floats& values) {
  double sum = 0;
  for (const float x : values) sum += static_cast<double>(x) * static_cast<double>(x);
  return std::sqrt(sum);
}

TEST(LowRankKernels, BasesAreOrthonormalOnEveryTargetAlike) {
  for (const auto& [length, rank] : {std::pair<std::int64_t, int>{1, 1},
                                     {2, 2},
                                     {5, 5},
                                     {64, 64},
                                     {100, 7},
                                     {1009, 4},
                                     {4096, 16}}) {
    for (const Pattern pattern : kPatterns) {
      SCOPED_TRACE(testing::Message() << name(pattern) << " " << length << "x" << rank);
      Factor given(length, rank, pattern, 5);
      if (rank > 3) {
        given.set(1, Floats(static_cast<std::size_t>(length)));  // zero
        for (std::int64_t i = 0; i < length; ++i) {              // dependent
          given.at(3)[i] = given.at(0)[i] / 2 + given.at(2)[i] / 4;
        }
      }
      Factor expected = given;
      lowrank_orthonormalise_reference(expected.view(), kStream);
      expect_orthonormal(expected);
      for_each_simd_target([&] {
        Factor got = given;
        lowrank_orthonormalise(got.view(), kStream);
        EXPECT_TRUE(got.same_bits(expected));
      });
    }
  }
}

TEST(LowRankKernels, ABasisSpansWhatItWasMadeOf) {
  const Factor given(333, 9, Pattern::kNormal, 3);
  Factor basis = given;
  lowrank_orthonormalise(basis.view(), kStream);
  for (int j = 0; j < 9; ++j) {
    Floats rest(given.at(j), given.at(j) + 333);
    const double before = norm(rest);
    for (int k = 0; k < 9; ++k) {
      double c = 0;
      for (std::size_t i = 0; i < rest.size(); ++i) {
        c += static_cast<double>(basis.at(k)[i]) * static_cast<double>(given.at(j)[i]);
      }
      for (std::size_t i = 0; i < rest.size(); ++i)
        rest[i] -= static_cast<float>(c) * basis.at(k)[i];
    }
    EXPECT_LT(norm(rest), 1e-5 * before);
  }
}

struct Problem {
  Problem(DType dtype, std::int64_t rows, std::int64_t columns, int rank)
      : grad(dtype, make_values(Pattern::kNormal, rows * columns, 1), 3),
        residual(make_values(Pattern::kSparse, rows * columns, 2)),
        left(rows, rank, Pattern::kNormal, 3),
        right(columns, rank, Pattern::kNormal, 4) {
    lowrank_orthonormalise(left.view(), kStream);
    lowrank_orthonormalise(right.view(), kStream);
    v = {.grad = grad.view(), .columns = columns, .residual = residual.data(), .decay = 0.75F};
  }
  Array grad;
  Floats residual;
  Factor left;
  Factor right;
  LowRankMatrix v;
};

TEST(LowRankKernels, ProjectionsAreNearTheReference) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const auto& [rows, columns, rank] : {std::array<std::int64_t, 3>{1, 1, 1},
                                              {3, 70, 3},
                                              {70, 3, 3},
                                              {37, 1500, 6},
                                              {9, 64, 9},
                                              {130, 2049, 13}}) {
      SCOPED_TRACE(testing::Message() << rows << "x" << columns << " rank " << rank);
      const Problem p(dtype, rows, columns, static_cast<int>(rank));
      Factor left(rows, static_cast<int>(rank));
      Factor right(columns, static_cast<int>(rank));
      lowrank_project_left_reference(p.v, p.right.view(), left.view());
      lowrank_project_right_reference(p.v, p.left.view(), right.view());
      const auto near = [](const Factor& got, const Factor& expected, std::int64_t terms) {
        // |v| <= 8, |b| <= 1 and sum |b| <= sqrt(terms): the bound of the header.
        const double bound = 2 * static_cast<double>(terms + 2) * 0x1p-24 * 8 *
                             std::sqrt(static_cast<double>(terms));
        for (std::int64_t i = 0; i < got.size(); ++i) {
          ASSERT_NEAR(got.view().data[i], expected.view().data[i], bound) << i;
        }
      };
      for_each_simd_target([&] {
        Factor got_left(rows, static_cast<int>(rank), Pattern::kNormal, 1);
        Factor got_right(columns, static_cast<int>(rank), Pattern::kNormal, 1);
        lowrank_project_left(p.v, p.right.view(), got_left.view(), LowRankSums::kFast);
        lowrank_project_right(p.v, p.left.view(), got_right.view(), LowRankSums::kFast);
        near(got_left, left, columns);
        near(got_right, right, rows);
      });
      Factor exact_left = left;
      Factor exact_right = right;
      lowrank_project_left(p.v, p.right.view(), exact_left.view(), LowRankSums::kExact);
      lowrank_project_right(p.v, p.left.view(), exact_right.view(), LowRankSums::kExact);
      near(exact_left, left, columns);
      near(exact_right, right, rows);
      for_each_simd_target([&] {
        lowrank_project_left(p.v, p.right.view(), left.view(), LowRankSums::kExact);
        lowrank_project_right(p.v, p.left.view(), right.view(), LowRankSums::kExact);
        EXPECT_TRUE(left.same_bits(exact_left));
        EXPECT_TRUE(right.same_bits(exact_right));
      });
    }
  }
}

TEST(LowRankKernels, ReconstructsTheSameOnEveryTarget) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const auto& [rows, columns, rank] : {std::array<std::int64_t, 3>{1, 1, 1},
                                              {3, 70, 3},
                                              {70, 3, 3},
                                              {37, 1500, 6},
                                              {9, 64, 9},
                                              {1030, 1024, 2}}) {
      SCOPED_TRACE(testing::Message()
                   << name(dtype) << " " << rows << "x" << columns << " rank " << rank);
      const auto run = [&](auto&& reconstruct) {
        Problem p(dtype, rows, columns, static_cast<int>(rank));
        std::vector<std::byte> memory(static_cast<std::size_t>(rows * columns) * 4 + 64);
        void* data = memory.data();
        std::size_t space = memory.size();
        auto* next = static_cast<float*>(std::align(64, space - 64, data, space));
        reconstruct({.v = p.v, .left = p.left.view(), .right = p.right.view(), .next = next});
        EXPECT_TRUE(p.grad.guards_intact());
        return std::pair(p.grad.bytes(), Floats(next, next + rows * columns));
      };
      const auto expected = run(lowrank_replace_reference);
      for_each_simd_target([&] { EXPECT_EQ(run(lowrank_replace), expected); });
    }
  }
}

// A codec with one rank's memory, whose means are its own projections.
class Stepper {
 public:
  Stepper(const std::string& spec, std::vector<std::int64_t> shape, float decay = 1)
      : codec_(make_codec(spec)),
        shape_(std::move(shape)),
        memory_(shape_[0] * shape_[1],
                {.decay = decay, .needs = codec_.linear->memory_needs(shape_)}),
        state_(codec_.linear->round_state_bytes(shape_) + 64) {}

  // What comes of the gradient.
  Floats step(const Floats& gradient) {
    Floats grad = gradient;
    void* data = state_.data();
    std::size_t space = state_.size();
    std::align(64, space - 64, data, space);
    const Context ctx{.step = step_++, .key_hash = 5};
    const LinearCodec::Tensor tensor{.grad = view(grad),
                                     .shape = shape_,
                                     .memory = &memory_,
                                     .round_state = {static_cast<std::byte*>(data), space}};
    sent_ = 0;
    for (int round = 0; round < codec_.linear->rounds(ctx.step); ++round) {
      Floats wire(static_cast<std::size_t>(codec_.linear->round_elements(shape_, round, ctx.step)));
      codec_.linear->project(ctx, round, tensor, wire);
      codec_.linear->absorb(ctx, round, wire, tensor);
      sent_ += wire.size();
    }
    memory_.commit();
    return grad;
  }
  Floats residual() const { return {memory_.current().begin(), memory_.current().end()}; }
  Floats kept() const { return {memory_.state().begin(), memory_.state().end()}; }
  std::size_t sent() const { return sent_; }

 private:
  Codec codec_;
  std::vector<std::int64_t> shape_;
  Memory memory_;
  std::vector<std::byte> state_;
  std::uint64_t step_ = 0;
  std::size_t sent_ = 0;
};

// sum of s_j u_j v_j^T over orthonormal u and v.
Floats with_spectrum(std::int64_t rows, std::int64_t columns, const std::vector<double>& spectrum) {
  const int rank = static_cast<int>(spectrum.size());
  Factor u(rows, rank, Pattern::kNormal, 21);
  Factor v(columns, rank, Pattern::kNormal, 22);
  lowrank_orthonormalise_reference(u.view(), kStream);
  lowrank_orthonormalise_reference(v.view(), kStream);
  Floats matrix(static_cast<std::size_t>(rows * columns));
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) {
      double sum = 0;
      for (int j = 0; j < rank; ++j) {
        sum += spectrum[static_cast<std::size_t>(j)] * static_cast<double>(u.at(j)[i]) *
               static_cast<double>(v.at(j)[c]);
      }
      matrix[static_cast<std::size_t>(i * columns + c)] = static_cast<float>(sum);
    }
  }
  return matrix;
}

TEST(LowRank, WhatIsLeftIsNeverLonger) {
  for (const char* spec : {"powersgd:1", "powersgd:4", "powersgd:3,rounds=1", "galore:2"}) {
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kEqual}) {
      Stepper stepper(spec, {50, 70}, 0.9F);
      for (std::uint64_t step = 0; step < 4; ++step) {
        Floats v = make_values(pattern, 3500, step);
        const Floats residual = stepper.residual();
        for (std::size_t i = 0; i < v.size(); ++i) v[i] += 0.9F * residual[i];
        stepper.step(make_values(pattern, 3500, step));
        EXPECT_LE(norm(stepper.residual()), norm(v) * (1 + 1e-5)) << spec << " " << name(pattern);
      }
    }
  }
}

TEST(LowRank, MatricesOfThatRankComeThroughWhole) {
  for (const char* spec : {"powersgd:3", "powersgd:4,rounds=1", "galore:3,refresh=2", "galore:5"}) {
    for (const auto& shape : {std::array<std::int64_t, 2>{60, 90}, {90, 60}}) {
      const Floats matrix = with_spectrum(shape[0], shape[1], {5, 1, 0.25});
      Stepper stepper(spec, {shape[0], shape[1]}, 0);
      stepper.step(matrix);
      stepper.step(matrix);
      stepper.step(matrix);
      EXPECT_LT(norm(stepper.residual()), 1e-5 * norm(matrix)) << spec;
    }
  }
}

// Power iterations on a matrix that stays: the error goes to that of the best matrix of that rank.
TEST(LowRank, FindsTheBestSubspaceInThreePowerIterations) {
  std::vector<double> spectrum = {10, 9, 8, 7};
  double tail = 0;
  for (int j = 0; j < 20; ++j) {
    spectrum.push_back(0.7);
    tail += 0.49;
  }
  tail = std::sqrt(tail);
  const Floats matrix = with_spectrum(120, 80, spectrum);
  const std::pair<const char*, int> cases[] = {
      {"powersgd:4", 3}, {"powersgd:4,rounds=1", 6}, {"galore:4,refresh=1", 3}};
  for (const auto& [spec, steps] : cases) {
    Stepper stepper(spec, {120, 80}, 0);
    for (int step = 0; step < steps; ++step) stepper.step(matrix);
    EXPECT_LT(norm(stepper.residual()), 1.001 * tail) << spec;
    EXPECT_GT(norm(stepper.residual()), 0.999 * tail) << spec;
  }
}

// Error feedback: what one step cannot carry comes through in the next ones.
TEST(LowRank, NothingIsLeftBehindForLong) {
  for (const char* spec : {"powersgd:2", "powersgd:2,rounds=1"}) {
    const Floats matrix = with_spectrum(40, 30, {4, 3, 2, 1});
    Stepper stepper(spec, {40, 30});
    Floats sum(matrix.size());
    const int steps = 40;
    for (int step = 0; step < steps; ++step) {
      const Floats got = stepper.step(matrix);
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += got[i];
    }
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] = sum[i] / steps - matrix[i];
    EXPECT_LT(norm(sum), 0.15 * norm(matrix)) << spec;
  }
}

// A state of zeros must not stay one: P = v Q would be zero for ever.
TEST(LowRank, ZeroGradientsDoNotKillTheIteration) {
  for (const char* spec : {"powersgd:3", "powersgd:3,rounds=1", "galore:3,refresh=3"}) {
    Stepper stepper(spec, {40, 50}, 0);
    const Floats zeros(2000);
    for (int step = 0; step < 3; ++step) {
      for (const float x : stepper.step(zeros)) ASSERT_EQ(x, 0.0F);
    }
    const Floats matrix = with_spectrum(40, 50, {3, 2, 1});
    stepper.step(matrix);
    stepper.step(matrix);
    EXPECT_LT(norm(stepper.residual()), 1e-5 * norm(matrix)) << spec;
  }
}

TEST(LowRank, GaloreKeepsItsBasisBetweenRefreshes) {
  for (const auto& shape : {std::array<std::int64_t, 2>{40, 50}, {50, 40}}) {
    Stepper stepper("galore:3,refresh=4", {shape[0], shape[1]});
    // The state holds the right factor, then the left one.
    const auto basis = [&] {
      const Floats kept = stepper.kept();
      return shape[0] < shape[1] ? Floats(kept.end() - 3 * 40, kept.end())
                                 : Floats(kept.begin(), kept.begin() + 3 * 40);
    };
    Floats before;
    for (std::uint64_t step = 0; step < 9; ++step) {
      stepper.step(make_values(Pattern::kNormal, 2000, step));
      EXPECT_EQ(stepper.sent(), step % 4 == 0 ? 3 * (40 + 50) : 3 * 50);
      EXPECT_EQ(basis() == before, step % 4 != 0) << step;
      before = basis();
    }
  }
}

TEST(LowRank, SizesAndRates) {
  const auto floats = [](const char* spec, std::vector<std::int64_t> shape, std::uint64_t step) {
    const Codec codec = make_codec(spec);
    std::vector<std::int64_t> rounds;
    for (int round = 0; round < codec.linear->rounds(step); ++round) {
      rounds.push_back(codec.linear->round_elements(shape, round, step));
    }
    return rounds;
  };
  using Rounds = std::vector<std::int64_t>;
  EXPECT_EQ(floats("powersgd:4", {64, 3, 7, 7}, 0), (Rounds{4 * 64, 4 * 147}));
  EXPECT_EQ(floats("powersgd:64", {10, 100}, 1), (Rounds{10 * 10, 10 * 100}));
  EXPECT_EQ(floats("powersgd:4,rounds=1", {64, 100}, 0), (Rounds{4 * 64}));
  EXPECT_EQ(floats("powersgd:4,rounds=1", {64, 100}, 1), (Rounds{4 * 100}));
  EXPECT_EQ(floats("galore:4", {64, 100}, 200), (Rounds{4 * 64, 4 * 100}));
  EXPECT_EQ(floats("galore:4", {64, 100}, 1), (Rounds{4 * 100}));
  EXPECT_EQ(floats("galore:4", {100, 64}, 1), (Rounds{4 * 100}));
  const auto gains = [](const char* spec, std::vector<std::int64_t> shape) {
    return make_codec(spec).linear->gains(shape);
  };
  EXPECT_TRUE(gains("powersgd:4", {64, 147}));
  EXPECT_TRUE(gains("powersgd:4", {9, 500}));
  EXPECT_FALSE(gains("powersgd:4", {8, 500}));
  EXPECT_FALSE(gains("powersgd:1", {4096}));
  EXPECT_FALSE(gains("powersgd:1", {}));
  EXPECT_FALSE(gains("powersgd:1", {0, 4}));
  EXPECT_TRUE(gains("galore:4", {9, 500}));
  EXPECT_FALSE(gains("galore:4", {8, 500}));
}

}  // namespace
}  // namespace thinwire
