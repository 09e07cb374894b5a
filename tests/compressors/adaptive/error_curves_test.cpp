// Estimated errors beside those of the real codecs; what curves say of hostile values.
#include "compressors/adaptive/error_curves.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "compressors/adaptive/candidates.h"
#include "compressors/adaptive/error_curves_kernels.h"
#include "compressors/adaptive/error_curves_reference.h"
#include "compressors/core/spec.h"
#include "tests/compressors/adaptive/codec_error.h"
#include "tests/compressors/adaptive/gradients.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Shape = std::vector<std::int64_t>;

ErrorCurves curves_of(std::vector<float> v, const Shape& shape, std::uint64_t counter = 0,
                      std::int64_t most = kSampleElements) {
  GradientSample sample;
  take_sample({.grad = view(v), .shape = shape}, 99, counter, sample, most);
  return measure_errors(sample);
}

bool same_bits(const ErrorCurves& a, const ErrorCurves& b) {
  return std::memcmp(a.values().data(), b.values().data(), a.values().size_bytes()) == 0;
}

void expect_finite(const ErrorCurves& curves) {
  for (std::size_t i = 0; i < ErrorCurves::kValues; ++i) {
    EXPECT_TRUE(std::isfinite(curves.values()[i])) << i;
    EXPECT_GE(curves.values()[i], 0) << i;
  }
}

// Relative deviation of each candidate's estimate, by what is allowed for its family.
struct Bounds {
  double payload = 0;
  double lowrank = 0;
};

void expect_near(const ErrorCurves& curves, const std::vector<float>& v, const Shape& shape,
                 const Bounds& bounds) {
  for (const CandidateCodec& candidate : make_candidates(shape, DType::kF32)) {
    const double measured = codec_error(candidate.spec, v, shape);
    const double estimated = error(candidate, curves);
    const double bound = candidate.curve == Curve::kLowRank ? bounds.lowrank : bounds.payload;
    EXPECT_NEAR(estimated, measured, bound * measured + 1e-4) << candidate.spec;
  }
}

TEST(ErrorCurves, OfAllOfATensorAreTheCodecsErrors) {
  for (const GradientKind kind : kGradientKinds) {
    for (const Shape& shape : {Shape{512, 256}, Shape{130, 1000}, Shape{1000, 64}}) {
      SCOPED_TRACE(testing::Message() << name(kind) << " " << testing::PrintToString(shape));
      const std::vector<float> v = make_gradient(kind, shape[0], shape[1]);
      expect_near(curves_of(v, shape), v, shape, {.payload = 0.03, .lowrank = 0.04});
    }
  }
}

