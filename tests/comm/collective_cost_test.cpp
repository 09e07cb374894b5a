#include "comm/collective_cost.h"

#include <gtest/gtest.h>

#include <array>

namespace thinwire {
namespace {

using Cost = double (*)(const Link&, int, double);
constexpr std::array<Cost, 7> kCosts = {allgather_seconds, alltoall_seconds, ring_allreduce_seconds,
                                        dense_seconds,     sparse_seconds,   requantising_seconds,
                                        linear_seconds};

constexpr Link kLink = {.latency_seconds = 10e-6, .bytes_per_second = 1e9};

TEST(CollectiveCost, IsNothingForOneRank) {
  for (const Cost cost : kCosts) EXPECT_EQ(cost(kLink, 1, 1e6), 0);
}

TEST(CollectiveCost, GrowsWithRanksBytesLatencyAndFallsWithSpeed) {
  for (const Cost cost : kCosts) {
    for (const int ranks : {2, 3, 7, 8, 1023, 1024}) {
      for (const double bytes : {0.0, 1.0, 1e4, 1e9}) {
        const double here = cost(kLink, ranks, bytes);
        EXPECT_GT(here, 0);
        EXPECT_LT(here, cost(kLink, ranks + 1, bytes));
        EXPECT_LT(here, cost(kLink, ranks, bytes + 1e5));
        EXPECT_LT(here, cost({2 * kLink.latency_seconds, 1e9}, ranks, bytes));
        EXPECT_LE(cost({kLink.latency_seconds, 2e9}, ranks, bytes), here);
      }
    }
  }
}

// Without latency a ring allreduce never takes longer than twice the whole, an allgather grows with
// P, and with latency alone all go by their number of messages.
TEST(CollectiveCost, HasTheLimitsOfItsAlgorithms) {
  const Link wide = {.latency_seconds = 0, .bytes_per_second = 1e9};
  const Link slow = {.latency_seconds = 1, .bytes_per_second = 1e30};
  for (const int ranks : {2, 16, 1024}) {
    const double p = ranks;
    EXPECT_NEAR(dense_seconds(wide, ranks, 1e9), 2 * (p - 1) / p, 1e-9);
    EXPECT_NEAR(sparse_seconds(wide, ranks, 1e6), (p - 1) * 1e-3, 1e-9);
    EXPECT_NEAR(requantising_seconds(wide, ranks, 1e9 / p), 2 * (p - 1) / p, 1e-9);
    EXPECT_NEAR(sparse_seconds(slow, ranks, 1e6), p - 1, 1e-9);
    EXPECT_NEAR(requantising_seconds(slow, ranks, 1e6), 2 * (p - 1), 1e-9);
    EXPECT_NEAR(linear_seconds(slow, ranks, 1e6), 2 * (p - 1), 1e-9);
  }
}

// An allgather of m bytes and a split-reduce of m / P to each owner take equally long where
// (P - 1) (l + m / s) = 2 (P - 1) (l + m / (P s)): at m = l s P / (P - 2).
TEST(CollectiveCost, AllgatherAndSplitReduceCrossWhereTheirBytesOutweighTheLatency) {
  for (const int ranks : {3, 4, 16, 1024}) {
    const double p = ranks;
    const double crossing = kLink.latency_seconds * kLink.bytes_per_second * p / (p - 2);
    for (const double factor : {0.5, 0.99, 1.01, 2.0}) {
      const double bytes = factor * crossing;
      EXPECT_EQ(requantising_seconds(kLink, ranks, bytes / p) < sparse_seconds(kLink, ranks, bytes),
                factor > 1)
          << ranks << " ranks, " << bytes << " bytes";
    }
  }
  // With two ranks never.
  EXPECT_GT(requantising_seconds(kLink, 2, 0.5e9), sparse_seconds(kLink, 2, 1e9));
}

}  // namespace
}  // namespace thinwire
