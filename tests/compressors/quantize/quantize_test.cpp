#include "compressors/quantize/quantize.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "compressors/quantize/quantize_kernels.h"
#include "compressors/quantize/quantize_reference.h"
#include "compressors/quantize/quantize_scales.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

struct Outcome {
  bool finite = false;
  std::vector<std::byte> records;
  std::vector<float> next;
  std::vector<std::byte> grad;
};

Outcome run(bool (*kernel)(const QuantizeEncode&), QuantizeEncode args, DType dtype,
            const std::vector<float>& values, const std::vector<float>& residual) {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(dtype, values, 1);
  Array next(DType::kF32, n);
  Outcome result;
  result.records.resize(static_cast<std::size_t>(args.shape.bytes(n)));
  args.grad = grad.view();
  args.residual = residual.data();
  args.next = static_cast<float*>(next.view().data);
  args.records = result.records.data();
  result.finite = kernel(args);
  result.next = next.values();
  result.grad = grad.bytes();
  EXPECT_TRUE(grad.guards_intact() && next.guards_intact());
  return result;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

QuantizeShape shape_of(const QuantizeOptions& options) {
  return {options.kind, options.bits, options.element, options.block, options.rotate};
}

std::string spec_of(const QuantizeOptions& options) { return make_quantize_codec(options)->name(); }

// Every kind with every count of bits that differs in code.
std::vector<QuantizeOptions> all_kinds() {
  std::vector<QuantizeOptions> all;
  for (int bits = 1; bits <= 8; ++bits) {
    all.push_back({.bits = bits, .block = 128});
    all.push_back({.bits = bits, .block = 128, .stochastic = true});
  }
  for (const int bits : {1, 3, 8}) {
    all.push_back({.bits = bits, .kind = QuantizeKind::kMaxMin, .block = 128});
    all.push_back({.bits = bits, .kind = QuantizeKind::kMaxMin, .block = 64, .stochastic = true});
  }
  for (const int bits : {2, 4, 8}) {
    for (const QuantizeKind kind : {QuantizeKind::kQsgd, QuantizeKind::kNatural}) {
      all.push_back({.bits = bits, .kind = kind, .block = 128, .stochastic = true});
    }
  }
  for (const std::int64_t block : {64, 256}) {
    all.push_back({.bits = 2, .kind = QuantizeKind::kTernGrad, .block = block, .stochastic = true});
  }
  for (const MxElement element :
       {MxElement::kE4M3, MxElement::kE5M2, MxElement::kE2M3, MxElement::kE3M2, MxElement::kE2M1}) {
    for (const bool stochastic : {false, true}) {
      all.push_back({.bits = mx_bits(element),
                     .kind = QuantizeKind::kMx,
                     .element = element,
                     .block = stochastic ? 128 : 32,
                     .stochastic = stochastic});
    }
  }
  return all;
}

class QuantizeKernels : public testing::TestWithParam<QuantizeOptions> {};

void expect_the_reference(const QuantizeOptions& options, Pattern pattern, std::int64_t n,
                          DType dtype) {
  const QuantizeShape shape = shape_of(options);
  const QuantizeRotation rotation(77, shape.unit());
  const auto values = make_values(pattern, n, 1);
  const auto residual = make_values(Pattern::kNormal, n, 2);
  const QuantizeEncode args{.decay = 0.75F,
                            .shape = shape,
                            .stochastic = options.stochastic,
                            .random = random_stream(7, 8, 9),
                            .rotation = &rotation};
  const Outcome expected = run(quantize_encode_reference, args, dtype, values, residual);
  ASSERT_TRUE(expected.finite);
  const std::byte* records = expected.records.data();
  Array decoded(DType::kBF16, n);
  Array sum(DType::kF32, values);
  ASSERT_TRUE(quantize_decode_reference(records, shape, &rotation, decoded.view()));
  ASSERT_TRUE(quantize_accumulate_reference(records, shape, &rotation, 0.3F,
                                            static_cast<float*>(sum.view().data), n));
  for_each_simd_target([&] {
    const Outcome got = run(quantize_encode, args, dtype, values, residual);
    EXPECT_EQ(got.finite, expected.finite);
    EXPECT_EQ(got.records, expected.records);
    EXPECT_TRUE(same_bits(got.next, expected.next));
    EXPECT_EQ(got.grad, expected.grad);
    Array other(DType::kBF16, n);
    EXPECT_TRUE(quantize_decode(records, shape, &rotation, other.view()));
    EXPECT_EQ(other.bytes(), decoded.bytes());
    Array added(DType::kF32, values);
    EXPECT_TRUE(quantize_accumulate(records, shape, &rotation, 0.3F,
                                    static_cast<float*>(added.view().data), n));
    EXPECT_EQ(added.bytes(), sum.bytes());
    EXPECT_TRUE(other.guards_intact() && added.guards_intact());
  });
}

TEST_P(QuantizeKernels, MatchTheReferenceBitForBit) {
  for (const bool rotate : {false, true}) {
    QuantizeOptions options = GetParam();
    options.rotate = rotate;
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : {1, 63, 64, 65, 127, 200, 257, 1097}) {
        for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
          // Dtypes meet no kind; patterns and sizes do.
          if (dtype != DType::kF32 && (n != 200 || rotate)) continue;
          SCOPED_TRACE(testing::Message() << spec_of(options) << " " << name(pattern) << " n=" << n
                                          << " " << name(dtype));
          expect_the_reference(options, pattern, n, dtype);
          if (HasFailure()) return;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, QuantizeKernels, testing::ValuesIn(all_kinds()),
                         [](const auto& test) {
                           std::string text = spec_of(test.param);
                           for (char& c : text) {
                             if (c == ',' || c == '=') c = '_';
                           }
                           return text;
                         });

TEST(QuantizeRotation, WholeUnitsMatchTheReference) {
  for (const std::int64_t block : {64, 2048, 4096}) {
    for (const std::int64_t n : {2048 + 1023, 4096 + 512 + 9}) {
      expect_the_reference({.bits = 4, .block = block, .rotate = true}, Pattern::kSpike, n,
                           DType::kF32);
    }
  }
}

// ---- Laws.

double squared_norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float v : values) sum += static_cast<double>(v) * static_cast<double>(v);
  return sum;
}

