// A small model's layer table with gradients that are a function of (step, rank), and ranks as
// threads over loopback, each of which owns its communicator.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "comm/loopback/loopback_communicator.h"
#include "comm/reducer.h"

namespace thinwire::testing {

// Three weights (one under min_elements), three biases, one bf16 weight.
std::vector<Layer> small_model();

// One rank's gradients of a layer table.
class Gradients {
 public:
  explicit Gradients(const std::vector<Layer>& layers);

  // Values of about unit size; the same for the same (step, rank, seed).
  void fill(std::uint64_t step, int rank, std::uint64_t seed = 0);
  void zero(std::size_t layer);
  void set(std::size_t layer, std::int64_t element, float value);
  float get(std::size_t layer, std::int64_t element) const;
  std::vector<float> values(std::size_t layer) const;

  TensorView view(std::size_t layer);
  Bucket bucket(const std::vector<std::size_t>& indices, bool last);
  // XXH3 of every byte.
  std::uint64_t hash() const;

 private:
  const std::vector<Layer>& layers_;
  std::vector<std::vector<std::byte>> bytes_;
};

using ReducerWork = std::function<void(int rank, std::unique_ptr<Communicator> comm)>;

// Runs `work` on `size` threads over `group`; what each rank threw, null where nothing.
std::vector<std::exception_ptr> run_group(LoopbackGroup& group, int size, const ReducerWork& work);
// The same on a fresh group; rethrows the first exception.
void run_ranks(int size, const ReducerWork& work);

using ReducerTest = std::function<void(int rank, GradientReducer& reducer, Gradients& gradients)>;

// run_ranks for what needs a reducer of the small model and the rank's gradients, not yet filled.
void run_reducers(int size, const std::string& policy, const ReducerTest& test,
                  const ReducerOptions& options = {});

// The message of the exception, or "" for null.
std::string message(const std::exception_ptr& error);

// Reduces all layers in the given buckets (the last one ends the step) and waits.
void reduce_step(GradientReducer& reducer, Gradients& gradients,
                 const std::vector<std::vector<std::size_t>>& buckets);

// By layer: (1/P) sum of the workers' parts + the owners'. With another `role`, (1/P) sum of that.
using Pending = std::map<std::string, std::vector<double>>;
Pending pending(const std::vector<ReducerState>& states, const std::string& role = "worker/");

// In the order in which a backward pass would make them, in two buckets.
inline const std::vector<std::vector<std::size_t>> kTwoBuckets = {{6, 5, 4, 3}, {2, 1, 0}};

}  // namespace thinwire::testing
