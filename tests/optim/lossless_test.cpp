// Where a codec loses nothing, a method is its paper's algorithm on the ranks' own gradients: 100
// steps on three ranks beside that in fp64. Bounds as in optim_kernels_test.cpp: twice the running
// error of the formulas in fp32. Layers in bf16 are left out, whose results are rounded to 8 bits.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "optim/adam.h"
#include "optim/sgd.h"
#include "tests/optim/reference.h"
#include "tests/optim/training.h"

namespace thinwire::optim {
namespace {

using testing::Gradients;
using testing::MakeOptimizer;
using testing::Trainer;

constexpr int kRanks = 3;
constexpr std::int64_t kSteps = 100;
constexpr std::int64_t kFrozenAfter = 20;

const AdamOptions kAdam{.lr = 2e-3, .beta2 = 0.99, .eps = 1e-5};
const AdamOptions kAdamW{
    .lr = 2e-3, .beta2 = 0.99, .eps = 1e-5, .weight_decay = 0.01, .decoupled = true};

// Of moments whose bias is folded in.
const AdamOptions kFolded = [] {
  AdamOptions options = kAdamW;
  options.bias_correction = false;
  return options;
}();

// A layer on every rank.
struct LayerReference {
  bool compressed = false;
  std::array<std::vector<Coordinate>, kRanks> ranks;
  // 1-bit LAMB's.
  Bounded coefficient;
  Bounded factor = exact(1);

  std::size_t size() const { return ranks[0].size(); }
};
using RankGradients = std::array<std::vector<float>, kRanks>;
// Step `step`, from 1.
using Advance =
    std::function<void(LayerReference& layer, const RankGradients& grads, std::int64_t step)>;

Bounded of_rank(const RankGradients& grads, std::size_t rank, std::size_t i) {
  return exact(static_cast<double>(grads[rank][i]));
}

// As reduced: each rank's share is rounded, then each sum.
template <typename Sent>
Bounded mean(Sent&& sent) {
  Bounded sum;
  for (std::size_t rank = 0; rank < kRanks; ++rank) {
    const Bounded share = constant(1.0 / kRanks) * sent(rank);
    sum = rank == 0 ? share : sum + share;
  }
  return sum;
}

Bounded mean_gradient(const RankGradients& grads, std::size_t i) {
  return mean([&](std::size_t rank) { return of_rank(grads, rank, i); });
}

// What the ranks send of a coordinate, which is the same on all.
Bounded mean_momentum(const Coordinate& c, const RankGradients& grads, std::size_t i) {
  return mean([&](std::size_t rank) {
    return reference_local_momentum(c, of_rank(grads, rank, i), kAdamW.beta1);
  });
}

// What is the same on all ranks is advanced on the first.
template <typename F>
void on_all_ranks(LayerReference& layer, F&& update) {
  for (std::size_t i = 0; i < layer.size(); ++i) {
    update(layer.ranks[0][i], i);
    layer.ranks[1][i] = layer.ranks[2][i] = layer.ranks[0][i];
  }
}

class Lossless : public ::testing::Test {
 protected:
  Lossless() {
    Gradients weights(layers_);
    testing::fill_weights(weights);
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      LayerReference& reference = references_.emplace_back();
      for (const float w : weights.values(layer)) {
        Coordinate c;
        c.weight = c.anchor = exact(static_cast<double>(w));
        for (auto& rank : reference.ranks) rank.push_back(c);
      }
    }
  }

  // weights_[rank][step][layer] after steps that are looked at.
  void train(const std::string& policy, const MakeOptimizer& make) {
    testing::run_trainers(kRanks, policy, make, [&](Trainer& trainer) {
      const auto rank = static_cast<std::size_t>(trainer.rank());
      for (std::int64_t step = 1; step <= kSteps; ++step) {
        ASSERT_TRUE(trainer.train(static_cast<std::uint64_t>(step)));
        auto& now = weights_[rank].emplace_back();
        for (std::size_t layer = 0; looks_at(step) && layer < layers_.size(); ++layer) {
          now.push_back(trainer.weights.values(layer));
        }
      }
      for (std::size_t layer = 0; rank == 0 && layer < layers_.size(); ++layer) {
        references_[layer].compressed = !trainer.reducer.plan()->choices[layer].codec.is_none();
      }
    });
  }

