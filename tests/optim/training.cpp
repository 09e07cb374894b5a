#include "tests/optim/training.h"

#include <cstring>
#include <utility>

#include "optim/adam.h"
#include "optim/sgd.h"

namespace thinwire::testing {
namespace {

constexpr std::uint64_t kWeightSeed = 77;
const std::vector<std::vector<std::size_t>> kBuckets = {{7, 6, 5, 4, 3}, {2, 1, 0}};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::string difference(const std::string& what, const std::vector<StateEntry>& a,
                       const std::vector<StateEntry>& b) {
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (a[i].key != b[i].key) return what + ": " + a[i].key + " and " + b[i].key;
    if (!same_bits(a[i].values, b[i].values)) return what + ": " + a[i].key;
  }
  if (a.size() == b.size()) return {};
  return what + ": " + std::to_string(a.size()) + " and " + std::to_string(b.size()) + " entries";
}

// Memories that hold nothing are made when they are first needed, also in a step that is undone.
std::vector<StateEntry> without_zeros(std::vector<StateEntry> entries) {
  std::erase_if(entries, [](const StateEntry& entry) {
    return same_bits(entry.values, std::vector<float>(entry.values.size()));
  });
  return entries;
}

}  // namespace

std::vector<Layer> training_model() {
  std::vector<Layer> layers = small_model();
  layers.push_back({"empty.weight", {0, 40}, DType::kF32});
  return layers;
}

Trainer::Trainer(std::unique_ptr<Communicator> comm, const std::string& policy,
                 const MakeOptimizer& make, const ReducerOptions& options)
    : reducer(std::move(comm), layers, Policy::parse(policy), options),
      optimizer(make(reducer)),
      weights(layers),
      gradients(layers) {
  fill_weights(weights);
}

void fill_gradients(const std::vector<Layer>& layers, std::uint64_t step, int rank,
                    Gradients& gradients) {
  gradients.fill(step, rank);
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (std::int64_t i = 0; i < layers[layer].elements(); ++i) {
      if (is_dead(i)) gradients.set(layer, i, 0);
    }
  }
}

void fill_weights(Gradients& weights) { weights.fill(0, 0, kWeightSeed); }

void Trainer::fill(std::uint64_t step) { fill_gradients(layers, step, rank(), gradients); }

void Trainer::multiply(float factor) {
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    for (std::int64_t i = 0; i < layers[layer].elements(); ++i) {
      gradients.set(layer, i, factor * gradients.get(layer, i));
    }
  }
}

void Trainer::reduce() { reduce_step(reducer, gradients, kBuckets); }

std::vector<optim::Parameter> Trainer::parameters() {
  std::vector<optim::Parameter> parameters;
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    parameters.push_back({weights.view(layer), gradients.view(layer)});
  }
  return parameters;
}

bool Trainer::apply() { return optimizer->step(parameters()); }

bool Trainer::train(std::uint64_t step) {
  fill(step);
  reduce();
  return apply();
}

void run_trainers(int size, const std::string& policy, const MakeOptimizer& make,
                  const TrainerTest& test) {
  run_ranks(size, [&](int, std::unique_ptr<Communicator> comm) {
    Trainer trainer(std::move(comm), policy, make);
    test(trainer);
  });
}

std::vector<Method> all_methods() {
  using namespace optim;
  const AdamOptions adam{.lr = 0.01, .beta2 = 0.99, .weight_decay = 0.01};
  const SgdOptions sgd{.lr = 0.05, .momentum = 0.9, .weight_decay = 1e-3, .nesterov = true};
  const FreezeOptions freeze{.at_step = kFreezeStep};
  return {
      {"SGD", [=](auto& r) { return Sgd::make(r, all_layers(r), {sgd}); }},
      {"Adam", [=](auto& r) { return Adam::make(r, all_layers(r), {adam}); }},
      {"DGCSGD", [=](auto& r) { return DgcSgd::make(r, all_layers(r), {sgd}); }, true},
      {"OneBitAdam", [=](auto& r) { return OneBitAdam::make(r, all_layers(r), {adam}, freeze); }},
      {"ZeroOneAdam",
       [=](auto& r) { return ZeroOneAdam::make(r, all_layers(r), {adam}, kShortIntervals); }},
      {"OneBitLAMB", [=](auto& r) { return OneBitLamb::make(r, all_layers(r), {adam}, freeze); }},
  };
}

std::string difference(const OptimizerState& a, const OptimizerState& b) {
  if (a.version != b.version || a.method != b.method) return "method";
  if (a.numbers != b.numbers) return "numbers";
  if (a.reducer.loss_scale != b.reducer.loss_scale) return "loss scale";
  for (const std::string& text :
       {difference("shared", a.shared, b.shared), difference("local", a.local, b.local),
        difference("reducer", without_zeros(a.reducer.entries),
                   without_zeros(b.reducer.entries))}) {
    if (!text.empty()) return text;
  }
  return {};
}

}  // namespace thinwire::testing
