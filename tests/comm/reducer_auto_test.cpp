// GradientReducer with the policy `auto`: whatever it chooses and when, the ranks hold the same
// bits and every gradient arrives in the end.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <barrier>
#include <cmath>
#include <set>
#include <string_view>
#include <thread>

#include "comm/reducer.h"
#include "compressors/core/error.h"
#include "tests/comm/reducer_fixture.h"
#include "tests/comm/slow_communicator.h"

namespace thinwire::testing {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kSize = 3;
constexpr std::uint64_t kSteps = 60;

void reduce(GradientReducer& reducer, Gradients& gradients) {
  reduce_step(reducer, gradients, kTwoBuckets);
}

constexpr double kSlow = 2e5;  // bytes a second: an uncompressed step takes half a second
constexpr double kFast = 1e10;

// Reducers of the small model over such a network.
void run_slow(const std::string& policy, const std::atomic<double>& rate, const ReducerTest& test) {
  run_ranks(kSize, [&](int rank, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::make_unique<SlowCommunicator>(std::move(comm), rate),
                            small_model(), Policy::parse(policy));
    const std::vector<Layer> layers = small_model();
    Gradients gradients(layers);
    test(rank, reducer, gradients);
  });
}

// One value of every rank, on every rank.
template <typename T>
class Exchange {
 public:
  std::array<T, kSize> all(int rank, const T& mine) {
    values_[static_cast<std::size_t>(rank)] = mine;
    barrier_.arrive_and_wait();
    std::array<T, kSize> values = values_;
    barrier_.arrive_and_wait();
    return values;
  }

 private:
  std::array<T, kSize> values_{};
  std::barrier<> barrier_{kSize};
};

// The network goes on changing until the plan has: on a busy machine a few steps later.
TEST(ReducerAuto, RanksHoldTheSameBitsInEveryStep) {
  Exchange<std::uint64_t> hashes;
  Exchange<std::vector<std::string>> plans;
  Exchange<std::size_t> plan_counts;
  std::atomic<double> rate = kSlow;
  run_slow("auto", rate, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    std::set<std::vector<std::string>> seen;
    bool changed = false;
    for (std::uint64_t step = 0; step < kSteps || (!changed && step < 5 * kSteps); ++step) {
      if (rank == 0 && step % (kSteps / 2) == 0) rate = step % kSteps == 0 ? kSlow : kFast;
      gradients.fill(step, rank);
      reduce(reducer, gradients);
      seen.insert(reducer.plan()->specs());
      changed = plan_counts.all(rank, seen.size())[0] > 1;
      const auto all = hashes.all(rank, gradients.hash());
      ASSERT_EQ(all[0], all[1]) << step;
      ASSERT_EQ(all[0], all[2]) << step;
    }
    reducer.state();  // when all is done
    const auto all = plans.all(rank, reducer.plan()->specs());
    EXPECT_EQ(all[0], all[1]);
    EXPECT_EQ(all[0], all[2]);
    EXPECT_TRUE(changed) << "nothing was tried";
  });
}

// Sum of what all steps gave + what is pending = sum of the mean gradients.
TEST(ReducerAuto, EveryGradientArrives) {
  Exchange<std::vector<float>> all_gradients;
  for (const char* policy : {"auto", "auto,memory=fp32", "auto,error=0.9,memory=bf16"}) {
    std::atomic<double> rate = kSlow;
    std::atomic<bool> compressed = false;
    run_slow(policy, rate, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const std::size_t layers = reducer.layers().size();
      std::vector<std::vector<double>> owed(layers);
      const auto add = [&](std::size_t layer, const std::vector<float>& values, double weight) {
        owed[layer].resize(values.size());
        for (std::size_t i = 0; i < values.size(); ++i) owed[layer][i] += weight * values[i];
      };
      const auto step = [&] {
        for (std::size_t layer = 0; layer < layers; ++layer) {
          for (const auto& values : all_gradients.all(rank, gradients.values(layer))) {
            add(layer, values, 1.0 / kSize);
          }
        }
        reduce(reducer, gradients);
        for (std::size_t layer = 0; layer < layers; ++layer)
          add(layer, gradients.values(layer), -1);
      };
      for (std::uint64_t i = 0; i < kSteps; ++i) {
        if (rank == 0 && i % 20 == 0) rate = i % 40 == 0 ? kSlow : kFast;
        gradients.fill(i, rank);
        step();
        for (const std::string& spec : reducer.plan()->specs()) {
          if (spec.substr(0, 4) != "none") compressed = true;
        }
      }
      reducer.set_policy(Policy::parse("none"));
      for (std::size_t layer = 0; layer < layers; ++layer) gradients.zero(layer);
      step();
      for (std::size_t layer = 0; layer < layers; ++layer) {
        // bf16 gradients are rounded each step; residuals of bf16 at random.
        const bool coarse = reducer.layers()[layer].dtype == DType::kBF16 ||
                            std::string_view(policy).find("fp32") == std::string_view::npos;
        for (const double value : owed[layer]) {
          ASSERT_NEAR(value, 0, coarse ? 0.3 : 1e-3) << policy << " " << layer;
        }
      }
    });
    EXPECT_TRUE(compressed) << policy;
  }
}

