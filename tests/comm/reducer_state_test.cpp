// GradientReducer over loopback: transactions (NaN policies, abandoned steps) and saved state.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include "comm/reducer.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr const char* kMixed = R"(
  policy = "topk:0.05,values=q8"
  [[rule]]
  name = "fc2.weight"
  policy = "q4"
  [[rule]]
  name = "half.weight"
  policy = "randmask:0.2"
)";

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void expect_same_residuals(const ReducerState& a, const ReducerState& b) {
  ASSERT_EQ(a.entries.size(), b.entries.size());
  for (std::size_t i = 0; i < a.entries.size(); ++i) {
    EXPECT_EQ(a.entries[i].key, b.entries[i].key);
    EXPECT_TRUE(same_bits(a.entries[i].values, b.entries[i].values)) << a.entries[i].key;
  }
}

std::string with_option(const std::string& option) {
  std::string text = kMixed;
  for (const char* spec : {"values=q8", "q4", "randmask:0.2"}) {
    text.replace(text.find(spec), std::strlen(spec), std::string(spec) + "," + option);
  }
  return text;
}

// Two good steps, then one in which rank 1 alone has a bad value, then a good one.
struct Bad {
  const char* name;
  std::size_t layer;
  float value;
  bool summed = false;  // by the transport: the rank is not known
};
class ReducerNonFinite : public ::testing::TestWithParam<Bad> {};

void run_with_bad_value(
    const std::string& policy, const Bad& bad,
    const std::function<void(GradientReducer&, Gradients&, const std::exception_ptr&)>& check) {
  run_reducers(3, policy, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    for (std::uint64_t step = 0; step < 2; ++step) {
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      EXPECT_FALSE(reducer.last_step_skipped());
    }
    const ReducerState before = reducer.state();
    gradients.fill(2, rank);
    if (rank == 1) {
      gradients.set(bad.layer, 5, bad.value);
    }
    std::exception_ptr error;
    try {
      reduce_step(reducer, gradients, kTwoBuckets);
    } catch (...) {
      error = std::current_exception();
    }
    const ReducerState after = reducer.state();
    expect_same_residuals(before, after);
    EXPECT_EQ(after.step, before.step + 1);
    EXPECT_TRUE(reducer.last_step_skipped());
    const ReducerStats stats = reducer.stats();
    EXPECT_EQ(stats.skipped_steps, 1u);
    EXPECT_EQ(stats.layers[bad.layer].nonfinite_steps, 1u);
    check(reducer, gradients, error);

    gradients.fill(3, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    EXPECT_FALSE(reducer.last_step_skipped());
    EXPECT_TRUE(std::isfinite(gradients.get(bad.layer, 5)));
  });
}

TEST_P(ReducerNonFinite, PropagateMakesThatTensorNaNEverywhere) {
  run_with_bad_value(
      kMixed, GetParam(), [](GradientReducer& reducer, Gradients& gradients, const auto& error) {
        EXPECT_EQ(message(error), "");
        for (std::size_t layer = 0; layer < reducer.layers().size(); ++layer) {
          for (const float value : gradients.values(layer)) {
            ASSERT_EQ(std::isnan(value), layer == GetParam().layer) << reducer.layers()[layer].name;
          }
        }
      });
}

TEST_P(ReducerNonFinite, SkipStepZeroesEveryGradientEverywhere) {
  run_with_bad_value(with_option("nonfinite=skip-step"), GetParam(),
                     [](GradientReducer& reducer, Gradients& gradients, const auto& error) {
                       EXPECT_EQ(message(error), "");
                       for (std::size_t layer = 0; layer < reducer.layers().size(); ++layer) {
                         for (const float value : gradients.values(layer)) {
                           ASSERT_EQ(value, 0.0F) << reducer.layers()[layer].name;
                         }
                       }
                     });
}

TEST_P(ReducerNonFinite, ErrorNamesTheLayerOnEveryRankAndTheReducerGoesOn) {
  run_with_bad_value(
      with_option("nonfinite=error"), GetParam(),
      [](GradientReducer& reducer, Gradients&, const auto& error) {
        EXPECT_THROW(std::rethrow_exception(error), NonFiniteError);
        const std::string name = reducer.layers()[GetParam().layer].name;
        const std::string where =
            "tensor '" + name + "', index 5, value " + std::to_string(GetParam().value);
        const std::string first =
            GetParam().summed ? where + " in the sum over the ranks\n" : "rank 1, " + where + "\n";
        EXPECT_THAT(message(error), AllOf(HasSubstr("the first: " + first), HasSubstr("at step 2"),
                                          HasSubstr("hint: ")));
      });
}

