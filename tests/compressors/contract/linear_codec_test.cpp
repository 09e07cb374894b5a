// The contract of LinearCodec: every spec of a linear family runs through the same laws, with P
// ranks played one after the other and the transport's mean computed here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "compressors/core/codec.h"
#include "compressors/core/convert.h"
#include "compressors/core/spec.h"
#include "compressors/randmask/randmask_kernels.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;

struct Rank {
  Rank(DType dtype, const Floats& values, const MemoryOptions& options)
      : grad(dtype, values, 1), memory(static_cast<std::int64_t>(values.size()), options) {
    memory.restore(make_values(Pattern::kNormal, memory.elements(), 31 + values.size()));
    v = grad.values();
    for (std::size_t i = 0; i < v.size(); ++i) v[i] += memory.decay() * memory.current()[i];
  }
  Array grad;
  Memory memory;
  Floats v;
  Floats sent;
};

class LinearCodecContract : public testing::TestWithParam<std::string> {
 protected:
  Context context(int sender) const { return {.step = 4, .sender = sender, .key_hash = 99}; }

  // One step of all ranks with the mean over them; fills each rank's `sent`.
  Floats run(std::vector<Rank>& ranks, std::int64_t n) const {
    const std::int64_t shape[] = {n};
    const auto elements = static_cast<std::size_t>(codec_.round_elements(shape, 0));
    Floats mean(elements);
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      ranks[r].sent.assign(elements, std::numeric_limits<float>::quiet_NaN());
      codec_.project(context(static_cast<int>(r)), 0, tensor(ranks[r], shape), ranks[r].sent);
      for (std::size_t i = 0; i < elements; ++i) mean[i] += ranks[r].sent[i];
    }
    for (float& x : mean) x /= static_cast<float>(ranks.size());
    for (std::size_t r = 0; r < ranks.size(); ++r) {
      codec_.absorb(context(static_cast<int>(r)), 0, mean, tensor(ranks[r], shape));
      EXPECT_TRUE(ranks[r].grad.guards_intact());
    }
    return mean;
  }

  static LinearCodec::Tensor tensor(Rank& rank, std::span<const std::int64_t> shape) {
    return {.grad = rank.grad.view(), .shape = shape, .memory = &rank.memory, .round_state = {}};
  }

  const Codec made_ = make_codec(GetParam());
  const LinearCodec& codec_ = *made_.linear;
};

constexpr std::int64_t kSizes[] = {0, 1, 2, 3, 63, 64, 65, 1009, 4099};

// residual = v - M^, one rounding; summed over ranks: mean v = M^ + mean residual.
TEST_P(LinearCodecContract, NothingIsLostOverAllRanks) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kZero}) {
      for (const std::int64_t n : kSizes) {
        for (const std::size_t world : {std::size_t{1}, std::size_t{4}}) {
          SCOPED_TRACE(testing::Message()
                       << name(pattern) << " n=" << n << " " << name(dtype) << " ranks=" << world);
          std::vector<Rank> ranks;
          for (std::size_t r = 0; r < world; ++r) {
            ranks.emplace_back(dtype, make_values(pattern, n, 40 + r),
                               MemoryOptions{.transactional = r % 2 == 0, .decay = 0.5F});
          }
          run(ranks, n);
          const Floats mean = ranks[0].grad.values();
          for (Rank& rank : ranks) {
            ASSERT_EQ(rank.grad.bytes(), ranks[0].grad.bytes()) << "replicas differ";
            const auto residual = rank.memory.next();
            for (std::size_t i = 0; i < mean.size(); ++i) {
              ASSERT_EQ(residual[i], rank.v[i] - mean[i]) << "element " << i;
            }
          }
          for (std::size_t i = 0; i < mean.size(); ++i) {
            double lost = -static_cast<double>(mean[i]);
            double size = std::fabs(static_cast<double>(mean[i]));
            for (Rank& rank : ranks) {
              const auto p = static_cast<double>(world);
              lost +=
                  (static_cast<double>(rank.v[i]) - static_cast<double>(rank.memory.next()[i])) / p;
              size += std::fabs(static_cast<double>(rank.v[i]));
            }
            ASSERT_NEAR(lost, 0, 0x1p-23 * size) << "element " << i;
          }
        }
      }
    }
  }
}

