// What a GradientMethod may change of a step: its mode, its codecs' options, what is reduced; and
// what a reducer tells of its memories and lets be done to them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <mutex>

#include "comm/reducer.h"
#include "compressors/core/error.h"
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
)";
constexpr StepMode kModes[] = {StepMode::kPolicy, StepMode::kDense, StepMode::kLocal};

// Modes in turn; where `doubles`, twice the gradient is reduced.
struct Method final : GradientMethod {
  std::vector<StepMode> modes = {StepMode::kPolicy};
  std::size_t step = 0;
  bool doubles = false;
  std::string says = "nothing";
  std::string options;
  std::vector<std::size_t> prepared;
  std::vector<bool> in_place;  // by prepared layer

  std::vector<HandshakeField> fields() const override { return {{"what it says", says}}; }
  std::string codec_options(std::size_t, const Codec&) const override { return options; }
  StepMode begin_step() override { return modes[step++ % modes.size()]; }
  bool prepare(std::size_t layer, TensorView gradient, TensorView out) override {
    prepared.push_back(layer);
    in_place.push_back(gradient.data == out.data);
    for (std::int64_t i = 0; doubles && gradient.dtype == DType::kF32 && i < gradient.elements;
         ++i) {
      static_cast<float*>(out.data)[i] = 2 * static_cast<const float*>(gradient.data)[i];
    }
    return doubles && gradient.dtype == DType::kF32;
  }
};

std::vector<std::vector<float>> residuals(const GradientReducer& reducer) {
  std::vector<std::vector<float>> values;
  for (const StateEntry& entry : reducer.state().entries) values.push_back(entry.values);
  return values;
}

// Of bf16 layers, too, that travel in messages of their own.
TEST(GradientMethod, DenseAndLocalStepsLeaveResidualsAlone) {
  const auto test = [](int rank, GradientReducer& reducer, Gradients& gradients) {
    const auto method = std::make_shared<Method>();
    method->modes = {kModes, kModes + 3};
    reducer.follow(method);
    std::vector<std::vector<float>> before;
    for (std::uint64_t step = 0; step < 9; ++step) {
      gradients.fill(step, rank);
      const Gradients own = gradients;
      const std::uint64_t sent = reducer.stats().wire_bytes;
      const std::size_t prepared = method->prepared.size();
      reduce_step(reducer, gradients, kTwoBuckets);
      const bool local = kModes[step % 3] == StepMode::kLocal;
      EXPECT_EQ(gradients.hash() == own.hash(), local) << step;
      EXPECT_EQ(reducer.stats().wire_bytes == sent, local) << step;
      EXPECT_EQ(method->prepared.size(), prepared + (local ? 0 : 7)) << step;
      EXPECT_EQ(residuals(reducer) == before, kModes[step % 3] != StepMode::kPolicy) << step;
      before = residuals(reducer);
      if (kModes[step % 3] != StepMode::kDense) continue;
      Gradients of_rank(reducer.layers());
      for (std::size_t layer = 0; layer < 4; ++layer) {
        std::vector<float> mean(gradients.values(layer).size());
        for (int other = 0; other < 3; ++other) {
          of_rank.fill(step, other);
          const std::vector<float> values = of_rank.values(layer);
          for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += values[i] / 3;
        }
        for (std::size_t i = 0; i < mean.size(); ++i) {
          ASSERT_NEAR(gradients.values(layer)[i], mean[i], 8 * 0x1p-24) << step;
        }
      }
    }
  };
  run_reducers(3, kMixed, test);
  run_reducers(3, kMixed, test, {.ride_along_bytes = 0});
}

// A reducer whose policy steps are the same, with dense and local ones between, and without.
TEST(GradientMethod, PolicyStepsDoNotSeeTheOthers) {
  std::vector<std::uint64_t> hashes[2];
  for (const bool mixed : {false, true}) {
    run_reducers(2, kMixed, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto method = std::make_shared<Method>();
      if (mixed) method->modes = {kModes, kModes + 3};
      reducer.follow(method);
      for (std::uint64_t step = 0; step < 5; ++step) {
        gradients.fill(step, rank);
        reduce_step(reducer, gradients, kTwoBuckets);
        if (rank == 0) hashes[mixed ? 1 : 0].push_back(gradients.hash());
        for (int other = 0; mixed && other < 2; ++other) {
          gradients.fill(100 + step, rank);
          reduce_step(reducer, gradients, kTwoBuckets);
        }
      }
    });
  }
  EXPECT_EQ(hashes[0], hashes[1]);
}