// Of several bad values one in a rank's own gradient, there that of the first layer, rank and
// index.
TEST(ReducerNonFinite, ErrorNamesWhatIsFirstAndKnown) {
  struct Place {
    int rank;
    std::size_t layer;
    std::int64_t index;
    float value;
  };
  struct Scene {
    std::string policy;
    std::vector<Place> places;
    std::string says;
  };
  const float inf = HUGE_VALF;
  const float huge = 3e38F;
  const Scene scenes[] = {
      {"q8,nonfinite=error",
       {{2, 2, 7, inf}, {1, 2, 2000, -inf}, {1, 2, 2110, inf}, {0, 5, 0, inf}, {0, 1, 0, inf}},
       "the first: rank 1, tensor 'fc2.weight', index 2000, value -inf"},
      {"topk:0.05,memory=bf16,nonfinite=error",
       {{2, 4, 7, inf}, {1, 2, 2000, inf}},
       "the first: rank 1, tensor 'fc2.weight', index 2000, value inf"},
      {"q8,nonfinite=error",
       {{0, 0, 1300, huge}, {1, 0, 1300, huge}, {2, 0, 1300, huge}},
       "the first: tensor 'fc1.weight', index 1300, value inf in the sum over the ranks"},
  };
  for (const Scene& scene : scenes) {
    SCOPED_TRACE(scene.policy + ": " + scene.says);
    ReducerOptions sum;
    sum.op = ReduceOp::kSum;
    run_reducers(
        3, scene.policy,
        [&](int rank, auto& reducer, auto& gradients) {
          gradients.fill(0, rank);
          for (const Place& place : scene.places) {
            if (place.rank == rank) gradients.set(place.layer, place.index, place.value);
          }
          std::exception_ptr error;
          try {
            reduce_step(reducer, gradients, kTwoBuckets);
          } catch (...) {
            error = std::current_exception();
          }
          EXPECT_THAT(message(error), HasSubstr(scene.says));
        },
        sum);
  }
}

INSTANTIATE_TEST_SUITE_P(Reducer, ReducerNonFinite,
                         ::testing::Values(Bad{"topk", 0, std::nanf("")},
                                           Bad{"dense", 1, HUGE_VALF}, Bad{"q4", 2, -HUGE_VALF},
                                           Bad{"randmask", 4, std::nanf("")},
                                           Bad{"small", 5, HUGE_VALF, true},
                                           Bad{"last", 6, std::nanf(""), true}),
                         [](const auto& info) { return info.param.name; });

TEST(ReducerState, WithoutTransactionsASkippedStepStaysInTheResidual) {
  run_reducers(2, "topk:0.05,transactional=off", [](int rank, auto& reducer, auto& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerState before = reducer.state();
    gradients.fill(1, rank);
    gradients.set(0, 5, std::nanf(""));
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerState after = reducer.state();
    ASSERT_EQ(after.entries.size(), 3u);
    for (std::size_t i = 0; i < after.entries.size(); ++i) {
      EXPECT_EQ(same_bits(after.entries[i].values, before.entries[i].values),
                after.entries[i].key.starts_with("worker/fc1"))
          << after.entries[i].key;
      for (const float value : after.entries[i].values) {
        ASSERT_TRUE(std::isfinite(value)) << after.entries[i].key;
      }
    }
    EXPECT_EQ(reducer.stats().memory_bytes, sizeof(float) * (1320 + 2120 + 1147));
  });
}

