// ReducerState carried over to another number of ranks: what is pending is kept, through reducers
// too, and states that do not fit together are refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "comm/reducer.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr std::uint64_t kSteps = 3;
constexpr float kUlp = 0x1p-24F;

double size_of(const Pending& pending) {
  double squares = 0;
  for (const auto& [layer, values] : pending) {
    for (const double value : values) squares += value * value;
  }
  return std::sqrt(squares);
}

std::vector<ReducerState> reshard_all(const std::vector<ReducerState>& states, int size) {
  std::vector<ReducerState> result;
  for (int rank = 0; rank < size; ++rank) {
    result.push_back(reshard(states, rank, size, ReduceOp::kMean));
    EXPECT_EQ(result.back().rank, rank);
    EXPECT_EQ(result.back().world_size, size);
    EXPECT_EQ(result.back().step, states[0].step);
  }
  return result;
}

// Each value is rounded to fp32 once.
void expect_kept(const Pending& before, const Pending& after) {
  for (const auto& [layer, values] : before) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_NEAR(after.at(layer)[i], values[i], std::fabs(values[i]) * kUlp + 1e-37)
          << layer << " " << i;
    }
  }
}

// A job's policy, and whether its sparse layers are split-reduced where there are ranks enough: a
// link without latency, from three ranks on.
struct Job {
  const char* policy;
  bool split = false;

  ReducerOptions options() const {
    ReducerOptions options;
    if (split) {
      options.link.latency_seconds = 0;
      options.split_from_ranks = 3;
    }
    return options;
  }
};

// As the name of a test.
std::ostream& operator<<(std::ostream& out, const Job& job) {
  return out << job.policy << (job.split ? " by split-reduce" : "");
}

// Trains kSteps from `states` (none: from nothing): results + what is pending at the end must be
// the mean gradients + what was pending at the start. fp32 layers: a bf16 result is rounded.
std::vector<ReducerState> train(int size, const Job& job, const std::vector<ReducerState>& states,
                                std::uint64_t first, bool used = false) {
  std::vector<ReducerState> after(static_cast<std::size_t>(size));
  Pending total = states.empty() ? pending({}) : pending(states);
  std::vector<std::vector<double>> results;
  const ReducerTest test = [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    EXPECT_EQ(reducer.summary().find("by split-reduce") != std::string::npos,
              job.split && size > 2);
    if (used && !states.empty()) {
      gradients.fill(99, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
    }
    if (!states.empty()) reducer.restore(states[static_cast<std::size_t>(rank)]);
    for (std::uint64_t step = first; step < first + kSteps; ++step) {
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      for (std::size_t layer = 0; rank == 0 && layer < small_model().size(); ++layer) {
        if (step == first) results.emplace_back(gradients.values(layer).size());
        const std::vector<float> values = gradients.values(layer);
        for (std::size_t i = 0; i < values.size(); ++i) {
          results[layer][i] += static_cast<double>(values[i]);
        }
      }
    }
    after[static_cast<std::size_t>(rank)] = reducer.state();
  };
  run_reducers(size, job.policy, test, job.options());
  const std::vector<Layer> layers = small_model();
  Gradients gradients(layers);
  for (std::uint64_t step = first; step < first + kSteps; ++step) {
    for (int rank = 0; rank < size; ++rank) {
      gradients.fill(step, rank);
      for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        std::vector<double>& sum = total.at(layers[layer].name);
        const std::vector<float> values = gradients.values(layer);
        for (std::size_t i = 0; i < values.size(); ++i) {
          sum[i] += static_cast<double>(values[i]) / size;
        }
      }
    }
  }
  const Pending left = pending(after);
  // Of numbers below 8 some 2 P + 4 roundings a step.
  const double bound = static_cast<double>(kSteps) * (2 * size + 4) * 8 * kUlp;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    if (layers[layer].dtype != DType::kF32) continue;
    const std::string& name = layers[layer].name;
    for (std::size_t i = 0; i < results[layer].size(); ++i) {
      EXPECT_NEAR(results[layer][i] + left.at(name)[i], total.at(name)[i], bound)
          << name << " " << i << ", " << size << " ranks";
      if (::testing::Test::HasFailure()) return after;
    }
  }
  return after;
}