TEST_P(LinearCodecContract, ProjectionIsLinearAndTheSameForAllSenders) {
  const std::int64_t n = 4099;
  const std::int64_t shape[] = {n};
  const auto elements = static_cast<std::size_t>(codec_.round_elements(shape, 0));
  const auto project = [&](const Floats& values, int sender) {
    Array grad(DType::kF32, values);
    Floats out(elements);
    codec_.project(context(sender), 0, {.grad = grad.view(), .shape = shape, .round_state = {}},
                   out);
    return out;
  };
  const Floats a = make_values(Pattern::kNormal, n, 50);
  const Floats b = make_values(Pattern::kSparse, n, 51);
  Floats both(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) both[i] = 2 * a[i] + b[i];
  const Floats pa = project(a, 0);
  const Floats pb = project(b, 1);
  const Floats sum = project(both, 2);
  EXPECT_EQ(pa, project(a, 3));
  for (std::size_t i = 0; i < elements; ++i) ASSERT_EQ(sum[i], 2 * pa[i] + pb[i]) << i;
}

TEST_P(LinearCodecContract, IsTheSameOnEverySimdTarget) {
  const std::int64_t n = 4099;
  const auto step = [&] {
    std::vector<Rank> ranks;
    ranks.emplace_back(DType::kBF16, make_values(Pattern::kNormal, n, 60), MemoryOptions{});
    ranks.emplace_back(DType::kBF16, make_values(Pattern::kSpike, n, 61), MemoryOptions{});
    const Floats mean = run(ranks, n);
    const auto next = ranks[1].memory.next();
    return std::tuple(mean, ranks[1].grad.bytes(), Floats(next.begin(), next.end()));
  };
  const auto expected = step();
  for_each_simd_target([&] { EXPECT_EQ(step(), expected); });
}

TEST_P(LinearCodecContract, NonFiniteValuesReachEveryRankAndNoMemory) {
  const std::int64_t n = 1009;
  for (const std::int64_t at : {std::int64_t{0}, n / 2, n - 1}) {
    std::vector<Rank> ranks;
    for (std::size_t r = 0; r < 3; ++r) {
      ranks.emplace_back(DType::kF32, make_values(Pattern::kNormal, n, 70 + r),
                         MemoryOptions{.transactional = r != 1});
    }
    ranks[1].grad.set(at, std::numeric_limits<float>::infinity());
    run(ranks, n);
    for (Rank& rank : ranks) {
      for (const float x : rank.grad.values()) ASSERT_TRUE(std::isnan(x));
      EXPECT_FALSE(rank.memory.written());
    }
  }
}

TEST_P(LinearCodecContract, RefusesWrongUse) {
  const std::int64_t n = 100;
  const std::int64_t shape[] = {n};
  const std::int64_t other[] = {n + 1};
  Rank rank(DType::kF32, make_values(Pattern::kNormal, n, 80), {});
  Floats out(static_cast<std::size_t>(codec_.round_elements(shape, 0)));
  EXPECT_THROW(codec_.project({}, 1, tensor(rank, shape), out), InvalidArgument);
  EXPECT_THROW(codec_.project({}, 0, tensor(rank, other), out), InvalidArgument);
  EXPECT_THROW(codec_.absorb({}, 0, std::span(out).first(out.size() - 1), tensor(rank, shape)),
               InvalidArgument);
  Memory wrong(n + 1);
  EXPECT_THROW(
      codec_.project(
          {}, 0, {.grad = rank.grad.view(), .shape = shape, .memory = &wrong, .round_state = {}},
          out),
      InvalidArgument);
  EXPECT_EQ(make_codec(codec_.name()).spec, made_.spec);
}

INSTANTIATE_TEST_SUITE_P(Randmask, LinearCodecContract,
                         testing::Values("randmask:0.01", "randmask:0.3", "randmask:1"));

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
