#include "optim/optim_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "compressors/core/convert.h"
#include "compressors/core/error.h"
#include "optim/optim_reference.h"
#include "tests/optim/reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire::optim {
namespace {

constexpr DType kGradTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

const SgdOptions kPlain{.lr = 0.05, .momentum = 0, .weight_decay = 1e-4};
const SgdOptions kMomentum{.lr = 0.05, .momentum = 0.9, .weight_decay = 5e-4};
const SgdOptions kNesterov{.lr = 0.05, .momentum = 0.9, .weight_decay = 5e-4, .nesterov = true};
const AdamOptions kAdam{.lr = 1e-3, .eps = 1e-5, .weight_decay = 0.01};
const AdamOptions kAdamW{.lr = 1e-3, .weight_decay = 0.01, .decoupled = true};
const AdamOptions kUncorrected{.lr = 1e-3, .bias_correction = false};

float* floats(Array& array) { return static_cast<float*>(array.view().data); }
std::span<float> span_of(Array& array) {
  return {floats(array), static_cast<std::size_t>(array.view().elements)};
}

struct Inputs {
  std::vector<float> grad;
  std::vector<float> weights;
  std::vector<float> a;
  std::vector<float> b;  // squares, of which every third is zero
};

Inputs make_inputs(Pattern pattern, std::int64_t n) {
  Inputs in{.grad = make_values(pattern, n, 1),
            .weights = make_values(Pattern::kNormal, n, 2),
            .a = make_values(Pattern::kNormal, n, 3),
            .b = make_values(Pattern::kNormal, n, 4)};
  for (std::size_t i = 0; i < in.b.size(); ++i) in.b[i] *= i % 3 == 0 ? 0 : in.b[i];
  return in;
}

// What a kernel reads and writes: a gradient, weights, two states, and where momentum is sent.
struct Arrays {
  Array grad;
  Array weights;
  Array a;
  Array b;
  Array out;

  Arrays(DType dtype, const Inputs& in, std::int64_t shift = 0)
      : grad(dtype, in.grad, shift),
        weights(DType::kF32, in.weights, shift),
        a(DType::kF32, in.a, shift),
        b(DType::kF32, in.b, shift),
        out(DType::kF32, static_cast<std::int64_t>(in.grad.size()), shift) {}

  bool guards_intact() const {
    return grad.guards_intact() && weights.guards_intact() && a.guards_intact() &&
           b.guards_intact() && out.guards_intact();
  }
};

struct Case {
  std::string name;
  std::function<void(Arrays&)> kernel;
  std::function<void(Arrays&)> reference;
};

Case sgd_case(const std::string& name, const SgdOptions& o, bool velocity) {
  return {name,
          [=](Arrays& x) {
            sgd_step(o, x.grad.view(), span_of(x.weights),
                     velocity ? span_of(x.a) : std::span<float>());
          },
          [=](Arrays& x) {
            sgd_reference(factors_of(o), x.grad.view(), floats(x.weights),
                          velocity ? floats(x.a) : nullptr);
          }};
}

Case dgc_case(const std::string& name, const SgdOptions& o, bool decay) {
  return {name,
          [=](Arrays& x) {
            dgc_step(o, x.grad.view(), span_of(x.weights),
                     decay ? span_of(x.a) : std::span<float>());
          },
          [=](Arrays& x) {
            dgc_reference(factors_of(o), x.grad.view(), floats(x.weights),
                          decay ? floats(x.a) : nullptr);
          }};
}

Case adam_case(const std::string& name, const AdamOptions& o, std::int64_t step) {
  return {name,
          [=](Arrays& x) {
            adam_step(o, step, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b));
          },
          [=](Arrays& x) {
            adam_reference(factors_of(o, step), x.grad.view(), floats(x.weights), floats(x.a),
                           floats(x.b));
          }};
}

