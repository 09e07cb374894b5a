// What a sample holds, where it lies, and that in time nothing is left out.
#include "compressors/adaptive/gradient_sample.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "compressors/core/error.h"
#include "tests/support/patterns.h"

namespace thinwire {
namespace {

using Shape = std::vector<std::int64_t>;

// Values that tell their index, up to 2^24.
std::vector<float> indices(std::int64_t n) {
  std::vector<float> values(static_cast<std::size_t>(n));
  std::iota(values.begin(), values.end(), 0.0F);
  return values;
}

GradientSample sample_of(std::vector<float>& values, const Shape& shape, std::uint64_t counter,
                         std::int64_t most = kMinSampleElements) {
  GradientSample sample;
  take_sample({.grad = view(values), .shape = shape}, 12345, counter, sample, most);
  return sample;
}

TEST(GradientSample, IsAllOfWhatIsSmall) {
  for (const Shape& shape : {Shape{}, Shape{0}, Shape{1}, Shape{1, 5}, Shape{5, 1}, Shape{0, 7},
                             Shape{128, 128}, Shape{4, 3, 2}, Shape{kMinSampleElements}}) {
    const MatrixExtents extents{std::span(shape)};
    std::vector<float> values = indices(extents.elements());
    const GradientSample sample = sample_of(values, shape, 3);
    EXPECT_EQ(sample.values, values);
    EXPECT_EQ(sample.extents.rows, extents.rows);
    EXPECT_EQ(sample.extents.columns, extents.columns);
    EXPECT_TRUE(sample.whole());
  }
}

TEST(GradientSample, IsBoundedAndCoversAllInTime) {
  for (const Shape& shape :
       {Shape{1000, 300}, Shape{3, 100'000}, Shape{100'000, 3}, Shape{257, 1031}, Shape{17, 9973},
        Shape{64, 64, 3, 3}, Shape{33, 512}, Shape{100'003}, Shape{1, 70'000}, Shape{70'000, 1},
        Shape{kMinSampleElements + 1}, Shape{2, kMinSampleElements}, Shape{129, 128}}) {
    SCOPED_TRACE(testing::PrintToString(shape));
    const MatrixExtents extents{std::span(shape)};
    std::vector<float> values = indices(extents.elements());
    std::vector<bool> seen(values.size());
    std::size_t left = values.size();
    for (std::uint64_t counter = 0; left > 0; ++counter) {
      ASSERT_LT(counter, 5 * values.size() / kMinSampleElements + 10) << left << " never sampled";
      const GradientSample sample = sample_of(values, shape, counter);
      ASSERT_LE(sample.values.size(), kMinSampleElements);
      EXPECT_GE(3 * sample.values.size(), kMinSampleElements);
      ASSERT_EQ(static_cast<std::int64_t>(sample.values.size()), sample.extents.elements());
      EXPECT_EQ(sample.extents.is_matrix(), extents.is_matrix());
      EXPECT_FALSE(sample.whole());
      for (const float index : sample.values) {
        const auto at = static_cast<std::size_t>(index);
        if (!seen[at]) --left;
        seen[at] = true;
      }
      if (!extents.is_matrix()) continue;
      // Rows of the sample are parts of rows, all from the same column on.
      const std::int64_t first = static_cast<std::int64_t>(sample.values[0]) % extents.columns;
      for (std::int64_t i = 0; i < sample.extents.elements(); ++i) {
        const auto index = static_cast<std::int64_t>(sample.values[static_cast<std::size_t>(i)]);
        ASSERT_EQ(index % extents.columns, first + i % sample.extents.columns);
      }
    }
  }
}

TEST(GradientSample, DependsOnKeyAndCounterAlone) {
  std::vector<float> values = indices(1 << 18);
  const Shape shape = {1 << 10, 1 << 8};
  const auto sampled = [&](std::uint64_t key, std::uint64_t counter) {
    GradientSample sample;
    take_sample({.grad = view(values), .shape = shape}, key, counter, sample, kMinSampleElements);
    return sample.values;
  };
  EXPECT_EQ(sampled(7, 1), sampled(7, 1));
  EXPECT_NE(sampled(7, 1), sampled(7, 2));
  EXPECT_NE(sampled(7, 1), sampled(8, 1));
  constexpr auto kMost = std::numeric_limits<std::uint64_t>::max();
  EXPECT_EQ(sampled(kMost, kMost).size(), sampled(7, 1).size());
}

TEST(GradientSample, IsOfGradientPlusResidual) {
  const std::int64_t n = 3 * kMinSampleElements;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(name(dtype));
    Array grad(dtype, make_values(Pattern::kNormal, n, 1));
    std::vector<float> v = grad.values();
    const Shape shape = {n / 128, 128};
    GradientSample got;
    take_sample({.grad = grad.view(), .shape = shape}, 5, 1, got, kMinSampleElements);
    GradientSample expected;
    take_sample({.grad = view(v), .shape = shape}, 5, 1, expected, kMinSampleElements);
    EXPECT_EQ(got.values, expected.values);

    for (const DType stored : {DType::kF32, DType::kBF16}) {
      Array residual(stored, make_values(Pattern::kNormal, n, 2));
      const std::vector<float> kept = residual.values();
      std::vector<float> sum = v;
      for (std::size_t i = 0; i < v.size(); ++i) sum[i] += 0.5F * kept[i];
      take_sample({.grad = grad.view(), .shape = shape, .residual = residual.view(), .decay = 0.5F},
                  5, 1, got, kMinSampleElements);
      take_sample({.grad = view(sum), .shape = shape}, 5, 1, expected, kMinSampleElements);
      EXPECT_EQ(got.values, expected.values);
    }
    EXPECT_TRUE(grad.guards_intact());
  }
}

TEST(GradientSample, RefusesSizesThatDoNotFit) {
  std::vector<float> values(100);
  std::vector<float> residual(99);
  const Shape shape = {10, 10};
  const Shape other = {10, 11};
  GradientSample sample;
  EXPECT_THROW(take_sample({.grad = view(values), .shape = other}, 0, 0, sample), InvalidArgument);
  EXPECT_THROW(
      take_sample({.grad = view(values), .shape = shape, .residual = view(residual)}, 0, 0, sample),
      InvalidArgument);
  EXPECT_THROW(
      take_sample({.grad = view(values), .shape = shape}, 0, 0, sample, kMinSampleElements - 1),
      InvalidArgument);
  EXPECT_THROW(
      take_sample({.grad = {values.data(), 100, DType::kOther}, .shape = shape}, 0, 0, sample),
      InvalidArgument);
}

}  // namespace
}  // namespace thinwire
