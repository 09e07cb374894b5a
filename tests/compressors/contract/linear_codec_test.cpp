// The contract of LinearCodec: every spec of a linear family runs through the same laws, with P
// ranks played one after the other, in as many rounds and steps as the codec has, and the
// transport's mean computed here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "compressors/core/codec.h"
#include "compressors/core/convert.h"
#include "compressors/core/spec.h"
#include "compressors/randmask/randmask_kernels.h"
#include "tests/support/allocations.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;
using Shape = std::vector<std::int64_t>;

struct LinearCase {
  std::string spec;
  // Projections are linear, and the same on all SIMD targets, to within this times the largest
  // magnitude of what is projected to; 0: exactly.
  double tolerance = 0;
};
void PrintTo(const LinearCase& test, std::ostream* out) { *out << test.spec; }

std::int64_t product(const Shape& shape) {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape) n *= extent;
  return n;
}

std::string text(const Shape& shape) {
  std::string all;
  for (const std::int64_t extent : shape) all += (all.empty() ? "" : "x") + std::to_string(extent);
  return all;
}

double largest(std::span<const float> values) {
  double most = 0;
  for (const float x : values) most = std::max(most, std::fabs(static_cast<double>(x)));
  return most;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
}

// Uninitialised bytes for a tensor's rounds, aligned to 64.
class RoundState {
 public:
  explicit RoundState(std::size_t bytes)
      : size_(bytes), data_(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) {
    std::memset(data_.get(), 0xFF, (bytes + 64) / 64 * 64);  // NaN as floats
  }
  std::span<std::byte> bytes() { return {static_cast<std::byte*>(data_.get()), size_}; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::size_t size_;
  std::unique_ptr<void, Free> data_;
};

// One rank's copy of a tensor.
struct Rank {
  Rank(const LinearCodec& codec, DType dtype, const Shape& its_shape, MemoryOptions options)
      : shape(its_shape),
        grad(dtype, product(shape), 1),
        memory(product(shape), with_needs(options, codec.memory_needs(shape))),
        state(codec.round_state_bytes(shape)) {}

  static MemoryOptions with_needs(MemoryOptions options, const MemoryNeeds& needs) {
    options.needs = needs;
    return options;
  }
  void set(DType dtype, const Floats& values) {
    grad = Array(dtype, values, 1);
    v = grad.values();
    for (std::size_t i = 0; i < v.size(); ++i) v[i] += memory.decay() * memory.current()[i];
  }
  LinearCodec::Tensor tensor() {
    return {.grad = grad.view(), .shape = shape, .memory = &memory, .round_state = state.bytes()};
  }

  Shape shape;
  Array grad;
  Memory memory;
  RoundState state;
  Floats v;
  std::vector<Floats> sent;  // a round
};

class LinearCodecContract : public testing::TestWithParam<LinearCase> {
 protected:
  static Context context(int sender, std::uint64_t step) {
    return {.step = step, .sender = sender, .key_hash = 99};
  }

  std::vector<Rank> make_ranks(const Shape& shape, DType dtype, std::size_t world,
                               float decay = 1) const {
    std::vector<Rank> ranks;
    for (std::size_t r = 0; r < world; ++r) {
      ranks.emplace_back(codec_, dtype, shape,
                         MemoryOptions{.transactional = r % 2 == 0, .decay = decay});
      const std::int64_t n = product(shape);
      ranks[r].memory.restore(make_values(Pattern::kNormal, n, 31 + r));
    }
    return ranks;
  }
  static void set_gradients(std::vector<Rank>& ranks, DType dtype, Pattern pattern,
                            std::uint64_t step) {
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      ranks[r].set(dtype, make_values(pattern, product(ranks[r].shape), 40 + 10 * step + r));
    }
  }

