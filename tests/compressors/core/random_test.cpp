#include "compressors/core/random.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <set>
#include <utility>

#include "compressors/core/context.h"

namespace thinwire {
namespace {

// Known answers of Philox4x32-10 published with the paper (Random123, kat_vectors).
TEST(Random, MatchesThePublishedKnownAnswers) {
  EXPECT_EQ(random_block({.key = 0, .counter = 0}, 0),
            (std::array<std::uint32_t, 4>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(random_block({.key = ~0ULL, .counter = ~0ULL}, ~0ULL),
            (std::array<std::uint32_t, 4>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0
  EXPECT_EQ(
      random_block({.key = 0x299f31d0a4093822, .counter = 0x0370734413198a2e}, 0x85a308d3243f6a88),
      (std::array<std::uint32_t, 4>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Random, StreamsDifferByKeyStepAndSender) {
  std::set<std::array<std::uint32_t, 4>> blocks;
  for (const std::uint64_t key : {1, 2}) {
    for (const std::uint64_t step : {0, 1, 2}) {
      for (const std::int32_t sender : {-1, 0, 1}) {
        for (const std::uint64_t i : {0, 1}) {
          blocks.insert(random_block(random_stream(key, step, sender), i));
        }
      }
    }
  }
  EXPECT_EQ(blocks.size(), 2U * 3 * 3 * 2);
}

// Of n uniform draws the mean deviates by 1 / sqrt(12 n), a bit's share by 1 / (2 sqrt(n)), and so
// does the share of equal bits of two elements: all within 5 deviations.
TEST(Random, DitherIsUniformAndOfNoPattern) {
  constexpr std::uint32_t kElements = 1 << 20;
  const double deviations = 5 / std::sqrt(double{kElements});
  for (const std::uint64_t step : {0, 1, 1000}) {
    const Dither dither = make_dither(7, step, 3);
    const Dither other = make_dither(7, step + 1, 3);
    double sum = 0;
    std::array<double, 16> ones{};
    std::array<double, 16> repeated{};  // by the element 16 further on, of the same word
    std::array<double, 16> next{};
    std::array<double, 16> of_other{};
    for (std::uint32_t i = 0; i < kElements; ++i) {
      const std::uint32_t bits = dither_bits(dither, i);
      ASSERT_LT(bits, 1U << 16);
      sum += bits / 65536.0;
      const auto count = [&](std::uint32_t word, std::array<double, 16>& counts) {
        for (std::size_t b = 0; b < 16; ++b) counts[b] += word >> b & 1;
      };
      count(bits, ones);
      count(~(bits ^ dither_bits(dither, i + 16)), repeated);
      count(~(bits ^ dither_bits(dither, i + 1)), next);
      count(~(bits ^ dither_bits(other, i)), of_other);
    }
    EXPECT_NEAR(sum / kElements, 0.5 - 0.5 / 65536, deviations / std::sqrt(12));
    for (const auto& counts : {ones, repeated, next, of_other}) {
      for (const double count : counts) EXPECT_NEAR(count / kElements, 0.5, deviations / 2);
    }
  }
}

TEST(Random, DitherDiffersByKeyStepAndSenderAndFromTheStream) {
  std::set<std::pair<std::uint32_t, std::uint32_t>> keys;
  for (const std::uint64_t key : {1, 2}) {
    for (const std::uint64_t step : {0, 1, 2}) {
      for (const std::int32_t sender : {-1, 0, 1}) {
        const Dither dither = make_dither(key, step, sender);
        keys.insert({dither.first, dither.second});
        EXPECT_NE(dither.first, random_block(random_stream(key, step, sender), 0)[0]);
      }
    }
  }
  EXPECT_EQ(keys.size(), 2U * 3 * 3);
}

TEST(Key, HashDependsOnEveryFieldAndOnWhereTheTextsPart) {
  const Key base{.stream = "grad", .parameter = "w", .begin = 0, .end = 10};
  EXPECT_EQ(base.hash(), (Key{"grad", "w", 0, 10}.hash()));
  const std::set<std::uint64_t> hashes = {
      base.hash(),
      Key{"outer", "w", 0, 10}.hash(),
      Key{"grad", "x", 0, 10}.hash(),
      Key{"grad", "w", 1, 10}.hash(),
      Key{"grad", "w", 0, 11}.hash(),
      Key{"gradw", "", 0, 10}.hash(),
      Key{"", "gradw", 0, 10}.hash(),
      Key{"gra", "dw", 0, 10}.hash(),
  };
  EXPECT_EQ(hashes.size(), 8U);
}

}  // namespace
}  // namespace thinwire
