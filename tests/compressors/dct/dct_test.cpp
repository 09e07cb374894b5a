#include "compressors/dct/dct.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numbers>
#include <vector>

#include "compressors/dct/dct_kernels.h"
#include "compressors/dct/dct_reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

constexpr double kUnit = 0x1p-24;  // of roundings to nearest fp32

double squared_norm(const std::vector<double>& values) {
  double sum = 0;
  for (const double x : values) sum += x * x;
  return sum;
}
std::vector<double> widen(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// The orthonormal DCT-II by its definition.
std::vector<double> naive_dct(const std::vector<double>& x) {
  const std::size_t n = x.size();
  std::vector<double> cosines(4 * n);  // of all arguments: the products' multiples of a period less
  for (std::size_t i = 0; i < cosines.size(); ++i) {
    cosines[i] = std::cos(static_cast<double>(i) * std::numbers::pi / static_cast<double>(2 * n));
  }
  std::vector<double> y(n);
  for (std::size_t k = 0; k < n; ++k) {
    for (std::size_t j = 0; j < n; ++j) y[k] += x[j] * cosines[(2 * j + 1) * k % (4 * n)];
    y[k] *= std::sqrt((k == 0 ? 1.0 : 2.0) / static_cast<double>(n));
  }
  return y;
}

// Bound of ||computed - exact|| / ||x||. A level of the recursion multiplies by a sparse matrix
// that is 2^(1/2) times an orthogonal one: a butterfly's rounding adds at most u of the norm, a
// rotation's (two products, a sum, coefficients off by u) 3 u 2^(1/2), the product by 2^(1/2) 2 u;
// a DCT-IV level has both of the latter. 2^(-m/2), which is exact or off by u, is one more product.
double relative_bound(std::size_t n) {
  const double levels = std::log2(static_cast<double>(n));
  return kUnit * (2 + levels * (1 + 3 * std::numbers::sqrt2 + 2)) * 1.001;
}

std::vector<float> scaled(std::vector<float> values) {
  const float scale = dct_scale(static_cast<int>(values.size()));
  for (float& x : values) x *= scale;
  return values;
}

class DctTransform : public testing::TestWithParam<std::int64_t> {};

TEST_P(DctTransform, IsTheOrthonormalOneAndInverseIsItsInverse) {
  const std::int64_t n = GetParam();
  const double bound = relative_bound(static_cast<std::size_t>(n));
  for (const Pattern pattern : {Pattern::kNormal, Pattern::kEqual, Pattern::kSpike,
                                Pattern::kSparse, Pattern::kAlternating}) {
    SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n);
    const auto x = make_values(pattern, n, 1);
    const double norm = std::sqrt(squared_norm(widen(x)));
    const auto y = scaled(dct_forward_reference(x));
    const auto back = scaled(dct_inverse_reference(y));
    EXPECT_LE(distance(widen(y), naive_dct(widen(x))), bound * norm);
    EXPECT_NEAR(std::sqrt(squared_norm(widen(y))), norm, bound * norm);  // Parseval
    EXPECT_LE(distance(widen(back), widen(x)), 2.001 * bound * norm);
  }
}

INSTANTIATE_TEST_SUITE_P(Tiles, DctTransform,
                         testing::Values(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096));

TEST(Dct, TwiddlesAreTheNearestFloats) {
  for (int n = 2; n <= kMaxDctTile / 2; n *= 2) {
    const DctTwiddles twiddles = dct_twiddles(n);
    for (int j = 0; j < n / 2; ++j) {
      const long double angle = (2 * j + 1) * std::numbers::pi_v<long double> / (4 * n);
      ASSERT_EQ(twiddles.cos[j], static_cast<float>(std::cos(angle))) << n << " " << j;
      ASSERT_EQ(twiddles.sin[j], static_cast<float>(std::sin(angle))) << n << " " << j;
    }
  }
}

struct Outcome {
  bool finite = false;
  std::vector<std::byte> records;
  std::vector<std::byte> next;
  std::vector<std::byte> grad;
};