TEST(ReducerState, AnAbandonedStepIsForgotten) {
  run_reducers(3, kMixed, [](int rank, GradientReducer& reducer, Gradients& gradients) {
    reducer.abandon_step();  // no step is open: nothing
    EXPECT_EQ(reducer.stats().steps, 0u);
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerState before = reducer.state();
    gradients.fill(1, rank);
    const auto first = reducer.reduce(gradients.bucket({6, 5, 4, 3}, false));
    const auto second = reducer.reduce(gradients.bucket({2}, false));
    EXPECT_THROW(reducer.state(), InvalidArgument);
    EXPECT_THROW(reducer.set_loss_scale(2), InvalidArgument);
    reducer.abandon_step();
    first->wait();
    second->wait();
    expect_same_residuals(before, reducer.state());
    EXPECT_EQ(reducer.stats().skipped_steps, 1u);
    gradients.fill(2, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    EXPECT_EQ(reducer.stats().steps, 3u);
    EXPECT_EQ(reducer.stats().skipped_steps, 1u);
  });
}

class ReducerRestart : public ::testing::TestWithParam<const char*> {};

TEST_P(ReducerRestart, ContinuesBitForBit) {
  constexpr int kRanks = 3;
  constexpr std::uint64_t kSteps = 6;
  constexpr std::uint64_t kSavedAfter = 3;
  std::vector<std::vector<std::uint64_t>> hashes[2];
  for (int restarted = 0; restarted < 2; ++restarted) {
    hashes[restarted].assign(kRanks, {});
    std::vector<ReducerState> saved(kRanks);
    const auto run = [&](std::uint64_t begin, std::uint64_t end) {
      run_reducers(kRanks, GetParam(), [&](int rank, auto& reducer, auto& gradients) {
        const auto at = static_cast<std::size_t>(rank);
        if (begin > 0) {
          reducer.restore(saved[at]);
        }
        for (std::uint64_t step = begin; step < end; ++step) {
          gradients.fill(step, rank);
          reduce_step(reducer, gradients, kTwoBuckets);
          hashes[restarted][at].push_back(gradients.hash());
        }
        saved[at] = reducer.state();
      });
    };
    if (restarted == 0) {
      run(0, kSteps);
    } else {
      run(0, kSavedAfter);
      run(kSavedAfter, kSteps);
    }
  }
  EXPECT_EQ(hashes[0], hashes[1]);
}

INSTANTIATE_TEST_SUITE_P(Reducer, ReducerRestart,
                         ::testing::Values("topk:0.05", "topk:0.05,values=q8",
                                           "topk:0.05,scope=bucket", "q4", "q4,stochastic",
                                           "randmask:0.1", "powersgd:2", "powersgd:2,rounds=1",
                                           "galore:2,refresh=4", "dctcols:2,refresh=4", "bf16",
                                           kMixed, "topk:0.02,start=4"));

TEST(ReducerState, RestoreRefusesWhatDoesNotFit) {
  run_reducers(2, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerState good = reducer.state();
    const auto refused = [&](const std::function<void(ReducerState&)>& change, const char* says) {
      ReducerState state = good;
      change(state);
      try {
        reducer.restore(state);
        ADD_FAILURE() << "accepted although " << says;
      } catch (const InvalidArgument& error) {
        EXPECT_THAT(error.what(), AllOf(HasSubstr(says), HasSubstr("hint: ")));
      }
    };
    refused([](ReducerState& s) { s.version = 2; }, "version: expected 1, got 2");
    refused([](ReducerState& s) { s.rank += 5; }, "rank: expected");
    refused([](ReducerState& s) { s.world_size = 9; }, "world size: expected 2, got 9");
    refused([](ReducerState& s) { s.policy = "q8"; }, "policy: expected 'topk:0.05', got 'q8'");
    refused([](ReducerState& s) { s.entries[0].key = "worker/other/0:1320"; }, "does not have");
    refused([](ReducerState& s) { s.entries[0].key = "boss/fc1.weight/0:1320"; }, "no known role");
    refused([](ReducerState& s) { s.entries[0].key = "worker/fc1.weight/0:1321"; }, "outside");
    refused([](ReducerState& s) { s.entries[0].key = "worker/fc1.weight"; }, "no range");
    refused([](ReducerState& s) { s.entries[0].key = "owner/fc1.bias/0:40"; }, "no residual");
    refused([](ReducerState& s) { s.entries[0].values.pop_back(); }, "has 1319 values");
    refused([](ReducerState& s) { s.entries.push_back(s.entries[0]); }, "twice");
    expect_same_residuals(good, reducer.state());
    ReducerState empty = good;
    empty.entries.clear();
    reducer.restore(empty);
    for (const StateEntry& entry : reducer.state().entries) {
      EXPECT_EQ(entry.values, std::vector<float>(entry.values.size()));
    }
    reducer.restore(good);
    expect_same_residuals(good, reducer.state());
  });
}

}  // namespace
}  // namespace thinwire::testing
