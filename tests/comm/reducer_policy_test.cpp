// GradientReducer::set_policy: what is pending is kept, whatever the codecs were and become; what
// cannot be is refused with nothing changed.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>
#include <cmath>
#include <limits>

#include "comm/reducer.h"
#include "compressors/core/convert.h"
#include "compressors/core/error.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr int kSize = 3;
constexpr float kUlp = 0x1p-24F;

// The states of all ranks, on every rank.
class Gathering {
 public:
  std::vector<ReducerState> all(int rank, const GradientReducer& reducer) {
    states_[static_cast<std::size_t>(rank)] = reducer.state();
    barrier_.arrive_and_wait();
    std::vector<ReducerState> states = states_;
    barrier_.arrive_and_wait();
    return states;
  }

 private:
  std::vector<ReducerState> states_{kSize};
  std::barrier<> barrier_{kSize};
};

void train(int rank, GradientReducer& reducer, Gradients& gradients, std::uint64_t first,
           std::uint64_t steps) {
  for (std::uint64_t step = first; step < first + steps; ++step) {
    gradients.fill(step, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
  }
}

// Sums of up to `kSize` owners' and workers' parts, each rounded to fp32.
void expect_kept(const Pending& before, const Pending& after) {
  for (const auto& [layer, values] : before) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      ASSERT_NEAR(after.at(layer)[i], values[i], 4 * kSize * kUlp) << layer << " " << i;
    }
  }
}

bool is_empty(const Pending& pending) {
  for (const auto& [layer, values] : pending) {
    for (const double value : values) {
      if (value != 0) return false;
    }
  }
  return true;
}

// Biases as q4: with the sparse layers, or by their owners.
constexpr const char* kGathered =
    "policy = \"topk:0.05\"\n[[rule]]\nname = \"*.bias\"\npolicy = \"q4\"";
constexpr const char* kRequantised =
    "policy = \"q2\"\n[[rule]]\nname = \"*.bias\"\npolicy = \"q4\"";

struct Change {
  const char* before;
  const char* after;
};
void PrintTo(const Change& change, std::ostream* out) {
  *out << change.before << " -> " << change.after;
}

class ReducerPolicy : public ::testing::TestWithParam<Change> {};

TEST_P(ReducerPolicy, PendingUpdatesAreKept) {
  Gathering gathering;
  run_reducers(kSize, GetParam().before, [&](int rank, GradientReducer& reducer, Gradients& grads) {
    train(rank, reducer, grads, 0, 4);
    const Pending before = pending(gathering.all(rank, reducer));
    ASSERT_FALSE(is_empty(before));
    reducer.set_policy(Policy::parse(GetParam().after));
    EXPECT_EQ(reducer.state().policy, Policy::parse(GetParam().after).text());
    expect_kept(before, pending(gathering.all(rank, reducer)));
    train(rank, reducer, grads, 4, 2);
    reducer.set_policy(Policy::parse(GetParam().before));
    train(rank, reducer, grads, 6, 2);
  });
}

INSTANTIATE_TEST_SUITE_P(
    Codecs, ReducerPolicy,
    ::testing::Values(Change{"topk:0.05", "topk:0.2"}, Change{"topk:0.05", "q4"},
                      Change{"q4", "topk:0.05"}, Change{"q4", "none"},
                      Change{"topk:0.05,values=q8", "none"}, Change{"powersgd:1", "topk:0.05"},
                      Change{"topk:0.05", "powersgd:1"}, Change{"onebit", "lossless"},
                      Change{"topk:0.05,memory=bf16", "q2"},
                      Change{"topk:0.05,scope=bucket", "dct:4"}, Change{kGathered, "q4"},
                      Change{kRequantised, kGathered}, Change{kGathered, "none"}));