std::vector<float> round_trip(const PayloadCodec& codec, const std::vector<float>& values,
                              const Context& ctx = {}) {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(DType::kF32, values);
  std::vector<std::byte> body(codec.slot_bytes(n));
  codec.encode(ctx, grad.view(), nullptr, body);
  Array out(DType::kF32, n);
  codec.decode({}, body, out.view());
  return out.values();
}

double squared_error(const std::vector<float>& values, const std::vector<float>& decoded) {
  double sum = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double error = static_cast<double>(values[i]) - static_cast<double>(decoded[i]);
    sum += error * error;
  }
  return sum;
}

// Decoded values have the transform of the sent ones, times the inverse: with codes of 8 bits the
// norm stays up to their error, whatever the size's powers of two.
TEST(QuantizeRotation, KeepsTheNorm) {
  for (const std::int64_t n : {1, 2, 3, 512, 1024, 1025, 4096 + 777}) {
    const auto values = make_values(Pattern::kNormal, n, 4);
    const auto codec = make_quantize_codec({.bits = 8, .block = 64, .rotate = true});
    const auto decoded = round_trip(*codec, values);
    EXPECT_LE(squared_error(values, decoded), 1e-4 * squared_norm(values)) << n;
    // A unit vector becomes n^(-1/2) everywhere, so 1 bit, whose scale is the mean magnitude, says
    // all of it.
    std::vector<float> unit(static_cast<std::size_t>(n));
    unit[static_cast<std::size_t>(n / 2)] = 3;
    const auto one_bit = make_quantize_codec({.bits = 1, .block = 1024, .rotate = true});
    if (n != 512 && n != 1024) continue;
    EXPECT_LE(squared_error(unit, round_trip(*one_bit, unit)), 1e-10) << n;
  }
}

