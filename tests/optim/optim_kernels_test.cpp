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
const AdamOptions kFloored{.lr = 1e-3, .weight_decay = 0.01, .decoupled = true, .least_v = 0.1};

float* floats(Array& array) { return static_cast<float*>(array.view().data); }
std::span<float> span_of(Array& array) {
  return {floats(array), static_cast<std::size_t>(array.view().elements)};
}

struct Inputs {
  std::vector<float> grad;
  std::vector<float> weights;
  std::vector<float> a;
  std::vector<float> b;  // squares, of which every third is zero
  std::vector<float> c;
  std::vector<float> d;  // squares
};

Inputs make_inputs(Pattern pattern, std::int64_t n) {
  Inputs in{.grad = make_values(pattern, n, 1),
            .weights = make_values(Pattern::kNormal, n, 2),
            .a = make_values(Pattern::kNormal, n, 3),
            .b = make_values(Pattern::kNormal, n, 4),
            .c = make_values(Pattern::kNormal, n, 5),
            .d = make_values(Pattern::kNormal, n, 6)};
  for (std::size_t i = 0; i < in.b.size(); ++i) in.b[i] *= i % 3 == 0 ? 0 : in.b[i];
  for (float& x : in.d) x *= x;
  return in;
}

// What a kernel reads and writes: a gradient, weights, four states, where momentum is sent, and
// what LAMB's kernels return.
struct Arrays {
  Array grad;
  Array weights;
  Array a;
  Array b;
  Array c;
  Array d;
  Array out;
  LambSums sums = {};

  Arrays(DType dtype, const Inputs& in, std::int64_t shift = 0)
      : grad(dtype, in.grad, shift),
        weights(DType::kF32, in.weights, shift),
        a(DType::kF32, in.a, shift),
        b(DType::kF32, in.b, shift),
        c(DType::kF32, in.c, shift),
        d(DType::kF32, in.d, shift),
        out(DType::kF32, static_cast<std::int64_t>(in.grad.size()), shift) {}

  bool guards_intact() const {
    return grad.guards_intact() && weights.guards_intact() && a.guards_intact() &&
           b.guards_intact() && c.guards_intact() && d.guards_intact() && out.guards_intact();
  }
};

// What becomes of an element without a variance.
enum class Masks { kNothing, kZero, kStays, kAnchor };

struct Case {
  std::string name;
  std::function<void(Arrays&)> kernel;
  std::function<void(Arrays&)> reference;
  Masks masks = Masks::kNothing;
  Array Arrays::*changes = &Arrays::weights;  // where a gradient's NaN shows
};

const AdamSteps kFew{.m = 9, .v = 4};
const MomentumOptions kSent{.beta1 = 0.9, .loss_scale = 64, .factor = 0.3};
constexpr double kSumLr = 0.02;

Case momentum_case(const std::string& name, Array Arrays::*out) {
  return {name,
          [=](Arrays& x) {
            local_momentum(kSent, x.grad.view(), span_of(x.a), span_of(x.b), (x.*out).view());
          },
          [=](Arrays& x) {
            local_momentum_reference(factors_of(kSent), x.grad.view(), floats(x.a), floats(x.b),
                                     (x.*out).view());
          },
          Masks::kZero, out};
}

Case sum_case(const std::string& name, Array Arrays::*out) {
  return {name,
          [=](Arrays& x) {
            local_sum(kSent, x.grad.view(), span_of(x.a), span_of(x.b), span_of(x.c),
                      (x.*out).view());
          },
          [=](Arrays& x) {
            local_sum_reference(factors_of(kSent), x.grad.view(), floats(x.a), floats(x.b),
                                floats(x.c), (x.*out).view());
          },
          Masks::kZero, out};
}

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