// A reducer that was made with the policy and restored what the other one had.
TEST(ReducerPolicy, GoesOnAsAReducerMadeWithIt) {
  run_reducers(kSize, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 3);
    reducer.set_policy(Policy::parse("topk:0.2"));
    const ReducerState state = reducer.state();
    train(rank, reducer, gradients, 3, 3);
    const std::uint64_t hash = gradients.hash();
    reducer.set_policy(Policy::parse("q4"));
    reducer.set_policy(Policy::parse("topk:0.2"));
    reducer.restore(state);
    train(rank, reducer, gradients, 3, 3);
    EXPECT_EQ(gradients.hash(), hash);
  });
}

TEST(ReducerPolicy, LayersWithTheSameCodecKeepEveryBit) {
  constexpr const char* kOther = R"(
    policy = "topk:0.05"
    [[rule]]
    name = "fc2.weight"
    policy = "q4"
  )";
  run_reducers(kSize, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 3);
    const ReducerState before = reducer.state();
    reducer.set_policy(Policy::parse(kOther));
    const ReducerState after = reducer.state();
    ASSERT_EQ(after.entries.size(), before.entries.size());
    for (std::size_t i = 0; i < before.entries.size(); ++i) {
      EXPECT_EQ(after.entries[i].key, before.entries[i].key);
      EXPECT_EQ(after.entries[i].values, before.entries[i].values);
    }
    EXPECT_EQ(reducer.stats().layers[2].codec.substr(0, 2), "q4");
    EXPECT_THAT(reducer.summary(), HasSubstr("q4"));
  });
}

// A layer that goes dense: mean of the gradients + what was pending, once; not in a step that is
// left out.
TEST(ReducerPolicy, WhatIsPendingGoesIntoTheNextDenseStep) {
  Gathering gathering;
  run_reducers(kSize, "q4", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 3);
    const Pending before = pending(gathering.all(rank, reducer));
    reducer.set_policy(Policy::parse("none,nonfinite=skip-step"));
    gradients.fill(3, rank);
    if (rank == 1) gradients.set(0, 5, std::numeric_limits<float>::infinity());
    reduce_step(reducer, gradients, kTwoBuckets);
    ASSERT_TRUE(reducer.last_step_skipped());
    expect_kept(before, pending(gathering.all(rank, reducer)));

    train(rank, reducer, gradients, 4, 1);
    EXPECT_TRUE(is_empty(pending(gathering.all(rank, reducer))));
    const std::vector<Layer> layers = small_model();
    for (const std::size_t layer : {0, 2}) {
      const std::vector<float> got = gradients.values(layer);
      std::vector<double> expected = before.at(layers[layer].name);
      Gradients own(layers);
      for (int other = 0; other < kSize; ++other) {
        own.fill(4, other);
        for (std::size_t i = 0; i < expected.size(); ++i) {
          expected[i] += static_cast<double>(own.values(layer)[i]) / kSize;
        }
      }
      for (std::size_t i = 0; i < expected.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(got[i]), expected[i], 16 * kSize * kUlp) << layer;
      }
    }
  });
}

// Gradients that are only read, and such as the reducer may keep.
TEST(ReducerPolicy, PendingUpdatesReachGradientsThatLieApart) {
  enum : std::uint8_t { kInPlace, kApart, kGiven };
  std::uint64_t hashes[3];
  for (const auto kind : {kInPlace, kApart, kGiven}) {
    const bool apart = kind != kInPlace;
    run_reducers(kSize, "topk:0.05", [&](int rank, GradientReducer& reducer, Gradients& grads) {
      train(rank, reducer, grads, 0, 3);
      reducer.set_policy(Policy::parse("none"));
      grads.fill(3, rank);
      Gradients sources = grads;
      const std::uint64_t sources_hash = sources.hash();
      Bucket bucket = grads.bucket({6, 5, 4, 3, 2, 1, 0}, true);
      for (BucketLayer& entry : bucket.layers) {
        if (apart) entry.source = sources.view(entry.layer);
        if (kind == kGiven) entry.owner = std::make_shared<int>();
      }
      if (apart) {
        for (std::size_t layer = 0; layer < 7; ++layer) grads.zero(layer);
      }
      reducer.reduce(std::move(bucket))->wait();
      EXPECT_EQ(sources.hash() == sources_hash, kind != kGiven);
      if (rank == 0) hashes[kind] = grads.hash();
    });
  }
  EXPECT_EQ(hashes[kApart], hashes[kInPlace]);
  EXPECT_EQ(hashes[kGiven], hashes[kInPlace]);
}