constexpr const char* kGathered =
    "policy = \"topk:0.05\"\n[[rule]]\nname = \"*.bias\"\npolicy = \"q4\"";

class Reshard : public ::testing::TestWithParam<Job> {};

TEST_P(Reshard, LosesNothingOnTheWay) {
  for (const std::vector<int>& sizes :
       {std::vector{4, 2, 4}, std::vector{4, 1, 4}, std::vector{1, 4}, std::vector{3, 4, 3}}) {
    std::vector<std::string> keys[2];  // of the last states
    for (const bool used : {false, true}) {
      SCOPED_TRACE(::testing::PrintToString(sizes) + (used ? " into used reducers" : ""));
      std::vector<ReducerState> states;
      std::uint64_t step = 0;
      for (const int size : sizes) {
        if (!states.empty()) {
          const Pending before = pending(states);
          EXPECT_EQ(size_of(before) > 0.1, states.size() > 1);
          states = reshard_all(states, size);
          expect_kept(before, pending(states));
        }
        states = train(size, GetParam(), states, step, used);
        step += kSteps;
        if (HasFailure()) return;
      }
      for (const StateEntry& entry : states[0].entries) keys[used ? 1 : 0].push_back(entry.key);
    }
    EXPECT_EQ(keys[0], keys[1]);  // nothing lies where no exchange looks
  }
}

INSTANTIATE_TEST_SUITE_P(Policies, Reshard,
                         ::testing::Values(Job{"onebit"}, Job{"topk:0.05"},
                                           Job{"topk:0.05,values=q8"}, Job{"powersgd:2"}, Job{"q4"},
                                           Job{kGathered}, Job{"topk:0.05", true},
                                           Job{"topk:0.05,select=carried", true}));

// Of one size, but another link: owners' residuals become workers', and ranges one.
TEST(Restore, CarriesASplitOverToAnAllgatherAndBack) {
  std::vector<ReducerState> states;
  std::uint64_t step = 0;
  for (const bool split : {true, false, true}) {
    for (const bool used : {false, true}) {
      states = train(4, {"topk:0.05", split}, states, step, used);
      step += kSteps;
      bool owners = false;
      for (const StateEntry& entry : states[0].entries) {
        owners = owners || entry.key.starts_with("owner/");
      }
      EXPECT_EQ(owners, split);
    }
  }
}

struct Momentum final : GradientMethod {
  std::vector<HandshakeField> fields() const override { return {}; }
  std::string codec_options(std::size_t, const Codec&) const override { return ",momentum=0.9"; }
  StepMode begin_step() override { return StepMode::kPolicy; }
  bool prepare(std::size_t, TensorView, TensorView) override { return false; }
};

TEST(ReshardState, KeepsVelocities) {
  std::vector<ReducerState> states(4);
  run_reducers(4, "topk:0.05", [&](int rank, auto& reducer, auto& gradients) {
    reducer.follow(std::make_shared<Momentum>());
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
    }
    states[static_cast<std::size_t>(rank)] = reducer.state();
  });
  const Pending before = pending(states, "worker.velocity/");
  EXPECT_GT(size_of(before), 0.1);
  const std::vector<ReducerState> two = reshard_all(states, 2);
  expect_kept(before, pending(two, "worker.velocity/"));
  std::vector<ReducerState> restored(2);
  run_reducers(2, "topk:0.05", [&](int rank, auto& reducer, auto&) {
    reducer.follow(std::make_shared<Momentum>());
    const auto at = static_cast<std::size_t>(rank);
    reducer.restore(two[at]);
    restored[at] = reducer.state();
  });
  expect_kept(before, pending(restored, "worker.velocity/"));
}

TEST(ReshardState, GivesEachRankItsOwnWhereNothingChanges) {
  std::vector<ReducerState> states(3);
  run_reducers(3, "q4", [&](int rank, auto& reducer, auto& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    states[static_cast<std::size_t>(2 - rank)] = reducer.state();  // in another order
  });
  for (int rank = 0; rank < 3; ++rank) {
    const ReducerState& saved = states[static_cast<std::size_t>(2 - rank)];
    const ReducerState same = reshard(states, rank, 3, ReduceOp::kMean);
    ASSERT_EQ(same.entries.size(), saved.entries.size());
    for (std::size_t i = 0; i < same.entries.size(); ++i) {
      EXPECT_EQ(same.entries[i].key, saved.entries[i].key);
      EXPECT_EQ(same.entries[i].values, saved.entries[i].values);
    }
  }
}