std::vector<Case> all_cases() {
  return {
      sgd_case("sgd", kPlain, false),
      sgd_case("sgd with momentum", kMomentum, true),
      sgd_case("sgd, nesterov", kNesterov, true),
      dgc_case("dgc", {.lr = 0.05, .momentum = 0.9}, false),
      dgc_case("dgc with weight decay", kMomentum, true),
      dgc_case("dgc, nesterov", kNesterov, true),
      adam_case("adam", kAdam, 1),
      adam_case("adamw", kAdamW, 7),
      adam_case("adam without bias correction", kUncorrected, 7),
      {"momentum to fp32",
       [](Arrays& x) {
         local_momentum(0.9, x.grad.view(), span_of(x.a), span_of(x.b), x.out.view());
       },
       [](Arrays& x) {
         local_momentum_reference(static_cast<float>(1 - 0.9), x.grad.view(), floats(x.a),
                                  floats(x.b), x.out.view());
       }},
      {"momentum in place",
       [](Arrays& x) {
         local_momentum(0.9, x.grad.view(), span_of(x.a), span_of(x.b), x.grad.view());
       },
       [](Arrays& x) {
         local_momentum_reference(static_cast<float>(1 - 0.9), x.grad.view(), floats(x.a),
                                  floats(x.b), x.grad.view());
       }},
      {"frozen adam",
       [](Arrays& x) {
         frozen_adam_step(kAdamW, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b));
       },
       [](Arrays& x) {
         frozen_adam_reference(frozen_factors_of(kAdamW), x.grad.view(), floats(x.weights),
                               floats(x.a), floats(x.b));
       }},
  };
}

// The same bits, but that any NaN is as good as another.
void expect_same(const Array& got, const Array& expected, const char* what) {
  if (got.bytes() == expected.bytes()) return;
  const std::vector<float> x = got.values();
  const std::vector<float> y = expected.values();
  for (std::size_t i = 0; i < x.size(); ++i) {
    const bool same = std::memcmp(&x[i], &y[i], sizeof(float)) == 0;
    ASSERT_TRUE(same || (std::isnan(x[i]) && std::isnan(y[i])))
        << what << " " << i << ": " << x[i] << ", expected " << y[i];
  }
}

void expect_same(const Arrays& got, const Arrays& expected) {
  expect_same(got.grad, expected.grad, "gradient");
  expect_same(got.weights, expected.weights, "weight");
  expect_same(got.a, expected.a, "first state");
  expect_same(got.b, expected.b, "second state");
  expect_same(got.out, expected.out, "momentum");
}

void compare_targets(const Case& which, DType dtype, const Inputs& inputs) {
  SCOPED_TRACE(which.name + " of " + std::string(name(dtype)) +
               " n=" + std::to_string(inputs.grad.size()));
  Arrays expected(dtype, inputs);
  which.reference(expected);
  for_each_simd_target([&] {
    for (const std::int64_t shift : {0, 1}) {
      Arrays got(dtype, inputs, shift);
      which.kernel(got);
      expect_same(got, expected);
      EXPECT_TRUE(got.guards_intact());
    }
  });
}

TEST(OptimKernels, EveryTargetGivesTheBitsOfTheScalarCode) {
  for (const Pattern pattern : kPatterns) {
    SCOPED_TRACE(name(pattern));
    const Inputs inputs = make_inputs(pattern, 1009);
    for (const Case& which : all_cases()) {
      for (const DType dtype : kGradTypes) compare_targets(which, dtype, inputs);
      if (HasFailure()) return;
    }
  }
}

TEST(OptimKernels, OfAnySize) {
  for (const std::int64_t n : {0, 1, 15, 16, 17, 65537}) {
    const Inputs inputs = make_inputs(Pattern::kNormal, n);
    for (const Case& which : all_cases()) {
      for (const DType dtype : {DType::kF32, DType::kBF16}) compare_targets(which, dtype, inputs);
      if (HasFailure()) return;
    }
  }
}

TEST(OptimKernels, NaNAndInfStayInTheirElement) {
  const Inputs inputs = make_inputs(Pattern::kNormal, 67);
  const std::size_t nan = 5;
  const std::size_t inf = 64;
  const std::size_t masked = 66;  // the variance is 0
  for (const Case& which : all_cases()) {
    SCOPED_TRACE(which.name);
    const bool sends = which.name.starts_with("momentum");
    const bool masks = sends || which.name.starts_with("frozen");
    Arrays clean(DType::kF32, inputs);
    which.kernel(clean);
    for_each_simd_target([&] {
      Arrays hit(DType::kF32, inputs);
      hit.grad.set(nan, std::numeric_limits<float>::quiet_NaN());
      hit.grad.set(inf, std::numeric_limits<float>::infinity());
      hit.grad.set(masked, std::numeric_limits<float>::quiet_NaN());
      which.kernel(hit);
      const Array& changed = !sends                             ? hit.weights
                             : which.name == "momentum to fp32" ? hit.out
                                                                : hit.grad;
      const std::vector<float> x = changed.values();
      EXPECT_TRUE(std::isnan(x[nan]));
      EXPECT_FALSE(std::isfinite(x[inf]));
      EXPECT_EQ(std::isnan(x[masked]), !masks);
      const auto same_elsewhere = [&](const Array& got, const Array& expected) {
        const std::vector<float> y = got.values();
        const std::vector<float> z = expected.values();
        for (std::size_t i = 0; i < y.size(); ++i) {
          if (i == nan || i == inf || i == masked) continue;
          ASSERT_EQ(std::memcmp(&y[i], &z[i], sizeof(float)), 0) << i;
        }
      };
      same_elsewhere(hit.grad, clean.grad);
      same_elsewhere(hit.weights, clean.weights);
      same_elsewhere(hit.a, clean.a);
      same_elsewhere(hit.b, clean.b);
      same_elsewhere(hit.out, clean.out);
    });
  }
}

