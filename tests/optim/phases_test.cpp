// What each method does in its phases: when variance freezes and what is sent then, 0/1 Adam's
// intervals, one rank alone, weights that are not fp32.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "optim/adam.h"
#include "optim/sgd.h"
#include "tests/optim/training.h"

namespace thinwire::optim {
namespace {

using testing::all_methods;
using testing::Gradients;
using testing::MakeOptimizer;
using testing::Method;
using testing::run_trainers;
using testing::Trainer;

constexpr std::size_t kRanks = 3;
const AdamOptions kAdamW{.lr = 0.01, .beta2 = 0.9, .weight_decay = 0.01, .decoupled = true};

// Wire bytes of each step of rank 0.
std::vector<std::uint64_t> wire_bytes(const std::string& policy, const MakeOptimizer& make,
                                      std::uint64_t steps) {
  std::vector<std::uint64_t> bytes;
  run_trainers(kRanks, policy, make, [&](Trainer& trainer) {
    trainer.fill(0);
    std::uint64_t before = 0;
    for (std::uint64_t step = 0; step < steps; ++step) {
      trainer.train(step);
      const std::uint64_t now = trainer.reducer.stats().wire_bytes;
      if (trainer.rank() == 0 && step > 0) bytes.push_back(now - before);  // step 0: a handshake
      before = now;
    }
  });
  return bytes;
}

MakeOptimizer plain_adam() {
  return [](GradientReducer& r) { return Adam::make(r, all_layers(r), {kAdamW}); };
}

TEST(Freezing, IsAtTheStepOfTheRuleOnAllRanks) {
  const FreezeOptions by_norms{.beta2 = 0.9, .ratio = 0.9};
  std::vector<std::vector<std::int64_t>> frozen(kRanks);
  std::vector<double> norms;
  const MakeOptimizer make = [&](auto& r) {
    return OneBitAdam::make(r, all_layers(r), {kAdamW}, by_norms);
  };
  run_trainers(kRanks, "onebit", make, [&](Trainer& trainer) {
    const auto& adam = trainer.as<OneBitAdam>();
    for (std::uint64_t step = 0; step < 30; ++step) {
      trainer.train(step);
      frozen[static_cast<std::size_t>(trainer.rank())].push_back(adam.frozen_after());
      double norm = 0;  // of the layers that the policy compresses
      for (const std::size_t layer : {0U, 2U, 4U}) norm += l1_norm(adam.slots()[2].values[layer]);
      if (trainer.rank() == 0) norms.push_back(norm);
    }
  });
  EXPECT_EQ(frozen[0], frozen[1]);
  EXPECT_EQ(frozen[0], frozen[2]);
  FreezeRule rule(by_norms);
  for (std::size_t step = 0; step < norms.size(); ++step) {
    if (!rule.frozen()) rule.observe(norms[step]);
    // The norm of the freezing step is seen after its bias is folded in: that step is given below.
    if (frozen[0][step] > 0) break;
    EXPECT_FALSE(rule.frozen()) << step;
  }
  const std::int64_t at = frozen[0].back();
  EXPECT_GE(at, rule.delta() + 1);
  EXPECT_LT(at, 30);
  for (std::size_t step = 0; step < 30; ++step) {
    EXPECT_EQ(frozen[0][step], static_cast<std::int64_t>(step) + 1 >= at ? at : 0) << step;
  }
  // Folding divided by 1 - beta2^at; without it the rule freezes at just this step.
  FreezeRule again(by_norms);
  for (std::int64_t step = 1; step <= at; ++step) {
    const double corrected = norms[static_cast<std::size_t>(step - 1)];
    EXPECT_EQ(again.observe(step == at ? corrected * bias_correction(0.9, at) : corrected),
              step == at);
  }
}

TEST(Freezing, SendsDenseBytesBeforeAndTheCodecsAfter) {
  const std::uint64_t steps = 9;
  const std::vector<std::uint64_t> dense = wire_bytes("none", plain_adam(), steps);
  const std::vector<std::uint64_t> compressed = wire_bytes("onebit", plain_adam(), steps);
  for (const std::size_t which : {3U, 5U}) {
    const Method method = all_methods()[which];
    const std::vector<std::uint64_t> bytes = wire_bytes("onebit", method.make, steps);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const bool warm = static_cast<std::int64_t>(i) + 1 < testing::kFreezeStep;
      EXPECT_EQ(bytes[i], (warm ? dense : compressed)[i]) << method.name << ", step " << i + 1;
    }
    EXPECT_LT(4 * bytes.back(), bytes.front()) << method.name;
  }
}

// Bytes of a 16-bit job against its uncompressed bytes: 1 / (w + (1 - w) / 16), w the share of
// uncompressed exchanges, and nothing for steps without one.
TEST(Volume, IsAsPublished) {
  const std::vector<Layer> layers = {{"weight", {512, 1024}, DType::kBF16}};
  constexpr std::int64_t kSteps = 40;
  const AdamOptions adam{.lr = 1e-3};
  const ZeroOneOptions zero_one{
      .kappa = 3, .var_freeze_step = 20, .local_step_scaler = 5, .local_step_clipper = 4};
  const ZeroOneSchedule schedule(zero_one);
  double dense = 0;
  double compressed = 0;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    dense += schedule.at(step) == ZeroOneStep::kVariance ? 1 : 0;
    compressed += schedule.at(step) == ZeroOneStep::kMomentum ? 1 : 0;
    compressed += schedule.at(step) == ZeroOneStep::kSync ? 1 : 0;
  }
  struct Published {
    MakeOptimizer make;
    double dense;
    double compressed;
  };
  const FreezeOptions freeze{.at_step = kSteps / 5};
  for (const Published& published :
       {Published{[&](auto& r) { return OneBitAdam::make(r, all_layers(r), {adam}, freeze); },
                  kSteps / 5, kSteps - kSteps / 5},
        Published{[&](auto& r) { return OneBitLamb::make(r, all_layers(r), {adam}, freeze); },
                  kSteps / 5, kSteps - kSteps / 5},
        Published{[&](auto& r) { return ZeroOneAdam::make(r, all_layers(r), {adam}, zero_one); },
                  dense, compressed}}) {
    testing::run_ranks(4, [&](int rank, std::unique_ptr<Communicator> comm) {
      GradientReducer reducer(std::move(comm), layers, Policy::parse("onebit"));
      const auto optimizer = published.make(reducer);
      Gradients weights(layers);
      Gradients gradients(layers);
      for (std::int64_t step = 0; step < kSteps; ++step) {
        gradients.fill(static_cast<std::uint64_t>(step), rank);
        reducer.reduce(gradients.bucket({0}, true))->wait();
        const Parameter parameter{weights.view(0), gradients.view(0)};
        ASSERT_TRUE(optimizer->step({&parameter, 1}));
      }
      const double formula = kSteps / (published.dense + published.compressed / 16);
      EXPECT_NEAR(reducer.stats().ratio_bf16, formula, formula * 0.02) << optimizer->name();
    });
  }
}