TEST(ReshardState, SumsAreSharedAmongTheNewRanks) {
  std::vector<ReducerState> states(2);
  for (int rank = 0; rank < 2; ++rank) {
    ReducerState& state = states[static_cast<std::size_t>(rank)];
    state.rank = rank;
    state.world_size = 2;
    state.entries = {{"worker/w/0:3", {1, 2, 3}}};
  }
  states[0].entries.push_back({"owner/w/1:3", {30, 60}});
  // (1 + 1) / 4, (2 + 2 + 30) / 4, (3 + 3 + 60) / 4; kMean: 2 / 2, 4 / 2 + 30, 6 / 2 + 60.
  const ReducerState sum = reshard(states, 3, 4, ReduceOp::kSum);
  ASSERT_EQ(sum.entries.size(), 1u);
  EXPECT_EQ(sum.entries[0].key, "worker/w/0:3");
  EXPECT_EQ(sum.entries[0].values, (std::vector<float>{0.5F, 8.5F, 16.5F}));
  EXPECT_EQ(reshard(states, 3, 4, ReduceOp::kMean).entries[0].values,
            (std::vector<float>{1, 32, 63}));
}

TEST(ReshardState, RefusesWhatDoesNotFitTogether) {
  std::vector<ReducerState> good(3);
  for (int rank = 0; rank < 3; ++rank) {
    good[static_cast<std::size_t>(rank)] = {.rank = rank,
                                            .world_size = 3,
                                            .step = 7,
                                            .policy = "q4",
                                            .entries = {{"worker/a/b/0:2", {1, 2}}}};
  }
  EXPECT_EQ(reshard(good, 0, 2, ReduceOp::kMean).entries.size(), 1u);
  const auto refused = [&](const std::function<void(std::vector<ReducerState>&)>& change,
                           const std::string& says) {
    std::vector<ReducerState> states = good;
    change(states);
    try {
      reshard(states, 1, 2, ReduceOp::kMean);
      ADD_FAILURE() << "accepted although " << says;
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr(says), HasSubstr("hint: ")));
    }
  };
  refused([](auto& s) { s.clear(); }, "no state given");
  refused([](auto& s) { s.pop_back(); }, "expected the states of 3 ranks, got 2");
  refused([](auto& s) { s[2].rank = 0; }, "rank 0: its state is there twice");
  refused([](auto& s) { s[2].rank = 3; }, "rank 3: expected a rank in [0, 3)");
  refused([](auto& s) { s[2].rank = -1; }, "rank -1: expected");
  refused([](auto& s) { s[1].step = 8; }, "rank 1: step: expected 7 as on rank 0, got 8");
  refused([](auto& s) { s[1].version = 2; }, "rank 1: version");
  refused([](auto& s) { s[1].world_size = 4; }, "rank 1: world size");
  refused([](auto& s) { s[1].loss_scale = 2; }, "rank 1: loss scale");
  refused([](auto& s) { s[1].policy = "q8"; }, "rank 1: policy: expected 'q4'");
  const auto key = [&](const char* key, const char* says) {
    refused([key](auto& s) { s[1].entries[0].key = key; }, says);
  };
  key("boss/a/b/0:2", "no known role");
  key("", "no known role");
  key("worker/", "names no range");
  key("worker/a/b", "names no range");
  key("worker/a/b/0-2", "names no range");
  key("worker/a/b/x:2", "names no range");
  key("worker/a/b/0:", "names no range");
  key("worker/a/b/-1:1", "names no range");
  key("worker/a/b/0:3", "has 2 values");
  key("worker/a/b/2:0", "has 2 values");
  key("worker/a/b/0:18446744073709551617", "names no range");
  for (const auto& [rank, size] : {std::pair{0, 0}, std::pair{2, 2}, std::pair{-1, 2}}) {
    EXPECT_THROW(reshard(good, rank, size, ReduceOp::kMean), InvalidArgument);
  }
}

}  // namespace
}  // namespace thinwire::testing