TEST(OptimKernels, MaskedElementsSendZeroAndStay) {
  const Inputs inputs = make_inputs(Pattern::kNormal, 100);
  for_each_simd_target([&] {
    Arrays x(DType::kF32, inputs);
    local_momentum(0.9, x.grad.view(), span_of(x.a), span_of(x.b), x.out.view());
    frozen_adam_step(kAdamW, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b));
    const std::vector<float> sent = x.out.values();
    const std::vector<float> m = x.a.values();
    const std::vector<float> weights = x.weights.values();
    for (std::size_t i = 0; i < sent.size(); ++i) {
      const bool masked = i % 3 == 0;
      EXPECT_EQ(sent[i] == 0, masked) << i;
      EXPECT_EQ(m[i], masked ? 0 : inputs.grad[i]) << i;
      EXPECT_EQ(weights[i] == inputs.weights[i], masked) << i;
    }
  });
}

// 100 steps beside the papers' formulas in fp64. The bound is twice the running error of the
// formula as written there, in fp32 (reference.h). Twice, because the kernels order operations in
// another way, with at most twice the rounding errors: m + c (g - m) rounds terms of at most
// 3 c (|g| + |m|) where beta1 m + c g rounds some of 2 (beta1 |m| + c |g|), and 3 c <= 4 beta1 for
// every beta1 >= 3/7; the other rearrangements round less often than the formulas.
class HundredSteps : public testing::TestWithParam<DType> {
 protected:
  static constexpr std::int64_t kSteps = 100;
  static constexpr std::int64_t kElements = 131;

  HundredSteps()
      : weights_(DType::kF32, make_values(Pattern::kAlternating, kElements, 9)),
        a_(DType::kF32, zeros()),
        b_(DType::kF32, zeros()),
        coordinates_(kElements) {
    const std::vector<float> start = weights_.values();
    for (std::size_t i = 0; i < coordinates_.size(); ++i) {
      coordinates_[i].weight = exact(static_cast<double>(start[i]));
    }
  }

  static std::vector<float> zeros() { return std::vector<float>(kElements); }