struct Scratch {
  Scratch(const DctShape& shape, std::int64_t n) : array(DType::kF32, size(shape, n)) {}
  static std::int64_t size(const DctShape& shape, std::int64_t n) {
    return static_cast<std::int64_t>(dct_scratch_floats(shape, n));
  }
  float* data() { return static_cast<float*>(array.view().data); }
  Array array;
};

Outcome run(bool (*kernel)(const DctEncode&), DctEncode args, DType dtype,
            const std::vector<float>& values, const std::vector<float>& residual) {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(dtype, values, 1);
  Array next(DType::kF32, n);
  Scratch scratch(args.shape, n);
  Outcome result;
  result.records.resize(static_cast<std::size_t>(dct_bytes(args.shape, n)));
  args.grad = grad.view();
  args.residual = residual.data();
  args.next = static_cast<float*>(next.view().data);
  args.records = result.records.data();
  args.scratch = scratch.data();
  result.finite = kernel(args);
  result.next = next.bytes();
  result.grad = grad.bytes();
  EXPECT_TRUE(grad.guards_intact() && next.guards_intact() && scratch.array.guards_intact());
  return result;
}

class DctKernels : public testing::TestWithParam<DctShape> {};

TEST_P(DctKernels, MatchTheReferenceBitForBit) {
  const DctShape shape = GetParam();
  const std::int64_t t = shape.tile;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : {std::int64_t{1}, std::int64_t{2}, std::int64_t{3}, t - 1, t,
                                   t + 1, 17 * t + t / 2 + 1}) {
        // 17 tiles: 16 at once, and one. Patterns concern the arithmetic, which is that of fp32 for
        // all dtypes and sizes.
        const bool long_or_other = n > 2500 || dtype != DType::kF32;
        if (long_or_other && pattern != Pattern::kNormal) continue;
        SCOPED_TRACE(testing::Message() << "dct:" << shape.keep << ",tile=" << t << " "
                                        << name(pattern) << " n=" << n << " " << name(dtype));
        const auto values = make_values(pattern, n, 1);
        const auto residual = make_values(Pattern::kNormal, n, 2);
        const DctEncode args{.decay = 0.75F, .shape = shape};
        const Outcome expected = run(dct_encode_reference, args, dtype, values, residual);
        ASSERT_TRUE(expected.finite);
        Array decoded(DType::kBF16, n);
        Array sum(DType::kF32, values);
        ASSERT_TRUE(dct_decode_reference(expected.records.data(), shape, decoded.view()));
        ASSERT_TRUE(dct_accumulate_reference(expected.records.data(), shape, 0.3F,
                                             static_cast<float*>(sum.view().data), n));
        Scratch scratch(shape, n);
        for_each_simd_target([&] {
          const Outcome got = run(dct_encode, args, dtype, values, residual);
          EXPECT_EQ(got.finite, expected.finite);
          EXPECT_TRUE(got.records == expected.records);
          EXPECT_TRUE(got.next == expected.next);
          EXPECT_TRUE(got.grad == expected.grad);
          Array other(DType::kBF16, n);
          EXPECT_TRUE(dct_decode(expected.records.data(), shape, scratch.data(), other.view()));
          EXPECT_TRUE(other.bytes() == decoded.bytes());
          Array added(DType::kF32, values);
          EXPECT_TRUE(dct_accumulate(expected.records.data(), shape, scratch.data(), 0.3F,
                                     static_cast<float*>(added.view().data), n));
          EXPECT_TRUE(added.bytes() == sum.bytes());
          EXPECT_TRUE(other.guards_intact() && added.guards_intact());
        });
        if (HasFailure()) return;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DctKernels,
    testing::Values(DctShape{8, 1, DctValues::kBF16}, DctShape{8, 8, DctValues::kF32},
                    DctShape{16, 5, DctValues::kQ8}, DctShape{32, 7, DctValues::kF32},
                    DctShape{64, 32, DctValues::kBF16}, DctShape{64, 10, DctValues::kQ8},
                    DctShape{128, 64, DctValues::kF32}, DctShape{512, 20, DctValues::kBF16},
                    DctShape{2048, 64, DctValues::kQ8}),
    [](const auto& test) {
      return std::to_string(test.param.keep) + "_of_" + std::to_string(test.param.tile) + "_" +
             std::to_string(static_cast<int>(test.param.values));
    });

