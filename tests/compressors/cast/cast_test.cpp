#include "compressors/cast/cast.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <vector>

#include "compressors/cast/cast_kernels.h"
#include "compressors/cast/cast_reference.h"
#include "compressors/core/convert.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

struct Outcome {
  bool finite = false;
  std::vector<std::byte> codes;
  std::vector<std::byte> next;
  std::vector<std::byte> grad;
  bool operator==(const Outcome&) const = default;
};

Outcome run(bool (*kernel)(const CastEncode&), DType type, DType dtype,
            const std::vector<float>& values, const std::vector<float>& residual) {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(dtype, values, 1);
  Array next(DType::kF32, n);
  Outcome outcome;
  outcome.codes.resize(2 * values.size());
  outcome.finite = kernel({.grad = grad.view(),
                           .residual = residual.data(),
                           .decay = 0.75F,
                           .next = static_cast<float*>(next.view().data),
                           .codes = outcome.codes.data(),
                           .type = type});
  outcome.next = next.bytes();
  outcome.grad = grad.bytes();
  EXPECT_TRUE(grad.guards_intact() && next.guards_intact());
  return outcome;
}

TEST(CastKernels, MatchTheReferenceBitForBit) {
  for (const DType type : {DType::kBF16, DType::kF16}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
      for (const Pattern pattern : kPatterns) {
        for (const std::int64_t n : {1, 3, 15, 16, 17, 64, 1009}) {
          SCOPED_TRACE(testing::Message() << name(type) << " of " << name(dtype) << " "
                                          << name(pattern) << " n=" << n);
          const auto values = make_values(pattern, n, 1);
          const auto residual = make_values(Pattern::kNormal, n, 2);
          const Outcome expected = run(cast_encode_reference, type, dtype, values, residual);
          ASSERT_TRUE(expected.finite);
          for_each_simd_target(
              [&] { ASSERT_EQ(run(cast_encode, type, dtype, values, residual), expected); });
          if (HasFailure()) return;
        }
      }
    }
  }
}

// All 65,536 codes into every dtype.
TEST(CastKernels, DecodeEveryCodeAsTheReference) {
  std::vector<std::uint16_t> codes(0x10000);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint16_t>(i);
  const auto* bytes = reinterpret_cast<const std::byte*>(codes.data());
  for (const DType type : {DType::kBF16, DType::kF16}) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
      SCOPED_TRACE(testing::Message() << name(type) << " into " << name(dtype));
      Array expected(dtype, 0x10000);
      cast_decode_reference(bytes, type, expected.view());
      for_each_simd_target([&] {
        Array got(dtype, 0x10000, 1);
        cast_decode(bytes, type, got.view());
        EXPECT_EQ(got.bytes(), expected.bytes());
        EXPECT_TRUE(got.guards_intact());
      });
    }
  }
}

TEST(Cast, FiniteValuesSaturateAndTheRestStaysInTheResidual) {
  const float most = std::numeric_limits<float>::max();
  std::vector<float> values = {most, -most, 65520.0F, -1e6F};
  for (const DType type : {DType::kBF16, DType::kF16}) {
    const auto codec = make_cast_codec(type);
    Array grad(DType::kF32, values);
    Memory memory(4);
    std::vector<std::byte> body(codec->slot_bytes(4));
    const auto result = codec->encode({}, grad.view(), &memory, body);
    EXPECT_FALSE(result.nonfinite);
    Array out(DType::kF32, 4);
    codec->decode({}, body, out.view());
    const auto decoded = out.values();
    for (std::size_t i = 0; i < 4; ++i) {
      EXPECT_TRUE(is_finite(decoded[i])) << name(type) << " " << i;
      EXPECT_EQ(memory.next()[i], values[i] - decoded[i]) << name(type) << " " << i;
    }
    if (type == DType::kF16) {
      EXPECT_EQ(decoded, (std::vector<float>{65504, -65504, 65504, -65504}));
    }
  }
}

TEST(Cast, RefusesOtherTypes) {
  for (const DType dtype : {DType::kF32, DType::kF64, DType::kOther}) {
    EXPECT_THROW(make_cast_codec(dtype), InvalidArgument) << name(dtype);
  }
}

}  // namespace
}  // namespace thinwire