// Gradients of one sign whose sizes span orders: one bit an element is off by as much as the large
// ones, for which the small ones' variance would make steps of any length.
double longest_step(const MakeOptimizer& make, double lr) {
  double longest = 0;
  run_trainers(kRanks, "onebit", make, [&](Trainer& trainer) {
    for (std::uint64_t step = 0; step < 40; ++step) {
      trainer.fill(step);
      for (std::size_t layer = 0; layer < 3; ++layer) {
        for (std::int64_t i = 0; i < trainer.layers[layer].elements(); ++i) {
          if (i % 5 != 0) trainer.gradients.set(layer, i, 1e-4F * trainer.gradients.get(layer, i));
        }
      }
      const std::vector<float> before = trainer.weights.values(0);
      trainer.reduce();
      ASSERT_TRUE(trainer.apply());
      const std::vector<float> after = trainer.weights.values(0);
      for (std::size_t i = 0; trainer.rank() == 0 && i < after.size(); ++i) {
        longest = std::max(longest, std::fabs(double{after[i]} - double{before[i]}) / lr);
      }
    }
  });
  return longest;
}

TEST(VarianceFloor, KeepsStepsAtAFewLearningRates) {
  constexpr double kLr = 1e-3;
  const AdamOptions adam{.lr = kLr, .beta2 = 0.99};
  for (const double floor : {0.0, 1.0}) {
    const double frozen = longest_step(
        [&](auto& r) {
          return OneBitAdam::make(r, all_layers(r), {adam}, {.at_step = 10, .floor = floor});
        },
        kLr);
    // Two ranks' signs, each with its error fed back, of 0/1 Adam summed over an interval.
    const double zero_one = longest_step(
        [&](auto& r) {
          return ZeroOneAdam::make(r, all_layers(r), {adam},
                                   {.kappa = 4,
                                    .var_freeze_step = 20,
                                    .local_step_scaler = 8,
                                    .local_step_clipper = 2,
                                    .floor = floor});
        },
        kLr);
    EXPECT_EQ(frozen < 10, floor == 1) << frozen;
    EXPECT_EQ(zero_one < 10, floor == 1) << zero_one;
    if (floor == 0) {
      EXPECT_GT(frozen, 100);
    }
  }
}

