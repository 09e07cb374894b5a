// One rank's training under an optimizer: a reducer over loopback, weights and gradients of a small
// model, and every method in the settings that bring all its phases into a few steps.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "optim/dgc_sgd.h"
#include "optim/onebit_adam.h"
#include "optim/onebit_lamb.h"
#include "optim/optimizer.h"
#include "optim/zero_one_adam.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {

using optim::Optimizer;
using optim::OptimizerState;
using MakeOptimizer = std::function<std::shared_ptr<Optimizer>(GradientReducer&)>;

// small_model() and a layer without elements.
std::vector<Layer> training_model();
inline constexpr std::size_t kHalfLayer = 4;  // bf16
inline constexpr std::size_t kEmptyLayer = 7;
// Element i of any layer never has a gradient where i % kDeadStride is 3.
inline constexpr std::int64_t kDeadStride = 7;
inline bool is_dead(std::int64_t i) { return i % kDeadStride == 3; }

// What Trainer::fill() makes of a rank's gradients.
void fill_gradients(const std::vector<Layer>& layers, std::uint64_t step, int rank,
                    Gradients& gradients);
// The weights that all ranks begin with.
void fill_weights(Gradients& weights);

class Trainer {
 public:
  // The communicator's rank and world size.
  Trainer(std::unique_ptr<Communicator> comm, const std::string& policy, const MakeOptimizer& make,
          const ReducerOptions& options = {});

  // Gradients of a step, reduced and applied; step()'s answer.
  bool train(std::uint64_t step);
  // The parts of train().
  void fill(std::uint64_t step);
  void multiply(float factor);  // the gradients
  void reduce();
  bool apply();

  int rank() const { return reducer.rank(); }
  // As T; OneBitAdam& adam = trainer.as<OneBitAdam>().
  template <typename T>
  T& as() {
    return dynamic_cast<T&>(*optimizer);
  }
  std::vector<optim::Parameter> parameters();

  const std::vector<Layer> layers = training_model();
  GradientReducer reducer;
  std::shared_ptr<Optimizer> optimizer;
  Gradients weights;
  Gradients gradients;
};

// Runs test(trainer) on `size` ranks.
using TrainerTest = std::function<void(Trainer& trainer)>;
void run_trainers(int size, const std::string& policy, const MakeOptimizer& make,
                  const TrainerTest& test);

struct Method {
  std::string name;
  MakeOptimizer make;
  bool needs_topk = false;
};
// 0/1 Adam: variance at steps 0, 1, 3, 5, intervals from step 6 on: two of 1 step, one of 2, then
// of 4. The others that freeze do so after 4 steps.
std::vector<Method> all_methods();
inline constexpr std::int64_t kFreezeStep = 4;
inline constexpr optim::ZeroOneOptions kShortIntervals{
    .kappa = 2, .var_freeze_step = 6, .local_step_scaler = 2, .local_step_clipper = 4};

// What differs between two states, in words; "" where all bits are the same. The reducer's number
// of the step is left out.
std::string difference(const OptimizerState& a, const OptimizerState& b);

}  // namespace thinwire::testing