Case adam_case(const std::string& name, const AdamOptions& o, AdamSteps steps) {
  return {name,
          [=](Arrays& x) {
            adam_step(o, steps, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b));
          },
          [=](Arrays& x) {
            adam_reference(factors_of(o, steps), x.grad.view(), floats(x.weights), floats(x.a),
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
      adam_case("adam", kAdam, {}),
      adam_case("adamw", kAdamW, {.m = 7, .v = 5}),
      adam_case("adam with a least variance", kFloored, kFew),
      adam_case("adam without bias correction", kUncorrected, {.m = 7, .v = 7}),
      momentum_case("momentum to fp32", &Arrays::out),
      momentum_case("momentum in place", &Arrays::grad),
      sum_case("sum to fp32", &Arrays::out),
      sum_case("sum in place", &Arrays::grad),
      {"frozen adam",
       [](Arrays& x) {
         frozen_adam_step(kFloored, kFew, x.grad.view(), span_of(x.weights), span_of(x.a),
                          span_of(x.b));
       },
       [](Arrays& x) {
         frozen_adam_reference(frozen_factors_of(kFloored, kFew), x.grad.view(), floats(x.weights),
                               floats(x.a), floats(x.b));
       },
       Masks::kStays},
      {"local adam",
       [](Arrays& x) {
         local_adam_step(kAdamW, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b),
                         span_of(x.c), {});
       },
       [](Arrays& x) {
         local_adam_reference(local_factors_of(kAdamW), x.grad.view(), floats(x.weights),
                              floats(x.a), floats(x.b), floats(x.c), nullptr);
       },
       Masks::kStays},
      {"local adam, the first since an exchange",
       [](Arrays& x) {
         local_adam_step(kAdamW, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b),
                         span_of(x.c), span_of(x.d));
       },
       [](Arrays& x) {
         local_adam_reference(local_factors_of(kAdamW), x.grad.view(), floats(x.weights),
                              floats(x.a), floats(x.b), floats(x.c), floats(x.d));
       },
       Masks::kStays},
      {"sync adam",
       [](Arrays& x) {
         sync_adam_step(kAdamW, kSumLr, x.grad.view(), span_of(x.weights), span_of(x.a),
                        span_of(x.b), span_of(x.d));
       },
       [](Arrays& x) {
         sync_adam_reference(factors_of(kAdamW, kSumLr), x.grad.view(), floats(x.weights),
                             floats(x.a), floats(x.b), floats(x.d));
       },
       Masks::kAnchor},
      {"sync adam from the weights",
       [](Arrays& x) {
         sync_adam_step(kAdamW, kSumLr, x.grad.view(), span_of(x.weights), span_of(x.a),
                        span_of(x.b), span_of(x.weights));
       },
       [](Arrays& x) {
         sync_adam_reference(factors_of(kAdamW, kSumLr), x.grad.view(), floats(x.weights),
                             floats(x.a), floats(x.b), floats(x.weights));
       },
       Masks::kStays},
      {"lamb's moments",
       [](Arrays& x) {
         x.sums = lamb_moments(kAdamW, kFew, x.grad.view(), span_of(x.weights), span_of(x.a),
                               span_of(x.b));
       },
       [](Arrays& x) {
         x.sums = lamb_moments_reference(lamb_factors_of(kAdamW, kFew), x.grad.view(),
                                         floats(x.weights), floats(x.a), floats(x.b));
       },
       Masks::kNothing, &Arrays::a},
      {"lamb",
       [](Arrays& x) {
         lamb_moments(kAdamW, kFew, x.grad.view(), span_of(x.weights), span_of(x.a), span_of(x.b));
         lamb_move(kAdamW, kFew, 0.7, span_of(x.weights), span_of(x.a), span_of(x.b));
       },
       [](Arrays& x) {
         const LambFactors f = lamb_factors_of(kAdamW, kFew);
         lamb_moments_reference(f, x.grad.view(), floats(x.weights), floats(x.a), floats(x.b));
         lamb_move_reference(f, static_cast<float>(kAdamW.lr * 0.7), false, floats(x.weights),
                             floats(x.a), floats(x.b), x.weights.view().elements);
       }},
      {"frozen lamb",
       [](Arrays& x) {
         x.sums = frozen_lamb_moments(kAdamW, 3, x.grad.view(), span_of(x.weights), span_of(x.a),
                                      span_of(x.b), span_of(x.d));
         frozen_lamb_move(kAdamW, 0.7, span_of(x.weights), span_of(x.a), span_of(x.b));
       },
       [](Arrays& x) {
         const LambFactors f = frozen_lamb_factors_of(kAdamW, 3);
         x.sums = frozen_lamb_moments_reference(f, x.grad.view(), floats(x.weights), floats(x.a),
                                                floats(x.b), floats(x.d));
         lamb_move_reference(f, static_cast<float>(kAdamW.lr * 0.7), true, floats(x.weights),
                             floats(x.a), floats(x.b), x.weights.view().elements);
       },
       Masks::kStays},
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
  expect_same(got.c, expected.c, "third state");
  expect_same(got.d, expected.d, "fourth state");
  expect_same(got.out, expected.out, "momentum");
  const auto same_sum = [](double x, double y) {
    EXPECT_TRUE(std::memcmp(&x, &y, sizeof x) == 0 || (std::isnan(x) && std::isnan(y)))
        << x << ", expected " << y;
  };
  same_sum(got.sums.weights, expected.sums.weights);
  same_sum(got.sums.update, expected.sums.update);
  same_sum(got.sums.direction, expected.sums.direction);
  same_sum(double{got.sums.ratio}, double{expected.sums.ratio});
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
  for (const std::int64_t n : {0, 1, 15, 16, 17, 4095, 8197}) {
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
    Arrays clean(DType::kF32, inputs);
    which.kernel(clean);
    for_each_simd_target([&] {
      Arrays hit(DType::kF32, inputs);
      hit.grad.set(nan, std::numeric_limits<float>::quiet_NaN());
      hit.grad.set(inf, std::numeric_limits<float>::infinity());
      hit.grad.set(masked, std::numeric_limits<float>::quiet_NaN());
      which.kernel(hit);
      const std::vector<float> x = (hit.*which.changes).values();
      EXPECT_TRUE(std::isnan(x[nan]));
      EXPECT_FALSE(std::isfinite(x[inf]));
      EXPECT_EQ(std::isnan(x[masked]), which.masks == Masks::kNothing);
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
      same_elsewhere(hit.c, clean.c);
      same_elsewhere(hit.d, clean.d);
      same_elsewhere(hit.out, clean.out);
    });
  }
}

