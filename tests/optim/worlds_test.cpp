// Optimizers whose job goes on with another number of ranks, and their settings that ranks must
// share or that are refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "compressors/core/error.h"
#include "optim/adam.h"
#include "optim/sgd.h"
#include "tests/optim/training.h"

namespace thinwire::optim {
namespace {

using testing::all_methods;
using ::testing::AllOf;
using testing::Gradients;
using ::testing::HasSubstr;
using testing::MakeOptimizer;
using testing::message;
using testing::Method;
using testing::run_trainers;
using testing::Trainer;

const std::vector<Layer> kModel = testing::training_model();

struct Job {
  std::vector<OptimizerState> states;  // by rank
  Gradients weights{kModel};           // rank 0's
  double last_move = 0;                // |w' - w| of rank 0's last step
};

double distance(const Gradients& a, const Gradients& b) {
  double squares = 0;
  for (std::size_t layer = 0; layer < kModel.size(); ++layer) {
    const std::vector<float> x = a.values(layer);
    const std::vector<float> y = b.values(layer);
    for (std::size_t i = 0; i < x.size(); ++i) squares += std::pow(double{x[i]} - double{y[i]}, 2);
  }
  return std::sqrt(squares);
}

void copy_values(const Gradients& from, Gradients& to) {
  for (std::size_t layer = 0; layer < kModel.size(); ++layer) {
    const std::vector<float> values = from.values(layer);
    for (std::size_t i = 0; i < values.size(); ++i) {
      to.set(layer, static_cast<std::int64_t>(i), values[i]);
    }
  }
}

// `steps` more steps on `size` ranks. The first one moves about as far as the one before, unless
// that was on one rank: then error feedback begins anew, where there is one.
void go_on(Job& job, const Method& method, const std::string& policy, int size,
           std::uint64_t steps) {
  const bool lossless = policy == "lossless";
  std::vector<OptimizerState> states;
  for (int rank = 0; !job.states.empty() && rank < size; ++rank) {
    states.push_back(reshard(job.states, rank, size));
  }
  const Job before = job;
  job.states.resize(static_cast<std::size_t>(size));
  std::vector<std::vector<std::uint64_t>> hashes(static_cast<std::size_t>(size));
  run_trainers(size, policy, method.make, [&](Trainer& trainer) {
    const auto rank = static_cast<std::size_t>(trainer.rank());
    if (!states.empty()) {
      copy_values(before.weights, trainer.weights);
      trainer.optimizer->restore(states[rank]);
    }
    const auto first = static_cast<std::uint64_t>(trainer.optimizer->steps());
    for (std::uint64_t step = first; step < first + steps; ++step) {
      const auto* zero_one = dynamic_cast<ZeroOneAdam*>(trainer.optimizer.get());
      const bool local = zero_one != nullptr && zero_one->next() == ZeroOneStep::kLocal;
      Gradients last(kModel);
      copy_values(trainer.weights, last);
      ASSERT_TRUE(trainer.train(step));
      hashes[rank].push_back(local ? 0 : trainer.weights.hash());
      const double move = distance(trainer.weights, last);
      if (rank == 0 && step == first &&
          (before.states.size() > 1 || (lossless && !states.empty()))) {
        EXPECT_LT(move, 4 * before.last_move)
            << method.name << ", " << policy << ", " << size << " ranks, step " << step;
        EXPECT_GT(move, before.last_move / 2)
            << method.name << ", " << policy << ", " << size << " ranks, step " << step;
      }
      if (rank == 0) job.last_move = move;
    }
    job.states[rank] = trainer.optimizer->state();
    if (rank == 0) copy_values(trainer.weights, job.weights);
  });
  for (const auto& of_rank : hashes) EXPECT_EQ(of_rank, hashes[0]) << size << " ranks";
}

TEST(OtherWorlds, GoOnWithMoreOrFewerRanks) {
  for (const Method& method : all_methods()) {
    for (const char* policy : {"topk:0.05", "onebit", "powersgd:2", "lossless"}) {
      if (method.needs_topk && *policy != 't') continue;
      for (const std::vector<int>& sizes :
           {std::vector{4, 2, 4}, std::vector{4, 1, 4}, std::vector{1, 4}}) {
        SCOPED_TRACE(method.name + ", " + policy + ", " + ::testing::PrintToString(sizes));
        Job job;
        // 0/1 Adam: 11 steps end within an interval, and so do 11 + 4.
        for (const int size : sizes) go_on(job, method, policy, size, job.states.empty() ? 11 : 4);
        EXPECT_EQ(job.states[0].numbers.at("steps")[0], 11.0 + 4 * double(sizes.size() - 1));
      }
    }
  }
}

// What is frozen has its bias folded in, and is not corrected again.
// What is pending comes with its loss scale, moments do not.
TEST(OtherWorlds, GoOnAlikeWhateverTheLossScale) {
  for (const Method& method : all_methods()) {
    for (const std::vector<int>& sizes : {std::vector{4, 1}, std::vector{1, 4}}) {
      std::vector<std::uint64_t> hashes;
      for (const float scale : {1.0F, 1024.0F}) {
        std::vector<OptimizerState> states;
        Gradients weights(kModel);
        testing::fill_weights(weights);
        for (const int size : sizes) {
          std::vector<OptimizerState> saved(static_cast<std::size_t>(size));
          Gradients trained(kModel);
          run_trainers(
              size, method.needs_topk ? "topk:0.05" : "onebit", method.make, [&](Trainer& trainer) {
                copy_values(weights, trainer.weights);
                if (!states.empty()) {
                  trainer.optimizer->restore(reshard(states, trainer.rank(), size));
                }
                trainer.reducer.set_loss_scale(double{scale});
                for (std::uint64_t step = 0; step < 9; ++step) {
                  trainer.fill(step);
                  trainer.multiply(scale);
                  trainer.reduce();
                  trainer.multiply(1 / scale);
                  ASSERT_TRUE(trainer.apply());
                }
                saved[static_cast<std::size_t>(trainer.rank())] = trainer.optimizer->state();
                if (trainer.rank() == 0) copy_values(trainer.weights, trained);
              });
          states = saved;
          copy_values(trained, weights);
        }
        hashes.push_back(weights.hash());
      }
      EXPECT_EQ(hashes[0], hashes[1]) << method.name << ", first on " << sizes[0];
    }
  }
}

TEST(OtherWorlds, OneRankIsAdamWFromTheMomentsOfSeveral) {
  AdamOptions options{.lr = 0.01, .beta2 = 0.99, .weight_decay = 0.01, .decoupled = true};
  options.bias_correction = false;
  for (const std::size_t which : {3U, 4U}) {
    const Method method = all_methods()[which];
    SCOPED_TRACE(method.name);
    Job job;
    go_on(job, method, "lossless", 2, 8);
    run_trainers(1, "lossless", method.make, [&](Trainer& trainer) {
      trainer.optimizer->restore(reshard(job.states, 0, 1));
      const auto& slots = trainer.optimizer->slots();
      ASSERT_EQ(slots[1].name + " " + slots[2].name, "exp_avg exp_avg_sq");
      std::vector<float> m = slots[1].values[0];
      std::vector<float> v = slots[2].values[0];
      std::vector<float> weights = trainer.weights.values(0);
      for (std::uint64_t step = 8; step < 10; ++step) {
        trainer.train(step);
        adam_step(options, {}, trainer.gradients.view(0), weights, m, v);
        EXPECT_EQ(trainer.weights.values(0), weights) << step;
      }
    });
  }
}

// What error feedback holds of momenta, and of the sums of 0/1 Adam's intervals, is no gradient: on
// one rank it goes into the momentum.
void expect_pending_momenta_settled(const Method& method, std::uint64_t steps, double factor) {
  SCOPED_TRACE(::testing::Message() << method.name << " after " << steps << " steps");
  Job job;
  go_on(job, method, "onebit", 3, steps);
  const OptimizerState one = reshard(job.states, 0, 1);
  run_trainers(1, "onebit", method.make, [&](Trainer& trainer) {
    trainer.optimizer->restore(one);
    const OptimizerState now = trainer.optimizer->state();
    EXPECT_TRUE(now.reducer.entries.empty());
    std::size_t changed = 0;
    for (const StateEntry& entry : one.reducer.entries) {
      const std::string layer = entry.key.substr(7, entry.key.rfind('/') - 7);
      const auto moment = [&](const OptimizerState& state) {
        for (const auto* entries : {&state.shared, &state.local}) {
          for (const StateEntry& e : *entries) {
            if (e.key == "exp_avg/" + layer) return e.values;
          }
        }
        return std::vector<float>();
      };
      const std::vector<float> before = moment(one);
      const std::vector<float> after = moment(now);
      ASSERT_EQ(after.size(), entry.values.size());
      double residual = 0;
      double change = 0;
      double product = 0;
      for (std::size_t i = 0; i < after.size(); ++i) {
        const double d = double{after[i]} - double{before[i]};
        if (d == 0) continue;  // masked
        residual += double{entry.values[i]} * double{entry.values[i]};
        change += d * d;
        product += d * double{entry.values[i]};
      }
      EXPECT_NEAR(product, std::sqrt(residual * change), 1e-4 * product) << "in proportion";
      if (factor > 0) {
        EXPECT_NEAR(product, factor * residual, 1e-4 * product);
      }
      changed += change > 0 ? 1 : 0;
    }
    EXPECT_GT(changed, 0U);
  });
}

TEST(OtherWorlds, OneRankTakesPendingMomentaIntoItsOwn) {
  const std::vector<Method> methods = all_methods();  // all with lr 0.01 and beta1 0.9
  expect_pending_momenta_settled(methods[3], 12, 1 / 0.9);
  expect_pending_momenta_settled(methods[4], 5, 1 / 0.9);
  expect_pending_momenta_settled(methods[4], 12, 0.1 / 0.01);
  expect_pending_momenta_settled(methods[5], 12, 0);  // by a scale of its layer's
}

// With a codec that loses nothing, what ranks share is as it was and the mean of the rest is kept.
TEST(OtherWorlds, KeepTheMeanOfWhatIsEachRanksOwn) {
  const Method zero_one = all_methods()[4];
  ASSERT_EQ(zero_one.name, "ZeroOneAdam");
  Job job;
  go_on(job, zero_one, "lossless", 4, 12);  // in the middle of an interval
  const OptimizerState two = reshard(job.states, 1, 2);
  EXPECT_EQ(two.numbers, job.states[0].numbers);
  ASSERT_EQ(two.shared.size(), job.states[0].shared.size());
  for (std::size_t i = 0; i < two.shared.size(); ++i) {
    EXPECT_EQ(two.shared[i].values, job.states[0].shared[i].values);
  }
  ASSERT_EQ(two.local.size(), job.states[0].local.size());
  ASSERT_GE(two.local.size(), 14U);
  for (std::size_t entry = 0; entry < two.local.size(); ++entry) {
    for (std::size_t i = 0; i < two.local[entry].values.size(); ++i) {
      double mean = 0;
      for (const OptimizerState& state : job.states) {
        mean += static_cast<double>(state.local[entry].values[i]) / 4;
      }
      ASSERT_NEAR(two.local[entry].values[i], mean, std::fabs(mean) * 0x1p-23 + 1e-37);
    }
  }
}

TEST(OtherWorlds, RefuseStatesThatDoNotBelongTogether) {
  Job job;
  go_on(job, all_methods()[4], "onebit", 2, 9);
  const auto refused = [&](const std::function<void(std::vector<OptimizerState>&)>& change,
                           const char* says) {
    std::vector<OptimizerState> states = job.states;
    change(states);
    try {
      reshard(states, 0, 3);
      ADD_FAILURE() << "accepted although " << says;
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr(says), HasSubstr("hint: ")));
    }
  };
  refused([](auto& s) { s.clear(); }, "no state given");
  refused([](auto& s) { s.pop_back(); }, "expected the states of 2 ranks");
  refused([](auto& s) { s[1] = s[0]; }, "twice");
  refused([](auto& s) { s[1].numbers["steps"] = {3}; }, "rank 1");
  refused([](auto& s) { s[1].method = "SGD"; }, "rank 1");
  refused([](auto& s) { s[1].local.pop_back(); }, "rank 1 has no '");
  refused([](auto& s) { s[1].local[0].values.pop_back(); }, "rank 1 has no '");
}

