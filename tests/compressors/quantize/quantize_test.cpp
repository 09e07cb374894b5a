#include "compressors/quantize/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <set>
#include <vector>

#include "compressors/quantize/quantize_kernels.h"
#include "compressors/quantize/quantize_reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

struct Outcome {
  bool finite = false;
  std::vector<std::byte> blocks;
  std::vector<float> next;
  std::vector<std::byte> grad;
};

Outcome run(bool (*kernel)(const QuantizeEncode&), QuantizeEncode args, DType dtype,
            const std::vector<float>& values, const std::vector<float>& residual) {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(dtype, values, 1);
  Array next(DType::kF32, n);
  Outcome result;
  result.blocks.resize(static_cast<std::size_t>(quantize_bytes(args.bits, args.block, n)));
  args.grad = grad.view();
  args.residual = residual.data();
  args.next = static_cast<float*>(next.view().data);
  args.blocks = result.blocks.data();
  result.finite = kernel(args);
  result.next = next.values();
  result.grad = grad.bytes();
  EXPECT_TRUE(grad.guards_intact() && next.guards_intact());
  return result;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

class QuantizeKernels : public testing::TestWithParam<int> {};

TEST_P(QuantizeKernels, MatchTheReferenceBitForBit) {
  const int bits = GetParam();
  for (const bool stochastic : {false, true}) {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : {1, 63, 64, 65, 127, 128, 129, 200, 1009}) {
        for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
          SCOPED_TRACE(testing::Message() << "q" << bits << (stochastic ? ",stochastic " : " ")
                                          << name(pattern) << " n=" << n << " " << name(dtype));
          const auto values = make_values(pattern, n, 1);
          auto residual = make_values(Pattern::kNormal, n, 2);
          const QuantizeEncode args{.decay = 0.75F,
                                    .bits = bits,
                                    .block = 128,
                                    .stochastic = stochastic,
                                    .random = random_stream(7, 8, 9)};
          const Outcome expected = run(quantize_encode_reference, args, dtype, values, residual);
          ASSERT_TRUE(expected.finite);
          Array decoded(DType::kBF16, n);
          Array sum(DType::kF32, values);
          ASSERT_TRUE(quantize_decode_reference(expected.blocks.data(), bits, 128, decoded.view()));
          ASSERT_TRUE(quantize_accumulate_reference(expected.blocks.data(), bits, 128, 0.3F,
                                                    static_cast<float*>(sum.view().data), n));
          for_each_simd_target([&] {
            const Outcome got = run(quantize_encode, args, dtype, values, residual);
            EXPECT_EQ(got.finite, expected.finite);
            EXPECT_EQ(got.blocks, expected.blocks);
            EXPECT_TRUE(same_bits(got.next, expected.next));
            EXPECT_EQ(got.grad, expected.grad);
            Array other(DType::kBF16, n);
            EXPECT_TRUE(quantize_decode(expected.blocks.data(), bits, 128, other.view()));
            EXPECT_EQ(other.bytes(), decoded.bytes());
            Array added(DType::kF32, values);
            EXPECT_TRUE(quantize_accumulate(expected.blocks.data(), bits, 128, 0.3F,
                                            static_cast<float*>(added.view().data), n));
            EXPECT_EQ(added.bytes(), sum.bytes());
            EXPECT_TRUE(other.guards_intact() && added.guards_intact());
          });
          if (HasFailure()) return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Bits, QuantizeKernels, testing::Range(1, 9));

// Nearest with b >= 2 bits is off by at most half a step, stochastic by less than a step.
TEST(Quantize, ErrorIsBoundedByTheStep) {
  for (int bits = 2; bits <= 8; ++bits) {
    for (const bool stochastic : {false, true}) {
      for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kAlternating}) {
        const std::int64_t n = 256;
        const auto values = make_values(pattern, n, 3);
        Array grad(DType::kF32, values);
        const auto codec =
            make_quantize_codec({.bits = bits, .block = 256, .stochastic = stochastic});
        std::vector<std::byte> body(codec->slot_bytes(n));
        codec->encode({}, grad.view(), nullptr, body);
        Array out(DType::kF32, n);
        codec->decode({}, body, out.view());
        float most = 0;
        for (const float v : values) most = std::max(most, std::fabs(v));
        const float step = most / static_cast<float>(quantize_levels(bits));
        const auto decoded = out.values();
        for (std::size_t i = 0; i < values.size(); ++i) {
          EXPECT_LE(std::fabs(values[i] - decoded[i]), (stochastic ? 1.0F : 0.5F) * step * 1.0001F)
              << "q" << bits << " " << name(pattern) << " element " << i;
        }
      }
    }
  }
}