TEST(VarianceFloor, RaisesFrozenVariancesAloneAndNoZeros) {
  const AdamOptions adam{.lr = 0.01, .beta2 = 0.99};
  std::vector<std::vector<float>> variances[2];
  std::vector<std::vector<float>> momenta;
  for (const bool raised : {false, true}) {
    const FreezeOptions freeze{.at_step = 4, .floor = raised ? 0.5 : 0.0};
    run_trainers(
        kRanks, "onebit",
        [&](auto& r) { return OneBitAdam::make(r, all_layers(r), {adam}, freeze); },
        [&](Trainer& trainer) {
          for (std::uint64_t step = 0; step < 4; ++step) ASSERT_TRUE(trainer.train(step));
          if (trainer.rank() == 0) {  // slots: master, exp_avg, exp_avg_sq
            momenta = trainer.optimizer->slots()[1].values;
            variances[raised ? 1 : 0] = trainer.optimizer->slots()[2].values;
          }
        });
  }
  for (const std::size_t layer : {0, 1, 2, 3}) {
    const bool compressed = layer == 0 || layer == 2;
    double squares = 0;
    for (const float x : momenta[layer]) squares += double{x} * double{x};
    const double least = 0.5 * squares / static_cast<double>(momenta[layer].size());
    int lifted = 0;
    for (std::size_t i = 0; i < variances[0][layer].size(); ++i) {
      const double paper = variances[0][layer][i];
      const bool lifts = compressed && paper != 0 && paper < least;
      const double expected = lifts ? least : paper;
      ASSERT_NEAR(variances[1][layer][i], expected, expected * 0x1p-23) << layer << " " << i;
      lifted += lifts ? 1 : 0;
    }
    EXPECT_EQ(lifted > 0, compressed) << layer;
  }
}

TEST(ZeroOneAdam, PendingMomentaBecomeSumsWhenIntervalsBegin) {
  const Method method = all_methods()[4];  // lr 0.01, beta1 0.9
  const std::int64_t last = testing::kShortIntervals.var_freeze_step - 1;
  ASSERT_EQ(ZeroOneSchedule(testing::kShortIntervals).at(last), ZeroOneStep::kVariance);
  run_trainers(kRanks, "onebit", method.make, [&](Trainer& trainer) {
    for (std::int64_t step = 0; step < last; ++step) {
      ASSERT_TRUE(trainer.train(static_cast<std::uint64_t>(step)));
    }
    const auto before = trainer.optimizer->state().reducer.entries;
    ASSERT_TRUE(trainer.train(static_cast<std::uint64_t>(last)));
    const auto after = trainer.optimizer->state().reducer.entries;
    const double factor = 0.01 / (1 - std::pow(0.9, last + 1));
    ASSERT_EQ(after.size(), before.size());
    double pending = 0;
    for (std::size_t entry = 0; entry < after.size(); ++entry) {
      for (std::size_t i = 0; i < after[entry].values.size(); ++i) {
        const double expected = factor * double{before[entry].values[i]};
        EXPECT_NEAR(after[entry].values[i], expected, std::fabs(expected) * 0x1p-22);
        pending += std::fabs(expected);
      }
    }
    EXPECT_GT(pending, 0);
  });
}

