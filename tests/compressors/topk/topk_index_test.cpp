#include "compressors/topk/topk_index.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
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

std::vector<std::byte> write(const TopKIndexCoding& coding, std::int64_t n,
                             std::span<const std::uint32_t> indices) {
  constexpr auto kGuard = std::byte{0xA5};
  std::vector<std::byte> bytes(coding.bytes() + 16, kGuard);
  write_topk_indices(coding, n, indices, std::span(bytes).first(coding.bytes()));
  const auto end = bytes.begin() + static_cast<std::ptrdiff_t>(coding.bytes());
  EXPECT_TRUE(std::all_of(end, bytes.end(), [=](std::byte b) { return b == kGuard; }));
  // An exact copy: reads beyond it are caught by the sanitizer.
  return {bytes.begin(), end};
}

std::vector<std::uint32_t> read(const TopKIndexCoding& coding, std::int64_t n, std::int64_t count,
                                std::span<const std::byte> bytes, std::size_t batch) {
  TopKIndexReader reader(coding.bitmap, coding.parameter, n, count, bytes);
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
    const TopKIndexCoding coding = choose_topk_coding(n, indices);
    EXPECT_LE(coding.bits, static_cast<std::uint64_t>(n));
    const std::vector<std::byte> bytes = write(coding, n, indices);
    for (const std::size_t batch : {std::size_t{1}, std::size_t{7}, std::size_t{256}}) {
      EXPECT_EQ(read(coding, n, count, bytes, batch), indices);
    }
    for (std::size_t cut = 0; cut < std::min<std::size_t>(bytes.size(), 50); ++cut) {
      EXPECT_THROW(read(coding, n, count, std::span(bytes).first(cut), 64), CorruptPayload);
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
  for (int b : {choose_topk_coding(kElements, indices).parameter, 28, 31}) {
    const TopKIndexCoding coding{.parameter = b, .bits = 4 * 32 + 64};
    EXPECT_EQ(read(coding, kElements, 4, write(coding, kElements, indices), 3), indices);
  }
}

TEST(TopKIndex, TheChosenCodingIsTheShortest) {
  std::mt19937_64 random(8);
  for (const auto& [n, count] : {Size{1000, 3}, Size{1000, 400}, Size{65537, 66}, Size{9, 4}}) {
    for (const std::uint32_t spread : {1U, 3U}) {
      auto indices = draw(n, count, random);
      for (std::uint32_t& index : indices) index = index / spread + (spread - 1) * 3;
      indices.erase(std::unique(indices.begin(), indices.end()), indices.end());
      const TopKIndexCoding chosen = choose_topk_coding(n, indices);
      std::uint64_t least = static_cast<std::uint64_t>(n);
      for (int b = 0; b < 32; ++b) {
        std::uint64_t bits = 0;
        std::uint64_t lowest = 0;
        for (const std::uint32_t index : indices) {
          const std::uint64_t quotient = (index - lowest) >> b;
          bits += quotient < 24 ? quotient + static_cast<std::uint64_t>(b) + 1 : 57;
          lowest = std::uint64_t{index} + 1;
        }
        least = std::min(least, bits);
      }
      EXPECT_EQ(chosen.bits, least) << "n = " << n << ", count = " << count;
    }
  }
}

// The plan is six standard deviations above the mean of independent positions.
TEST(TopKIndex, IndependentPositionsFitTheirPlan) {
  std::mt19937_64 random(9);
  for (const auto& [n, count] : {Size{1009, 1}, Size{1009, 10}, Size{1009, 500}, Size{65537, 66},
                                 Size{65537, 30000}, Size{1000003, 1000}}) {
    for (int round = 0; round < 20; ++round) {
      EXPECT_LE(choose_topk_coding(n, draw(n, count, random)).bytes(), plan_topk_indices(n, count))
          << "n = " << n << ", count = " << count;
    }
  }
}

// With 2^b the power of two below n, quotients add up to less than 2: gaps take one bit more than
// raw indices at most, and need no third coding beside them for the fewest entries.
TEST(TopKIndex, RawIndicesWouldSaveABitATensorAtMost) {
  std::mt19937_64 random(12);
  for (const std::int64_t n : {2, 3, 8, 9, 100, 256, 257, 4096, 36864, 65536, 65537, 2359296}) {
    for (std::int64_t count = 1; count <= std::min<std::int64_t>(n, 12); ++count) {
      for (int round = 0; round < 20; ++round) {
        auto indices = draw(n, count, random);
        if (round == 0) {  // as late as can be
          std::iota(indices.begin(), indices.end(), static_cast<std::uint32_t>(n - count));
        }
        const auto raw =
            static_cast<std::uint64_t>(count) *
            static_cast<std::uint64_t>(std::bit_width(static_cast<std::uint64_t>(n - 1)));
        EXPECT_LE(choose_topk_coding(n, indices).bits, raw + 1) << n << ", " << count;
      }
    }
  }
}

TEST(TopKIndex, DenseSelectionsCostABitAPosition) {
  EXPECT_EQ(plan_topk_indices(10000, 5000), 1250U);
  EXPECT_EQ(plan_topk_indices(10000, 10000), 1250U);
  std::mt19937_64 random(10);
  EXPECT_TRUE(choose_topk_coding(10000, draw(10000, 5000, random)).bitmap);
}

TEST(TopKIndex, ClusteredSelectionsCostLess) {
  std::vector<std::uint32_t> rows(1000);  // ten rows of which every fourth element is there
  for (std::uint32_t i = 0; i < 1000; ++i) rows[i] = i / 100 * 100000 + i % 100 * 4;
  EXPECT_LT(choose_topk_coding(1'000'000, rows).bits, 4U * 1000);
}

// Entropy of 10,000 of ten million: 11.4 bits each.
TEST(TopKIndex, SparseSelectionsCostLessThanTwelveBits) {
  EXPECT_LE(static_cast<double>(plan_topk_indices(10'000'000, 10'000)) * 8 / 10'000, 11.65);
}

TEST(TopKIndex, RefusesWhatNoWriterWrote) {
  const std::vector<std::byte> zeros(64, std::byte{0});
  const std::vector<std::byte> ones(64, std::byte{0xFF});
  const TopKIndexCoding gaps{.bitmap = false, .parameter = 3};
  const TopKIndexCoding bits{.bitmap = true, .parameter = 0};
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
    const TopKIndexCoding coding{.bitmap = random() % 4 == 0,
                                 .parameter = static_cast<int>(random() % 34)};
    try {
      const auto indices = read(coding, n, count, bytes, 16);
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
