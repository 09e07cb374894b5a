#include "compressors/onebit/onebit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "compressors/onebit/onebit_kernels.h"
#include "compressors/onebit/onebit_reference.h"
#include "compressors/onebit/onebit_runs.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

constexpr OneBitScale kScales[] = {OneBitScale::kL2, OneBitScale::kL1};
constexpr std::size_t kHeaderBytes = 1 + kOneBitFirstBytes;  // mode, first run

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

double squared_norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float v : values) sum += static_cast<double>(v) * static_cast<double>(v);
  return sum;
}

std::int64_t size_of(const std::vector<float>& values) {
  return static_cast<std::int64_t>(values.size());
}

void set_zero(std::vector<float>& values, std::int64_t begin, std::int64_t end) {
  std::fill(values.begin() + begin, values.begin() + end, 0.0F);
}

std::vector<std::byte> encoded(const PayloadCodec& codec, const std::vector<float>& values,
                               Memory* memory = nullptr) {
  Array grad(DType::kF32, values);
  std::vector<std::byte> body(codec.slot_bytes(size_of(values)));
  body.resize(codec.encode({}, grad.view(), memory, body).bytes);
  return body;
}

std::vector<float> decoded(const PayloadCodec& codec, const std::vector<std::byte>& body,
                           std::int64_t n) {
  std::vector<float> out(static_cast<std::size_t>(n));
  codec.decode({}, body, view(out));
  return out;
}

std::vector<float> sent_of(const OneBitOptions& options, const std::vector<float>& values) {
  const auto codec = make_onebit_codec(options);
  return decoded(*codec, encoded(*codec, values), size_of(values));
}

struct Outcome {
  bool finite = false;
  std::vector<std::byte> body;
  std::vector<float> next;
};

Outcome run(bool (*kernel)(const OneBitEncode&), OneBitEncode args, DType dtype,
            const std::vector<float>& values, const std::vector<float>& residual) {
  const std::int64_t n = size_of(values);
  Array grad(dtype, values, 1);
  Array next(DType::kF32, n);
  Outcome result;
  result.body.resize(static_cast<std::size_t>(onebit_bytes(args.block, n)), std::byte{0xA5});
  args.grad = grad.view();
  args.residual = residual.data();
  args.next = static_cast<float*>(next.view().data);
  args.body = result.body.data();
  result.finite = kernel(args);
  result.next = next.values();
  EXPECT_TRUE(grad.guards_intact() && next.guards_intact());
  return result;
}

// Gradient and residual that cancel, or are zero, in runs of every length around what is masked.
struct Input {
  std::vector<float> values;
  std::vector<float> residual;
};
Input with_runs(Pattern pattern, std::int64_t n, std::uint64_t seed) {
  Input input{make_values(pattern, n, seed), make_values(Pattern::kNormal, n, seed + 1)};
  std::int64_t at = 3;
  for (const std::int64_t length : {1, 63, 64, 65, 70, 71, 72, 127, 128, 129, 300, 5}) {
    if (at + length > n) break;
    set_zero(input.values, at, at + length);
    set_zero(input.residual, at, at + length);
    input.values[static_cast<std::size_t>(at)] = -0.0F;
    at += length + 1 + length % 7;
  }
  return input;
}

void expect_like_reference(const OneBitEncode& args, DType dtype, const Input& input) {
  const std::int64_t n = size_of(input.values);
  const Outcome expected = run(onebit_encode_reference, args, dtype, input.values, input.residual);
  ASSERT_TRUE(expected.finite);
  const OneBitBody body(expected.body.data(), args.block, n);
  ASSERT_TRUE(onebit_valid(body, args.block, n));
  Array out(DType::kBF16, n);
  onebit_decode_reference(body, args.block, out.view());
  std::vector<float> sum = input.values;
  onebit_accumulate_reference(body, args.block, -0.3F, sum);
  for_each_simd_target([&] {
    const Outcome got = run(onebit_encode, args, dtype, input.values, input.residual);
    EXPECT_EQ(got.finite, expected.finite);
    EXPECT_EQ(got.body, expected.body);
    EXPECT_TRUE(same_bits(got.next, expected.next));
    Array other(DType::kBF16, n);
    onebit_decode(body, args.block, other.view());
    EXPECT_EQ(other.bytes(), out.bytes());
    EXPECT_TRUE(other.guards_intact());
    std::vector<float> added = input.values;
    onebit_sum({&body, 1}, args.block, -0.3F, false, added);
    EXPECT_TRUE(same_bits(added, sum));
  });
}