TEST(ErrorCurves, OfSomeSamplesAreNearTheCodecsErrors) {
  for (const GradientKind kind : kGradientKinds) {
    for (const Shape& shape : {Shape{1024, 1024}, Shape{300, 4000}, Shape{20'000, 64}}) {
      SCOPED_TRACE(testing::Message() << name(kind) << " " << testing::PrintToString(shape));
      const std::vector<float> v = make_gradient(kind, shape[0], shape[1]);
      ErrorCurves curves;
      for (std::uint64_t counter = 0; counter < 8; ++counter) {
        curves += curves_of(v, shape, counter);
      }
      // Where more is sent than is not zero, q4 goes by the least value of all, and where the rank
      // is about that of the few rows, low rank by their number: no sample tells either.
      const bool sparse = kind == GradientKind::kSparseRows;
      expect_near(curves, v, shape,
                  {.payload = sparse ? 0.25 : 0.08, .lowrank = sparse ? 0.35 : 0.13});
    }
  }
}

TEST(ErrorCurves, OfVectorsAndSmallTensors) {
  for (const std::int64_t n : {1000, 4096, 100'003}) {
    for (const GradientKind kind : {GradientKind::kNormal, GradientKind::kStudent}) {
      SCOPED_TRACE(testing::Message() << name(kind) << " " << n);
      const std::vector<float> v = make_gradient(kind, 1, n);
      expect_near(curves_of(v, {n}), v, {n}, {.payload = 0.05});
    }
  }
}

TEST(ErrorCurves, TheSquaredNormIsTheWholeTensors) {
  const std::vector<float> v = make_gradient(GradientKind::kNormal, 2000, 300);
  const double exact = norm_of(v) * norm_of(v);
  EXPECT_NEAR(curves_of(v, {2000, 300}).squared_norm(), exact, 0.02 * exact);
  const std::vector<float> small = make_gradient(GradientKind::kNormal, 200, 300);
  const double exact_small = norm_of(small) * norm_of(small);
  EXPECT_NEAR(curves_of(small, {200, 300}).squared_norm(), exact_small, 1e-5 * exact_small);
}

TEST(ErrorCurves, FallWithWhatIsSent) {
  for (const Pattern pattern : kPatterns) {
    SCOPED_TRACE(name(pattern));
    const ErrorCurves curves = curves_of(make_values(pattern, 60'000, 4), {300, 200});
    expect_finite(curves);
    if (curves.zero()) continue;
    double last = 1 + 1e-6;
    for (double density = 1e-5; density <= 1; density *= 1.25) {
      EXPECT_LE(curves.topk(density, TopKValues::kF32), last) << density;
      last = curves.topk(density, TopKValues::kF32) + 1e-6;
      EXPECT_GE(curves.topk(density, TopKValues::kQ4), curves.topk(density, TopKValues::kQ8));
      EXPECT_GE(curves.topk(density, TopKValues::kQ8), curves.topk(density, TopKValues::kF32));
    }
    EXPECT_EQ(curves.topk(1, TopKValues::kF32), 0);
    for (int bits = 3; bits <= 8; ++bits) {
      EXPECT_LE(curves.quantize(bits), curves.quantize(bits - 1) + 1e-6) << bits;
    }
    for (int rank = 2; rank <= kCurveRanks; ++rank) {
      EXPECT_LE(curves.lowrank(rank), curves.lowrank(rank - 1)) << rank;
    }
    EXPECT_LE(curves.onebit(OneBitScale::kL1, kCurveBlock), 1);
    EXPECT_LE(curves.onebit(OneBitScale::kL1, 0), 1);
  }
}

TEST(ErrorCurves, OfHostilePatternsAreTheCodecsErrors) {
  for (const Pattern pattern :
       {Pattern::kEqual, Pattern::kSparse, Pattern::kSpike, Pattern::kAlternating}) {
    SCOPED_TRACE(name(pattern));
    const std::vector<float> v = make_values(pattern, 64'000, 4);
    const ErrorCurves curves = curves_of(v, {64'000});
    for (const CandidateCodec& candidate : make_candidates(Shape{64'000}, DType::kF32)) {
      const double measured = codec_error(candidate.spec, v, Shape{64'000});
      EXPECT_NEAR(error(candidate, curves), measured, 0.05 * measured + 2e-3) << candidate.spec;
    }
  }
}

TEST(ErrorCurves, AroundTheEdgesOfBlocks) {
  for (const std::int64_t n : {1, 2, 3, 63, 64, 65, 255, 256, 257, 511, 513, 4095, 4097}) {
    SCOPED_TRACE(n);
    const std::vector<float> v = make_gradient(GradientKind::kNormal, 1, n);
    const ErrorCurves curves = curves_of(v, {n});
    expect_finite(curves);
    for (int bits = 1; bits <= 8; ++bits) {
      const double measured = codec_error("q" + std::to_string(bits), v, Shape{n});
      EXPECT_NEAR(curves.quantize(bits), measured, 1e-4 * measured + 1e-6) << bits;
    }
    for (const auto& [spec, scale, block] :
         {std::tuple{"onebit", OneBitScale::kL2, 0},
          {"onebit,scale=l1", OneBitScale::kL1, 0},
          {"onebit,block=256", OneBitScale::kL2, 256},
          {"onebit,block=256,scale=l1", OneBitScale::kL1, 256}}) {
      const double measured = codec_error(spec, v, Shape{n});
      EXPECT_NEAR(curves.onebit(scale, block), measured, 1e-4 * measured + 1e-3) << spec;
    }
  }
}

TEST(ErrorCurves, OfOneRowOrColumnHaveNoRank) {
  for (const Shape& shape : {Shape{1, 1}, Shape{1, 100}, Shape{100, 1}, Shape{100}, Shape{}}) {
    const MatrixExtents extents{std::span(shape)};
    const ErrorCurves curves =
        curves_of(make_gradient(GradientKind::kNormal, extents.rows, extents.columns), shape);
    expect_finite(curves);
    EXPECT_EQ(curves.lowrank(16), 1);
  }
  const ErrorCurves two = curves_of(make_gradient(GradientKind::kNormal, 2, 100), {2, 100});
  EXPECT_GT(two.lowrank(1), 0.1);
  EXPECT_LT(two.lowrank(2), 1e-3);
  EXPECT_LT(two.lowrank(16), 1e-3);
}

TEST(ErrorCurves, SayWhatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const std::size_t at : {0UL, 1UL, 255UL, 256UL, 9'983UL, 9'999UL}) {
      std::vector<float> v = make_gradient(GradientKind::kNormal, 100, 100);
      v[at] = bad;
      const ErrorCurves curves = curves_of(v, {100, 100});
      EXPECT_TRUE(curves.nonfinite()) << bad << " at " << at;
      EXPECT_TRUE(curves.zero());
      expect_finite(curves);
      EXPECT_EQ(curves.squared_norm(), 0);
    }
  }
}

TEST(ErrorCurves, OfZerosLoseNothing) {
  for (const std::int64_t n : {0, 1, 300, 10'000}) {
    for (const Pattern pattern : {Pattern::kZero, Pattern::kDenormal}) {
      const ErrorCurves curves = curves_of(make_values(pattern, n, 1), {n});
      EXPECT_TRUE(curves.zero());
      EXPECT_FALSE(curves.nonfinite());
      EXPECT_EQ(curves.squared_norm(), 0);
      for (const CandidateCodec& candidate : make_candidates(Shape{1000, 1000}, DType::kF32)) {
        EXPECT_EQ(error(candidate, curves), 0) << candidate.spec;
      }
    }
  }
  EXPECT_TRUE(ErrorCurves().zero());
}

TEST(ErrorCurves, OfHugeValuesStayFinite) {
  const ErrorCurves curves = curves_of(make_values(Pattern::kHuge, 10'000, 1), {100, 100});
  expect_finite(curves);
  EXPECT_EQ(static_cast<float>(curves.squared_norm()), std::numeric_limits<float>::max());
  EXPECT_GT(curves.quantize(4), 0.01);
}

TEST(ErrorCurves, AverageOverRanks) {
  const Shape shape = {200, 100};
  const ErrorCurves a = curves_of(make_gradient(GradientKind::kNormal, 200, 100, 1), shape);
  const ErrorCurves b = curves_of(make_gradient(GradientKind::kStudent, 200, 100, 2), shape);
  const ErrorCurves zeros = curves_of(std::vector<float>(20'000), shape);
  std::vector<float> bad(20'000);
  bad[7] = std::numeric_limits<float>::quiet_NaN();

  ErrorCurves mean = a;
  (mean += b) *= 0.5F;
  const double expected =
      std::sqrt((a.quantize(4) * a.quantize(4) + b.quantize(4) * b.quantize(4)) / 2);
  EXPECT_NEAR(mean.quantize(4), expected, 1e-6);
  EXPECT_NEAR(mean.squared_norm(), (a.squared_norm() + b.squared_norm()) / 2,
              1e-6 * mean.squared_norm());
  EXPECT_FALSE(mean.zero());

  // A rank without a gradient has a norm, and no say in what codecs lose.
  ErrorCurves with_zeros = a;
  with_zeros += zeros;
  EXPECT_NEAR(with_zeros.topk(0.01, TopKValues::kQ8), a.topk(0.01, TopKValues::kQ8), 1e-6);
  EXPECT_NEAR(with_zeros.squared_norm(), a.squared_norm() / 2, 1e-6 * a.squared_norm());

  ErrorCurves with_bad = a;
  with_bad += curves_of(bad, shape);
  EXPECT_TRUE(with_bad.nonfinite());
  EXPECT_NEAR(with_bad.lowrank(4), a.lowrank(4), 1e-6);
  EXPECT_NEAR(with_bad.squared_norm(), a.squared_norm(), 1e-6 * a.squared_norm());

  ErrorCurves restored;
  std::copy(mean.values().begin(), mean.values().end(), restored.values().begin());
  EXPECT_TRUE(same_bits(restored, mean));
}

TEST(ErrorCurves, AreTheSameFloatsOnEveryTarget) {
  for (const GradientKind kind : kGradientKinds) {
    SCOPED_TRACE(name(kind));
    for (const Shape& shape : {Shape{100, 333}, Shape{3000, 77}, Shape{200'001}}) {
      const MatrixExtents extents{std::span(shape)};
      const std::vector<float> v = make_gradient(kind, extents.rows, extents.columns);
      set_simd_limit("scalar");
      const ErrorCurves expected = curves_of(v, shape, 5);
      for_each_simd_target([&] { EXPECT_TRUE(same_bits(curves_of(v, shape, 5), expected)); });
    }
  }
}

TEST(ErrorCurves, KernelsMatchTheReference) {
  for (const Pattern pattern : kPatterns) {
    SCOPED_TRACE(name(pattern));
    const std::vector<float> values = make_values(pattern, 5 * kErrorBlock + 1, 9);
    std::vector<BlockErrors> expected(5);
    block_errors_reference(values.data() + 1, 5, expected.data());
    for_each_simd_target([&] {
      std::vector<BlockErrors> got(5);
      block_errors(values.data() + 1, 5, got.data());
      EXPECT_EQ(std::memcmp(got.data(), expected.data(), 5 * sizeof(BlockErrors)), 0);
    });
  }
}

TEST(ErrorCurves, WithoutLowRankAllElseIsTheSame) {
  std::vector<float> v = make_gradient(GradientKind::kRecurrent, 100, 300);
  GradientSample sample;
  take_sample({.grad = view(v), .shape = Shape{100, 300}}, 1, 1, sample);
  const ErrorCurves with = measure_errors(sample);
  const ErrorCurves without = measure_errors(sample, false);
  EXPECT_EQ(without.lowrank(16), 1);
  EXPECT_LT(with.lowrank(16), 1);
  EXPECT_EQ(without.topk(0.01, TopKValues::kQ4), with.topk(0.01, TopKValues::kQ4));
  EXPECT_EQ(without.quantize(2), with.quantize(2));
}

}  // namespace
}  // namespace thinwire
