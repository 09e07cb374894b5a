// What all optimizers have in common, ranks as threads over loopback: equal replicas, steps that
// are left out, loss scales, what one rank alone does.
#include "optim/optimizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "compressors/core/error.h"
#include "optim/adam.h"
#include "optim/sgd.h"
#include "tests/optim/training.h"

namespace thinwire::optim {
namespace {

using testing::all_methods;
using testing::difference;
using testing::Method;
using testing::run_trainers;
using testing::Trainer;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint64_t kSteps = 16;

struct Setting {
  Method method;
  std::string policy;
};

std::vector<Setting> all_settings() {
  std::vector<Setting> settings;
  for (const Method& method : all_methods()) {
    for (const char* policy :
         {"onebit", "q4", "powersgd:2", "lossless", "none", "topk:0.05,values=q8"}) {
      if (!method.needs_topk || std::string(policy).starts_with("topk") || *policy == 'n') {
        settings.push_back({method, policy});
      }
    }
  }
  return settings;
}

// Settings for tests that need one policy a method.
std::vector<Setting> few_settings() {
  std::vector<Setting> settings;
  for (const Method& method : all_methods()) {
    settings.push_back({method, method.needs_topk ? "topk:0.05" : "onebit"});
  }
  return settings;
}

bool next_is_local(Trainer& trainer) {
  const auto* zero_one = dynamic_cast<ZeroOneAdam*>(trainer.optimizer.get());
  return zero_one != nullptr && zero_one->next() == ZeroOneStep::kLocal;
}

std::string trace_of(const Setting& setting) { return setting.method.name + ", " + setting.policy; }

TEST(Optimizers, KeepReplicasEqual) {
  for (const Setting& setting : all_settings()) {
    SCOPED_TRACE(trace_of(setting));
    constexpr std::size_t kRanks = 3;
    std::vector<std::vector<std::uint64_t>> hashes(kRanks);
    std::vector<std::uint64_t> local;
    run_trainers(kRanks, setting.policy, setting.method.make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < kSteps; ++step) {
        if (trainer.rank() == 0 && next_is_local(trainer)) local.push_back(step);
        ASSERT_TRUE(trainer.train(step));
        hashes[static_cast<std::size_t>(trainer.rank())].push_back(trainer.weights.hash());
      }
    });
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      const bool exchanges = std::find(local.begin(), local.end(), step) == local.end();
      EXPECT_EQ(hashes[0][step] == hashes[1][step], exchanges) << step;
      EXPECT_EQ(hashes[0][step] == hashes[2][step], exchanges) << step;
    }
  }
}

// Two good steps, a bad value on rank 1 in each later one, each then done again without it.
TEST(Optimizers, LeaveOutAStepWithNaNOnAllRanks) {
  for (const Setting& setting : few_settings()) {
    SCOPED_TRACE(trace_of(setting));
    std::vector<std::vector<std::uint64_t>> hashes(2, std::vector<std::uint64_t>(3));
    for (const std::size_t disturbed : {0U, 1U}) {
      run_trainers(3, setting.policy, setting.method.make, [&](Trainer& trainer) {
        for (std::uint64_t step = 0; step < kSteps; ++step) {
          if (disturbed == 1 && step >= 2 && !next_is_local(trainer)) {
            const OptimizerState before = trainer.optimizer->state();
            const std::uint64_t weights = trainer.weights.hash();
            trainer.fill(step + 100);
            const float bad = step % 2 == 0 ? kNaN : std::numeric_limits<float>::infinity();
            if (trainer.rank() == 1) trainer.gradients.set(step % 7, 5, bad);
            trainer.reduce();
            EXPECT_FALSE(trainer.apply()) << step;
            EXPECT_EQ(trainer.weights.hash(), weights) << step;
            EXPECT_EQ(difference(before, trainer.optimizer->state()), "") << step;
          }
          ASSERT_TRUE(trainer.train(step));
        }
        hashes[disturbed][static_cast<std::size_t>(trainer.rank())] = trainer.weights.hash();
        EXPECT_EQ(trainer.optimizer->steps(), static_cast<std::int64_t>(kSteps));
      });
    }
    EXPECT_EQ(hashes[0], hashes[1]);
  }
}