TEST(ReducerAuto, SaysWhatItDecidesAndChanges) {
  run_reducers(kSize, "auto", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      gradients.fill(step, rank);
      reduce(reducer, gradients);
    }
    reducer.state();
    const std::vector<std::string> decisions = reducer.take_decisions();
    ASSERT_FALSE(decisions.empty());
    EXPECT_THAT(decisions[0], HasSubstr("auto: begins with"));
    EXPECT_TRUE(reducer.take_decisions().empty());
    EXPECT_THAT(reducer.stats().layers[0].reason, HasSubstr("auto"));
    EXPECT_THAT(reducer.stats().layers[0].reason, Not(HasSubstr("not seen yet")));
  });
}

TEST(ReducerAuto, GoesOnFromAState) {
  Exchange<ReducerState> states;
  std::array<ReducerState, kSize> saved;
  const std::atomic<double> rate = kSlow;
  run_slow("auto", rate, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    for (std::uint64_t step = 0; step < 20; ++step) {
      gradients.fill(step, rank);
      reduce(reducer, gradients);
    }
    const ReducerState state = reducer.state();
    EXPECT_EQ(state.codecs.size(), reducer.layers().size());
    const auto all = states.all(rank, state);
    if (rank == 0) saved = all;
  });
  run_slow("auto", rate, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    const ReducerState& state = saved[static_cast<std::size_t>(rank)];
    reducer.restore(state);
    EXPECT_EQ(reducer.plan()->specs(), state.codecs);
    const ReducerState again = reducer.state();
    ASSERT_EQ(again.entries.size(), state.entries.size());
    for (std::size_t i = 0; i < state.entries.size(); ++i) {
      EXPECT_EQ(again.entries[i].key, state.entries[i].key);
      EXPECT_EQ(again.entries[i].values, state.entries[i].values);
    }
    for (std::uint64_t step = 20; step < 40; ++step) {
      gradients.fill(step, rank);
      reduce(reducer, gradients);
    }
  });
}

TEST(ReducerAuto, ComesAndGoesBySetPolicy) {
  Exchange<std::uint64_t> hashes;
  run_reducers(kSize, "topk:0.05", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    std::uint64_t step = 0;
    for (const char* policy : {"auto", "q4", "auto,families=topk", "none", "auto"}) {
      reducer.set_policy(Policy::parse(policy));
      for (int i = 0; i < 12; ++i) {
        gradients.fill(step++, rank);
        reduce(reducer, gradients);
        const auto all = hashes.all(rank, gradients.hash());
        ASSERT_EQ(all[0], all[1]) << policy;
        ASSERT_EQ(all[0], all[2]) << policy;
      }
      EXPECT_EQ(reducer.take_decisions().empty(), std::string_view(policy).substr(0, 4) != "auto");
    }
  });
}

TEST(ReducerAuto, AStepWithNanIsNothingToIt) {
  run_reducers(kSize, "auto,nonfinite=skip-step",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 for (std::uint64_t step = 0; step < 40; ++step) {
                   gradients.fill(step, rank);
                   if (step % 3 == 1 && rank == 1) gradients.set(2, 5, std::nanf(""));
                   reduce(reducer, gradients);
                   for (const float value : gradients.values(2)) ASSERT_TRUE(std::isfinite(value));
                 }
                 EXPECT_EQ(reducer.stats().skipped_steps, 13U);
               });
}

