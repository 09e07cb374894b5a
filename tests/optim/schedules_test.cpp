#include "optim/schedules.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire::optim {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

// ||v_t|| of v <- beta2 v + (1 - beta2) x_t.
struct Variance {
  double beta2;
  double norm = 0;
  double next(double x) { return norm = beta2 * norm + (1 - beta2) * x; }
};

// Steps until the rule freezes, at most `limit`; 0 for never.
template <typename F>
std::int64_t steps_to_freeze(FreezeRule& rule, std::int64_t limit, F&& norm_of_step) {
  for (std::int64_t step = 1; step <= limit; ++step) {
    if (rule.observe(norm_of_step(step))) return step;
  }
  return 0;
}

TEST(FreezeRule, DeltaIsTheVariancesMemory) {
  const std::vector<std::pair<double, std::int64_t>> table = {
      {0, 1}, {0.5, 2}, {0.6, 3} /* 2.5 */, {0.9, 10}, {0.95, 20}, {0.98, 50}, {0.999, 1000}};
  for (const auto& [beta2, delta] : table) {
    EXPECT_EQ(FreezeRule({.beta2 = beta2}).delta(), delta) << beta2;
  }
}

// beta2 = 0.5: delta 2, and the corrections of steps 1, 2, 3, ... are 1/2, 3/4, 7/8, 15/16, 31/32.
// Norms that are these times 100, 50, 40, 45, 39 stand for corrected norms of just these; ratios
// to two steps before: 40/100, 45/50 = 0.9, 39/40 = 0.975.
TEST(FreezeRule, FreezesAtTheFirstRatioOf96Percent) {
  const std::vector<double> norms = {100 * 0.5, 50 * 0.75, 40 * 0.875, 45 * 0.9375, 39 * 0.96875};
  FreezeRule rule({.beta2 = 0.5});
  for (std::size_t i = 0; i < 4; ++i) EXPECT_FALSE(rule.observe(norms[i])) << i;
  EXPECT_TRUE(rule.observe(norms[4]));
  EXPECT_TRUE(rule.frozen());
  EXPECT_EQ(rule.state().frozen_after, 5);
  // From then on nothing changes.
  EXPECT_TRUE(rule.observe(1e-9));
  EXPECT_EQ(rule.state().steps, 5);
  // The rule that asks for 0.89 is a step ahead.
  FreezeRule looser({.beta2 = 0.5, .ratio = 0.89});
  EXPECT_EQ(
      steps_to_freeze(looser, 5, [&](auto t) { return norms[static_cast<std::size_t>(t - 1)]; }),
      4);
}

TEST(FreezeRule, NeverBeforeDeltaStepsNorBeforeTheGivenNumber) {
  for (const std::int64_t least : {0, 1, 10, 11, 12, 500}) {
    FreezeRule rule({.beta2 = 0.9, .min_steps = least});
    EXPECT_FALSE(rule.frozen());
    Variance v{0.9};
    EXPECT_EQ(steps_to_freeze(rule, 1000, [&](auto) { return v.next(1); }),
              std::max<std::int64_t>(11, least));
  }
}

// Squared gradients that fall by 1 % a step: over delta = 10 steps to 0.904 of what they were, so
// never; by 0.3 % a step: to 0.970, so at once. From v = 0 the uncorrected norms would pass both.
TEST(FreezeRule, FallingGradientsKeepItOpen) {
  for (const auto& [kept, freezes] : {std::pair{0.99, 0}, std::pair{0.997, 11}}) {
    FreezeRule rule({.beta2 = 0.9});
    Variance v{0.9};
    EXPECT_EQ(
        steps_to_freeze(rule, 200,
                        [&](auto t) { return v.next(std::pow(kept, static_cast<double>(t))); }),
        freezes)
        << kept;
  }
}

TEST(FreezeRule, ZeroVarianceDoesNotFreeze) {
  FreezeRule rule({.beta2 = 0.5});
  EXPECT_EQ(steps_to_freeze(rule, 20, [](auto) { return 0.0; }), 0);
  // Two steps later the norm before is no longer zero.
  EXPECT_FALSE(rule.observe(1));
  EXPECT_FALSE(rule.observe(1));
  EXPECT_TRUE(rule.observe(1));
}

