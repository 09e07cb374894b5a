#include "compressors/core/packed_residual.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "compressors/core/convert.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;

constexpr ResidualStorage kStorages[] = {ResidualStorage::kBF16, ResidualStorage::kQ8};
constexpr Dither kDither = {.first = 0x1234, .second = 0xFEDC5678};
constexpr std::int64_t kSizes[] = {0, 1, 31, 32, 33, 127, 128, 129, 1000, 4099};

Floats kept(ResidualStorage storage, const Floats& values, const Dither* dither) {
  PackedResidual packed(storage, static_cast<std::int64_t>(values.size()));
  packed.write(values, dither);
  Floats read(values.size(), 99.0F);
  packed.read(read);
  return read;
}

// The distance of the two values that x lies between: of its bfloat16 binade, or of its block.
Floats steps(ResidualStorage storage, const Floats& values) {
  Floats result(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    float reference = std::fabs(values[i]);
    if (storage == ResidualStorage::kQ8) {
      for (std::size_t j = i / 32 * 32; j < std::min(i / 32 * 32 + 32, values.size()); ++j) {
        reference = std::max(reference, std::fabs(values[j]));
      }
    }
    int exponent = 0;
    const float mantissa = std::frexp(reference, &exponent);  // in [0.5, 1)
    if (storage == ResidualStorage::kBF16) {
      result[i] = std::ldexp(1.0F, std::max(exponent - 8, -133));
    } else {
      result[i] =
          std::ldexp(1.0F, std::clamp(exponent - (mantissa > 127.0F / 128 ? 6 : 7), -126, 121));
    }
  }
  return result;
}

// The rounding of one element by 16 random bits, as packed_residual_kernels.h says.
float rounded(ResidualStorage storage, float x, float step, std::uint32_t noise) {
  if (storage == ResidualStorage::kQ8) {
    return std::floor(std::clamp(x / step, -127.0F, 127.0F) +
                      static_cast<float>(noise) * 0x1p-16F) *
           step;
  }
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sum = std::min((bits & 0x7FFFFFFFU) + noise, 0x7F7F0000U);
  return std::bit_cast<float>((sum | (bits & 0x80000000U)) & 0xFFFF0000U);
}

TEST(PackedResidual, RoundsAsTheReferenceDoesOnEveryTarget) {
  for (const ResidualStorage storage : kStorages) {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : kSizes) {
        SCOPED_TRACE(testing::Message()
                     << static_cast<int>(storage) << " " << name(pattern) << " " << n);
        const Floats values = make_values(pattern, n, 3);
        const Floats step = steps(storage, values);
        Floats expected(values.size());
        for (std::size_t i = 0; i < values.size(); ++i) {
          const std::uint32_t noise = dither_bits(kDither, static_cast<std::uint32_t>(i));
          expected[i] = rounded(storage, values[i], step[i], noise);
          if (storage == ResidualStorage::kBF16) {
            ASSERT_EQ(to_float(dithered_bf16(values[i], noise)), expected[i]);
          }
        }
        for_each_simd_target([&] { EXPECT_EQ(kept(storage, values, &kDither), expected); });
      }
    }
  }
}

TEST(PackedResidual, IsWithinAStepAndKeepsWhatItOnceKept) {
  for (const ResidualStorage storage : kStorages) {
    for (const Pattern pattern : kPatterns) {
      SCOPED_TRACE(testing::Message() << static_cast<int>(storage) << " " << name(pattern));
      const Floats values = make_values(pattern, 4099, 7);
      const Floats step = steps(storage, values);
      for (const Dither* dither : {static_cast<const Dither*>(nullptr), &kDither}) {
        const Floats once = kept(storage, values, dither);
        for (std::size_t i = 0; i < values.size(); ++i) {
          const double bound = dither == nullptr ? 0.5 : 1.0;
          const double error = std::fabs(static_cast<double>(once[i]) - values[i]);
          const bool largest = std::fabs(values[i]) > 0x1.FCp127F;  // the last step is cut off
          ASSERT_LE(error, (largest ? 1.0 : bound) * step[i]) << i << ": " << values[i];
          ASSERT_TRUE(std::isfinite(once[i]));
        }
        ASSERT_EQ(kept(storage, once, nullptr), once);
      }
    }
  }
}

// The mean over T streams of a value between two steps is that value: each draw has variance at
// most step^2 / 4, so the mean is within 5 sigma = 5 step / (2 sqrt(T)).
TEST(PackedResidual, RoundingIsUnbiased) {
  constexpr int kDraws = 4000;
  Floats values = make_values(Pattern::kNormal, 256, 11);
  for (const ResidualStorage storage : kStorages) {
    std::vector<double> mean(values.size());
    for (int draw = 0; draw < kDraws; ++draw) {
      const Dither dither = make_dither(static_cast<std::uint64_t>(draw), 1, 0);
      const Floats read = kept(storage, values, &dither);
      for (std::size_t i = 0; i < values.size(); ++i) mean[i] += read[i] / double{kDraws};
    }
    const Floats step = steps(storage, values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_NEAR(mean[i], values[i], 5 * step[i] / (2 * std::sqrt(kDraws))) << i;
    }
  }
}

TEST(PackedResidual, TakesTheBytesItSays) {
  EXPECT_EQ(PackedResidual(ResidualStorage::kBF16, 1 << 20).bytes(), 2U << 20);
  EXPECT_EQ(PackedResidual(ResidualStorage::kQ8, 1 << 20).bytes(), (33U << 20) / 32);
  EXPECT_EQ(PackedResidual().bytes(), 0U);
}

}  // namespace
}  // namespace thinwire