// Between variance steps it counts without being kept: by the momenta before the step.
TEST(VarianceFloor, OfZeroOneAdamCountsInCompressedSteps) {
  const AdamOptions adam{.lr = 0.01, .beta2 = 0.99, .decoupled = true};
  ZeroOneOptions options = testing::kShortIntervals;
  options.floor = 0.5;
  ASSERT_EQ(ZeroOneSchedule(options).at(2), ZeroOneStep::kMomentum);
  run_trainers(
      kRanks, "onebit",
      [&](auto& r) { return ZeroOneAdam::make(r, all_layers(r), {adam}, options); },
      [&](Trainer& trainer) {
        ASSERT_TRUE(trainer.train(0) && trainer.train(1));
        const auto moments = [&](std::size_t slot) {  // slots: master, exp_avg, exp_avg_sq
          return trainer.optimizer->slots()[slot].values[0];
        };
        const std::vector<float> before = moments(1);
        const std::vector<float> v = moments(2);
        std::vector<float> floored = trainer.weights.values(0);
        std::vector<float> plain = floored;
        ASSERT_TRUE(trainer.train(2));
        EXPECT_EQ(moments(2), v);
        double squares = 0;
        for (const float x : before) squares += double{x} * double{x};
        const double of_m = 1 - 0.9 * 0.9;
        const double of_v = 1 - 0.99 * 0.99;
        const double least =
            0.5 * squares / static_cast<double>(before.size()) * of_v / (of_m * of_m);
        std::vector<float> reduced = moments(1);
        const auto step = [&](double floor, std::vector<float>& weights) {
          AdamOptions with_floor = adam;
          with_floor.least_v = floor;
          std::vector<float> m(reduced.size());
          frozen_adam_step(with_floor, {.m = 3, .v = 2}, view(reduced), weights, m, v);
        };
        step(least, floored);
        step(0, plain);
        const std::vector<float> now = trainer.weights.values(0);
        double shorter = 0;
        for (std::size_t i = 0; i < now.size(); ++i) {
          EXPECT_NEAR(now[i], floored[i], 1e-6) << i;
          shorter += std::fabs(double{now[i]} - double{plain[i]});
        }
        EXPECT_GT(shorter, 1e-3);
      });
}

TEST(VarianceFloor, OfZeroOneAdamIsKeptWhenIntervalsBegin) {
  const AdamOptions adam{.lr = 0.01, .beta2 = 0.99};
  ZeroOneOptions schedule = testing::kShortIntervals;
  schedule.floor = 0.5;
  run_trainers(
      kRanks, "onebit",
      [&](auto& r) { return ZeroOneAdam::make(r, all_layers(r), {adam}, schedule); },
      [&](Trainer& trainer) {
        for (std::int64_t step = 0; step < schedule.var_freeze_step; ++step) {
          ASSERT_TRUE(trainer.train(static_cast<std::uint64_t>(step)));
        }
        for (const std::size_t layer : {0, 2}) {  // slots: master, exp_avg, exp_avg_sq
          double squares = 0;
          const std::vector<float>& m = trainer.optimizer->slots()[1].values[layer];
          for (const float x : m) squares += double{x} * double{x};
          const double least = 0.5 * squares / static_cast<double>(m.size());
          int at_floor = 0;
          for (const float v : trainer.optimizer->slots()[2].values[layer]) {
            if (v == 0) continue;
            EXPECT_GE(v, least * (1 - 0x1p-22));
            at_floor += v < least * (1 + 0x1p-22) ? 1 : 0;
          }
          EXPECT_GT(at_floor, 0);
        }
      });
}