TEST(FreezeRule, AStateSavedAnywhereContinuesAlike) {
  const FreezeOptions options{.beta2 = 0.8, .min_steps = 12};
  const auto norm = [](std::int64_t t) {
    return (1 + 9 * std::pow(0.7, static_cast<double>(t))) *
           (1 - std::pow(0.8, static_cast<double>(t)));
  };
  FreezeRule whole(options);
  const std::int64_t frozen_after = steps_to_freeze(whole, 100, norm);
  ASSERT_GT(frozen_after, 12);
  for (std::int64_t cut = 0; cut <= frozen_after; ++cut) {
    FreezeRule first(options);
    for (std::int64_t t = 1; t <= cut; ++t) first.observe(norm(t));
    FreezeRule second(options);
    second.restore(first.state());
    for (std::int64_t t = cut + 1; t <= frozen_after; ++t) second.observe(norm(t));
    EXPECT_EQ(second.state().frozen_after, frozen_after) << cut;
    EXPECT_EQ(second.state().norms, whole.state().norms) << cut;
  }
}

TEST(FreezeRule, AtAGivenStepWhateverTheNorms) {
  FreezeRule rule({.beta2 = 0.5, .min_steps = 100, .at_step = 3});
  EXPECT_FALSE(rule.needs_norm());
  EXPECT_EQ(steps_to_freeze(rule, 10, [](auto) { return 0.0; }), 3);
  EXPECT_EQ(rule.state().frozen_after, 3);
  EXPECT_TRUE(rule.state().norms.empty());
  // What one kind of rule has frozen stays so under the other; a norm before is not made up.
  FreezeRule by_norms({.beta2 = 0.5});
  by_norms.restore(rule.state());
  EXPECT_TRUE(by_norms.frozen());
  FreezeRule open({.beta2 = 0.5, .at_step = 3});
  open.observe(0);
  EXPECT_THROW(FreezeRule({.beta2 = 0.5}).restore(open.state()), InvalidArgument);
  open.restore({.steps = 2, .norms = {1, 1}});
  EXPECT_TRUE(open.observe(0));
}

TEST(FreezeRule, RefusesWhatMakesNoSense) {
  for (const FreezeOptions& options :
       {FreezeOptions{.beta2 = 1}, FreezeOptions{.beta2 = -0.1}, FreezeOptions{.beta2 = kNaN},
        FreezeOptions{.ratio = 0}, FreezeOptions{.ratio = 1.5}, FreezeOptions{.ratio = kNaN},
        FreezeOptions{.min_steps = -1}, FreezeOptions{.at_step = -1}}) {
    EXPECT_THROW(FreezeRule{options}, InvalidArgument)
        << options.beta2 << " " << options.ratio << " " << options.min_steps;
  }
  FreezeRule rule({.beta2 = 0.5});
  for (const double norm : {kNaN, kInf, -1.0}) EXPECT_THROW(rule.observe(norm), InvalidArgument);
  EXPECT_EQ(rule.state().steps, 0);
  for (const FreezeState& state :
       {FreezeState{.steps = -1}, FreezeState{.steps = 1}, FreezeState{.norms = {1}},
        FreezeState{.steps = 5, .norms = {1, 1, 1}}, FreezeState{.steps = 1, .norms = {kNaN}},
        FreezeState{.steps = 5, .frozen_after = 6, .norms = {1, 1}},
        FreezeState{.steps = 5, .frozen_after = -1, .norms = {1, 1}}}) {
    EXPECT_THROW(rule.restore(state), InvalidArgument) << state.steps << " " << state.frozen_after;
  }
}

// One letter a step.
std::string letters(const ZeroOneSchedule& schedule, std::int64_t begin, std::int64_t end) {
  std::string text;
  for (std::int64_t step = begin; step < end; ++step) {
    text += "vmls"[static_cast<int>(schedule.at(step))];
  }
  return text;
}

TEST(ZeroOneSchedule, ATableByHand) {
  // Variance: three updates with gap 1, three with 2, three with 4, the first of those with 8.
  const ZeroOneSchedule schedule(
      {.kappa = 3, .var_freeze_step = 30, .local_step_scaler = 6, .local_step_clipper = 4});
  EXPECT_EQ(letters(schedule, 0, 30),
            "vvv"
            "mvmvmv"
            "mmmvmmmvmmmv"
            "mmmmmmmvm");
  // Intervals of 1 that begin at 0..5, of 2 at 6, 8, 10, then of 4.
  EXPECT_EQ(letters(schedule, 30, 30 + 24),
            "ssssss"
            "lslsls"
            "lllslllsllls");
}