// Wherever the others are, also where they decide: an error for each, and no memory that is gone.
TEST(ReducerAuto, ARankThatDiesIsAnErrorOnTheOthers) {
  for (int last = 3; last < 14; ++last) {
    LoopbackGroup group(kSize);
    const auto errors = run_group(group, kSize, [&](int rank, std::unique_ptr<Communicator> comm) {
      const std::vector<Layer> layers = small_model();
      GradientReducer reducer(std::move(comm), layers, Policy::parse("auto"),
                              {.roll_call_grace = std::chrono::milliseconds(50)});
      Gradients gradients(layers);
      for (int step = 0; step < 20; ++step) {
        gradients.fill(static_cast<std::uint64_t>(step), rank);
        reduce(reducer, gradients);
        if (rank == 1 && step == last) {
          group.kill(1, LoopbackGroup::Death::kConnection);
          return;
        }
      }
    });
    EXPECT_EQ(errors[1], nullptr);
    EXPECT_THAT(message(errors[0]), HasSubstr("rank 1")) << last;
    EXPECT_THAT(message(errors[2]), HasSubstr("rank 1")) << last;
  }
}

TEST(ReducerAuto, StatesOfOtherPlansAreRefusedWithNothingChanged) {
  const std::atomic<double> rate = kSlow;
  run_slow("auto", rate, [](int rank, GradientReducer& reducer, Gradients& gradients) {
    for (std::uint64_t step = 0; step < 12; ++step) {
      gradients.fill(step, rank);
      reduce(reducer, gradients);
    }
    const ReducerState good = reducer.state();
    ReducerState bad = good;
    bad.codecs.pop_back();
    EXPECT_THROW(reducer.restore(bad), InvalidArgument);
    bad = good;
    bad.codecs[0] = "fedzip:0.01";
    EXPECT_THROW(reducer.restore(bad), InvalidArgument);
    bad = good;
    bad.entries.push_back({"worker/nothing/0:4", {0, 0, 0, 0}});
    EXPECT_THROW(reducer.restore(bad), InvalidArgument);
    const ReducerState after = reducer.state();
    EXPECT_EQ(after.codecs, good.codecs);
    ASSERT_EQ(after.entries.size(), good.entries.size());
    for (std::size_t i = 0; i < good.entries.size(); ++i) {
      EXPECT_EQ(after.entries[i].values, good.entries[i].values);
    }
  });
}

TEST(ReducerAuto, OneRankGoesOnFromTheStatesOfSeveral) {
  Exchange<ReducerState> states;
  std::array<ReducerState, kSize> saved;
  const std::atomic<double> rate = kSlow;
  run_slow("auto,families=lowrank,memory=bf16", rate,
           [&](int rank, GradientReducer& reducer, Gradients& gradients) {
             for (std::uint64_t step = 0; step < 3; ++step) {
               gradients.fill(step, rank);
               reduce(reducer, gradients);
             }
             const auto all = states.all(rank, reducer.state());
             ASSERT_FALSE(all[0].entries.empty());
             if (rank == 0) saved = all;
           });
  run_reducers(1, "auto,families=lowrank,memory=bf16",
               [&](int rank, GradientReducer& reducer, Gradients& gradients) {
                 reducer.restore(reshard(saved, 0, 1, ReduceOp::kMean));
                 gradients.fill(12, rank);
                 const std::uint64_t hash = gradients.hash();
                 reduce(reducer, gradients);
                 EXPECT_NE(gradients.hash(), hash) << "what was pending has not come";
                 reducer.restore(reducer.state());
               });
}

TEST(ReducerAuto, OneRankAlone) {
  run_reducers(1, "auto", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    const std::uint64_t hash = gradients.hash();
    reduce(reducer, gradients);
    EXPECT_EQ(gradients.hash(), hash);
    EXPECT_TRUE(reducer.take_decisions().empty());
  });
}

class SilentMethod final : public GradientMethod {
 public:
  std::vector<HandshakeField> fields() const override { return {}; }
  StepMode begin_step() override { return StepMode::kPolicy; }
  bool prepare(std::size_t, TensorView, TensorView) override { return false; }
};

TEST(ReducerAuto, RefusesAnOptimizerThatMustKnowTheCodecs) {
  run_reducers(kSize, "auto", [](int, GradientReducer& reducer, Gradients&) {
    EXPECT_THROW(reducer.follow(std::make_shared<SilentMethod>()), PolicyError);
  });
  run_reducers(kSize, "topk:0.05", [](int, GradientReducer& reducer, Gradients&) {
    reducer.follow(std::make_shared<SilentMethod>());
    EXPECT_THROW(reducer.set_policy(Policy::parse("auto")), PolicyError);
  });
}

}  // namespace
}  // namespace thinwire::testing