// One value of each block thirty times the others, which plain steps of a seventh or a 127th of it
// hardly see; rotated, it takes the root of 1 + 900 / 256 from the steps.
TEST(QuantizeRotation, LowersTheErrorOfASpikyVector) {
  constexpr std::size_t kElements = 4096;
  auto values = make_values(Pattern::kNormal, kElements, 5);
  const auto sigma = static_cast<float>(std::sqrt(squared_norm(values) / kElements));
  for (std::size_t i = 7; i < kElements; i += 256) values[i] = 30 * sigma;
  for (const int bits : {4, 5, 8}) {
    const auto plain = make_quantize_codec({.bits = bits});
    const auto rotated = make_quantize_codec({.bits = bits, .rotate = true});
    const double before = squared_error(values, round_trip(*plain, values));
    const double after = squared_error(values, round_trip(*rotated, values));
    EXPECT_LT(after, 0.25 * before) << "q" << bits;
  }
}

TEST(QuantizeRotation, IsSharedByAllRanksAndChangesWithKeyAndStep) {
  const auto codec = make_quantize_codec({.bits = 4, .rotate = true});
  const auto values = make_values(Pattern::kNormal, 3000, 6);
  const auto body = [&](const Context& ctx) {
    Array grad(DType::kF32, values);
    std::vector<std::byte> out(codec->slot_bytes(3000));
    codec->encode(ctx, grad.view(), nullptr, out);
    return out;
  };
  const Context ctx{.step = 3, .sender = 0, .key_hash = 7};
  const auto expected = body(ctx);
  for (const std::int32_t sender : {-1, 1, 2}) {
    EXPECT_EQ(body({.step = 3, .sender = sender, .key_hash = 7}), expected);
  }
  EXPECT_NE(body({.step = 4, .sender = 0, .key_hash = 7}), expected);
  EXPECT_NE(body({.step = 3, .sender = 0, .key_hash = 8}), expected);
}

// What is sent whole at a boundary of rotations is sent alone as well, with the same key and step.
TEST(QuantizeRotation, RangesAtItsGranularityEncodeAlone) {
  const auto codec = make_quantize_codec({.bits = 4, .rotate = true});
  const std::int64_t grain = codec->traits().granularity;
  ASSERT_EQ(grain, 1024);
  const auto values = make_values(Pattern::kNormal, 3 * grain + 5, 18);
  const auto whole = round_trip(*codec, values);
  for (const std::int64_t begin : {std::int64_t{0}, grain, 3 * grain}) {
    const std::vector<float> range(values.begin() + begin, values.end());
    const auto decoded = round_trip(*codec, range);
    EXPECT_TRUE(std::equal(decoded.begin(), decoded.end(), whole.begin() + begin)) << begin;
  }
}

// Element by element: the mean of many encodings is v, within six standard errors of an error
// whose bound the kind states. The error at v between two neighbours a step apart has at most the
// variance step^2 / 4.
struct Unbiased {
  QuantizeOptions options;
  // The step at v of a block of largest magnitude `largest` and norm `norm`.
  double (*step)(double v, double largest, double norm);
};

class QuantizeUnbiased : public testing::TestWithParam<Unbiased> {};

TEST_P(QuantizeUnbiased, MeanIsTheValue) {
  constexpr std::size_t kElements = 192;
  constexpr int kTrials = 1500;
  const auto codec = make_quantize_codec(GetParam().options);
  ASSERT_TRUE(codec->traits().unbiased);
  auto values = make_values(Pattern::kNormal, kElements, 17);
  for (std::size_t i = 0; i < kElements; i += 3) values[i] *= 0x1p-6F;
  double largest = 0;
  for (const float v : values) largest = std::max(largest, std::fabs(static_cast<double>(v)));
  const double norm = std::sqrt(squared_norm(values));
  std::vector<double> mean(kElements);
  for (int t = 0; t < kTrials; ++t) {
    const auto decoded =
        round_trip(*codec, values, {.step = static_cast<std::uint64_t>(t / 2), .sender = t % 2});
    for (std::size_t i = 0; i < kElements; ++i) {
      mean[i] += static_cast<double>(decoded[i]) / kTrials;
    }
  }
  for (std::size_t i = 0; i < kElements; ++i) {
    const auto v = static_cast<double>(values[i]);
    const double sigma = GetParam().step(std::fabs(v), largest, norm) / 2 / std::sqrt(kTrials);
    EXPECT_NEAR(mean[i], v, 6 * sigma + 1e-6 * largest) << codec->name() << " element " << i;
  }
}

