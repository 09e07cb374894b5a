#include "compressors/core/dtype.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

#include "compressors/core/convert.h"

namespace thinwire {
namespace {

TEST(Convert, EveryHalfReadsAsItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const FP16 half{static_cast<std::uint16_t>(bits)};
    const float value = to_float(half);
    const auto exponent = static_cast<int>(bits >> 10 & 31);
    const auto mantissa = static_cast<int>(bits & 0x3FF);
    if (exponent == 31 && mantissa != 0) {
      EXPECT_TRUE(std::isnan(value)) << bits;
      EXPECT_TRUE(std::isnan(to_float(to_fp16(value)))) << bits;
      continue;
    }
    float expected = std::ldexp(static_cast<float>(mantissa + (exponent == 0 ? 0 : 1024)),
                                (exponent == 0 ? 1 : exponent) - 25);
    if (exponent == 31) expected = std::numeric_limits<float>::infinity();
    EXPECT_EQ(value, (bits & 0x8000) != 0 ? -expected : expected) << bits;
    EXPECT_EQ(to_fp16(value).bits, bits);
  }
}

TEST(Convert, EveryBF16ReadsAsItsValueAndComesBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = to_float(BF16{static_cast<std::uint16_t>(bits)});
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(to_float(to_bf16(value)))) << bits;
    } else {
      EXPECT_EQ(to_bf16(value).bits, bits);
    }
  }
}

// Between two neighbours the middle goes to the even one, and everything else to the nearer.
template <typename Half, typename To>
void expect_nearest_even(To to, std::uint16_t first, std::uint16_t last) {
  for (std::uint32_t bits = first; bits < last; ++bits) {
    const Half low{static_cast<std::uint16_t>(bits)};
    const Half high{static_cast<std::uint16_t>(bits + 1)};
    const float middle = 0.5F * to_float(low) + 0.5F * to_float(high);
    const std::uint16_t even = bits % 2 == 0 ? low.bits : high.bits;
    EXPECT_EQ(to(middle).bits, even) << bits;
    EXPECT_EQ(to(std::nextafter(middle, 0.0F)).bits, low.bits) << bits;
    EXPECT_EQ(to(std::nextafter(middle, INFINITY)).bits, high.bits) << bits;
    EXPECT_EQ(to(-middle).bits, even | 0x8000) << bits;
  }
}

TEST(Convert, RoundsToNearestEven) {
  expect_nearest_even<FP16>([](float x) { return to_fp16(x); }, 0, 0x7BFF);
  // bf16 subnormals have middles that fp32 holds, too.
  expect_nearest_even<BF16>([](float x) { return to_bf16(x); }, 0, 0x7F7F);
}

TEST(Convert, OverflowIsInfinityOrSaturates) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kMax = std::numeric_limits<float>::max();
  EXPECT_EQ(to_float(to_fp16(65519.0F)), 65504.0F);
  EXPECT_EQ(to_float(to_fp16(65520.0F)), kInf);
  EXPECT_EQ(to_float(to_fp16(-kMax)), -kInf);
  EXPECT_EQ(to_float(to_bf16(kMax)), kInf);
  EXPECT_EQ(to_float(to_fp16_saturated(65520.0F)), 65504.0F);
  EXPECT_EQ(to_float(to_fp16_saturated(-kMax)), -65504.0F);
  EXPECT_EQ(to_bf16_saturated(kMax).bits, kMaxBF16);
  EXPECT_EQ(to_bf16_saturated(-kMax).bits, 0x8000 | kMaxBF16);
}

}  // namespace
}  // namespace thinwire