  // Projections of one round, in a buffer of their size and guards around it.
  Floats project(Rank& rank, int sender, std::uint64_t step, int round) const {
    const auto n = codec_.round_elements(rank.shape, round, step);
    Array out(DType::kF32, Floats(static_cast<std::size_t>(n), kNaN), 1);
    const auto before = rank.grad.bytes();
    const std::int64_t calls = allocations();
    codec_.project(context(sender, step), round, rank.tensor(),
                   {static_cast<float*>(out.view().data), static_cast<std::size_t>(n)});
    EXPECT_EQ(allocations(), calls) << "project allocated";
    EXPECT_TRUE(out.guards_intact()) << "project wrote outside its output";
    EXPECT_EQ(rank.grad.bytes(), before) << "project changed the gradient";
    EXPECT_FALSE(rank.memory.written());
    return out.values();
  }

  // One step of all ranks, with the mean over them or with `given` means, a round each. Fills each
  // rank's `sent`; returns the means.
  std::vector<Floats> run(std::vector<Rank>& ranks, std::uint64_t step,
                          const std::vector<Floats>* given = nullptr) const {
    std::vector<Floats> means;
    for (Rank& rank : ranks) rank.sent.clear();
    for (int round = 0; round < codec_.rounds(step); ++round) {
      Floats mean(static_cast<std::size_t>(codec_.round_elements(ranks[0].shape, round, step)));
      for (std::size_t r = 0; r < ranks.size(); ++r) {
        ranks[r].sent.push_back(project(ranks[r], static_cast<int>(r), step, round));
        for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += ranks[r].sent.back()[i];
      }
      for (float& x : mean) x /= static_cast<float>(ranks.size());
      if (given != nullptr) mean = (*given)[static_cast<std::size_t>(round)];
      for (std::size_t r = 0; r < ranks.size(); ++r) {
        const std::int64_t calls = allocations();
        codec_.absorb(context(static_cast<int>(r), step), round, mean, ranks[r].tensor());
        EXPECT_EQ(allocations(), calls) << "absorb allocated";
        EXPECT_TRUE(ranks[r].grad.guards_intact()) << "absorb wrote outside the gradient";
      }
      means.push_back(std::move(mean));
    }
    return means;
  }

  void expect_nothing_lost(std::vector<Rank>& ranks) const {
    const Floats mean = ranks[0].grad.values();
    std::vector<double> lost(mean.size());
    std::vector<double> size(mean.size());
    const auto p = static_cast<double>(ranks.size());
    for (Rank& rank : ranks) {
      ASSERT_EQ(rank.grad.bytes(), ranks[0].grad.bytes()) << "replicas differ";
      ASSERT_TRUE(rank.memory.written());
      ASSERT_TRUE(same_bits(rank.memory.next_state(), ranks[0].memory.next_state()))
          << "states differ";
      const auto residual = rank.memory.next();
      for (std::size_t i = 0; i < mean.size(); ++i) {
        ASSERT_TRUE(std::isfinite(mean[i]));
        ASSERT_EQ(residual[i], rank.v[i] - mean[i]) << "element " << i;
        lost[i] += (static_cast<double>(rank.v[i]) - static_cast<double>(residual[i])) / p;
        size[i] += std::fabs(static_cast<double>(rank.v[i]));
      }
    }
    for (std::size_t i = 0; i < mean.size(); ++i) {
      const auto m = static_cast<double>(mean[i]);
      ASSERT_NEAR(lost[i], m, 0x1p-23 * (size[i] + std::fabs(m))) << "element " << i;
    }
  }

  static constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const Codec made_ = make_codec(GetParam().spec);
  const LinearCodec& codec_ = *made_.linear;
};

const Shape kShapes[] = {{},      {0},     {1},        {3},       {64},        {4099},
                         {1, 1},  {1, 67}, {67, 1},    {0, 5},    {5, 0},      {2, 2},
                         {7, 13}, {16, 9}, {101, 103}, {33, 130}, {5, 3, 4, 2}};