// Between neighbouring powers of two, the smallest of `levels` of which is the one below zero's.
double power_step(double v, double largest, int levels) {
  const int top = static_cast<int>(std::ceil(std::log2(largest)));
  return std::ldexp(1.0, std::max(std::ilogb(v), top - levels + 1));
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, QuantizeUnbiased,
    testing::Values(
        Unbiased{{.bits = 1, .block = 192, .stochastic = true},
                 [](double, double m, double) { return 2 * m; }},
        Unbiased{{.bits = 4, .block = 192, .stochastic = true},
                 [](double, double m, double) { return m / 7; }},
        Unbiased{{.bits = 2, .kind = QuantizeKind::kMaxMin, .block = 192, .stochastic = true},
                 [](double, double m, double) { return 2 * m / 3; }},
        Unbiased{{.bits = 2, .kind = QuantizeKind::kQsgd, .block = 192, .stochastic = true},
                 [](double, double, double norm) { return norm; }},
        Unbiased{{.bits = 4, .kind = QuantizeKind::kQsgd, .block = 192, .stochastic = true},
                 [](double, double, double norm) { return norm / 7; }},
        Unbiased{{.bits = 2, .kind = QuantizeKind::kNatural, .block = 192, .stochastic = true},
                 [](double v, double m, double) { return power_step(v, m, 1); }},
        Unbiased{{.bits = 3, .kind = QuantizeKind::kNatural, .block = 192, .stochastic = true},
                 [](double v, double m, double) { return power_step(v, m, 3); }},
        Unbiased{{.bits = 8, .kind = QuantizeKind::kNatural, .block = 192, .stochastic = true},
                 [](double v, double m, double) { return power_step(v, m, 127); }},
        Unbiased{{.bits = 4,
                  .kind = QuantizeKind::kMx,
                  .element = MxElement::kE2M1,
                  .block = 32,
                  .stochastic = true},
                 // 2 of 6 is the widest step; the scale is less than 2 / 3 too large.
                 [](double, double m, double) { return m * 2 / 3; }},
        Unbiased{{.bits = 8,
                  .kind = QuantizeKind::kMx,
                  .element = MxElement::kE5M2,
                  .block = 32,
                  .stochastic = true},
                 [](double, double m, double) { return m / 4; }},
        // The error of a rotated value is spread over all: each has the variance of a step.
        Unbiased{{.bits = 4, .block = 256, .stochastic = true, .rotate = true},
                 [](double, double, double norm) { return norm / std::sqrt(192) * 5 / 7; }}));

// TernGrad is unbiased for the values clipped at 2.5 sigma, and says so by no trait.
TEST(QuantizeTernGrad, MeanIsTheClippedValue) {
  constexpr std::size_t kElements = 256;
  constexpr int kTrials = 1500;
  const auto codec =
      make_quantize_codec({.bits = 2, .kind = QuantizeKind::kTernGrad, .stochastic = true});
  EXPECT_FALSE(codec->traits().unbiased);
  auto values = make_values(Pattern::kNormal, kElements, 19);
  values[3] = 9;
  values[200] = -7;
  const double sigma = std::sqrt(squared_norm(values) / kElements);
  const double clip = 2.5 * sigma;
  std::vector<double> mean(kElements);
  for (int t = 0; t < kTrials; ++t) {
    const auto decoded = round_trip(*codec, values, {.step = static_cast<std::uint64_t>(t)});
    for (std::size_t i = 0; i < kElements; ++i) {
      const auto x = static_cast<double>(decoded[i]);
      EXPECT_TRUE(x == 0 || std::fabs(std::fabs(x) - clip) < 1e-5 * clip);
      mean[i] += x / kTrials;
    }
  }
  for (std::size_t i = 0; i < kElements; ++i) {
    const double v = std::clamp(static_cast<double>(values[i]), -clip, clip);
    EXPECT_NEAR(mean[i], v, 6 * clip / 2 / std::sqrt(kTrials)) << i;
  }
}