// Published: the last updates of each gap for kappa 16 are steps 15, 47, 111, 239.
TEST(ZeroOneSchedule, ThePublishedVariancePolicy) {
  const ZeroOneSchedule schedule({});
  std::vector<std::int64_t> updates;
  for (std::int64_t step = 0; step < 240; ++step) {
    if (schedule.at(step) == ZeroOneStep::kVariance) updates.push_back(step);
  }
  ASSERT_EQ(updates.size(), 64U);
  EXPECT_EQ(updates[15], 15);
  EXPECT_EQ(updates[16], 17);
  EXPECT_EQ(updates[31], 47);
  EXPECT_EQ(updates[32], 51);
  EXPECT_EQ(updates[47], 111);
  EXPECT_EQ(updates[48], 119);
  EXPECT_EQ(updates[63], 239);
}

TEST(ZeroOneSchedule, ThePublishedLocalSteps) {
  const ZeroOneSchedule schedule({});
  const std::int64_t first = 100'000;
  const std::int64_t scaler = 32'678;
  EXPECT_EQ(schedule.at(first - 1), ZeroOneStep::kMomentum);
  EXPECT_EQ(letters(schedule, first, first + 3), "sss");
  EXPECT_EQ(letters(schedule, first + scaler - 1, first + scaler + 4), "slsls");
  // 32678 is 2 mod 4: intervals of 4 begin with their stage, those of 8 begin 2 steps late, those
  // of 16 4 steps late.
  EXPECT_EQ(letters(schedule, first + 2 * scaler - 2, first + 2 * scaler + 8), "lslllsllls");
  EXPECT_EQ(letters(schedule, first + 3 * scaler - 2, first + 3 * scaler + 10), "lllsllllllls");
  EXPECT_EQ(letters(schedule, first + 4 * scaler - 4, first + 4 * scaler + 20),
            std::string(7, 'l') + "s" + std::string(15, 'l') + "s");
}

// Against the definition, followed step by step, for intervals longer than their stage, too.
TEST(ZeroOneSchedule, FollowsItsDefinition) {
  for (const std::int64_t kappa : {1, 2, 5, 16}) {
    for (const std::int64_t scaler : {1, 3, 7, 64}) {
      for (const std::int64_t clipper : {1, 2, 12, 16}) {
        const std::int64_t freeze = 300;
        const ZeroOneSchedule schedule({.kappa = kappa,
                                        .var_freeze_step = freeze,
                                        .local_step_scaler = scaler,
                                        .local_step_clipper = clipper});
        std::string expected(600, 'm');
        for (std::int64_t update = 0, step = 0; step < freeze; ++update) {
          expected[static_cast<std::size_t>(step)] = 'v';
          step += std::int64_t{1} << ((update + 1) / kappa);
        }
        for (std::int64_t begin = 0; begin < 300;) {
          const std::int64_t doublings = std::min<std::int64_t>(begin / scaler, 20);
          const std::int64_t length = std::min(clipper, std::int64_t{1} << doublings);
          for (std::int64_t i = begin; i < std::min<std::int64_t>(300, begin + length); ++i) {
            expected[static_cast<std::size_t>(freeze + i)] = i == begin + length - 1 ? 's' : 'l';
          }
          begin += length;
        }
        EXPECT_EQ(letters(schedule, 0, 600), expected)
            << "kappa " << kappa << " scaler " << scaler << " clipper " << clipper;
      }
    }
  }
}

TEST(ZeroOneSchedule, LargeNumbersAreFine) {
  const std::int64_t large = std::int64_t{1} << 60;
  const ZeroOneSchedule schedule({.var_freeze_step = large});
  EXPECT_EQ(schedule.at(0), ZeroOneStep::kVariance);
  EXPECT_NO_THROW(schedule.at(large - 1));
  EXPECT_NO_THROW(schedule.at(2 * large));
  const ZeroOneSchedule slow({.kappa = std::numeric_limits<std::int64_t>::max(),
                              .local_step_scaler = std::numeric_limits<std::int64_t>::max()});
  EXPECT_EQ(letters(slow, 99'998, 100'003), "vvsss");
}

TEST(ZeroOneSchedule, RefusesWhatMakesNoSense) {
  for (const ZeroOneOptions& options :
       {ZeroOneOptions{.kappa = 0}, ZeroOneOptions{.var_freeze_step = 0},
        ZeroOneOptions{.local_step_scaler = 0}, ZeroOneOptions{.local_step_clipper = 0}}) {
    EXPECT_THROW(ZeroOneSchedule{options}, InvalidArgument);
  }
  EXPECT_THROW(ZeroOneSchedule({}).at(-1), InvalidArgument);
}

}  // namespace
}  // namespace thinwire::optim
