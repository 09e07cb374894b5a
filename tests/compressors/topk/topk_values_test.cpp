#include "compressors/topk/topk_values.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

struct Coded {
  std::vector<float> decoded;
  std::vector<float> missing;
};

Coded code(TopKValues kind, std::vector<float> values) {
  const std::size_t count = values.size();
  std::vector<std::byte> bytes(topk_value_bytes(kind, count));
  write_topk_values(kind, least_magnitude(values), values, bytes);
  Coded coded{.decoded = std::vector<float>(count), .missing = values};
  for (std::size_t first = 0; first < count; first += kTopKBlock) {
    const auto block = std::span(coded.decoded).subspan(first, std::min(kTopKBlock, count - first));
    read_topk_values(kind, bytes, count, first, block);
  }
  return coded;
}

constexpr TopKValues kKinds[] = {TopKValues::kF32, TopKValues::kBF16, TopKValues::kQ8,
                                 TopKValues::kQ4,  TopKValues::kQ2,   TopKValues::kTernary};

TEST(TopKValues, DecodedAndMissingAddUpToTheValue) {
  std::mt19937_64 random(3);
  std::normal_distribution<float> normal;
  constexpr float kMax = std::numeric_limits<float>::max();
  constexpr float kTiny = std::numeric_limits<float>::denorm_min();
  for (const TopKValues kind : kKinds) {
    for (const std::size_t count : {1U, 2U, 255U, 256U, 257U, 1009U}) {
      for (const float spread : {0.0F, 1.0F, 8.0F}) {
        std::vector<float> values(count);
        for (float& v : values)
          v = std::copysign(std::exp(spread * normal(random)), normal(random));
        // The ends of what 8 bits may span, and of what floats can hold.
        values[count / 2] = kind == TopKValues::kQ8 ? -0x1p60F : -kMax;
        if (count > 2) values[0] = kind == TopKValues::kQ8 ? 0x1p-66F : kTiny;
        const Coded coded = code(kind, values);
        double missing = 0;
        double all = 0;
        for (std::size_t i = 0; i < count; ++i) {
          SCOPED_TRACE(testing::Message()
                       << "kind " << static_cast<int>(kind) << ", count " << count << ", " << i);
          ASSERT_TRUE(std::isfinite(coded.decoded[i]));
          ASSERT_EQ(coded.missing[i], values[i] - coded.decoded[i]);
          if (kind <= TopKValues::kQ8) {
            ASSERT_EQ(coded.decoded[i] + coded.missing[i], values[i]);
          }
          if (kind != TopKValues::kTernary) {
            ASSERT_LE(std::fabs(coded.missing[i]), std::fabs(values[i]));
          }
          missing += double{coded.missing[i]} * coded.missing[i];
          all += double{values[i]} * values[i];
        }
        EXPECT_LE(missing, all);
      }
    }
  }
}

TEST(TopKValues, EightBitsMissAtMostHalfAStep) {
  // The tail of a normal beyond 3.29 sigma: what density 0.001 keeps.
  std::mt19937_64 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> values;
  while (values.size() < 2000) {
    const float v = normal(random);
    if (std::fabs(v) > 3.29F) values.push_back(v);
  }
  const Coded coded = code(TopKValues::kQ8, values);
  double missing = 0;
  double total = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    missing += double{coded.missing[i]} * coded.missing[i];
    total += double{values[i]} * values[i];
    // 127 steps cover less than one octave above 3.29.
    EXPECT_LE(std::fabs(coded.missing[i]), 0.5F * 4.0F / 127 + 1e-6F);
  }
  EXPECT_LT(missing / total, 3e-6);
}

// What density 0.001 keeps of normal values, and of heavier tails.
TEST(TopKValues, FewBitsMissLittleOfATail) {
  std::mt19937_64 random(4);
  std::normal_distribution<float> normal;
  for (const bool heavy : {false, true}) {
    std::vector<float> values;
    while (values.size() < 2000) {
      const float v = normal(random);
      if (std::fabs(v) > 3.29F) values.push_back(heavy ? v * v * v : v);
    }
    const std::pair<TopKValues, double> most[] = {{TopKValues::kQ4, heavy ? 0.006 : 0.0008},
                                                  {TopKValues::kQ2, heavy ? 0.08 : 0.012},
                                                  {TopKValues::kTernary, heavy ? 0.15 : 0.012}};
    for (const auto& [kind, share] : most) {
      const Coded coded = code(kind, values);
      double missing = 0;
      double all = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        missing += double{coded.missing[i]} * coded.missing[i];
        all += double{values[i]} * values[i];
      }
      EXPECT_LT(missing / all, share) << static_cast<int>(kind) << (heavy ? " heavy" : "");
    }
  }
}

TEST(TopKValues, TernarySendsTheMeanMagnitude) {
  const Coded coded = code(TopKValues::kTernary, {1, -2, 3, -6});
  EXPECT_EQ(coded.decoded, (std::vector<float>{3, -3, 3, -3}));
  EXPECT_EQ(coded.missing, (std::vector<float>{-2, 1, 0, -3}));
}

TEST(TopKValues, EightBitsAreExactWhereAllMagnitudesAreEqual) {
  const Coded coded = code(TopKValues::kQ8, std::vector<float>(300, -0.1F));
  for (const float missing : coded.missing) EXPECT_EQ(missing, 0.0F);
}

TEST(TopKValues, AnOutlierDoesNotFlattenTheRest) {
  std::vector<float> values(256, 0.0F);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = 1.0F + 0.001F * static_cast<float>(i);
  values[17] = 1e6F;
  const Coded coded = code(TopKValues::kQ8, values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_LE(std::fabs(coded.missing[i]), 0.1F * values[i]) << i;
  }
}

TEST(TopKValues, NonfiniteBytesAreRefused) {
  for (const TopKValues kind : kKinds) {
    const std::vector<std::byte> bytes(topk_value_bytes(kind, 4), std::byte{0xFF});
    std::vector<float> out(4);
    EXPECT_THROW(read_topk_values(kind, bytes, 4, 0, out), CorruptPayload);
  }
}

}  // namespace
}  // namespace thinwire
