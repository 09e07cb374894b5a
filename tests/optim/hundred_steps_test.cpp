// The kernels over 100 steps, beside the papers' formulas in fp64.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "optim/optim_kernels.h"
#include "tests/optim/reference.h"
#include "tests/support/patterns.h"

namespace thinwire::optim {
namespace {

const SgdOptions kPlain{.lr = 0.05, .momentum = 0, .weight_decay = 1e-4};
const SgdOptions kMomentum{.lr = 0.05, .momentum = 0.9, .weight_decay = 5e-4};
const SgdOptions kNesterov{.lr = 0.05, .momentum = 0.9, .weight_decay = 5e-4, .nesterov = true};
const AdamOptions kAdam{.lr = 1e-3, .eps = 1e-5, .weight_decay = 0.01};
const AdamOptions kAdamW{.lr = 1e-3, .weight_decay = 0.01, .decoupled = true};
const AdamOptions kUncorrected{.lr = 1e-3, .bias_correction = false};

std::span<float> span_of(Array& array) {
  return {static_cast<float*>(array.view().data), static_cast<std::size_t>(array.view().elements)};
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
      each(grad, [&](Coordinate& c, Bounded g) {
        reference_adam(c, g, options, {.m = step, .v = step});
      });
      adam_step(options, {.m = step, .v = step}, grad.view(), span_of(weights_), span_of(a_),
                span_of(b_));
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
      each(grad, [&](Coordinate& c, Bounded g) {
        reference_adam(c, g, options, {.m = step, .v = step});
      });
      adam_step(options, {.m = step, .v = step}, grad.view(), span_of(weights_), span_of(a_),
                span_of(b_));
      continue;
    }
    std::vector<Bounded> sent;
    each(grad, [&](Coordinate& c, Bounded g) {
      sent.push_back(reference_local_momentum(c, g, options.beta1));
    });
    Array out(DType::kF32, kElements);
    local_momentum({.beta1 = options.beta1}, grad.view(), span_of(a_), span_of(b_), out.view());
    frozen_adam_step(frozen, {}, out.view(), span_of(weights_), span_of(a_), span_of(b_));
    for (std::size_t i = 0; i < sent.size(); ++i) {
      reference_frozen_adam(coordinates_[i], sent[i], options, {});
    }
    expect_near(a_, coordinates_, &Coordinate::m);
    if (HasFatalFailure()) return;
  }
  expect_near(b_, coordinates_, &Coordinate::v);
  expect_weights_near();
}

// Variance is measured in every third step, then not at all, then steps are taken alone.
TEST_P(HundredSteps, ZeroOneAdam) {
  const std::int64_t frozen_after = 40;
  const std::int64_t interval = 5;
  Array u(DType::kF32, zeros());
  Array anchor(DType::kF32, zeros());
  AdamSteps steps{.m = 0, .v = 0};
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    Array grad = gradient(step, frozen_after);
    const std::span<float> w = span_of(weights_);
    const bool measures = step % 3 == 1 && step <= frozen_after;
    const double sum_lr = static_cast<double>(interval) * kAdamW.lr;
    ++steps.m;
    steps.v += measures ? 1 : 0;
    if (measures) {
      each(grad, [&](Coordinate& c, Bounded g) { reference_adam(c, g, kAdamW, steps); });
      adam_step(kAdamW, steps, grad.view(), w, span_of(a_), span_of(b_));
    } else if (step <= frozen_after) {
      each(grad, [&](Coordinate& c, Bounded g) {
        reference_frozen_adam(c, reference_local_momentum(c, g, kAdamW.beta1), kAdamW, steps);
      });
      Array out(DType::kF32, kElements);
      local_momentum({.beta1 = kAdamW.beta1}, grad.view(), span_of(a_), span_of(b_), out.view());
      frozen_adam_step(kAdamW, steps, out.view(), w, span_of(a_), span_of(b_));
    } else if (step % interval != 0) {
      const bool first = (step - 1) % interval == 0;
      each(grad, [&](Coordinate& c, Bounded g) {
        if (first) c.anchor = c.weight;
        if (first) c.u = exact(0);
        reference_local_adam(c, g, kAdamW);
      });
      local_adam_step(kAdamW, grad.view(), w, span_of(a_), span_of(b_), span_of(u),
                      first ? span_of(anchor) : std::span<float>());
    } else {
      std::vector<Bounded> sums;
      each(grad,
           [&](Coordinate& c, Bounded g) { sums.push_back(reference_local_sum(c, g, kAdamW)); });
      Array out(DType::kF32, kElements);
      local_sum({.beta1 = kAdamW.beta1, .factor = kAdamW.lr}, grad.view(), span_of(a_), span_of(b_),
                span_of(u), out.view());
      sync_adam_step(kAdamW, sum_lr, out.view(), w, span_of(a_), span_of(b_), span_of(anchor));
      for (std::size_t i = 0; i < sums.size(); ++i) {
        reference_sync_adam(coordinates_[i], sums[i], sum_lr, kAdamW);
      }
    }
    if (step == frozen_after) {
      fold_bias(kAdamW, steps, span_of(a_), span_of(b_));
      for (Coordinate& c : coordinates_) reference_fold_bias(c, kAdamW, steps);
    }
    expect_near(a_, coordinates_, &Coordinate::m);
    expect_near(b_, coordinates_, &Coordinate::v);
    expect_near(u, coordinates_, &Coordinate::u);
    if (HasFatalFailure()) return;
  }
  expect_near(anchor, coordinates_, &Coordinate::anchor);
  expect_weights_near();
}