  static bool looks_at(std::int64_t step) { return step % 7 == 1 || step > 95; }

  void compare(const std::string& policy, const MakeOptimizer& make, const Advance& advance) {
    train(policy, make);
    std::vector<Gradients> gradients(kRanks, Gradients(layers_));
    for (std::int64_t step = 1; step <= kSteps; ++step) {
      for (int rank = 0; rank < kRanks; ++rank) {
        testing::fill_gradients(layers_, static_cast<std::uint64_t>(step), rank,
                                gradients[static_cast<std::size_t>(rank)]);
      }
      for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
        if (layers_[layer].dtype != DType::kF32 || layers_[layer].elements() == 0) continue;
        RankGradients grads;
        for (std::size_t rank = 0; rank < kRanks; ++rank) {
          grads[rank] = gradients[rank].values(layer);
        }
        advance(references_[layer], grads, step);
        if (looks_at(step)) expect_near(layer, step);
        if (HasFatalFailure()) return;
      }
    }
    expect_a_bound_that_says_something();
  }

  void expect_near(std::size_t layer, std::int64_t step) {
    for (std::size_t rank = 0; rank < kRanks; ++rank) {
      const std::vector<float>& got = weights_[rank][static_cast<std::size_t>(step - 1)][layer];
      for (std::size_t i = 0; i < got.size(); ++i) {
        const Bounded expected = references_[layer].ranks[rank][i].weight;
        ASSERT_LE(std::fabs(static_cast<double>(got[i]) - expected.value), 2 * expected.error)
            << layers_[layer].name << " " << i << ", rank " << rank << ", step " << step << ": "
            << got[i] << ", expected " << expected.value;
      }
    }
  }

  void expect_a_bound_that_says_something() {
    Gradients start(layers_);
    testing::fill_weights(start);
    double way = 0;
    double bound = 0;
    for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
      if (layers_[layer].dtype != DType::kF32) continue;
      const std::vector<float> before = start.values(layer);
      for (std::size_t i = 0; i < before.size(); ++i) {
        const Bounded after = references_[layer].ranks[0][i].weight;
        way += std::fabs(after.value - static_cast<double>(before[i]));
        bound += 2 * after.error;
      }
    }
    RecordProperty("bound_to_way", std::to_string(bound / way));
    EXPECT_LT(bound, 1e-3 * way);
  }

  const std::vector<Layer> layers_ = testing::training_model();
  std::vector<LayerReference> references_;
  std::array<std::vector<std::vector<std::vector<float>>>, kRanks> weights_;
};

TEST_F(Lossless, Sgd) {
  const SgdOptions options{.lr = 0.05, .momentum = 0.9, .weight_decay = 1e-3, .nesterov = true};
  compare(
      "lossless", [&](auto& r) { return Sgd::make(r, all_layers(r), {options}); },
      [&](LayerReference& layer, const RankGradients& grads, std::int64_t) {
        on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
          reference_sgd(c, mean_gradient(grads, i), options);
        });
      });
}

// Without weight decay, which would drive weights that have no gradient through zero, where the
// update is a quotient of rounding errors.
TEST_F(Lossless, Adam) {
  compare(
      "lossless", [](auto& r) { return Adam::make(r, all_layers(r), {kAdam}); },
      [](LayerReference& layer, const RankGradients& grads, std::int64_t step) {
        on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
          reference_adam(c, mean_gradient(grads, i), kAdam, {.m = step, .v = step});
        });
      });
}