// By powers of two, so all roundings are the same.
TEST(Optimizers, TakeLossScalesAsIfThereWereNone) {
  std::vector<Setting> settings = few_settings();
  for (const bool by_last : {false, true}) {  // a threshold that most gradients exceed
    const auto clipped = [by_last](GradientReducer& reducer) {
      return DgcSgd::make(reducer, all_layers(reducer), {{.lr = 0.05, .momentum = 0.9}},
                          {.clip = 0.5, .clip_by_last = by_last});
    };
    const std::string name = by_last ? "DGCSGD clipped by the last norm" : "DGCSGD clipped";
    settings.push_back({{name, clipped, true}, "topk:0.05"});
  }
  for (const Setting& setting : settings) {
    SCOPED_TRACE(trace_of(setting));
    std::vector<std::vector<std::uint64_t>> hashes(2, std::vector<std::uint64_t>(2));
    for (const std::size_t scaled : {0U, 1U}) {
      run_trainers(2, setting.policy, setting.method.make, [&](Trainer& trainer) {
        for (std::uint64_t step = 0; step < kSteps; ++step) {
          const float scale = scaled == 0 ? 1.0F : step < 5 ? 1024.0F : step < 9 ? 256.0F : 4096.0F;
          trainer.reducer.set_loss_scale(static_cast<double>(scale));
          trainer.fill(step);
          trainer.multiply(scale);
          trainer.reduce();
          trainer.multiply(1 / scale);
          ASSERT_TRUE(trainer.apply());
        }
        hashes[scaled][static_cast<std::size_t>(trainer.rank())] = trainer.weights.hash();
      });
    }
    EXPECT_EQ(hashes[0], hashes[1]);
  }
}

TEST(Optimizers, ResumeBitForBitFromAnyStep) {
  for (const Setting& setting : all_settings()) {
    SCOPED_TRACE(trace_of(setting));
    if (setting.policy == "q4" || setting.policy == "none") continue;
    constexpr std::size_t kRanks = 2;
    // By rank, before each step.
    std::vector<std::vector<OptimizerState>> states(kRanks);
    std::vector<std::vector<testing::Gradients>> weights(kRanks);
    std::vector<std::uint64_t> last(kRanks);
    std::vector<OptimizerState> end(kRanks);
    const std::vector<Layer> layers = testing::training_model();
    const auto go_on = [&](Trainer& trainer, std::uint64_t from, bool keep) {
      const auto rank = static_cast<std::size_t>(trainer.rank());
      for (std::uint64_t step = from; step < kSteps; ++step) {
        if (keep) {
          states[rank].push_back(trainer.optimizer->state());
          testing::Gradients copy(layers);
          for (std::size_t layer = 0; layer < layers.size(); ++layer) {
            for (std::int64_t i = 0; i < layers[layer].elements(); ++i) {
              copy.set(layer, i, trainer.weights.get(layer, i));
            }
          }
          weights[rank].push_back(copy);
        }
        ASSERT_TRUE(trainer.train(step));
      }
    };
    run_trainers(kRanks, setting.policy, setting.method.make, [&](Trainer& trainer) {
      const auto rank = static_cast<std::size_t>(trainer.rank());
      go_on(trainer, 0, true);
      last[rank] = trainer.weights.hash();
      end[rank] = trainer.optimizer->state();
    });
    for (const std::uint64_t from : {2U, 4U, 5U, 6U, 7U, 9U, 11U, 13U}) {
      run_trainers(kRanks, setting.policy, setting.method.make, [&](Trainer& trainer) {
        const auto rank = static_cast<std::size_t>(trainer.rank());
        if (from % 2 == 1) trainer.train(1000);  // a reducer that is not fresh
        for (std::size_t layer = 0; layer < layers.size(); ++layer) {
          for (std::int64_t i = 0; i < layers[layer].elements(); ++i) {
            trainer.weights.set(layer, i, weights[rank][from].get(layer, i));
          }
        }
        trainer.optimizer->restore(states[rank][from]);
        EXPECT_EQ(difference(trainer.optimizer->state(), states[rank][from]), "") << from;
        go_on(trainer, from, false);
        EXPECT_EQ(trainer.weights.hash(), last[rank]) << from;
        EXPECT_EQ(difference(trainer.optimizer->state(), end[rank]), "") << from;
      });
    }
  }
}

}  // namespace
}  // namespace thinwire::optim