// A layer whose codec starts later is dense until then.
TEST(ReducerPolicy, WhatIsPendingDoesNotWaitForACodecThatStartsLater) {
  Gathering gathering;
  run_reducers(kSize, "topk:0.05", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 3);
    reducer.set_policy(Policy::parse("topk:0.05,start=6"));
    ASSERT_FALSE(is_empty(pending(gathering.all(rank, reducer))));
    train(rank, reducer, gradients, 3, 1);
    EXPECT_TRUE(is_empty(pending(gathering.all(rank, reducer))));
    train(rank, reducer, gradients, 4, 4);
    EXPECT_FALSE(is_empty(pending(gathering.all(rank, reducer))));
  });
}

// What fp16 cannot hold in one step goes with the next ones.
TEST(ReducerPolicy, WhatIsPendingBeyondFp16TakesSeveralSteps) {
  const std::vector<Layer> layers = {{"weight", {32, 64}, DType::kF16}};
  run_ranks(2, [&](int, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), layers, Policy::parse("topk:k=1"));
    std::vector<FP16> values(2048);
    const auto step = [&](float value) {
      std::fill(values.begin(), values.end(), from_float<FP16>(value));
      reducer.reduce({.layers = {{0, {values.data(), 2048, DType::kF16}}}, .last = true})->wait();
      EXPECT_FALSE(reducer.last_step_skipped());
      return to_float(values[2000]);
    };
    for (int i = 0; i < 2; ++i) step(30'000);  // pending: 60,000
    reducer.set_policy(Policy::parse("none,nonfinite=skip-step"));
    EXPECT_EQ(step(30'000), 65'504);
    EXPECT_EQ(step(0), 90'000 - 65'504);
    EXPECT_EQ(step(0), 0);
  });
}

TEST(ReducerPolicy, OneRankAddsWhatIsPendingOnce) {
  std::vector<ReducerState> states(kSize);
  run_reducers(kSize, "q4", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 3);
    states[static_cast<std::size_t>(rank)] = reducer.state();
  });
  const Pending before = pending(states);
  run_reducers(1, "q4", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    reducer.restore(reshard(states, 0, 1, ReduceOp::kMean));
    reducer.set_policy(Policy::parse("topk:0.1"));
    gradients.fill(3, rank);
    reducer.reduce(gradients.bucket({0}, false))->wait();
    reducer.abandon_step();
    for (const std::uint64_t step : {3, 4}) {
      gradients.fill(step, rank);
      const std::vector<float> own = gradients.values(0);
      reduce_step(reducer, gradients, kTwoBuckets);
      const std::vector<double>& kept = before.at("fc1.weight");
      for (std::size_t i = 0; i < own.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(gradients.values(0)[i]),
                    static_cast<double>(own[i]) + (step == 3 ? kept[i] : 0), 8 * kUlp);
      }
    }
  });
}

TEST(ReducerPolicy, OtherPoliciesOnOtherRanksAreAMismatch) {
  LoopbackGroup group(kSize);
  const auto errors = run_group(group, kSize, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse("topk:0.05"));
    Gradients gradients(layers);
    train(rank, reducer, gradients, 0, 1);
    reducer.set_policy(Policy::parse(rank == 2 ? "topk:0.01" : "topk:0.02"));
    train(rank, reducer, gradients, 1, 1);
  });
  for (const std::exception_ptr& error : errors) {
    EXPECT_THROW(std::rethrow_exception(error), MismatchError);
    EXPECT_THAT(message(error), AllOf(HasSubstr("policy"), HasSubstr("topk:0.01"),
                                      HasSubstr("topk:0.02"), HasSubstr("rank 2")));
  }
}