TEST(Freezing, ElementsWithoutVarianceNeverMoveAgain) {
  for (const std::size_t which : {3U, 5U}) {
    const Method method = all_methods()[which];
    SCOPED_TRACE(method.name);
    run_trainers(kRanks, "onebit", method.make, [&](Trainer& trainer) {
      std::vector<float> at_freeze;
      for (std::uint64_t step = 0; step < 14; ++step) {
        if (step == testing::kFreezeStep) at_freeze = trainer.weights.values(0);
        trainer.fill(step);
        // From the freeze on there are gradients everywhere.
        if (step >= testing::kFreezeStep) trainer.gradients.fill(step, trainer.rank());
        trainer.reduce();
        ASSERT_TRUE(trainer.apply());
      }
      const std::vector<float> now = trainer.weights.values(0);
      for (std::size_t i = 0; i < now.size(); ++i) {
        const bool dead = testing::is_dead(static_cast<std::int64_t>(i));
        ASSERT_EQ(now[i] == at_freeze[i], dead) << i;
      }
    });
  }
}

TEST(ZeroOneAdam, SendsNothingInLocalStepsAndFewBytesInOthers) {
  const std::uint64_t steps = 22;
  const ZeroOneSchedule schedule(testing::kShortIntervals);
  const std::vector<std::uint64_t> dense = wire_bytes("none", plain_adam(), steps);
  const std::vector<std::uint64_t> compressed = wire_bytes("onebit", plain_adam(), steps);
  const std::vector<std::uint64_t> bytes = wire_bytes("onebit", all_methods()[4].make, steps);
  std::string kinds;
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const ZeroOneStep kind = schedule.at(static_cast<std::int64_t>(i) + 1);
    kinds += "vmls"[static_cast<int>(kind)];
    EXPECT_EQ(bytes[i], kind == ZeroOneStep::kLocal      ? 0
                        : kind == ZeroOneStep::kVariance ? dense[i]
                                                         : compressed[i])
        << i + 1;
  }
  EXPECT_EQ(kinds,
            "vmvmv"
            "ss"
            "ls"
            "llls"
            "llls"
            "llls");
}

// Nothing moves where lr is 0, and what follows is no larger than it would be.
TEST(ZeroOneAdam, RestsWhereTheLearningRateIsZero) {
  const MakeOptimizer make = [](auto& r) {
    return ZeroOneAdam::make(r, all_layers(r), {kAdamW}, testing::kShortIntervals);
  };
  run_trainers(kRanks, "onebit", make, [&](Trainer& trainer) {
    auto& adam = trainer.as<ZeroOneAdam>();
    const auto intervals = [&](std::uint64_t begin, std::uint64_t end) {
      double moved = 0;
      const std::vector<float> before = trainer.weights.values(2);
      for (std::uint64_t step = begin; step < end; ++step) EXPECT_TRUE(trainer.train(step));
      const std::vector<float> after = trainer.weights.values(2);
      for (std::size_t i = 0; i < after.size(); ++i) {
        moved += std::pow(double{after[i]} - double{before[i]}, 2);
      }
      return std::sqrt(moved);
    };
    intervals(0, 14);
    const double usual = intervals(14, 18);
    AdamOptions still = kAdamW;
    still.lr = 0;
    adam.set_options({still});
    EXPECT_EQ(intervals(18, 26), 0);
    adam.set_options({kAdamW});
    EXPECT_LT(intervals(26, 30), 2 * usual);
    EXPECT_GT(usual, 0);
  });
}