TEST(OptimizerState, RestoresAllOrNothing) {
  for (const Method& method : all_methods()) {
    SCOPED_TRACE(method.name);
    const std::string policy = method.needs_topk ? "topk:0.05" : "onebit";
    run_trainers(2, policy, method.make, [&](Trainer& trainer) {
      for (std::uint64_t step = 0; step < 9; ++step) trainer.train(step);
      const OptimizerState good = trainer.optimizer->state();
      for (std::uint64_t step = 9; step < 11; ++step) trainer.train(step);
      const OptimizerState now = trainer.optimizer->state();
      const auto refused = [&](const std::function<void(OptimizerState&)>& change,
                               const char* says) {
        OptimizerState state = good;
        change(state);
        try {
          trainer.optimizer->restore(state);
          ADD_FAILURE() << "accepted although " << says;
        } catch (const InvalidArgument& error) {
          EXPECT_THAT(error.what(), AllOf(HasSubstr(says), HasSubstr("hint: ")));
        }
        EXPECT_EQ(testing::difference(now, trainer.optimizer->state()), "") << says;
        EXPECT_EQ(now.reducer.step, trainer.optimizer->state().reducer.step);
      };
      refused([](auto& s) { s.version = 2; }, "version 2; expected");
      refused([](auto& s) { s.method = "Lion"; }, "a state of Lion");
      refused([](auto& s) { s.shared[0].values.pop_back(); }, "values, got");
      refused([](auto& s) { s.shared[0].key = "exp_avg/other.weight"; }, "'exp_avg/other.weight'");
      refused([](auto& s) { s.shared[0].key = "huh/fc1.weight"; }, "no such parameter or state");
      refused([](auto& s) { s.numbers.clear(); }, "'steps', got 0");
      refused([](auto& s) { s.reducer.rank += 2; }, "rank: expected");
      refused([](auto& s) { s.reducer.world_size = 3; }, "world size: expected 2, got 3");
      refused([](auto& s) { s.reducer.policy = "q8"; }, "policy: expected");
      refused([](auto& s) { s.reducer.entries[0].values.pop_back(); }, "values, expected");
      const bool has_moments = std::any_of(good.shared.begin(), good.shared.end(),
                                           [](auto& e) { return e.key.starts_with("exp_avg"); });
      if (has_moments) {
        refused([](auto& s) { std::erase_if(s.shared, [](auto& e) { return e.key[0] == 'e'; }); },
                "is missing");
      }
      for (const auto& [name, values] : good.numbers) {
        if (name == "freeze_norms" || name == "steps") continue;
        refused([&](auto& s) { s.numbers.erase(name); }, ("'" + name + "'").c_str());
      }
      trainer.optimizer->restore(good);
      EXPECT_EQ(testing::difference(good, trainer.optimizer->state()), "");
    });
  }
}