TEST_F(Lossless, OneBitAdam) {
  const FreezeOptions freeze{.at_step = kFrozenAfter, .floor = 0};  // as in the paper
  compare(
      "lossless", [&](auto& r) { return OneBitAdam::make(r, all_layers(r), {kAdamW}, freeze); },
      [](LayerReference& layer, const RankGradients& grads, std::int64_t step) {
        on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
          if (step <= kFrozenAfter || !layer.compressed) {
            reference_adam(c, mean_gradient(grads, i), kAdamW, {.m = step, .v = step});
          } else {
            reference_frozen_adam(c, mean_momentum(c, grads, i), kFolded, {});
          }
          if (step == kFrozenAfter && layer.compressed) {
            reference_fold_bias(c, kAdamW, {.m = step, .v = step});
          }
        });
      });
}

// Steps from 0 here as in the schedule, whose own tests are in schedules_test.cpp.
TEST_F(Lossless, ZeroOneAdam) {
  const ZeroOneOptions options{.kappa = 4,
                               .var_freeze_step = 30,
                               .local_step_scaler = 10,
                               .local_step_clipper = 8,
                               .floor = 0};  // as in the paper
  const ZeroOneSchedule schedule(options);
  std::int64_t variance_steps = 0;
  std::int64_t counted = 0;
  double sum_lr = 0;
  compare(
      "lossless", [&](auto& r) { return ZeroOneAdam::make(r, all_layers(r), {kAdamW}, options); },
      [&](LayerReference& layer, const RankGradients& grads, std::int64_t step) {
        const ZeroOneStep kind = schedule.at(step - 1);
        const bool in_intervals = kind == ZeroOneStep::kSync || kind == ZeroOneStep::kLocal;
        const bool begins = in_intervals && schedule.at(step - 2) != ZeroOneStep::kLocal;
        if (counted < step) {  // once for all layers
          counted = step;
          variance_steps += kind == ZeroOneStep::kVariance ? 1 : 0;
          sum_lr = begins ? kAdamW.lr : sum_lr + kAdamW.lr;
        }
        const AdamSteps steps{.m = step, .v = variance_steps};
        if (!in_intervals) {
          on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
            if (kind == ZeroOneStep::kVariance) {
              reference_adam(c, mean_gradient(grads, i), kAdamW, steps);
            } else {
              reference_frozen_adam(c, mean_momentum(c, grads, i), kAdamW, steps);
            }
            if (step == options.var_freeze_step) {
              reference_fold_bias(c, kAdamW, steps);
            }
          });
          return;
        }
        for (std::size_t i = 0; i < layer.size(); ++i) {
          const auto at = [&](std::size_t rank) -> Coordinate& { return layer.ranks[rank][i]; };
          for (std::size_t rank = 0; begins && rank < kRanks; ++rank) {
            at(rank).anchor = at(rank).weight;
            at(rank).u = exact(0);
          }
          if (kind == ZeroOneStep::kLocal) {
            for (std::size_t rank = 0; rank < kRanks; ++rank) {
              reference_local_adam(at(rank), of_rank(grads, rank, i), kAdamW);
            }
            continue;
          }
          const Bounded sum = mean([&](std::size_t rank) {
            return reference_local_sum(at(rank), of_rank(grads, rank, i), kAdamW);
          });
          for (std::size_t rank = 0; rank < kRanks; ++rank) {
            reference_sync_adam(at(rank), sum, sum_lr, kAdamW);
          }
        }
      });
}