// One rank's bad gradient in a step without exchange costs it that layer's step.
TEST(ZeroOneAdam, LeavesABadLayerOutOfALocalStep) {
  std::vector<std::uint64_t> hashes(kRanks);
  run_trainers(kRanks, "onebit", all_methods()[4].make, [&](Trainer& trainer) {
    auto& adam = trainer.as<ZeroOneAdam>();
    std::size_t met = 0;
    for (std::uint64_t step = 0; step < 18; ++step) {
      const bool local = adam.next() == ZeroOneStep::kLocal;
      trainer.fill(step);
      const bool bad = local && trainer.rank() == 1;
      if (bad) trainer.gradients.set(0, 9, std::numeric_limits<float>::quiet_NaN());
      const std::vector<float> before = trainer.weights.values(0);
      const std::vector<float> other = trainer.weights.values(2);
      trainer.reduce();
      ASSERT_TRUE(trainer.apply());
      EXPECT_EQ(trainer.weights.values(0) == before, bad) << step;
      EXPECT_NE(trainer.weights.values(2), other) << step;
      met += bad ? 1 : 0;
    }
    EXPECT_EQ(met > 1, trainer.rank() == 1);
    for (const float w : trainer.weights.values(0)) ASSERT_TRUE(std::isfinite(w));
    hashes[static_cast<std::size_t>(trainer.rank())] = trainer.weights.hash();
  });
  EXPECT_EQ(hashes, std::vector<std::uint64_t>(kRanks, hashes[0]));  // step 17 ends an interval
}

// Under a loss scale, which ranks lower where they see Inf, all see it.
void leave_out_bad_local_steps(double scale) {
  run_trainers(kRanks, "onebit", all_methods()[4].make, [&](Trainer& trainer) {
    trainer.reducer.set_loss_scale(scale);
    auto& adam = trainer.as<ZeroOneAdam>();
    int met = 0;
    for (std::uint64_t step = 0; step < 18; ++step) {
      const bool local = adam.next() == ZeroOneStep::kLocal;
      if (local) {
        const OptimizerState before = trainer.optimizer->state();
        trainer.fill(step);
        if (trainer.rank() == 1) {
          trainer.gradients.set(2, 9, std::numeric_limits<float>::infinity());
        }
        trainer.reduce();
        EXPECT_TRUE(std::isnan(trainer.gradients.get(2, 0))) << step;
        EXPECT_TRUE(std::isfinite(trainer.gradients.get(0, 0))) << step;
        EXPECT_FALSE(trainer.apply()) << step;
        EXPECT_EQ(testing::difference(before, trainer.optimizer->state()), "") << step;
        ++met;
      }
      ASSERT_TRUE(trainer.train(step));
    }
    EXPECT_GT(met, 2);
  });
}

TEST(ZeroOneAdam, LeavesABadLocalStepOutOnAllRanksUnderALossScale) {
  leave_out_bad_local_steps(2);
  leave_out_bad_local_steps(1);  // as far as a GradScaler may lower it
}

// --- one rank

std::vector<std::uint64_t> alone(const MakeOptimizer& make) {
  std::vector<std::uint64_t> hashes;
  run_trainers(1, "topk:0.05", make, [&](Trainer& trainer) {
    for (std::uint64_t step = 0; step < 14; ++step) {
      trainer.train(step);
      hashes.push_back(trainer.weights.hash());
    }
  });
  return hashes;
}

TEST(OneRank, IsThePlainOptimizerBitForBit) {
  AdamOptions options = kAdamW;
  options.decoupled = false;  // the methods' own doing
  const FreezeOptions freeze{.at_step = 3};
  const auto adam = alone(plain_adam());
  EXPECT_EQ(adam,
            alone([&](auto& r) { return OneBitAdam::make(r, all_layers(r), {options}, freeze); }));
  EXPECT_EQ(adam, alone([&](auto& r) {
              return ZeroOneAdam::make(r, all_layers(r), {options}, testing::kShortIntervals);
            }));
  for (const bool nesterov : {false, true}) {
    const SgdOptions sgd{.lr = 0.05, .momentum = 0.9, .weight_decay = 1e-3, .nesterov = nesterov};
    EXPECT_EQ(alone([&](auto& r) { return Sgd::make(r, all_layers(r), {sgd}); }),
              alone([&](auto& r) { return DgcSgd::make(r, all_layers(r), {sgd}); }));
  }
}