// --- settings

const AdamOptions kAdam{.lr = 0.01};
const SgdOptions kSgd{.lr = 0.01, .momentum = 0.9};
using Make = std::function<void(GradientReducer&)>;

template <typename E = InvalidArgument>
void expect_refused(const std::string& policy, const Make& make, const std::string& says) {
  testing::run_ranks(2, [&](int, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), kModel, Policy::parse(policy));
    try {
      make(reducer);
      ADD_FAILURE() << "accepted although " << says;
    } catch (const E& error) {
      EXPECT_THAT(error.what(), HasSubstr(says));
    }
  });
}

TEST(OptimizerSettings, AreRefusedWhereTheyMakeNoSense) {
  const auto sgd = [](const SgdOptions& o) -> Make {
    return [o](auto& r) { Sgd::make(r, all_layers(r), {o}); };
  };
  const auto adam = [](const AdamOptions& o) -> Make {
    return [o](auto& r) { OneBitAdam::make(r, all_layers(r), {o}); };
  };
  const auto lamb = [](const LambOptions& o) -> Make {
    return [o](auto& r) { OneBitLamb::make(r, all_layers(r), {kAdam}, {}, o); };
  };
  const double nan = std::nan("");
  expect_refused("q4", sgd({.lr = -1}), "SGD, parameter group 0: lr: expected 0 or more, got -1");
  expect_refused("q4", sgd({.lr = nan}), "lr: ");
  expect_refused("q4", sgd({.momentum = 1}), "momentum: ");
  expect_refused("q4", sgd({.weight_decay = -1}), "weight_decay: ");
  expect_refused("q4", sgd({.nesterov = true}), "nesterov: ");
  expect_refused("q4", adam({.beta1 = 1}), "OneBitAdam, parameter group 0: beta1: ");
  expect_refused("q4", adam({.beta2 = -0.1}), "beta2: ");
  expect_refused("q4", adam({.eps = 0}), "eps: ");
  expect_refused("q4", adam({.weight_decay = nan}), "weight_decay: ");
  expect_refused("q4", lamb({.coefficient_min = 0}), "coefficient_min: ");
  expect_refused("q4", lamb({.coefficient_max = 0.001}), "coefficient_max: ");
  expect_refused("q4", lamb({.coefficient_beta = 1}), "coefficient_beta: ");
  expect_refused("q4", lamb({.factor_min = 0}), "factor_min: ");
  expect_refused("q4", lamb({.factor_max = 0.1}), "factor_max: ");
  expect_refused("q4", lamb({.factor_threshold = 1}), "factor_threshold: ");
  expect_refused(
      "q4",
      [](auto& r) {
        Adam::make(r, {{.layer = 0}, {.layer = 0}}, {kAdam});
      },
      "'fc1.weight' is there twice");
  expect_refused(
      "q4", [](auto& r) { Adam::make(r, {{.layer = 8}}, {kAdam}); }, "layer index 8");
  expect_refused(
      "q4", [](auto& r) { Adam::make(r, {{.layer = 0, .group = 1}}, {kAdam}); },
      "expected options for 2 parameter groups, got 1");
  expect_refused(
      "q4", [](auto& r) { OneBitAdam::make(r, all_layers(r), {kAdam}, {.at_step = -1}); },
      "freeze step");
  expect_refused(
      "q4", [](auto& r) { ZeroOneAdam::make(r, all_layers(r), {kAdam}, {.kappa = 0}); }, "kappa");
  expect_refused(
      "q4", [](auto& r) { OneBitAdam::make(r, all_layers(r), {kAdam}, {.floor = -1}); },
      "variance floor");
  expect_refused(
      "q4", [](auto& r) { ZeroOneAdam::make(r, all_layers(r), {kAdam}, {.floor = -1}); },
      "variance floor");
  expect_refused(
      "topk:0.1", [](auto& r) { DgcSgd::make(r, all_layers(r), {kSgd}, {.clip = -1}); }, "clip");
  expect_refused(
      "q4", [](auto& r) { DgcSgd::make(r, all_layers(r), {kSgd}); }, "no layer has a top-k codec");
  const std::vector<Make> freezers = {adam(kAdam), lamb({}),
                                      [](auto& r) { ZeroOneAdam::make(r, all_layers(r), {kAdam}); },
                                      [](auto& r) { DgcSgd::make(r, all_layers(r), {kSgd}); }};
  for (const Make& make : freezers) {
    expect_refused<PolicyError>("topk:0.1,start=5", make, "expected no start=");
  }
  expect_refused<PolicyError>(
      "topk:0.1,scope=bucket", [](auto& r) { DgcSgd::make(r, all_layers(r), {kSgd}); }, "momentum");
  expect_refused(
      "topk:0.1",
      [](auto& r) {
        const auto dgc = DgcSgd::make(r, all_layers(r), {kSgd});
        dgc->set_options({{.lr = 0.5, .momentum = 0.9}});
        dgc->set_options({{.lr = 0.5, .momentum = 0.8}});
      },
      "cannot change on the way");
  expect_refused(
      "q4",
      [](auto& r) {
        Adam::make(r, all_layers(r), {kAdam});
        Adam::make(r, all_layers(r), {kAdam});
      },
      "follows an optimizer already");
}