struct RoundTrip {
  std::vector<float> v;
  std::vector<float> decoded;
};

RoundTrip round_trip(const DctOptions& options, const std::vector<float>& values) {
  const auto n = static_cast<std::int64_t>(values.size());
  const auto codec = make_dct_codec(options);
  const DctShape shape{static_cast<int>(options.tile), static_cast<int>(options.keep),
                       options.values};
  Scratch scratch(shape, n);
  const Context ctx{
      .workspace = {reinterpret_cast<std::byte*>(scratch.data()), codec->workspace_bytes(n)}};
  std::vector<std::byte> body(codec->slot_bytes(n));
  Array grad(DType::kF32, values);
  codec->encode(ctx, grad.view(), nullptr, body);
  Array out(DType::kF32, n);
  codec->decode(ctx, body, out.view());
  return {values, out.values()};
}

// Relative to ||v||^2, what rounding may add to the squared error of the kept coefficients: those
// of both transforms, and the values'.
double slack(const DctOptions& options) {
  const double roundings = 4 * relative_bound(static_cast<std::size_t>(options.tile));
  const auto keep = static_cast<double>(options.keep);
  if (options.values == DctValues::kF32) return roundings;
  if (options.values == DctValues::kBF16) return roundings + 0x1p-16;
  return roundings + keep * std::pow(0.51 / 127, 2);
}

// ||v - decoded||^2 <= (1 - k / t) ||v||^2: the k largest coefficients hold k / t of the squares
// at least, in every tile and so in the whole tensor; the tiles that end it keep no smaller share.
TEST(Dct, LeavesAtMostTheShareThatIsNotKept) {
  for (const DctValues values : {DctValues::kF32, DctValues::kBF16, DctValues::kQ8}) {
    for (const std::int64_t tile : {8, 64, 256, 4096}) {
      for (const std::int64_t keep : {std::int64_t{1}, tile / 8, tile / 2 + 1, tile}) {
        const DctOptions options{.keep = keep, .tile = tile, .values = values};
        for (const Pattern pattern :
             {Pattern::kNormal, Pattern::kEqual, Pattern::kSparse, Pattern::kAlternating}) {
          for (const std::int64_t n : {std::int64_t{1}, std::int64_t{3}, tile - 1, tile, tile + 1,
                                       5 * tile + 3, std::int64_t{1009}}) {
            SCOPED_TRACE(testing::Message()
                         << "dct:" << keep << ",tile=" << tile << " values "
                         << static_cast<int>(values) << " " << name(pattern) << " n=" << n);
            const RoundTrip got = round_trip(options, make_values(pattern, n, 4));
            const double all = squared_norm(widen(got.v));
            const double share = static_cast<double>(keep) / static_cast<double>(tile);
            const double left = std::pow(distance(widen(got.v), widen(got.decoded)), 2);
            ASSERT_LE(left, (1 - share + slack(options)) * all);
          }
        }
      }
    }
  }
}

TEST(Dct, KeepingAllAsFp32LosesOnlyRoundings) {
  for (const std::int64_t tile : {8, 64, 4096}) {
    const DctOptions options{.keep = tile, .tile = tile, .values = DctValues::kF32};
    for (const std::int64_t n : {std::int64_t{7}, tile, 17 * tile + 5}) {
      const RoundTrip got = round_trip(options, make_values(Pattern::kNormal, n, 5));
      const double norm = std::sqrt(squared_norm(widen(got.v)));
      EXPECT_LE(distance(widen(got.v), widen(got.decoded)),
                2.001 * relative_bound(static_cast<std::size_t>(tile)) * norm);
    }
  }
}

// A cosine of the basis needs one coefficient.
TEST(Dct, ACosineIsOneCoefficient) {
  std::vector<float> values(64);
  for (std::size_t j = 0; j < values.size(); ++j) {
    values[j] = static_cast<float>(
        std::cos((2.0 * static_cast<double>(j) + 1) * 5 * std::numbers::pi / 128));
  }
  const RoundTrip got = round_trip({.keep = 1, .tile = 64, .values = DctValues::kF32}, values);
  for (std::size_t j = 0; j < values.size(); ++j) {
    EXPECT_NEAR(got.decoded[j], values[j], 1e-5) << j;
  }
}