TEST(GradientMethod, LayoutsOfOldBucketsAreDroppedInAllModes) {
  run_reducers(2, kMixed, [](int rank, GradientReducer& reducer, Gradients& gradients) {
    const auto method = std::make_shared<Method>();
    method->modes = {kModes, kModes + 3};
    reducer.follow(method);
    std::vector<std::size_t> bytes;
    const std::vector<std::vector<std::size_t>> three = {{6, 5}, {4, 3, 2}, {1, 0}};
    for (const auto& buckets : {kTwoBuckets, three, kTwoBuckets}) {
      for (std::uint64_t step = 0; step < 6; ++step) {
        gradients.fill(step, rank);
        reduce_step(reducer, gradients, buckets);
        if (step == 2) bytes.push_back(reducer.stats().buffer_bytes);
      }
      EXPECT_EQ(reducer.stats().buffer_bytes, bytes.back());  // no mode makes its layout again
    }
    EXPECT_EQ(bytes[0], bytes[2]);
  });
}

// Where the gradient is read elsewhere than the mean is written.
TEST(GradientMethod, OnlyAnOwnedSourceIsOverwritten) {
  std::vector<std::uint64_t> hashes;
  std::mutex mutex;
  for (const char* kind : {"grad", "borrowed", "owned"}) {
    run_reducers(2, kMixed, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto method = std::make_shared<Method>();
      method->doubles = true;
      method->modes = {StepMode::kPolicy, StepMode::kDense};
      reducer.follow(method);
      for (std::uint64_t step = 0; step < 4; ++step) {
        Gradients source(reducer.layers());
        source.fill(step, rank);
        std::vector<std::shared_ptr<Reduction>> reductions;
        gradients.fill(step, rank);
        for (std::size_t b = 0; b < 2; ++b) {
          Bucket bucket = gradients.bucket(kTwoBuckets[b], b == 1);
          for (BucketLayer& entry : bucket.layers) {
            if (*kind == 'g') continue;
            std::memset(entry.grad.data, 0xff, entry.grad.bytes());
            entry.source = source.view(entry.layer);
            if (*kind == 'b') continue;
            auto owned = std::make_shared<std::vector<std::byte>>(entry.source.bytes());
            std::memcpy(owned->data(), entry.source.data, owned->size());
            entry.source.data = owned->data();
            entry.owner = owned;
          }
          reductions.push_back(reducer.reduce(bucket));
        }
        const std::uint64_t before = source.hash();
        for (const auto& reduction : reductions) reduction->wait();
        EXPECT_EQ(source.hash(), before) << kind;
        source.fill(step, rank);
        EXPECT_EQ(source.hash(), before) << kind;
        for (const bool in_place : method->in_place) EXPECT_EQ(in_place, *kind != 'b') << kind;
        if (step == 3 && rank == 0) {
          const std::lock_guard lock(mutex);
          hashes.push_back(gradients.hash());
        }
      }
    });
  }
  ASSERT_EQ(hashes.size(), 3u);
  EXPECT_EQ(hashes[0], hashes[1]);
  EXPECT_EQ(hashes[0], hashes[2]);
}

TEST(GradientMethod, WhatItWritesIsReduced) {
  std::vector<std::vector<float>> results[2];
  for (const bool doubles : {false, true}) {
    run_reducers(2, "q4", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto method = std::make_shared<Method>();
      method->doubles = doubles;
      reducer.follow(method);
      for (std::uint64_t step = 0; step < 3; ++step) {
        gradients.fill(step, rank);
        reduce_step(reducer, gradients, kTwoBuckets);
      }
      for (std::size_t layer = 0; rank == 0 && layer < 7; ++layer) {
        results[doubles ? 1 : 0].push_back(gradients.values(layer));
      }
    });
  }
  for (std::size_t layer = 0; layer < 7; ++layer) {
    const float factor = layer == 4 ? 1 : 2;  // the bf16 one is not doubled
    for (float& value : results[0][layer]) value *= factor;
    EXPECT_EQ(results[0][layer], results[1][layer]) << layer;
  }
}

TEST(GradientMethod, RanksMustAgreeOnItsFields) {
  LoopbackGroup group(3);
  const auto errors = run_group(group, 3, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse("q4"));
    const auto method = std::make_shared<Method>();
    if (rank == 1) method->says = "something";
    reducer.follow(method);
    Gradients gradients(layers);
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
  });
  for (const auto& error : errors) {
    EXPECT_THAT(message(error), AllOf(HasSubstr("what it says"), HasSubstr("ranks 0, 2: nothing"),
                                      HasSubstr("rank 1: something")));
    EXPECT_THROW(std::rethrow_exception(error), MismatchError);
  }
}