// Also where a state is restored before the next step.
TEST(ReducerPolicy, ARestoredStateDoesNotHideAMismatch) {
  LoopbackGroup group(kSize);
  const auto errors = run_group(group, kSize, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse("topk:0.05"));
    Gradients gradients(layers);
    reducer.set_policy(Policy::parse(rank == 2 ? "topk:0.01" : "topk:0.02"));
    reducer.restore(reducer.state());
    train(rank, reducer, gradients, 1, 1);
  });
  for (const std::exception_ptr& error : errors) {
    EXPECT_THROW(std::rethrow_exception(error), MismatchError);
  }
}

TEST(ReducerPolicy, AnEndedReducerSaysWhy) {
  run_reducers(kSize, "topk:0.05", [](int, GradientReducer& reducer, Gradients&) {
    reducer.abort();
    EXPECT_THROW(reducer.set_policy(Policy::parse("q4")), TransportError);
  });
}

TEST(ReducerPolicy, RefusalsChangeNothing) {
  run_reducers(kSize, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    train(rank, reducer, gradients, 0, 2);
    const ReducerState before = reducer.state();
    constexpr const char* kNoLayer = R"(
      policy = "topk:0.1"
      [[rule]]
      name = "nowhere.*"
      policy = "q4"
    )";
    EXPECT_THROW(reducer.set_policy(Policy::parse(kNoLayer)), PolicyError);
    gradients.fill(2, rank);
    const auto reduction = reducer.reduce(gradients.bucket({0}, false));
    EXPECT_THROW(reducer.set_policy(Policy::parse("q4")), InvalidArgument);
    reduction->wait();
    reducer.abandon_step();
    const ReducerState after = reducer.state();
    EXPECT_EQ(after.policy, before.policy);
    ASSERT_EQ(after.entries.size(), before.entries.size());
    for (std::size_t i = 0; i < before.entries.size(); ++i) {
      EXPECT_EQ(after.entries[i].values, before.entries[i].values);
    }
  });
}

struct Particular final : GradientMethod {
  int changes = 0;
  std::vector<HandshakeField> fields() const override { return {}; }
  std::string codec_options(std::size_t, const Codec& codec) const override {
    return codec.spec.starts_with("topk:") ? ",momentum=0.9" : "";
  }
  void check_plan(const Plan& plan) const override {
    if (plan.choices[0].codec.is_none()) throw PolicyError("not so");
  }
  void plan_changed() override { ++changes; }
  StepMode begin_step() override { return StepMode::kPolicy; }
  bool prepare(std::size_t, TensorView, TensorView) override { return false; }
};

TEST(ReducerPolicy, TheMethodIsAskedAndGivesItsOptionsAnew) {
  Gathering gathering;
  run_reducers(kSize, "topk:0.05", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
    const auto method = std::make_shared<Particular>();
    reducer.follow(method);
    train(rank, reducer, gradients, 0, 3);
    EXPECT_THROW(reducer.set_policy(Policy::parse("none")), PolicyError);
    EXPECT_EQ(method->changes, 0);
    const auto velocities = [&] {
      return pending(gathering.all(rank, reducer), "worker.velocity/");
    };
    const Pending before = velocities();
    ASSERT_FALSE(is_empty(before));
    reducer.set_policy(Policy::parse("topk:0.2"));
    EXPECT_EQ(method->changes, 1);
    EXPECT_THAT(reducer.plan()->choices[0].codec.spec, HasSubstr("momentum=0.9"));
    EXPECT_EQ(velocities(), before);
    train(rank, reducer, gradients, 3, 2);
  });
}

}  // namespace
}  // namespace thinwire::testing
