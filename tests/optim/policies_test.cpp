// Optimizers under a reducer whose policy changes on the way; groups; several threads.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "compressors/core/convert.h"
#include "compressors/core/error.h"
#include "optim/adam.h"
#include "optim/sgd.h"
#include "tests/optim/training.h"

namespace thinwire::optim {
namespace {

using testing::all_methods;
using ::testing::AllOf;
using testing::difference;
using ::testing::HasSubstr;
using testing::MakeOptimizer;
using testing::Method;
using testing::run_trainers;
using testing::Trainer;

constexpr std::uint64_t kSteps = 16;

bool local_is_next(const Trainer& trainer) {
  const auto* zero_one = dynamic_cast<const ZeroOneAdam*>(trainer.optimizer.get());
  return zero_one != nullptr && zero_one->next() == ZeroOneStep::kLocal;
}

// The policies in turn, one a step, in every phase of every method.
TEST(PolicyChanges, KeepReplicasEqualAndTheOptimizersStateAsItIs) {
  for (const Method& method : all_methods()) {
    SCOPED_TRACE(method.name);
    const std::vector<std::string> policies =
        method.needs_topk ? std::vector<std::string>{"topk:0.05", "topk:0.2,values=q8"}
                          : std::vector<std::string>{"onebit", "q4", "topk:0.05", "powersgd:2"};
    constexpr std::size_t kRanks = 3;
    std::vector<std::vector<std::uint64_t>> hashes(kRanks);
    run_trainers(kRanks, policies[0], method.make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < kSteps; ++step) {
        const OptimizerState before = trainer.optimizer->state();
        trainer.reducer.set_policy(Policy::parse(policies[step % policies.size()]));
        OptimizerState after = trainer.optimizer->state();
        after.reducer = before.reducer;
        EXPECT_EQ(difference(before, after), "") << step;
        const bool local = local_is_next(trainer);
        ASSERT_TRUE(trainer.train(step));
        hashes[static_cast<std::size_t>(trainer.rank())].push_back(local ? 0
                                                                         : trainer.weights.hash());
      }
    });
    EXPECT_EQ(hashes[0], hashes[1]);
    EXPECT_EQ(hashes[0], hashes[2]);
  }
}

// All of SGD's weights move in the end by what its gradients say, whatever was compressed when.
TEST(PolicyChanges, SgdMovesByAllGradientsOnceNothingIsCompressed) {
  const MakeOptimizer make = [](auto& r) {
    return Sgd::make(r, all_layers(r), {SgdOptions{.lr = 0.125}});
  };
  std::vector<std::vector<float>> moved[2];
  for (const bool changes : {false, true}) {
    run_trainers(3, changes ? "topk:0.05" : "none", make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < 6; ++step) {
        if (changes && step == 2) trainer.reducer.set_policy(Policy::parse("q2"));
        if (changes && step == 4) trainer.reducer.set_policy(Policy::parse("none"));
        ASSERT_TRUE(trainer.train(step));
      }
      for (std::size_t layer = 0; trainer.rank() == 0 && layer < 4; ++layer) {
        moved[changes ? 1 : 0].push_back(trainer.weights.values(layer));
      }
    });
  }
  for (std::size_t layer = 0; layer < 4; ++layer) {
    for (std::size_t i = 0; i < moved[0][layer].size(); ++i) {
      ASSERT_NEAR(moved[1][layer][i], moved[0][layer][i], 64 * 0x1p-24) << layer << " " << i;
    }
  }
}

TEST(PolicyChanges, AreRefusedWhereMomentumWouldBeLost) {
  struct Refusal {
    const char* method;
    const char* from;
    const char* to;
  };
  for (const Refusal& refusal :
       {Refusal{"OneBitAdam", "onebit", "none"}, Refusal{"OneBitLAMB", "onebit", "none"},
        Refusal{"ZeroOneAdam", "onebit", "none"}, Refusal{"DGCSGD", "topk:0.05", "q4"},
        Refusal{"DGCSGD", "topk:0.05", "none"}, Refusal{"DGCSGD", "topk:0.05", "topk:0.1,start=9"},
        Refusal{"OneBitAdam", "onebit", "q4,start=9"}}) {
    SCOPED_TRACE(std::string(refusal.method) + ": " + refusal.from + " to " + refusal.to);
    const std::vector<Method> methods = all_methods();
    const auto method = std::find_if(methods.begin(), methods.end(),
                                     [&](const Method& one) { return one.name == refusal.method; });
    run_trainers(2, refusal.from, method->make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < 5; ++step) ASSERT_TRUE(trainer.train(step));
      const OptimizerState before = trainer.optimizer->state();
      try {
        trainer.reducer.set_policy(Policy::parse(refusal.to));
        ADD_FAILURE() << "accepted";
      } catch (const PolicyError& error) {
        EXPECT_THAT(error.what(), AllOf(HasSubstr(refusal.method), HasSubstr("'fc1.weight'"),
                                        HasSubstr("hint: ")));
      }
      EXPECT_EQ(difference(before, trainer.optimizer->state()), "");
      EXPECT_EQ(trainer.optimizer->state().reducer.policy, before.reducer.policy);
      ASSERT_TRUE(trainer.train(5));
    });
  }
}

// --- groups