TEST(OptimizerSettings, ParametersOfAStepAreTheMembers) {
  run_trainers(2, "q4", all_methods()[1].make, [](Trainer& trainer) {
    trainer.fill(0);
    trainer.reduce();
    const OptimizerState before = trainer.optimizer->state();
    const std::uint64_t weights = trainer.weights.hash();
    const auto refused = [&](const std::function<void(std::vector<Parameter>&)>& change,
                             const char* says) {
      std::vector<Parameter> parameters = trainer.parameters();
      change(parameters);
      try {
        trainer.optimizer->step(parameters);
        ADD_FAILURE() << "accepted although " << says;
      } catch (const InvalidArgument& error) {
        EXPECT_THAT(error.what(), AllOf(HasSubstr(says), HasSubstr("hint: ")));
      }
    };
    refused([](auto& p) { p.pop_back(); }, "expected 8 parameters, got 7");
    refused([](auto& p) { p[6].weights.dtype = DType::kBF16; }, "weights of 'out.bias': expected");
    refused([](auto& p) { p[6].grad.elements = 9; }, "gradient of 'out.bias': expected");
    refused([](auto& p) { p[4].grad.dtype = DType::kF16; }, "gradient of 'half.weight'");
    EXPECT_EQ(trainer.weights.hash(), weights);
    EXPECT_EQ(testing::difference(before, trainer.optimizer->state()), "");
    // Without a gradient a parameter stays.
    std::vector<Parameter> parameters = trainer.parameters();
    const std::vector<float> kept = trainer.weights.values(2);
    parameters[2].grad = {};
    EXPECT_TRUE(trainer.optimizer->step(parameters));
    EXPECT_EQ(trainer.weights.values(2), kept);
    EXPECT_NE(trainer.weights.hash(), weights);
  });
}