// residual = v - M^, one rounding; summed over ranks: mean v = M^ + mean residual.
TEST_P(LinearCodecContract, NothingIsLostOverAllRanks) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const Pattern pattern :
         {Pattern::kNormal, Pattern::kSpike, Pattern::kZero, Pattern::kDenormal}) {
      for (const Shape& shape : kShapes) {
        for (const std::size_t world : {std::size_t{1}, std::size_t{4}}) {
          std::vector<Rank> ranks = make_ranks(shape, dtype, world, 0.5F);
          for (std::uint64_t step = 4; step < 7; ++step) {
            SCOPED_TRACE(testing::Message()
                         << name(pattern) << " " << text(shape) << " " << name(dtype)
                         << " ranks=" << world << " step " << step);
            set_gradients(ranks, dtype, pattern, step);
            run(ranks, step);
            ASSERT_NO_FATAL_FAILURE(expect_nothing_lost(ranks));
            for (Rank& rank : ranks) rank.memory.commit();
          }
        }
      }
    }
  }
}

TEST_P(LinearCodecContract, HugeValuesStayFinite) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const Shape& shape : kShapes) {
      std::vector<Rank> ranks = make_ranks(shape, dtype, 1, 0);
      for (std::uint64_t step = 4; step < 7; ++step) {
        SCOPED_TRACE(testing::Message() << text(shape) << " " << name(dtype) << " step " << step);
        set_gradients(ranks, dtype, Pattern::kHuge, step);
        run(ranks, step);
        for (const float x : ranks[0].grad.values()) ASSERT_TRUE(std::isfinite(x));
        for (const float x : ranks[0].memory.next()) ASSERT_TRUE(std::isfinite(x));
        ranks[0].memory.commit();
      }
    }
  }
}

// For a fixed key and step, and the same means absorbed before.
TEST_P(LinearCodecContract, ProjectionIsLinearAndTheSameForAllSenders) {
  for (const Shape& shape : {Shape{4099}, Shape{101, 103}, Shape{64, 300}, Shape{6, 4, 5, 7}}) {
    const std::int64_t n = product(shape);
    const Floats a = make_values(Pattern::kNormal, n, 50);
    const Floats b = make_values(Pattern::kSparse, n, 51);
    Floats both(a.size());
    for (std::size_t i = 0; i < a.size(); ++i) both[i] = 2 * a[i] + b[i];
    for (const std::uint64_t step : {std::uint64_t{4}, std::uint64_t{5}}) {
      std::vector<Rank> ranks;
      for (const Floats* values : std::initializer_list<const Floats*>{&a, &b, &both, &a}) {
        ranks.emplace_back(codec_, DType::kF32, shape, MemoryOptions{});
        ranks.back().set(DType::kF32, *values);
      }
      run(ranks, step);
      EXPECT_EQ(ranks[0].sent, ranks[3].sent);
      for (std::size_t round = 0; round < ranks[0].sent.size(); ++round) {
        const Floats& pa = ranks[0].sent[round];
        const Floats& pb = ranks[1].sent[round];
        const Floats& sum = ranks[2].sent[round];
        const double bound = GetParam().tolerance * (2 * largest(pa) + largest(pb));
        for (std::size_t i = 0; i < sum.size(); ++i) {
          ASSERT_NEAR(sum[i], 2 * pa[i] + pb[i], bound)
              << text(shape) << " step " << step << " round " << round << " element " << i;
        }
      }
    }
  }
}

