#include "compressors/topk/topk_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

std::vector<std::uint32_t> draw(std::int64_t n, std::int64_t count, std::mt19937_64& random) {
  std::vector<std::uint32_t> indices;
  std::int64_t left = count;
  for (std::int64_t i = 0; i < n && left > 0; ++i) {
    if (static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(n - i)) < left) {
      indices.push_back(static_cast<std::uint32_t>(i));
      --left;
    }
  }
  return indices;
}

std::vector<std::byte> write(const TopKIndexPlan& plan, std::int64_t n,
                             std::span<const std::uint32_t> indices) {
  constexpr auto kGuard = std::byte{0xA5};
  std::vector<std::byte> bytes(plan.worst_bytes + 16, kGuard);
  const std::size_t used =
      write_topk_indices(plan, n, indices, std::span(bytes).first(plan.worst_bytes));
  EXPECT_LE(used, plan.worst_bytes);
  EXPECT_TRUE(std::all_of(bytes.begin() + static_cast<std::ptrdiff_t>(used), bytes.end(),
                          [=](std::byte b) { return b == kGuard; }));
  // An exact copy: reads beyond it are caught by the sanitizer.
  return {bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(used)};
}

std::vector<std::uint32_t> read(const TopKIndexPlan& plan, std::int64_t n, std::int64_t count,
                                std::span<const std::byte> bytes, std::size_t batch) {
  TopKIndexReader reader(plan.bitmap, plan.parameter, n, count, bytes);
  std::vector<std::uint32_t> indices;
  std::vector<std::uint32_t> some(batch);
  while (const std::size_t got = reader.next(some)) {
    indices.insert(indices.end(), some.begin(), some.begin() + static_cast<std::ptrdiff_t>(got));
  }
  return indices;
}

struct Size {
  std::int64_t n;
  std::int64_t count;
};

class TopKIndexSizes : public testing::TestWithParam<Size> {};

