// Linear exchange: in each round the projections of all layers lie in one flat fp32 buffer that the
// transport's own allreduce sums. Behind the first round's projections comes one value a layer, 1
// where the gradient holds NaN or Inf: a projection need not show them (a mask may miss them), and
// all ranks must know.
#include <algorithm>
#include <cstring>
#include <utility>

#include "comm/collectives/common.h"
#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/codec_support.h"

namespace thinwire {

using namespace collectives;

namespace {

class LinearExchange final : public Exchange {
 public:
  LinearExchange(Communicator& comm, std::vector<ExchangeLayer> layers, MemoryStore& memories)
      : comm_(comm),
        layers_(std::move(layers)),
        states_(layers_.size()),
        flags_(layers_.size()),
        found_(layers_) {
    if (!comm_.traits().identical_allreduce) {
      throw InvalidArgument("rank " + std::to_string(comm_.rank()) + ": the allreduce of " +
                            comm_.name() + " does not promise identical bits on all ranks");
    }
    std::size_t state_bytes = 0;
    std::size_t longest = layers_.size();  // the marks of round 0
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const ExchangeLayer& layer = layers_[i];
      if (layer.linear == nullptr) {
        refuse_layer(comm_.rank(), layer, "a linear codec expected\nhint: send it dense");
      }
      longest += static_cast<std::size_t>(longest_round(layer));
      states_[i].memory = memories.memory(layer.name, 0, layer.elements, MemoryRole::kWorker);
      states_[i].offset = state_bytes;
      states_[i].bytes = layer.linear->round_state_bytes(layer.shape);
      state_bytes += round_up(states_[i].bytes, 64);
    }
    flat_ = AlignedBuffer(longest * sizeof(float));
    round_state_ = AlignedBuffer(state_bytes);
    grads_.reserve(layers_.size());
  }

  int transfers() const override { return rounds_; }

  std::unique_ptr<Transfer> start(std::uint64_t step, float weight,
                                  std::span<const Gradient> grads) override {
    check_gradients(comm_.rank(), layers_, grads);
    step_ = step;
    rounds_ = 1;
    for (const ExchangeLayer& layer : layers_) {
      rounds_ = std::max(rounds_, layer.linear->rounds(step));
    }
    weight_ = weight;
    round_ = 0;
    grads_.clear();
    found_.clear();
    for (const Gradient& grad : grads) {  // the rounds work in the place of the mean
      if (grad.source.data != grad.mean.data && grad.mean.elements > 0) {
        std::memcpy(grad.mean.data, grad.source.data, grad.mean.bytes());
      }
      grads_.push_back(grad.mean);
    }
    const std::span<float> marks = flat().last(layers_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      flags_[i] = has_nonfinite(grads_[i]) ? 1 : 0;
      marks[i] = flags_[i];
      if (flags_[i] != 0) {
        found_.look(i, 0, grads_[i], nullptr, true);
      }
    }
    return project();
  }

  std::unique_ptr<Transfer> next() override {
    absorb();
    ++round_;
    return project();
  }

  std::span<const std::uint8_t> finish() override {
    absorb();
    // The codecs have written the mean; a sum is P times that.
    const float mean = 1.0F / static_cast<float>(comm_.size());
    const float factor = weight_ == mean ? 1.0F : weight_ * static_cast<float>(comm_.size());
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (flags_[i] == 0 && factor != 1.0F) {
        multiply(grads_[i], factor);
      }
      if (flags_[i] != 0 || overflowed(grads_[i])) {
        flags_[i] = 1;
        fill_nan(grads_[i]);
      }
    }
    return flags_;
  }

  std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const override {
    return found_[layer];
  }

  std::size_t buffer_bytes() const override { return flat_.size() + round_state_.size(); }

 private:
  struct State {
    Memory* memory = nullptr;
    std::size_t offset = 0;  // in round_state_
    std::size_t bytes = 0;
  };

  std::int64_t layer_elements(const ExchangeLayer& layer) const {
    return round_ < layer.linear->rounds(step_)
               ? layer.linear->round_elements(layer.shape, round_, step_)
               : 0;
  }