// The step's size is the reference's: what OneBitLamb makes of the sums is in lossless_test.cpp.
TEST_P(HundredSteps, Lamb) {
  const std::int64_t frozen_after = 30;
  const double trust = 0.7;
  const double scale = 3;
  Array fresh(DType::kF32, zeros());
  for (std::int64_t step = 1; step <= kSteps; ++step) {
    Array grad = gradient(step, frozen_after);
    std::vector<Bounded> weights;
    std::vector<Bounded> updates;
    std::vector<Bounded> directions;
    std::vector<Bounded> ratios;
    for (const Coordinate& c : coordinates_) weights.push_back(c.weight);
    LambSums sums;
    if (step <= frozen_after) {
      each(grad, [&](Coordinate& c, Bounded g) {
        updates.push_back(reference_lamb_moments(c, g, kAdamW, step));
      });
      const AdamSteps steps{.m = step, .v = step};
      sums = lamb_moments(kAdamW, steps, grad.view(), span_of(weights_), span_of(a_), span_of(b_));
      lamb_move(kAdamW, steps, trust, span_of(weights_), span_of(a_), span_of(b_));
    } else {
      each(grad, [&](Coordinate& c, Bounded g) {
        const Bounded sent =
            constant(scale) * reference_local_momentum(c, g, kAdamW.beta1) / constant(scale);
        const FrozenUpdate update = reference_frozen_lamb_moments(c, sent, kAdamW);
        updates.push_back(update.update);
        directions.push_back(update.direction);
        ratios.push_back(update.ratio);
      });
      Array out(DType::kF32, kElements);
      local_momentum({.beta1 = kAdamW.beta1, .factor = scale}, grad.view(), span_of(a_),
                     span_of(b_), out.view());
      sums = frozen_lamb_moments(kAdamW, scale, out.view(), span_of(weights_), span_of(a_),
                                 span_of(b_), span_of(fresh));
      frozen_lamb_move(kAdamW, trust, span_of(weights_), span_of(a_), span_of(b_));
      const auto near = [](double got, Bounded expected) {
        EXPECT_LE(std::fabs(got - expected.value), 2 * expected.error + 1e-12 * expected.value);
      };
      near(sums.direction, square_sum(directions));
      near(static_cast<double>(sums.ratio), largest(ratios));
    }
    for (std::size_t i = 0; i < updates.size(); ++i) {
      Coordinate& c = coordinates_[i];
      // A masked element's update is 0, decay and all.
      reference_lamb_move(c, constant(trust), updates[i], kAdamW);
    }
    EXPECT_LE(std::fabs(sums.weights - square_sum(weights).value),
              2 * square_sum(weights).error + 1e-12 * square_sum(weights).value);
    EXPECT_LE(std::fabs(sums.update - square_sum(updates).value),
              2 * square_sum(updates).error + 1e-12 * square_sum(updates).value);
    if (step == frozen_after) {
      fold_bias(kAdamW, {.m = step, .v = step}, span_of(a_), span_of(b_));
      const std::span<float> v = span_of(b_);
      std::copy(v.begin(), v.end(), span_of(fresh).begin());
      for (Coordinate& c : coordinates_) {
        reference_fold_bias(c, kAdamW, {.m = step, .v = step});
        c.fresh = c.v;
      }
    }
    expect_near(a_, coordinates_, &Coordinate::m);
    expect_near(b_, coordinates_, &Coordinate::v);
    expect_near(fresh, coordinates_, &Coordinate::fresh);
    if (HasFailure()) return;
  }
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

}  // namespace
}  // namespace thinwire::optim