// Layers of two groups move as under an optimizer of their group's options alone.
TEST(Groups, HaveOptionsOfTheirOwn) {
  const AdamOptions adam[2] = {{.lr = 0.01, .beta2 = 0.99, .weight_decay = 0.01},
                               {.lr = 0.003, .beta1 = 0.8, .beta2 = 0.98, .eps = 1e-6}};
  const SgdOptions sgd[2] = {{.lr = 0.05, .momentum = 0.9, .weight_decay = 1e-3},
                             {.lr = 0.02, .momentum = 0.5, .nesterov = true}};
  const auto members = [](GradientReducer& reducer, bool both) {
    std::vector<Member> all = all_layers(reducer);
    for (Member& member : all) member.group = both ? member.layer % 2 : 0;
    return all;
  };
  const FreezeOptions freeze{.at_step = testing::kFreezeStep};
  const auto of = []<typename T>(const T(&options)[2], int group) {
    return group == 2 ? std::vector<T>{options[0], options[1]} : std::vector<T>{options[group]};
  };
  struct Grouped {
    const char* name;
    const char* policy;
    std::function<std::shared_ptr<Optimizer>(GradientReducer&, int group)> make;  // 2: both
  };
  const Grouped all[] = {
      {"SGD", "q4", [&](auto& r, int g) { return Sgd::make(r, members(r, g == 2), of(sgd, g)); }},
      {"Adam", "q4",
       [&](auto& r, int g) { return Adam::make(r, members(r, g == 2), of(adam, g)); }},
      {"DGCSGD", "topk:0.05",
       [&](auto& r, int g) { return DgcSgd::make(r, members(r, g == 2), of(sgd, g)); }},
      {"OneBitAdam", "onebit",
       [&](auto& r, int g) {
         return OneBitAdam::make(r, members(r, g == 2), of(adam, g), freeze);
       }},
      {"ZeroOneAdam", "onebit", [&](auto& r, int g) {
         return ZeroOneAdam::make(r, members(r, g == 2), of(adam, g), testing::kShortIntervals);
       }}};
  for (const Grouped& grouped : all) {
    std::vector<std::vector<float>> weights[3];
    for (const int group : {0, 1, 2}) {
      run_trainers(
          2, grouped.policy, [&](auto& r) { return grouped.make(r, group); },
          [&](Trainer& trainer) {
            for (std::uint64_t step = 0; step < 10; ++step) ASSERT_TRUE(trainer.train(step));
            for (std::size_t layer = 0; trainer.rank() == 0 && layer < 7; ++layer) {
              weights[group].push_back(trainer.weights.values(layer));
            }
          });
    }
    for (std::size_t layer = 0; layer < 7; ++layer) {
      EXPECT_EQ(weights[2][layer], weights[layer % 2][layer]) << grouped.name << " " << layer;
      EXPECT_NE(weights[0][layer], weights[1][layer]) << grouped.name << " " << layer;
    }
  }
}

// --- threads

TEST(Threads, GiveTheSameBitsWhateverTheirNumber) {
  for (const Method& method : all_methods()) {
    std::vector<std::uint64_t> hashes;
    for (const std::int64_t threads : {1, 2, 3}) {
      run_trainers(
          2, method.needs_topk ? "topk:0.05" : "onebit", method.make, [&](Trainer& trainer) {
            trainer.optimizer->set_parallel_for([&](std::int64_t n, const Range& f) {
              std::vector<std::thread> running;
              for (std::int64_t t = 0; t < threads; ++t) {
                running.emplace_back([&, t] { f(n * t / threads, n * (t + 1) / threads); });
              }
              for (std::thread& thread : running) thread.join();
            });
            for (std::uint64_t step = 0; step < kSteps; ++step) {
              ASSERT_TRUE(trainer.train(step));
            }
            if (trainer.rank() == 0) hashes.push_back(trainer.weights.hash());
          });
    }
    EXPECT_EQ(hashes[0], hashes[1]) << method.name;
    EXPECT_EQ(hashes[0], hashes[2]) << method.name;
  }
}

// --- weights in fp16

// An fp16 parameter follows the rounding of what an fp32 one would be.
TEST(HalfPrecision, Fp16WeightsFollowTheirMasters) {
  const std::vector<Layer> layers = {{"half.weight", {40, 33}, DType::kF16}};
  constexpr std::size_t kElements = 1320;
  for (const char* policy : {"none", "onebit"}) {
    testing::run_ranks(2, [&](int rank, std::unique_ptr<Communicator> comm) {
      GradientReducer reducer(std::move(comm), layers, Policy::parse(policy));
      const AdamOptions adam{.lr = 1e-4};
      const auto optimizer =
          OneBitAdam::make(reducer, all_layers(reducer), {adam}, {.at_step = 20});
      std::vector<FP16> weights(kElements, from_float<FP16>(1.0F));
      std::vector<FP16> gradients(kElements);
      const auto view = [](std::vector<FP16>& values) {
        return TensorView{values.data(), static_cast<std::int64_t>(values.size()), DType::kF16};
      };
      for (int step = 0; step < 40; ++step) {
        const float sign = rank == 0 ? 1.0F : 0.5F;
        std::fill(gradients.begin(), gradients.end(), from_float<FP16>(sign));
        reducer.reduce({.layers = {{0, view(gradients)}}, .last = true})->wait();
        const Parameter parameter{view(weights), view(gradients)};
        ASSERT_TRUE(optimizer->step({&parameter, 1}));
        const std::vector<float>& master = optimizer->slots()[0].values[0];
        for (std::size_t i = 0; i < kElements; ++i) {
          ASSERT_EQ(weights[i].bits, from_float<FP16>(master[i]).bits) << policy << " " << step;
        }
      }
      // 40 steps of the learning rate each, every gradient being the same.
      EXPECT_NEAR(to_float(weights[0]), 1 - 40e-4, 40e-4 / 20) << policy;
    });
  }
}

}  // namespace
}  // namespace thinwire::optim