// What is absorbed decides the bits; projections may differ a little between targets.
TEST_P(LinearCodecContract, AbsorbsTheSameOnEverySimdTarget) {
  const auto step = [&](const Shape& shape, DType dtype, const std::vector<Floats>* given) {
    std::vector<Rank> ranks = make_ranks(shape, dtype, 2);
    set_gradients(ranks, dtype, Pattern::kNormal, 5);
    const std::vector<Floats> means = run(ranks, 5, given);
    const auto next = ranks[1].memory.next();
    const auto state = ranks[1].memory.next_state();
    Floats kept(next.begin(), next.end());
    kept.insert(kept.end(), state.begin(), state.end());
    return std::tuple(means, ranks[1].grad.bytes(), kept, ranks[1].sent);
  };
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const Shape& shape : {Shape{4099}, Shape{101, 103}, Shape{64, 304}}) {
      const auto [means, grad, residual, sent] = step(shape, dtype, nullptr);
      for_each_simd_target([&, &means = means, &grad = grad, &residual = residual, &sent = sent] {
        SCOPED_TRACE(text(shape) + " " + std::string(name(dtype)));
        const auto got = step(shape, dtype, &means);
        EXPECT_EQ(std::get<1>(got), grad);
        EXPECT_TRUE(same_bits(std::get<2>(got), residual));
        for (std::size_t round = 0; round < sent.size(); ++round) {
          const double bound = GetParam().tolerance * largest(sent[round]);
          for (std::size_t i = 0; i < sent[round].size(); ++i) {
            ASSERT_NEAR(std::get<3>(got)[round][i], sent[round][i], bound);
          }
        }
      });
    }
  }
}

// A step taken back leaves no trace: the same step again gives the same, as if it came first.
TEST_P(LinearCodecContract, RollbackForgetsTheStep) {
  for (const Shape& shape : {Shape{1009}, Shape{37, 41}}) {
    std::vector<Rank> ranks = make_ranks(shape, DType::kF32, 1);
    set_gradients(ranks, DType::kF32, Pattern::kNormal, 1);
    run(ranks, 1);
    ranks[0].memory.commit();
    const auto step = [&](Pattern pattern) {
      set_gradients(ranks, DType::kF32, pattern, 2);
      const std::vector<Floats> means = run(ranks, 2);
      const auto next = ranks[0].memory.next();
      return std::tuple(means, ranks[0].grad.values(), Floats(next.begin(), next.end()));
    };
    const auto expected = step(Pattern::kNormal);
    ranks[0].memory.rollback();
    step(Pattern::kSpike);
    ranks[0].memory.rollback();
    EXPECT_EQ(step(Pattern::kNormal), expected) << text(shape);
  }
}

TEST_P(LinearCodecContract, NonFiniteValuesReachEveryRankAndNoMemory) {
  for (const Shape& shape : {Shape{1009}, Shape{23, 44}}) {
    const std::int64_t n = product(shape);
    for (const std::uint64_t step : {std::uint64_t{4}, std::uint64_t{5}}) {
      for (const std::int64_t at : {std::int64_t{0}, n / 2, n - 1}) {
        std::vector<Rank> ranks = make_ranks(shape, DType::kF32, 3);
        set_gradients(ranks, DType::kF32, Pattern::kNormal, 7);
        ranks[1].grad.set(at, std::numeric_limits<float>::infinity());
        run(ranks, step);
        for (Rank& rank : ranks) {
          for (const float x : rank.grad.values()) ASSERT_TRUE(std::isnan(x)) << text(shape);
          EXPECT_FALSE(rank.memory.written());
        }
      }
    }
  }
}