TEST(OneBit, KernelsMatchTheReferenceBitForBit) {
  for (const std::int64_t block : {0, 64, 128, 4096}) {
    for (const OneBitScale scale : kScales) {
      for (const Pattern pattern : kPatterns) {
        for (const std::int64_t n : {1, 63, 64, 65, 127, 129, 200, 1009, 5003}) {
          for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
            SCOPED_TRACE(testing::Message() << "block " << block << " scale " << int(scale) << " "
                                            << name(pattern) << " n=" << n << " " << name(dtype));
            expect_like_reference({.decay = 0.75F, .block = block, .scale = scale}, dtype,
                                  with_runs(pattern, n, 1));
            if (testing::Test::HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(OneBit, ScaleIsTheFormulasOfThePapers) {
  for (const std::int64_t n : {1, 5, 64, 1000, 100'003}) {
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kHuge}) {
      const auto values = make_values(pattern, n, 3);
      long double magnitudes = 0;
      long double squares = 0;
      for (const float v : values) {
        magnitudes += std::fabs(static_cast<long double>(v));
        squares += static_cast<long double>(v) * static_cast<long double>(v);
      }
      const auto count = static_cast<long double>(n);
      const auto l1 = static_cast<double>(magnitudes / count);
      const auto l2 = static_cast<double>(std::sqrt(squares / count));
      const float got_l1 = std::fabs(sent_of({.scale = OneBitScale::kL1}, values)[0]);
      const float got_l2 = std::fabs(sent_of({.scale = OneBitScale::kL2}, values)[0]);
      // One rounding to fp32; the sum's own is far below.
      EXPECT_NEAR(static_cast<double>(got_l1) / l1, 1, 0x1.01p-24) << name(pattern) << " n=" << n;
      EXPECT_NEAR(static_cast<double>(got_l2) / l2, 1, 0x1.01p-24) << name(pattern) << " n=" << n;
    }
  }
}

TEST(OneBit, ZerosArePositiveAndBlocksHaveTheirOwnScales) {
  std::vector<float> values(130, 1.0F);
  set_zero(values, 0, 2);
  values[1] = -0.0F;
  values[2] = -1.0F;
  for (std::size_t i = 64; i < 128; ++i) values[i] = -3.0F;
  values[128] = 8.0F;
  values[129] = -4.0F;
  const auto sent = sent_of({.block = 64, .scale = OneBitScale::kL1}, values);
  EXPECT_EQ(sent[0], 62.0F / 64);
  EXPECT_EQ(sent[1], 62.0F / 64);
  EXPECT_EQ(sent[2], -62.0F / 64);
  EXPECT_EQ(sent[100], -3.0F);
  EXPECT_EQ(sent[128], 6.0F);  // of the two elements that the last block has
  EXPECT_EQ(sent[129], -6.0F);
}

// ||v - C(v)||^2 <= (1 - ||v||_1^2 / (m ||v||_2^2)) ||v||_2^2, m the elements that are sent: the
// bound of the paper, with equality but for rounding.
TEST(OneBit, TheMeanMagnitudeContracts) {
  for (const Pattern pattern : kPatterns) {
    if (pattern == Pattern::kHuge) continue;  // its squares sum up to Inf
    for (const std::int64_t n : {1, 100, 1009, 20'011}) {
      auto values = with_runs(pattern, n, 4).values;
      double magnitudes = 0;
      for (const float v : values) magnitudes += static_cast<double>(std::fabs(v));
      const auto sent = sent_of({.scale = OneBitScale::kL1}, values);
      const auto m = static_cast<double>(
          n - std::count(sent.begin(), sent.end(), 0.0F));  // of zero scale: bound by ||v||^2
      const double all = squared_norm(values);
      std::vector<float> rest(values.size());
      for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = values[i] - sent[i];
      const double bound = m == 0 ? all : all - magnitudes * magnitudes / m;
      EXPECT_LE(squared_norm(rest), bound + 1e-6 * all) << name(pattern) << " n=" << n;
    }
  }
}

// Rows that never get a gradient, of widths that are no multiples of anything.
TEST(OneBit, RowsWithoutGradientStayExactlyZeroWhileOthersLearn) {
  constexpr std::int64_t kRows = 40;
  for (const std::int64_t width : {71, 100, 300, 768}) {
    for (const OneBitScale scale : kScales) {
      const std::int64_t n = kRows * width;
      const auto codec = make_onebit_codec({.scale = scale});
      const auto unused = [&](std::int64_t row) { return row % 3 == 1 || row > 35; };
      Memory memory(n, {.decay = 0.9F});
      std::vector<float> learned(static_cast<std::size_t>(n));
      std::vector<double> gradients(static_cast<std::size_t>(n));
      for (std::uint64_t step = 0; step < 50; ++step) {
        auto values = make_values(Pattern::kNormal, n, 100 + step);
        for (std::int64_t row = 0; row < kRows; ++row) {
          if (unused(row)) set_zero(values, row * width, (row + 1) * width);
        }
        const auto body = encoded(*codec, values, &memory);
        memory.commit();
        codec->accumulate({}, body, 1, learned);
        for (std::size_t i = 0; i < values.size(); ++i) {
          gradients[i] += static_cast<double>(values[i]);
        }
      }
      double error = 0;
      for (std::int64_t i = 0; i < n; ++i) {
        const auto at = static_cast<std::size_t>(i);
        if (unused(i / width)) {
          ASSERT_EQ(learned[at], 0.0F) << "width " << width << " element " << i;
          ASSERT_EQ(memory.current()[at], 0.0F) << "width " << width << " element " << i;
        } else {
          ASSERT_NE(learned[at], 0.0F);
        }
        error += std::fabs(gradients[at] - static_cast<double>(learned[at]));
      }
      EXPECT_LT(error / static_cast<double>(n), 0.05) << "width " << width;
    }
  }
}

TEST(OneBit, MaskedElementsDoNotEnterTheScale) {
  for (const std::int64_t block : {0, 512}) {
    std::vector<float> values(512, -2.0F);
    set_zero(values, 100, 400);
    for (const OneBitScale scale : kScales) {
      const auto sent = sent_of({.block = block, .scale = scale}, values);
      EXPECT_EQ(sent, values);
    }
  }
}

TEST(OneBit, RunsFrom71ElementsOnAreMaskedAndNoneBelow64) {
  for (std::int64_t begin = 60; begin < 70; ++begin) {
    for (std::int64_t length = 1; length < 90; ++length) {
      auto values = std::vector<float>(256, 1.0F);
      set_zero(values, begin, begin + length);
      const auto sent = sent_of({}, values);
      const auto masked = std::count(sent.begin(), sent.end(), 0.0F);
      ASSERT_TRUE(masked == 0 || masked == length) << begin << " " << length;
      ASSERT_TRUE(length < 71 || masked == length) << begin << " " << length;
      ASSERT_TRUE(length >= 64 || masked == 0) << begin << " " << length;
    }
  }
}

// Ranges that exchanges cut at multiples of the block decode as they do inside the whole, wherever
// their zeros lie.
TEST(OneBit, RunsEndWithTheirBlocks) {
  constexpr std::int64_t kElements = 1024;
  const auto codec = make_onebit_codec({.block = 128});
  auto values = make_values(Pattern::kNormal, kElements, 5);
  set_zero(values, 90, 300);  // 38 of block 0, all of block 1, 44 of block 2
  set_zero(values, 600, 720);
  const auto whole = decoded(*codec, encoded(*codec, values), kElements);
  EXPECT_NE(whole[100], 0.0F);
  EXPECT_EQ(whole[128], 0.0F);
  for (std::int64_t begin = 0; begin < kElements; begin += 128) {
    const std::vector<float> range(values.begin() + begin, values.end());
    const auto alone = decoded(*codec, encoded(*codec, range), size_of(range));
    EXPECT_TRUE(std::equal(alone.begin(), alone.end(), whole.begin() + begin)) << begin;
  }
}

// A tensor without any nonzero value, and blocks longer than a cache.
TEST(OneBit, ExtremesOfSizeAndContent) {
  const std::vector<float> zeros(1000, -0.0F);
  for (const std::int64_t block : {0, 64, 65536}) {
    const auto sent = sent_of({.block = block}, zeros);
    EXPECT_TRUE(std::all_of(sent.begin(), sent.end(), [](float x) { return x == 0; }));
  }
  const std::vector<float> largest(5000, -std::numeric_limits<float>::max());
  EXPECT_EQ(sent_of({}, largest), largest);
  EXPECT_EQ(sent_of({.scale = OneBitScale::kL1}, largest), largest);
  const Input input = with_runs(Pattern::kNormal, 150'001, 6);
  expect_like_reference({.block = 65536, .scale = OneBitScale::kL1}, DType::kF32, input);
  // Seven values close to 2^-149: their root mean square is no less.
  const std::vector<float> least(7, std::numeric_limits<float>::denorm_min());
  EXPECT_EQ(sent_of({}, least), least);
}

TEST(OneBit, WireBytesAreOneBitAnElementAndTheScales) {
  EXPECT_EQ(make_onebit_codec({})->slot_bytes(8'000'000), kHeaderBytes + 4 + 1'000'000);
  EXPECT_EQ(make_onebit_codec({})->slot_bytes(9), kHeaderBytes + 4 + 2);
  EXPECT_EQ(make_onebit_codec({})->slot_bytes(0), kHeaderBytes);
  EXPECT_EQ(make_onebit_codec({.block = 512})->slot_bytes(1025), kHeaderBytes + 3 * 4 + 129);
  EXPECT_THROW(make_onebit_codec({})->slot_bytes(std::int64_t{1} << 32), InvalidArgument);
}

TEST(OneBit, RefusesScalesAndRunsThatNoEncoderWrites) {
  constexpr std::int64_t kElements = 300;
  const auto codec = make_onebit_codec({});
  auto values = make_values(Pattern::kNormal, kElements, 1);
  set_zero(values, 8, 108);
  set_zero(values, 200, 300);
  const auto good = encoded(*codec, values);
  const auto refused = [&](std::size_t at, std::uint32_t word) {
    auto bad = good;
    std::memcpy(bad.data() + at, &word, 4);
    EXPECT_THROW(decoded(*codec, bad, kElements), CorruptPayload) << at << " " << word;
    std::vector<float> sum(kElements);
    EXPECT_THROW(codec->accumulate({}, bad, 1, sum), CorruptPayload) << at << " " << word;
    const std::array<std::span<const std::byte>, 2> bodies = {good, bad};
    EXPECT_THROW(codec->sum({}, bodies, 1, sum), CorruptPayload) << at << " " << word;
  };
  EXPECT_EQ(decoded(*codec, good, kElements)[8], 0.0F);
  EXPECT_EQ(decoded(*codec, good, kElements)[299], 0.0F);
  for (const std::uint32_t bits : {0x80000000U, 0xBF800000U, 0x7F800000U, 0x7FC00000U, ~0U}) {
    refused(kHeaderBytes, bits);
  }
  // The first run's begin; then the length of the run at 8, whose link is at byte 1 of the signs,
  // and the distance from its end, 108, to the run at 200.
  const std::size_t signs = kHeaderBytes + 4;
  for (const std::uint32_t begin : {240U, 299U, 301U, ~0U}) refused(1, begin);
  for (const std::uint32_t length : {0U, 63U, 293U, ~0U}) refused(signs + 1, length);
  for (const std::uint32_t distance : {130U, 193U, ~0U}) refused(signs + 5, distance);
}

TEST(OneBit, RefusesOptionsOutOfRange) {
  for (const std::int64_t block : {-64, 32, 100, 65600, 131072}) {
    EXPECT_THROW(make_onebit_codec({.block = block}), InvalidArgument) << block;
  }
}

}  // namespace
}  // namespace thinwire