struct Different {
  const char* field;
  std::function<void(GradientReducer&, bool)> make;
};

TEST(OptimizerSettings, MustBeTheSameOnAllRanks) {
  const Different cases[] = {
      {"optimizer",
       [](auto& r, bool odd) {
         odd ? static_cast<void>(Sgd::make(r, all_layers(r), {kSgd}))
             : static_cast<void>(Adam::make(r, all_layers(r), {kAdam}));
       }},
      {"parameter group 0",
       [](auto& r, bool odd) { Adam::make(r, all_layers(r), {{.lr = odd ? 0.1 : 0.2}}); }},
      {"OneBitAdam's settings",
       [](auto& r, bool odd) {
         OneBitAdam::make(r, all_layers(r), {kAdam}, {.at_step = odd ? 3 : 4});
       }},
      {"ZeroOneAdam's settings",
       [](auto& r, bool odd) {
         ZeroOneAdam::make(r, all_layers(r), {kAdam}, {.local_step_clipper = odd ? 8 : 16});
       }},
      {"OneBitLAMB's settings",
       [](auto& r, bool odd) {
         OneBitLamb::make(r, all_layers(r), {kAdam}, {}, {.factor_max = odd ? 3.0 : 4.0});
       }},
      {"DGCSGD's settings",
       [](auto& r, bool odd) {
         DgcSgd::make(r, all_layers(r), {kSgd}, {.clip = odd ? 3.0 : 4.0});
       }},
      {"parameter 1",
       [](auto& r, bool odd) {
         Adam::make(r, {{.layer = 0}, {.layer = odd ? 1U : 2U}}, {kAdam});
       }},
  };
  for (const Different& different : cases) {
    SCOPED_TRACE(different.field);
    LoopbackGroup group(3);
    const auto errors =
        testing::run_group(group, 3, [&](int rank, std::unique_ptr<Communicator> comm) {
          GradientReducer reducer(std::move(comm), kModel, Policy::parse("topk:0.1"));
          different.make(reducer, rank == 1);
          Gradients gradients(kModel);
          gradients.fill(0, rank);
          testing::reduce_step(reducer, gradients, testing::kTwoBuckets);
        });
    for (const auto& error : errors) {
      ASSERT_TRUE(error);
      EXPECT_THAT(message(error), HasSubstr(std::string("\n  ") + different.field + ":\n"));
      EXPECT_THROW(std::rethrow_exception(error), MismatchError);
    }
  }
}

}  // namespace
}  // namespace thinwire::optim