TEST(GradientMethod, FollowsOneFromTheFirstStep) {
  for (const int size : {1, 2}) {
    run_reducers(size, kMixed, [](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto bad = std::make_shared<Method>();
      bad->options = ",unheard=of";
      EXPECT_THROW(reducer.follow(bad), PolicyError);
      EXPECT_EQ(reducer.plan()->choices[0].codec.spec, "topk:0.05,values=q8");
      reducer.follow(std::make_shared<Method>());
      EXPECT_THROW(reducer.follow(std::make_shared<Method>()), InvalidArgument);
      gradients.fill(0, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
    });
    run_reducers(size, kMixed, [](int rank, GradientReducer& reducer, Gradients& gradients) {
      gradients.fill(0, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      EXPECT_THROW(reducer.follow(std::make_shared<Method>()), InvalidArgument);
    });
  }
}

TEST(ReducerMemories, NormsAndScales) {
  run_reducers(2, kMixed, [](int rank, GradientReducer& reducer, Gradients& gradients) {
    EXPECT_EQ(reducer.residual_norms(), std::vector<double>(7));
    gradients.fill(0, rank);
    const auto open = reducer.reduce(gradients.bucket(kTwoBuckets[0], false));
    EXPECT_THROW(reducer.residual_norms(), InvalidArgument);
    EXPECT_THROW(reducer.scale_memories(std::vector<float>(7, 1)), InvalidArgument);
    reducer.reduce(gradients.bucket(kTwoBuckets[1], true))->wait();
    open->wait();
    const ReducerState before = reducer.state();
    std::vector<double> expected(7);
    for (const StateEntry& entry : before.entries) {
      if (!entry.key.starts_with("worker/")) continue;
      for (std::size_t layer = 0; layer < 7; ++layer) {
        if (entry.key.find(reducer.layers()[layer].name) == std::string::npos) continue;
        for (const float x : entry.values) expected[layer] += static_cast<double>(x * x);
      }
    }
    const std::vector<double> norms = reducer.residual_norms();
    for (std::size_t layer = 0; layer < 7; ++layer) {
      EXPECT_NEAR(norms[layer], std::sqrt(expected[layer]), 1e-5);
      EXPECT_EQ(norms[layer] > 0, layer == 0 || layer == 2 || layer == 4) << layer;
    }
    std::vector<float> factors(7, 1.0F);
    factors[2] = -0.5F;
    factors[4] = 0;
    reducer.scale_memories(factors);
    const ReducerState after = reducer.state();
    for (std::size_t i = 0; i < before.entries.size(); ++i) {
      const std::string& key = before.entries[i].key;
      const bool second = key.find("fc2.weight") != std::string::npos;
      const float factor = second ? -0.5F : key.find("half") != std::string::npos ? 0.0F : 1.0F;
      for (std::size_t j = 0; j < before.entries[i].values.size(); ++j) {
        ASSERT_EQ(after.entries[i].values[j], factor * before.entries[i].values[j]) << key;
      }
    }
    EXPECT_THROW(reducer.scale_memories(std::vector<float>(6, 1)), InvalidArgument);
    EXPECT_THROW(reducer.scale_memories({}), InvalidArgument);
  });
}

// What several ranks have left is in the first step of one, once.
TEST(ReducerMemories, OneRankTakesWhatIsPending) {
  run_reducers(1, "q4", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    ReducerState state = reducer.state();
    std::vector<float> pending(1320);
    for (std::size_t i = 0; i < pending.size(); ++i) pending[i] = static_cast<float>(i) / 64;
    state.entries = {{"worker/fc1.weight/0:1320", pending}};
    reducer.restore(state);
    EXPECT_GT(reducer.residual_norms()[0], 0);
    for (std::uint64_t step = 0; step < 2; ++step) {
      gradients.fill(step, rank);
      const std::vector<float> own = gradients.values(0);
      reduce_step(reducer, gradients, kTwoBuckets);
      const std::vector<float> result = gradients.values(0);
      for (std::size_t i = 0; i < own.size(); ++i) {
        ASSERT_EQ(result[i], step == 0 ? own[i] + pending[i] : own[i]) << step << " " << i;
      }
      EXPECT_EQ(reducer.residual_norms()[0], 0);
      EXPECT_TRUE(reducer.state().entries.empty());
    }
  });
}

}  // namespace
}  // namespace thinwire::testing