  // With a trend, and scales from 1e-4 to 1; every seventh element is 0 until `dead_until`.
  static Array gradient(std::int64_t step, std::int64_t dead_until = 0) {
    std::vector<float> values =
        make_values(Pattern::kNormal, kElements, static_cast<std::uint64_t>(100 + step));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float scale = std::pow(10.0F, -static_cast<float>(i % 5));
      values[i] = scale * (100 * values[i] + (i % 2 == 0 ? 0.3F : -0.1F));
      if (i % 7 == 0 && step <= dead_until) values[i] = 0;
    }
    return {GetParam(), values};
  }

  template <typename F>
  void each(Array& grad, F&& update) {
    const std::vector<float> g = grad.values();
    for (std::size_t i = 0; i < g.size(); ++i) {
      update(coordinates_[i], exact(static_cast<double>(g[i])));
    }
  }

  static void expect_near(const Array& got, const std::vector<Coordinate>& coordinates,
                          Bounded Coordinate::*what) {
    const std::vector<float> x = got.values();
    for (std::size_t i = 0; i < x.size(); ++i) {
      const Bounded expected = coordinates[i].*what;
      ASSERT_LE(std::fabs(static_cast<double>(x[i]) - expected.value), 2 * expected.error) << i;
    }
  }

  // After the last step: near the reference, and the bound says something: it is a small part of
  // the way that the weights have gone.
  void expect_weights_near() const {
    expect_near(weights_, coordinates_, &Coordinate::weight);
    const std::vector<float> start = make_values(Pattern::kAlternating, kElements, 9);
    double way = 0;
    double bound = 0;
    for (std::size_t i = 0; i < coordinates_.size(); ++i) {
      way += std::fabs(coordinates_[i].weight.value - static_cast<double>(start[i]));
      bound += 2 * coordinates_[i].weight.error;
    }
    RecordProperty("bound_to_way", std::to_string(bound / way));
    EXPECT_LT(bound, 1e-3 * way);
  }

  void run_sgd(const SgdOptions& options) {
    for (std::int64_t step = 1; step <= kSteps; ++step) {
      Array grad = gradient(step);
      each(grad, [&](Coordinate& c, Bounded g) { reference_sgd(c, g, options); });
      sgd_step(options, grad.view(), span_of(weights_),
               options.momentum > 0 ? span_of(a_) : std::span<float>());
      if (options.momentum > 0) expect_near(a_, coordinates_, &Coordinate::velocity);
      if (HasFatalFailure()) return;
    }
    expect_weights_near();
  }

  void run_adam(const AdamOptions& options) {
    for (std::int64_t step = 1; step <= kSteps; ++step) {
      Array grad = gradient(step);
      each(grad, [&](Coordinate& c, Bounded g) { reference_adam(c, g, options, step); });
      adam_step(options, step, grad.view(), span_of(weights_), span_of(a_), span_of(b_));
      expect_near(a_, coordinates_, &Coordinate::m);
      expect_near(b_, coordinates_, &Coordinate::v);
      if (HasFatalFailure()) return;
    }
    expect_weights_near();
  }

  Array weights_;
  Array a_;
  Array b_;
  std::vector<Coordinate> coordinates_;
};

TEST_P(HundredSteps, Sgd) { run_sgd(kPlain); }
TEST_P(HundredSteps, SgdWithMomentum) { run_sgd(kMomentum); }
TEST_P(HundredSteps, SgdNesterov) { run_sgd(kNesterov); }
TEST_P(HundredSteps, Adam) { run_adam(kAdam); }
TEST_P(HundredSteps, AdamW) { run_adam(kAdamW); }
TEST_P(HundredSteps, AdamWithoutBiasCorrection) { run_adam(kUncorrected); }

TEST_P(HundredSteps, Dgc) {
  for (const SgdOptions& options : {kMomentum, kNesterov}) {
    for (std::int64_t step = 1; step <= kSteps / 2; ++step) {
      Array mean = gradient(step);
      each(mean, [&](Coordinate& c, Bounded g) { reference_dgc(c, g, options); });
      dgc_step(options, mean.view(), span_of(weights_), span_of(a_));
      expect_near(a_, coordinates_, &Coordinate::decay_velocity);
      if (HasFatalFailure()) return;
    }
  }
  expect_weights_near();
}

// World size 1 and no loss: what is sent is what comes back, through fp32 or the gradient's dtype.
TEST_P(HundredSteps, OneBitAdam) {
  const std::int64_t frozen_after = 20;
  AdamOptions options = kAdamW;
  options.bias_correction = false;
  AdamOptions frozen = options;
  frozen.decoupled = false;  // not read
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    Array grad = gradient(step, frozen_after);
    if (step <= frozen_after) {
      each(grad, [&](Coordinate& c, Bounded g) { reference_adam(c, g, options, step); });
      adam_step(options, step, grad.view(), span_of(weights_), span_of(a_), span_of(b_));
      continue;
    }
    std::vector<Bounded> sent;
    each(grad, [&](Coordinate& c, Bounded g) {
      sent.push_back(reference_local_momentum(c, g, options.beta1));
    });
    Array out(DType::kF32, kElements);
    local_momentum(options.beta1, grad.view(), span_of(a_), span_of(b_), out.view());
    frozen_adam_step(frozen, out.view(), span_of(weights_), span_of(a_), span_of(b_));
    for (std::size_t i = 0; i < sent.size(); ++i) {
      reference_frozen_adam(coordinates_[i], sent[i], options);
    }
    expect_near(a_, coordinates_, &Coordinate::m);
    if (HasFatalFailure()) return;
  }
  expect_near(b_, coordinates_, &Coordinate::v);
  expect_weights_near();
}

INSTANTIATE_TEST_SUITE_P(Gradients, HundredSteps,
                         testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& info) { return std::string(name(info.param)); });

