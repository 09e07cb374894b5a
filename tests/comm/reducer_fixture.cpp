#include "tests/comm/reducer_fixture.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <bit>
#include <cstring>
#include <thread>
#include <utility>

namespace thinwire::testing {
namespace {

std::uint64_t mix(std::uint64_t x) {  // the finaliser of splitmix64
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

}  // namespace

std::vector<Layer> small_model() {
  return {{"fc1.weight", {40, 33}, DType::kF32},   {"fc1.bias", {40}, DType::kF32},
          {"fc2.weight", {53, 40}, DType::kF32},   {"fc2.bias", {53}, DType::kF32},
          {"half.weight", {31, 37}, DType::kBF16}, {"out.weight", {10, 53}, DType::kF32},
          {"out.bias", {10}, DType::kF32}};
}

Gradients::Gradients(const std::vector<Layer>& layers) : layers_(layers) {
  for (const Layer& layer : layers) {
    bytes_.emplace_back(static_cast<std::size_t>(layer.elements()) * size_bytes(layer.dtype));
  }
}

void Gradients::fill(std::uint64_t step, int rank, std::uint64_t seed) {
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    for (std::int64_t i = 0; i < layers_[layer].elements(); ++i) {
      const std::uint64_t bits =
          mix(mix(mix(seed + 1) + step * 1'000'003 + static_cast<std::uint64_t>(rank)) +
              layer * 0x9e3779b97f4a7c15ULL + static_cast<std::uint64_t>(i));
      // The product of two uniform values: some entries are much larger than most.
      const float a = static_cast<float>(bits >> 40) / 8'388'608.0F - 1.0F;
      const float b = static_cast<float>((bits >> 8) & 0xffffff) / 16'777'216.0F;
      set(layer, i, a * b * b);
    }
  }
}

void Gradients::zero(std::size_t layer) {
  std::fill(bytes_[layer].begin(), bytes_[layer].end(), std::byte{0});
}

void Gradients::set(std::size_t layer, std::int64_t element, float value) {
  const auto at = static_cast<std::size_t>(element);
  if (layers_[layer].dtype == DType::kBF16) {
    const auto bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value) >> 16);
    std::memcpy(&bytes_[layer][at * 2], &bits, 2);
  } else {
    std::memcpy(&bytes_[layer][at * 4], &value, 4);
  }
}

float Gradients::get(std::size_t layer, std::int64_t element) const {
  const auto at = static_cast<std::size_t>(element);
  if (layers_[layer].dtype == DType::kBF16) {
    std::uint16_t bits = 0;
    std::memcpy(&bits, &bytes_[layer][at * 2], 2);
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  float value = 0;
  std::memcpy(&value, &bytes_[layer][at * 4], 4);
  return value;
}

std::vector<float> Gradients::values(std::size_t layer) const {
  std::vector<float> result;
  for (std::int64_t i = 0; i < layers_[layer].elements(); ++i) {
    result.push_back(get(layer, i));
  }
  return result;
}

TensorView Gradients::view(std::size_t layer) {
  return {bytes_[layer].data(), layers_[layer].elements(), layers_[layer].dtype};
}

Bucket Gradients::bucket(const std::vector<std::size_t>& indices, bool last) {
  Bucket bucket;
  for (const std::size_t layer : indices) {
    bucket.layers.push_back({layer, view(layer)});
  }
  bucket.last = last;
  return bucket;
}

std::uint64_t Gradients::hash() const {
  std::uint64_t hash = 0;
  for (const auto& bytes : bytes_) {
    hash = XXH3_64bits_withSeed(bytes.data(), bytes.size(), hash);
  }
  return hash;
}

std::vector<std::exception_ptr> run_group(LoopbackGroup& group, int size, const ReducerWork& work) {
  std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        work(rank, group.communicator(rank));
      } catch (...) {
        errors[static_cast<std::size_t>(rank)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return errors;
}

void run_ranks(int size, const ReducerWork& work) {
  LoopbackGroup group(size);
  for (const std::exception_ptr& error : run_group(group, size, work)) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

void run_reducers(int size, const std::string& policy, const ReducerTest& test,
                  const ReducerOptions& options) {
  run_ranks(size, [&](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse(policy), options);
    Gradients gradients(layers);
    test(rank, reducer, gradients);
  });
}

std::string message(const std::exception_ptr& error) {
  if (!error) {
    return "";
  }
  try {
    std::rethrow_exception(error);
  } catch (const std::exception& exception) {
    return exception.what();
  }
}

void reduce_step(GradientReducer& reducer, Gradients& gradients,
                 const std::vector<std::vector<std::size_t>>& buckets) {
  std::vector<std::shared_ptr<Reduction>> reductions;
  for (std::size_t i = 0; i < buckets.size(); ++i) {
    reductions.push_back(reducer.reduce(gradients.bucket(buckets[i], i + 1 == buckets.size())));
  }
  for (const auto& reduction : reductions) {
    reduction->wait();
  }
}

Pending pending(const std::vector<ReducerState>& states, const std::string& role) {
  Pending sums;
  for (const Layer& layer : small_model()) {
    sums[layer.name].resize(static_cast<std::size_t>(layer.elements()));
  }
  for (const ReducerState& state : states) {
    for (const StateEntry& entry : state.entries) {
      const bool worker = entry.key.starts_with(role);
      if (!worker && (role != "worker/" || !entry.key.starts_with("owner/"))) continue;
      const std::size_t name = entry.key.find('/') + 1;
      const std::size_t range = entry.key.rfind('/');
      const auto begin = std::stoul(entry.key.substr(range + 1));
      std::vector<double>& sum = sums.at(entry.key.substr(name, range - name));
      for (std::size_t i = 0; i < entry.values.size(); ++i) {
        sum.at(begin + i) += static_cast<double>(entry.values[i]) /
                             (worker ? static_cast<double>(states.size()) : 1);
      }
    }
  }
  return sums;
}

}  // namespace thinwire::testing