TEST(QuantizeTernGrad, FiveTritsTakeAByte) {
  const auto codec = make_quantize_codec(
      {.bits = 2, .kind = QuantizeKind::kTernGrad, .block = 4096, .stochastic = true});
  EXPECT_EQ(codec->slot_bytes(4096), 2U + 4 + 820);
  EXPECT_EQ(codec->slot_bytes(1), 2U + 4 + 1);
}

// A half of the distance between an element's neighbours; the formats' own figures (OCP MX 1.0).
TEST(QuantizeMx, ErrorIsBoundedByTheFormat) {
  struct Format {
    MxElement element;
    int mantissa;
    int exponents;  // between the largest value's and the smallest normal one's
    double largest;
  };
  for (const Format& format :
       {Format{MxElement::kE4M3, 3, 14, 448.0 / 256}, Format{MxElement::kE5M2, 2, 29, 1.75},
        Format{MxElement::kE2M3, 3, 2, 7.5 / 4}, Format{MxElement::kE3M2, 2, 6, 28.0 / 16},
        Format{MxElement::kE2M1, 1, 2, 6.0 / 4}}) {
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kAlternating}) {
      const auto codec = make_quantize_codec({.bits = mx_bits(format.element),
                                              .kind = QuantizeKind::kMx,
                                              .element = format.element,
                                              .block = 32});
      const auto values = make_values(pattern, 300, 3);
      const auto decoded = round_trip(*codec, values);
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t begin = i / 32 * 32;
        double most = 0;
        for (std::size_t j = begin; j < std::min(begin + 32, values.size()); ++j) {
          most = std::max(most, std::fabs(static_cast<double>(values[j])));
        }
        const double v = std::fabs(static_cast<double>(values[i]));
        const int top = std::ilogb(most);
        const int place = std::max(v == 0 ? -1000 : std::ilogb(v), top - format.exponents);
        const double half = std::ldexp(0.5, place - format.mantissa);
        const double cut = std::max(0.0, v - std::ldexp(format.largest, top));
        EXPECT_LE(std::fabs(static_cast<double>(values[i] - decoded[i])), half + cut)
            << codec->name() << " " << name(pattern) << " element " << i;
      }
    }
  }
}

// Codes, scales and their places in the examples of the formats.
TEST(QuantizeMx, KnownValues) {
  const std::vector<float> values = {6,     -4, 3,    2.5F, 1.75F,  -0.25F,
                                     0.26F, 0,  5.0F, 3.5F, -0.75F, 7};
  const auto codec = make_quantize_codec(
      {.bits = 4, .kind = QuantizeKind::kMx, .element = MxElement::kE2M1, .block = 32});
  // To nearest, ties to even; 7 is cut to the largest float.
  EXPECT_EQ(round_trip(*codec, values),
            (std::vector<float>{6, -4, 3, 2, 2, 0, 0.5F, 0, 4, 4, -1, 6}));
  EXPECT_EQ(codec->slot_bytes(32), 2U + 1 + 32);
  EXPECT_EQ(codec->slot_bytes(256), 2U + 8 + 128);
}

TEST(QuantizeMaxMin, ErrorIsHalfAStepOfTheRange) {
  for (const int bits : {1, 2, 4, 8}) {
    auto values = make_values(Pattern::kNormal, 256, 3);
    for (float& v : values) v += 100;  // far from zero
    const auto codec = make_quantize_codec({.bits = bits, .kind = QuantizeKind::kMaxMin});
    const auto [least, most] = std::minmax_element(values.begin(), values.end());
    const float step = (*most - *least) / static_cast<float>((1 << bits) - 1);
    const auto decoded = round_trip(*codec, values);
    for (std::size_t i = 0; i < values.size(); ++i) {
      EXPECT_LE(std::fabs(values[i] - decoded[i]), 0.5F * step + 2e-5F) << "q" << bits;
    }
  }
  const std::vector<float> same(77, -1.25F);
  EXPECT_EQ(round_trip(*make_quantize_codec({.bits = 3, .kind = QuantizeKind::kMaxMin}), same),
            same);
}