  // Over all rounds of all steps.
  static std::int64_t longest_round(const ExchangeLayer& layer) {
    const LinearCodec& codec = *layer.linear;
    std::int64_t longest = 0;
    for (std::uint64_t step = 0; step < static_cast<std::uint64_t>(codec.period()); ++step) {
      for (int round = 0; round < codec.rounds(step); ++round) {
        longest = std::max(longest, codec.round_elements(layer.shape, round, step));
      }
    }
    return longest;
  }

  // This round's part of the buffer.
  std::span<float> flat() const {
    std::int64_t n = round_ == 0 ? static_cast<std::int64_t>(layers_.size()) : 0;
    for (const ExchangeLayer& layer : layers_) {
      n += layer_elements(layer);
    }
    return flat_.floats(static_cast<std::size_t>(n));
  }

  // Calls work(layer index, tensor, its part of the flat buffer) for the layers that take part in
  // this round and have nothing nonfinite.
  template <typename Work>
  void each_layer(Work&& work) {
    std::size_t at = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const auto n = static_cast<std::size_t>(layer_elements(layers_[i]));
      const std::span<float> values = flat_.floats(at + n).last(n);
      at += n;
      if (round_ >= layers_[i].linear->rounds(step_)) {
        continue;
      }
      if (flags_[i] != 0) {
        std::fill(values.begin(), values.end(), 0.0F);
        continue;
      }
      work(i,
           LinearCodec::Tensor{grads_[i], layers_[i].shape, states_[i].memory,
                               round_state_.bytes().subspan(states_[i].offset, states_[i].bytes)},
           values);
    }
  }

  std::unique_ptr<Transfer> project() {
    each_layer([&](std::size_t i, const LinearCodec::Tensor& tensor, std::span<float> values) {
      layers_[i].linear->project(context(i), round_, tensor, values);
    });
    return comm_.allreduce_sum(view(flat()));
  }

  void absorb() {
    const std::span<float> sums = flat();
    if (round_ == 0) {
      const std::span<const float> marks = sums.last(layers_.size());
      for (std::size_t i = 0; i < layers_.size(); ++i) {
        flags_[i] = marks[i] != 0.0F ? 1 : 0;
      }
    }
    const float mean = 1.0F / static_cast<float>(comm_.size());
    each_layer([&](std::size_t i, const LinearCodec::Tensor& tensor, std::span<float> values) {
      // A sum that overflowed, on all ranks alike: nothing of it may enter the memory.
      if (scale(view(values), mean)) {
        flags_[i] = 1;
      } else {
        layers_[i].linear->absorb(context(i), round_, values, tensor);
      }
    });
  }

  Context context(std::size_t i) const {
    return codec_context(layers_[i], layers_[i].key_hash, step_, comm_.rank(), comm_.size(), {});
  }

  static void multiply(TensorView grad, float factor) {
    if (grad.dtype == DType::kF32 || grad.dtype == DType::kF64) {
      scale(grad, factor);
      return;
    }
    constexpr std::int64_t kBlock = 1024;
    float block[kBlock];
    for (std::int64_t begin = 0; begin < grad.elements; begin += kBlock) {
      const TensorView part = grad.slice(begin, std::min(begin + kBlock, grad.elements));
      const std::span<float> values(block, static_cast<std::size_t>(part.elements));
      load_f32(part, values);
      scale(view(values), factor);
      store_f32(values, part);
    }
  }

  Communicator& comm_;
  std::vector<ExchangeLayer> layers_;
  std::vector<State> states_;
  std::vector<TensorView> grads_;
  std::vector<std::uint8_t> flags_;
  NonFiniteTable found_;
  int rounds_ = 1;
  AlignedBuffer flat_;  // every layer's longest round, and the marks
  AlignedBuffer round_state_;
  int round_ = 0;
  std::uint64_t step_ = 0;
  float weight_ = 1;
};

}  // namespace

std::unique_ptr<Exchange> make_linear_exchange(Communicator& comm,
                                               std::vector<ExchangeLayer> layers,
                                               MemoryStore& memories) {
  return std::make_unique<LinearExchange>(comm, std::move(layers), memories);
}

}  // namespace thinwire