TEST(OptimKernels, MaskedElementsSendZeroAndStay) {
  const Inputs inputs = make_inputs(Pattern::kNormal, 100);
  for (const Case& which : all_cases()) {
    SCOPED_TRACE(which.name);
    for_each_simd_target([&] {
      Arrays x(DType::kF32, inputs);
      which.kernel(x);
      const std::vector<float> now = (x.*which.changes).values();
      for (std::size_t i = 0; i < now.size(); ++i) {
        const bool masked = i % 3 == 0;
        switch (which.masks) {
          case Masks::kNothing:
            break;
          case Masks::kZero:
            EXPECT_EQ(now[i] == 0, masked) << i;
            break;
          case Masks::kStays:
            EXPECT_EQ(now[i] == inputs.weights[i], masked) << i;
            break;
          case Masks::kAnchor:
            EXPECT_EQ(now[i] == inputs.d[i], masked) << i;
            break;
        }
      }
    });
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

TEST(SquareSum, IsTheSumInAFixedOrder) {
  for (const std::int64_t n : {0, 1, 17, 4095, 4097, 65537}) {
    for (const Pattern pattern : kPatterns) {
      SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n);
      std::vector<float> values = make_values(pattern, n, 1);
      const double expected = square_sum_reference(values);
      long double plain = 0;
      for (const float x : values) plain += static_cast<long double>(x) * x;
      EXPECT_NEAR(expected, static_cast<double>(plain), static_cast<double>(plain) * 0x1p-44);
      for_each_simd_target([&] {
        const double got = square_sum(values);
        ASSERT_EQ(std::memcmp(&got, &expected, sizeof got), 0) << got << " " << expected;
      });
    }
  }
}

TEST(AllFinite, SeesEveryElement) {
  for (const DType dtype : kGradTypes) {
    for (const std::int64_t n : {0, 1, 16, 37}) {
      Array values(dtype, make_values(Pattern::kHuge, n, 1), 1);
      for_each_simd_target([&] {
        EXPECT_TRUE(all_finite(values.view()));
        for (std::int64_t i = 0; i < n; ++i) {
          const float before = values.values()[static_cast<std::size_t>(i)];
          for (const float bad :
               {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
            values.set(i, bad);
            EXPECT_FALSE(all_finite(values.view())) << i;
          }
          values.set(i, before);
        }
      });
    }
  }
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
  const MomentumOptions sent;
  const auto bad = [](auto&& call) { EXPECT_THROW(call(), InvalidArgument); };
  for (const AdamSteps steps : {AdamSteps{.m = 0, .v = 1}, AdamSteps{.m = 1, .v = 0}}) {
    bad([&] { adam_step(kAdam, steps, grad, three, three, three); });
    bad([&] { frozen_adam_step(kAdam, steps, grad, three, three, three); });
    bad([&] { lamb_moments(kAdam, steps, grad, three, three, three); });
    bad([&] { lamb_move(kAdam, steps, 1, three, three, three); });
  }
  bad([&] { adam_step(kAdam, {}, grad, three, four, three); });
  bad([&] { frozen_adam_step(kAdam, {}, grad, three, three, four); });
  bad([&] { local_momentum(sent, grad, three, three, view(four)); });
  bad([&] { local_momentum(sent, grad, three, three, half.view()); });
  bad([&] { local_adam_step(kAdam, grad, three, three, three, four, {}); });
  bad([&] { local_adam_step(kAdam, grad, three, three, three, three, four); });
  bad([&] { local_sum(sent, grad, three, three, four, view(three)); });
  bad([&] { local_sum(sent, grad, three, three, three, half.view()); });
  bad([&] { sync_adam_step(kAdam, 1, grad, three, three, three, four); });
  for (const double sum_lr : {0.0, -1.0, std::nan("")}) {
    bad([&] { sync_adam_step(kAdam, sum_lr, grad, three, three, three, three); });
  }
  bad([&] { lamb_moments(kAdam, {}, grad, four, three, three); });
  bad([&] { frozen_lamb_moments(kAdam, 1, grad, three, three, three, four); });
  bad([&] { lamb_move(kAdam, {}, 1, three, three, four); });
  bad([&] { frozen_lamb_move(kAdam, 1, three, four, three); });
  bad([&] { frozen_adam_step(kAdam, {}, integers, three, three, three); });
  bad([&] { all_finite(integers); });
  EXPECT_EQ(three, std::vector<float>(3, 1.0F));
  EXPECT_EQ(four, std::vector<float>(4, 1.0F));
}

}  // namespace
}  // namespace thinwire::optim