TEST(Dct, WireBytesAreTheShorterPositionsAndTheValues) {
  constexpr std::int64_t kTiles = 1000;
  const auto bytes = [&](const DctOptions& options) {
    return (make_dct_codec(options)->slot_bytes(kTiles * options.tile) - 1) / kTiles;
  };
  EXPECT_EQ(bytes({.keep = 32, .tile = 64}), 8U + 2 * 32);
  EXPECT_EQ(bytes({.keep = 8, .tile = 64}), 6U + 2 * 8);  // 48 bits of indices, not 64 of bitmap
  EXPECT_EQ(bytes({.keep = 64, .tile = 64}), 2U * 64);    // no positions
  EXPECT_EQ(bytes({.keep = 32, .tile = 64, .values = DctValues::kF32}), 8U + 4 * 32);
  EXPECT_EQ(bytes({.keep = 32, .tile = 64, .values = DctValues::kQ8}), 8U + 2 + 32);
  EXPECT_EQ(bytes({.keep = 64, .tile = 4096}), 64U * 12 / 8 + 2 * 64);
  // 64 + 32 + 4 + 1 elements: 32, 16, 2 and 1 coefficients; 8, 4, 1 and 0 bytes of positions.
  EXPECT_EQ(make_dct_codec({})->slot_bytes(101), 1U + 8 + 4 + 1 + 0 + 2 * (32 + 16 + 2 + 1));
}

TEST(Dct, RefusesRecordsThatNoEncoderWrites) {
  const std::int64_t n = 64;
  const auto refused = [&](const DctOptions& options, std::size_t at, std::byte byte) {
    const auto codec = make_dct_codec(options);
    Scratch scratch({static_cast<int>(options.tile), static_cast<int>(options.keep)}, n);
    const Context ctx{
        .workspace = {reinterpret_cast<std::byte*>(scratch.data()), codec->workspace_bytes(n)}};
    Array grad(DType::kF32, make_values(Pattern::kNormal, n, 1));
    std::vector<std::byte> body(codec->slot_bytes(n));
    codec->encode(ctx, grad.view(), nullptr, body);
    body[at] = byte;
    Array out(DType::kF32, n);
    std::vector<float> sum(static_cast<std::size_t>(n));
    for_each_simd_target([&] {
      EXPECT_THROW(codec->decode(ctx, body, out.view()), CorruptPayload);
      EXPECT_THROW(codec->accumulate(ctx, body, 1, sum), CorruptPayload);
    });
  };
  // A bitmap of other than 60 bits; indices that do not rise.
  refused({.keep = 60}, 1, std::byte{0});
  refused({.keep = 2}, 1, std::byte{0xFF});
  // The exponents of 2^103, Inf and NaN, as bf16's, fp32's and a scale's upper byte; and a sign.
  for (const int high : {0x73, 0x7F, 0xFF}) {
    const auto byte = static_cast<std::byte>(high);
    refused({.keep = 1}, 1 + 1 + 1, byte);
    refused({.keep = 1, .values = DctValues::kF32}, 1 + 1 + 3, byte);
    refused({.keep = 1, .values = DctValues::kQ8}, 1 + 1 + 1, byte);
  }
  refused({.keep = 1, .values = DctValues::kQ8}, 1 + 1 + 1, std::byte{0x80});
}

TEST(Dct, RefusesOptionsOutOfRange) {
  for (const std::int64_t tile : {0, 4, 60, 96, 8192}) {
    EXPECT_THROW(make_dct_codec({.keep = 1, .tile = tile}), InvalidArgument) << tile;
  }
  for (const std::int64_t keep : {-1, 0, 65}) {
    EXPECT_THROW(make_dct_codec({.keep = keep, .tile = 64}), InvalidArgument) << keep;
  }
}

}  // namespace
}  // namespace thinwire