TEST(QuantizeNatural, PowersOfTwoArriveAndTheRestIsNextToThem) {
  const auto codec =
      make_quantize_codec({.bits = 4, .kind = QuantizeKind::kNatural, .stochastic = true});
  const std::vector<float> powers = {1, -0.5F, 0.25F, 0.125F, 0.0625F, -0.03125F, 0.015625F, 0};
  EXPECT_EQ(round_trip(*codec, powers), powers);
  const auto values = make_values(Pattern::kNormal, 256, 21);
  const auto decoded = round_trip(*codec, values);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const float ratio = decoded[i] / values[i];
    EXPECT_TRUE(decoded[i] == 0 || (ratio > 0.5F && ratio <= 2) || std::fabs(values[i]) < 0.1F);
  }
}

// Zeros give zeros without memory, too: no scale divides by its norm.
TEST(Quantize, ZerosDecodeToZeros) {
  for (const QuantizeOptions& options : all_kinds()) {
    for (const bool rotate : {false, true}) {
      QuantizeOptions chosen = options;
      chosen.rotate = rotate;
      const auto decoded = round_trip(*make_quantize_codec(chosen), std::vector<float>(300));
      for (const float x : decoded) ASSERT_EQ(x, 0) << spec_of(chosen);
    }
  }
}

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

TEST(Quantize, RefusesBodiesOfOtherBitsElementsOrRotation) {
  const auto values = make_values(Pattern::kNormal, 300, 1);
  Array grad(DType::kF32, values);
  const auto q8 = make_quantize_codec({.bits = 8, .kind = QuantizeKind::kMx, .block = 32});
  std::vector<std::byte> body(q8->slot_bytes(300) + 100);
  q8->encode({}, grad.view(), nullptr, body);
  const auto other = make_quantize_codec(
      {.bits = 8, .kind = QuantizeKind::kMx, .element = MxElement::kE5M2, .block = 32});
  const auto rotated =
      make_quantize_codec({.bits = 8, .kind = QuantizeKind::kMx, .block = 32, .rotate = true});
  const auto q4 = make_quantize_codec(
      {.bits = 4, .kind = QuantizeKind::kMx, .element = MxElement::kE2M1, .block = 32});
  Array out(DType::kF32, 300);
  for (const auto& codec : {other, rotated, q4}) {
    EXPECT_THROW(codec->decode({}, body, out.view()), CorruptPayload) << codec->name();
  }
}

TEST(Quantize, RefusesOptionsOutOfRange) {
  EXPECT_THROW(make_quantize_codec({.bits = 0}), InvalidArgument);
  EXPECT_THROW(make_quantize_codec({.bits = 9}), InvalidArgument);
  for (const std::int64_t block : {0, 32, 100, 8192}) {
    EXPECT_THROW(make_quantize_codec({.block = block}), InvalidArgument) << block;
  }
  const auto refused = [](const QuantizeOptions& options) {
    EXPECT_THROW(make_quantize_codec(options), InvalidArgument);
  };
  refused({.bits = 1, .kind = QuantizeKind::kQsgd, .stochastic = true});
  refused({.bits = 4, .kind = QuantizeKind::kQsgd});
  refused({.bits = 3, .kind = QuantizeKind::kTernGrad, .stochastic = true});
  refused({.bits = 1, .kind = QuantizeKind::kNatural, .stochastic = true});
  refused({.bits = 6, .kind = QuantizeKind::kMx, .block = 32});
  refused({.bits = 8, .kind = QuantizeKind::kMx, .block = 96});
  refused({.bits = 8, .kind = QuantizeKind::kMx, .block = 512});
  refused({.bits = 8, .block = 192, .rotate = true});
}

}  // namespace
}  // namespace thinwire