// Of the formulas: where nothing is lost, momentum before the exchange and weight decay's after it
// are SGD's.
TEST(OptimReference, DgcWithoutCompressionIsSgd) {
  for (const SgdOptions& options : {kMomentum, kNesterov}) {
    Coordinate sgd;
    sgd.weight = exact(0.75);
    Coordinate dgc = sgd;
    double u = 0;
    for (std::int64_t step = 1; step <= 100; ++step) {
      const double g = std::sin(static_cast<double>(step));
      u = options.momentum * u + g;
      reference_sgd(sgd, exact(g), options);
      reference_dgc(dgc, exact(options.nesterov ? g + options.momentum * u : u), options);
    }
    EXPECT_NEAR(sgd.weight.value, dgc.weight.value, 1e-12);
  }
}

TEST(BiasCorrection, IsOneMinusThePower) {
  EXPECT_EQ(bias_correction(0.5, 0), 0);
  EXPECT_EQ(bias_correction(0.5, 1), 0.5);
  EXPECT_EQ(bias_correction(0.5, 3), 0.875);
  EXPECT_EQ(bias_correction(0, 1), 1);
  EXPECT_EQ(bias_correction(0.9, 1'000'000'000'000), 1);
  for (const double beta : {0.9, 0.95, 0.999}) {
    for (const std::int64_t step : {1, 2, 10, 100, 12345}) {
      // Some 2 log2(step) products, each of whose errors a later square doubles at most `step`
      // times.
      const double power = std::pow(beta, static_cast<double>(step));
      EXPECT_NEAR(bias_correction(beta, step), 1 - power,
                  static_cast<double>(step) * 0x1p-52 * power + 0x1p-53);
    }
  }
}

TEST(L1Norm, IsTheSumInAFixedOrder) {
  for (const std::int64_t n : {0, 1, 15, 16, 17, 1009, 4095, 4096, 4097, 65537}) {
    for (const Pattern pattern : kPatterns) {
      SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n);
      const std::vector<float> values = make_values(pattern, n, 1);
      const double expected = l1_norm_reference(values);
      long double plain = 0;
      for (const float x : values) plain += std::fabs(static_cast<long double>(x));
      // Of positive terms: each is rounded in at most 256 + 4 + 17 sums.
      EXPECT_NEAR(expected, static_cast<double>(plain), static_cast<double>(plain) * 0x1p-44);
      for_each_simd_target([&] {
        for (const std::int64_t shift : {0, 1}) {
          Array array(DType::kF32, values, shift);
          const double got = l1_norm(span_of(array));
          ASSERT_EQ(std::memcmp(&got, &expected, sizeof got), 0) << got << " " << expected;
        }
      });
    }
  }
  EXPECT_TRUE(std::isnan(l1_norm(std::vector<float>{1, std::numeric_limits<float>::quiet_NaN()})));
}

TEST(OptimKernels, RefuseWhatDoesNotFit) {
  std::vector<float> three(3, 1.0F);
  std::vector<float> four(4, 1.0F);
  const TensorView grad = view(three);
  const TensorView integers{three.data(), 3, DType::kOther};
  Array half(DType::kBF16, 3);
  EXPECT_THROW(sgd_step(kPlain, grad, four, {}), InvalidArgument);
  EXPECT_THROW(sgd_step(kMomentum, grad, three, {}), InvalidArgument);
  EXPECT_THROW(sgd_step(kMomentum, grad, three, four), InvalidArgument);
  EXPECT_THROW(sgd_step(kPlain, integers, three, {}), InvalidArgument);
  EXPECT_THROW(dgc_step(kMomentum, grad, three, {}), InvalidArgument);
  EXPECT_THROW(adam_step(kAdam, 0, grad, three, three, three), InvalidArgument);
  EXPECT_THROW(adam_step(kAdam, 1, grad, three, four, three), InvalidArgument);
  EXPECT_THROW(frozen_adam_step(kAdam, grad, three, three, four), InvalidArgument);
  EXPECT_THROW(local_momentum(0.9, grad, three, three, view(four)), InvalidArgument);
  EXPECT_THROW(local_momentum(0.9, grad, three, three, half.view()), InvalidArgument);
  EXPECT_EQ(three, std::vector<float>(3, 1.0F));
  EXPECT_EQ(four, std::vector<float>(4, 1.0F));
}

}  // namespace
}  // namespace thinwire::optim