TEST_F(Lossless, OneBitLamb) {
  const FreezeOptions freeze{.at_step = kFrozenAfter, .floor = 0};  // as in the paper
  const LambOptions lamb;
  const auto root = [](Bounded x) {  // in fp64
    const double root = std::sqrt(x.value);
    return Bounded{root, x.error / root};
  };
  const auto weights_of = [](const LayerReference& layer) {
    std::vector<Bounded> weights;
    for (const Coordinate& c : layer.ranks[0]) weights.push_back(c.weight);
    return weights;
  };
  compare(
      "lossless",
      [&](auto& r) { return OneBitLamb::make(r, all_layers(r), {kAdamW}, freeze, lamb); },
      [&](LayerReference& layer, const RankGradients& grads, std::int64_t step) {
        const bool frozen = step > kFrozenAfter && layer.compressed;
        const Bounded weights = root(square_sum(weights_of(layer)));
        std::vector<Bounded> updates;
        std::vector<Bounded> directions;
        std::vector<Bounded> ratios;
        for (std::size_t i = 0; i < layer.size(); ++i) {
          Coordinate& c = layer.ranks[0][i];
          if (!frozen) {
            updates.push_back(reference_lamb_moments(c, mean_gradient(grads, i), kAdamW, step));
            continue;
          }
          // Brought to one size and back.
          const Bounded scale = constant(1);
          const Bounded reduced = mean([&](std::size_t rank) {
            return scale * reference_local_momentum(c, of_rank(grads, rank, i), kAdamW.beta1);
          });
          const FrozenUpdate update = reference_frozen_lamb_moments(c, reduced / scale, kAdamW);
          updates.push_back(update.update);
          directions.push_back(update.direction);
          ratios.push_back(update.ratio);
        }
        const Bounded size = root(square_sum(updates));
        Bounded trust;
        if (frozen) {
          const Bounded share = clamp(root(square_sum(directions)) / size, exact(0), exact(1));
          const Bounded factor = largest(ratios) * share + exact(1) - share;
          const Bounded within = clamp(factor, exact(lamb.factor_min), exact(lamb.factor_max));
          layer.factor = clamp(within, layer.factor * exact(1 - lamb.factor_threshold),
                               layer.factor * exact(1 + lamb.factor_threshold));
          trust = layer.coefficient * layer.factor;
        } else {
          trust = clamp(weights / size, exact(lamb.coefficient_min), exact(lamb.coefficient_max));
          layer.coefficient = exact(lamb.coefficient_beta) * layer.coefficient +
                              exact(1 - lamb.coefficient_beta) * trust;
        }
        on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
          reference_lamb_move(c, trust, updates[i], kAdamW);
          if (step == kFrozenAfter && layer.compressed) {
            reference_fold_bias(c, kAdamW, {.m = step, .v = step});
            c.fresh = c.v;
          }
        });
        if (step == kFrozenAfter && layer.compressed) {
          layer.coefficient = layer.coefficient / exact(1 - std::pow(lamb.coefficient_beta, step));
        }
      });
}

// Density 1 sends every entry and so forgets every momentum (factor masking): plain SGD, times
// 1 + momentum with Nesterov's, and weight decay with its own momentum. Dense layers are SGD with
// momentum.
void compare_dgc(
    bool nesterov,
    const std::function<void(const std::string&, const MakeOptimizer&, const Advance&)>& compare) {
  const SgdOptions options{.lr = 0.05, .momentum = 0.9, .weight_decay = 1e-3, .nesterov = nesterov};
  compare(
      "topk:1", [&](auto& r) { return DgcSgd::make(r, all_layers(r), {options}); },
      [&](LayerReference& layer, const RankGradients& grads, std::int64_t) {
        on_all_ranks(layer, [&](Coordinate& c, std::size_t i) {
          if (!layer.compressed) {
            reference_sgd(c, mean_gradient(grads, i), options);
            return;
          }
          const Bounded sent = mean([&](std::size_t rank) {
            const Bounded g = of_rank(grads, rank, i);
            return nesterov ? constant(options.momentum) * g + g : g;
          });
          reference_dgc(c, sent, options);
        });
      });
}

TEST_F(Lossless, DgcOfDensityOne) {
  compare_dgc(false, [this](const auto&... arguments) { compare(arguments...); });
}
TEST_F(Lossless, DgcOfDensityOneWithNesterov) {
  compare_dgc(true, [this](const auto&... arguments) { compare(arguments...); });
}

}  // namespace
}  // namespace thinwire::optim