TEST_P(LinearCodecContract, RefusesWrongUse) {
  const Shape shape = {10, 10};
  std::vector<Rank> ranks = make_ranks(shape, DType::kF32, 1);
  set_gradients(ranks, DType::kF32, Pattern::kNormal, 8);
  const Context ctx = context(0, 4);
  Floats out(static_cast<std::size_t>(codec_.round_elements(shape, 0, 4)));
  const LinearCodec::Tensor good = ranks[0].tensor();
  const auto refused = [&](int round, const LinearCodec::Tensor& tensor, std::span<float> values) {
    EXPECT_THROW(codec_.project(ctx, round, tensor, values), InvalidArgument);
    EXPECT_THROW(codec_.absorb(ctx, round, values, tensor), InvalidArgument);
  };
  refused(codec_.rounds(4), good, out);
  refused(-1, good, out);
  Floats longer(out.size() + 1);
  refused(0, good, longer);
  LinearCodec::Tensor tensor = good;
  const Shape other = {10, 11};
  tensor.shape = other;
  refused(0, tensor, out);
  tensor = good;
  Memory wrong(101);
  tensor.memory = &wrong;
  refused(0, tensor, out);
  if (!good.round_state.empty()) {
    tensor = good;
    tensor.round_state = good.round_state.first(good.round_state.size() - 1);
    refused(0, tensor, out);
  }
  EXPECT_EQ(make_codec(codec_.name()).spec, codec_.name());
  EXPECT_FALSE(ranks[0].memory.written());
}

INSTANTIATE_TEST_SUITE_P(Randmask, LinearCodecContract,
                         testing::Values(LinearCase{"randmask:0.01"}, LinearCase{"randmask:0.3"},
                                         LinearCase{"randmask:1"}));
// The contract's longest sums have some 4100 terms of which most cancel: 2^-15 of the largest.
INSTANTIATE_TEST_SUITE_P(LowRank, LinearCodecContract,
                         testing::Values(LinearCase{"powersgd:1", 0x1p-15},
                                         LinearCase{"powersgd:5", 0x1p-15},
                                         LinearCase{"powersgd:2,rounds=1", 0x1p-15},
                                         LinearCase{"galore:3,refresh=2", 0x1p-15}));
INSTANTIATE_TEST_SUITE_P(DctCols, LinearCodecContract,
                         testing::Values(LinearCase{"dctcols:1", 0x1p-16},
                                         LinearCase{"dctcols:20", 0x1p-16},
                                         LinearCase{"dctcols:3,refresh=3", 0x1p-16}));

TEST(Randmask, DrawsDistinctPositionsInOrderAndAllEquallyOften) {
  const std::int64_t n = 1000;
  for (const double density : {0.001, 0.01, 0.3, 0.999, 1.0}) {
    const std::int64_t count = randmask_count(density, n);
    EXPECT_EQ(count, static_cast<std::int64_t>(std::ceil(density * static_cast<double>(n))));
    std::vector<int> hits(static_cast<std::size_t>(n));
    const int steps = 4000;
    for (int step = 0; step < steps; ++step) {
      std::int64_t last = -1;
      std::int64_t calls = 0;
      const auto stream = random_stream(5, static_cast<std::uint64_t>(step), -1);
      for_each_position(stream, count, n, [&](std::int64_t i, std::int64_t position) {
        ASSERT_EQ(i, calls++);
        ASSERT_GT(position, last);
        ASSERT_LT(position, n);
        last = position;
        ++hits[static_cast<std::size_t>(position)];
      });
      ASSERT_EQ(calls, count);
    }
    // A range has floor or ceil of n / count elements: the share of an element is between the
    // two reciprocals, and six standard deviations of a binomial around them.
    const double width = static_cast<double>(n) / static_cast<double>(count);
    const double low = steps / std::ceil(width);
    const double high = steps / std::floor(width);
    for (const int h : hits) {
      ASSERT_GE(h, low - 6 * std::sqrt(low)) << density;
      ASSERT_LE(h, high + 6 * std::sqrt(high)) << density;
    }
  }
}

TEST(Randmask, PositionsOfAHugeTensorStayInside) {
  const std::int64_t n = (std::int64_t{1} << 40) + 12345;
  const std::int64_t count = 1 << 12;
  std::int64_t last = -1;
  for_each_position(random_stream(1, 2, -1), count, n, [&](std::int64_t, std::int64_t position) {
    ASSERT_GT(position, last);
    ASSERT_LT(position, n);
    last = position;
  });
  EXPECT_GT(last, n - n / count);
}

}  // namespace
}  // namespace thinwire