// 1 bit to nearest: scale = mean magnitude, the least-squares choice for signs.
TEST(Quantize, OneBitDecodesToTheSignedMean) {
  std::vector<float> values = {1, -2, 3, -6};
  Array grad(DType::kF32, values);
  const auto codec = make_quantize_codec({.bits = 1});
  std::vector<std::byte> body(codec->slot_bytes(4));
  codec->encode({}, grad.view(), nullptr, body);
  Array out(DType::kF32, 4);
  codec->decode({}, body, out.view());
  EXPECT_EQ(out.values(), (std::vector<float>{3, -3, 3, -3}));
}

TEST(Quantize, WireBytesAreBitsPlusOneScaleABlock) {
  const auto q4 = make_quantize_codec({.bits = 4, .block = 256});
  EXPECT_EQ(q4->slot_bytes(256 * 1000), 1U + 1000 * (4 + 128));
  const auto q1 = make_quantize_codec({.bits = 1, .block = 1024});
  EXPECT_EQ(q1->slot_bytes(1024), 1U + 4 + 128);
  EXPECT_EQ(q1->slot_bytes(1), 1U + 4 + 8);
}

TEST(Quantize, RefusesScalesThatNoEncoderWrites) {
  const auto codec = make_quantize_codec({.bits = 4});
  const auto values = make_values(Pattern::kNormal, 300, 1);
  Array grad(DType::kF32, values);
  std::vector<std::byte> good(codec->slot_bytes(300));
  codec->encode({}, grad.view(), nullptr, good);
  for (const std::uint32_t bits : {0x80000000U, 0xBF800000U, 0x7F800000U, 0x7FC00000U, ~0U}) {
    for (const std::size_t at : {std::size_t{1}, std::size_t{1 + 4 + 128}}) {
      auto bad = good;
      std::memcpy(bad.data() + at, &bits, 4);
      Array out(DType::kF32, 300);
      EXPECT_THROW(codec->decode({}, bad, out.view()), CorruptPayload) << bits;
      std::vector<float> sum(300);
      EXPECT_THROW(codec->accumulate({}, bad, 1, sum), CorruptPayload) << bits;
    }
  }
}

// Workers encode a range by its hash, step and rank; its owner encodes the sum as sender -1. None
// of them may round with the random numbers of another.
TEST(Quantize, StochasticRoundingHasItsOwnNumbersForEverySenderStepAndKey) {
  constexpr std::int64_t kElements = 512;
  const auto codec = make_quantize_codec({.bits = 4, .stochastic = true});
  const auto values = make_values(Pattern::kNormal, kElements, 1);
  const auto encoded = [&](std::int32_t sender, std::uint64_t step, std::uint64_t key_hash) {
    Array grad(DType::kF32, values);
    std::vector<std::byte> body(codec->slot_bytes(kElements));
    codec->encode({.step = step, .sender = sender, .key_hash = key_hash}, grad.view(), nullptr,
                  body);
    return body;
  };
  std::set<std::vector<std::byte>> bodies;
  for (const std::int32_t sender : {-1, 0, 1, 2}) {
    for (const std::uint64_t step : {0, 1}) {
      for (const std::uint64_t key_hash : {7, 8}) {
        bodies.insert(encoded(sender, step, key_hash));
      }
    }
  }
  EXPECT_EQ(bodies.size(), 4U * 2 * 2);
  EXPECT_EQ(encoded(-1, 0, 7), encoded(-1, 0, 7));
}

TEST(Quantize, RefusesOptionsOutOfRange) {
  EXPECT_THROW(make_quantize_codec({.bits = 0}), InvalidArgument);
  EXPECT_THROW(make_quantize_codec({.bits = 9}), InvalidArgument);
  for (const std::int64_t block : {0, 32, 100, 8192}) {
    EXPECT_THROW(make_quantize_codec({.block = block}), InvalidArgument) << block;
  }
}

}  // namespace
}  // namespace thinwire