TEST(OneRank, IsLamb) {
  const MakeOptimizer make = [](auto& r) {
    return OneBitLamb::make(r, all_layers(r), {kAdamW}, {.at_step = 3});
  };
  run_trainers(1, "onebit", make, [&](Trainer& trainer) {
    std::vector<float> weights = trainer.weights.values(0);
    std::vector<float> m(weights.size());
    std::vector<float> v(weights.size());
    for (std::int64_t step = 1; step < 10; ++step) {
      trainer.train(static_cast<std::uint64_t>(step));
      const AdamSteps steps{.m = step, .v = step};
      const LambSums sums = lamb_moments(kAdamW, steps, trainer.gradients.view(0), weights, m, v);
      const double trust = std::clamp(std::sqrt(sums.weights / sums.update), 0.01, 10.0);
      lamb_move(kAdamW, steps, trust, weights, m, v);
      EXPECT_EQ(trainer.weights.values(0), weights) << step;
    }
  });
}

// --- weights of 16 bits

// Each step is far below half a unit of the weight's last place.
TEST(HalfWeights, SmallUpdatesAddUp) {
  const MakeOptimizer make = [](auto& r) {
    return Sgd::make(r, all_layers(r), {SgdOptions{.lr = 1e-4}});
  };
  run_trainers(2, "none", make, [&](Trainer& trainer) {
    const std::size_t half = testing::kHalfLayer;
    const std::int64_t n = trainer.layers[half].elements();
    for (std::int64_t i = 0; i < n; ++i) trainer.weights.set(half, i, 1);
    for (int step = 0; step < 100; ++step) {
      trainer.fill(0);
      for (std::int64_t i = 0; i < n; ++i) trainer.gradients.set(half, i, 1);
      trainer.reduce();
      trainer.apply();
      EXPECT_EQ(trainer.weights.get(half, 0) == 1, step < 19) << step;  // half a unit: 2^-9
    }
    // 1 - 100 * 1e-4, in bf16.
    EXPECT_NEAR(trainer.weights.get(half, 0), 0.99, 0x1p-9);
    EXPECT_LT(trainer.weights.get(half, 0), 1);
    // What somebody else sets counts; the others keep their fractions.
    trainer.weights.set(half, 1, 2);
    trainer.reduce();
    trainer.apply();
    EXPECT_EQ(trainer.weights.get(half, 1), 2);
    EXPECT_EQ(trainer.optimizer->slots()[0].name, "master");
    EXPECT_NEAR(trainer.optimizer->slots()[0].values[half][0], 0.99, 2e-4);
    EXPECT_NEAR(trainer.optimizer->slots()[0].values[half][1], 2, 2e-4);
  });
}

// Weights that are set between two steps, here between two intervals, are trained from there.
TEST(Weights, SetFromOutsideAreFollowed) {
  for (const Method& method : all_methods()) {
    SCOPED_TRACE(method.name);
    run_trainers(2, method.needs_topk ? "topk:0.05" : "onebit", method.make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < 14; ++step) trainer.train(step);
      for (std::size_t layer = 0; layer < trainer.layers.size(); ++layer) {
        for (std::int64_t i = 0; i < trainer.layers[layer].elements(); ++i) {
          trainer.weights.set(layer, i, 64);
        }
      }
      for (std::uint64_t step = 14; step < 22; ++step) trainer.train(step);
      for (std::size_t layer = 0; layer < 6; ++layer) {
        double sum = 0;
        const std::vector<float> values = trainer.weights.values(layer);
        for (const float w : values) sum += double{w};
        EXPECT_NEAR(sum / static_cast<double>(values.size()), 64, 4) << layer;
      }
    });
  }
}

}  // namespace
}  // namespace thinwire::optim