TEST_P(TopKIndexSizes, RoundTripsSpreadAndClusteredSelections) {
  const auto [n, count] = GetParam();
  SCOPED_TRACE(testing::Message() << "n = " << n << ", count = " << count);
  std::mt19937_64 random(static_cast<std::uint64_t>(n * 31 + count));
  const TopKIndexPlan plan = plan_topk_indices(n, count);
  std::vector<std::vector<std::uint32_t>> selections = {draw(n, count, random)};
  std::vector<std::uint32_t> first(static_cast<std::size_t>(count));
  std::iota(first.begin(), first.end(), 0U);
  selections.push_back(first);
  // All but one at the end: one gap as long as gaps get.
  std::vector<std::uint32_t> last = first;
  for (std::size_t i = 1; i < last.size(); ++i) {
    last[i] += static_cast<std::uint32_t>(n - count);
  }
  selections.push_back(last);
  for (const auto& indices : selections) {
    const std::vector<std::byte> bytes = write(plan, n, indices);
    for (const std::size_t batch : {std::size_t{1}, std::size_t{7}, std::size_t{256}}) {
      EXPECT_EQ(read(plan, n, count, bytes, batch), indices);
    }
    for (std::size_t cut = 0; cut < std::min<std::size_t>(bytes.size(), 50); ++cut) {
      EXPECT_THROW(read(plan, n, count, std::span(bytes).first(cut), 64), CorruptPayload);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, TopKIndexSizes,
                         testing::Values(Size{1, 1}, Size{2, 1}, Size{2, 2}, Size{7, 3}, Size{8, 8},
                                         Size{9, 4}, Size{63, 1}, Size{64, 32}, Size{65, 64},
                                         Size{1009, 10}, Size{1009, 500}, Size{1009, 1009},
                                         Size{65537, 1}, Size{65537, 66}, Size{65537, 30000},
                                         Size{1000003, 1000}));

TEST(TopKIndex, SpansTheWholeRangeOf32Bits) {
  constexpr std::int64_t kElements = (std::int64_t{1} << 32) - 1;
  const std::vector<std::uint32_t> indices = {0, 1, 0x7FFFFFFF, 0xFFFFFFFE};
  const TopKIndexPlan plan = plan_topk_indices(kElements, 4);
  EXPECT_EQ(read(plan, kElements, 4, write(plan, kElements, indices), 3), indices);
}

TEST(TopKIndex, WorstCaseNeverFallsWithTheCount) {
  for (const std::int64_t n : {1, 2, 100, 1009, 65536}) {
    std::size_t before = 0;
    for (std::int64_t count = 0; count <= n; count += 1 + n / 500) {
      const std::size_t bytes = plan_topk_indices(n, count).worst_bytes;
      EXPECT_GE(bytes, before) << "n = " << n << ", count = " << count;
      before = bytes;
    }
  }
}

TEST(TopKIndex, DenseSelectionsCostABitAPosition) {
  EXPECT_TRUE(plan_topk_indices(10000, 5000).bitmap);
  EXPECT_EQ(plan_topk_indices(10000, 5000).worst_bytes, 1250U);
}

TEST(TopKIndex, SparseSelectionsCostTwelveBits) {
  const TopKIndexPlan plan = plan_topk_indices(10'000'000, 10'000);
  EXPECT_FALSE(plan.bitmap);
  EXPECT_LE(static_cast<double>(plan.worst_bytes) * 8 / 10'000, 12.0);
}

TEST(TopKIndex, RefusesWhatNoWriterWrote) {
  const std::vector<std::byte> zeros(64, std::byte{0});
  const std::vector<std::byte> ones(64, std::byte{0xFF});
  const TopKIndexPlan gaps{.bitmap = false, .parameter = 3, .worst_bytes = 64};
  const TopKIndexPlan bits{.bitmap = true, .parameter = 0, .worst_bytes = 64};
  EXPECT_THROW(read(gaps, 1000, 5, zeros, 8), CorruptPayload) << "a gap without an end";
  EXPECT_THROW(read(gaps, 10, 5, ones, 8), CorruptPayload) << "indices beyond n";
  EXPECT_THROW(read(gaps, 4, 5, ones, 8), CorruptPayload) << "more entries than elements";
  EXPECT_THROW(read({.parameter = 32}, 1000, 5, ones, 8), CorruptPayload) << "parameter";
  EXPECT_THROW(read(bits, 512, 5, zeros, 8), CorruptPayload) << "too few bits";
  EXPECT_THROW(read(bits, 512, 5, ones, 8), CorruptPayload) << "too many bits";
  EXPECT_THROW(read(bits, 509, 512, ones, 8), CorruptPayload) << "bits beyond n";
}

TEST(TopKIndex, AnyBytesGiveAscendingIndicesOrAnError) {
  std::mt19937_64 random(5);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::byte> bytes(random() % 80);
    const std::uint64_t thin = random() % 3;  // fewer ones: longer gaps
    for (std::byte& b : bytes) {
      b = static_cast<std::byte>(random() & (thin > 0 ? random() : 255) &
                                 (thin > 1 ? random() : 255));
    }
    const std::int64_t n = 1 + static_cast<std::int64_t>(random() % 3000);
    const auto count = static_cast<std::int64_t>(random() % 40);
    const TopKIndexPlan plan{.bitmap = random() % 4 == 0,
                             .parameter = static_cast<int>(random() % 34)};
    try {
      const auto indices = read(plan, n, count, bytes, 16);
      ASSERT_EQ(indices.size(), static_cast<std::size_t>(count));
      ASSERT_TRUE(std::is_sorted(indices.begin(), indices.end(), std::less_equal<>()));
      ASSERT_TRUE(indices.empty() || indices.back() < n);
      ++accepted;
    } catch (const CorruptPayload&) {
    }
  }
  EXPECT_GT(accepted, 0);
}

}  // namespace
}  // namespace thinwire
