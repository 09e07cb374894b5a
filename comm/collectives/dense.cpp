// Dense exchange: the transport's own allreduce. fp32 gradients that lie one behind the other in
// memory (a bucket) are reduced in place; others go through a flat buffer, bf16 and fp16 as fp32.
// fp64 layers, if any, make a second transfer.
#include <cstring>
#include <utility>

#include "comm/collectives/common.h"
#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/codec_support.h"

namespace thinwire {

using namespace collectives;

namespace {

// Layers of one width on their way through one allreduce.
struct Group {
  DType dtype = DType::kF32;
  std::vector<std::size_t> members;  // indices of layers
  std::int64_t elements = 0;
  AlignedBuffer flat;    // allocated at the first step that needs it
  TensorView in_flight;  // flat, or the gradients' own memory
  bool in_place = false;
};

class DenseExchange final : public Exchange {
 public:
  DenseExchange(Communicator& comm, std::vector<ExchangeLayer> layers)
      : comm_(comm), layers_(std::move(layers)), flags_(layers_.size()), found_(layers_) {
    if (!comm_.traits().identical_allreduce) {
      throw InvalidArgument("rank " + std::to_string(comm_.rank()) + ": the allreduce of " +
                            comm_.name() + " does not promise identical bits on all ranks");
    }
    Group narrow;
    Group wide;
    wide.dtype = DType::kF64;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (layers_[i].dtype == DType::kOther) {
        refuse_layer(comm_.rank(), layers_[i], "a floating-point gradient expected");
      }
      Group& group = layers_[i].dtype == DType::kF64 ? wide : narrow;
      group.members.push_back(i);
      group.elements += layers_[i].elements;
    }
    if (!narrow.members.empty() || wide.members.empty()) {
      groups_.push_back(std::move(narrow));
    }
    if (!wide.members.empty()) {
      groups_.push_back(std::move(wide));
    }
  }

  int transfers() const override { return static_cast<int>(groups_.size()); }

  std::unique_ptr<Transfer> start(std::uint64_t /*step*/, float weight,
                                  std::span<const Gradient> grads) override {
    check_gradients(comm_.rank(), layers_, grads);
    weight_ = weight;
    found_.clear();
    means_.clear();
    for (const Gradient& grad : grads) {
      means_.push_back(grad.mean);
    }
    for (Group& group : groups_) {
      gather(group, grads);
    }
    return comm_.allreduce_sum(groups_[0].in_flight);
  }

  std::unique_ptr<Transfer> next() override { return comm_.allreduce_sum(groups_[1].in_flight); }

  std::span<const std::uint8_t> finish() override {
    for (const Group& group : groups_) {
      scatter(group);
    }
    return flags_;
  }

  std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const override {
    return found_[layer];
  }

  std::size_t buffer_bytes() const override {
    std::size_t bytes = 0;
    for (const Group& group : groups_) {
      bytes += group.flat.size();
    }
    return bytes;
  }

 private:
  bool adjacent(const Group& group) const {
    const char* end = nullptr;
    for (const std::size_t i : group.members) {
      const TensorView& mean = means_[i];
      if (mean.elements == 0) {
        continue;
      }
      if (mean.dtype != group.dtype || (end != nullptr && end != mean.data)) {
        return false;
      }
      end = static_cast<const char*>(mean.data) + mean.bytes();
    }
    return true;
  }

  void gather(Group& group, std::span<const Gradient> grads) {
    group.in_place = adjacent(group);
    group.in_flight = {nullptr, group.elements, group.dtype};
    if (group.in_place) {
      for (const std::size_t i : group.members) {
        if (means_[i].elements == 0) {
          continue;
        }
        if (group.in_flight.data == nullptr) {
          group.in_flight.data = means_[i].data;
        }
        if (grads[i].source.data != means_[i].data) {
          std::memcpy(means_[i].data, grads[i].source.data, means_[i].bytes());
        }
      }
      return;
    }
    if (group.flat.size() == 0) {
      group.flat = AlignedBuffer(group.in_flight.bytes());
    }
    group.in_flight.data = group.flat.bytes().data();
    std::int64_t at = 0;
    for (const std::size_t i : group.members) {
      const TensorView& source = grads[i].source;
      const TensorView part = group.in_flight.slice(at, at + source.elements);
      at += source.elements;
      if (group.dtype == DType::kF64) {
        if (part.elements > 0) {
          std::memcpy(part.data, source.data, part.bytes());
        }
      } else {
        load_f32(source, floats(part));
      }
    }
  }

  void scatter(const Group& group) {
    std::int64_t at = 0;
    for (const std::size_t i : group.members) {
      const TensorView part = group.in_flight.slice(at, at + means_[i].elements);
      at += means_[i].elements;
      bool nonfinite = scale(part, weight_);
      if (!nonfinite && !group.in_place && part.elements > 0) {
        if (group.dtype == DType::kF64) {
          std::memcpy(means_[i].data, part.data, part.bytes());
        } else {
          store_f32(floats(part), means_[i]);
          nonfinite = overflowed(means_[i]);
        }
      }
      flags_[i] = nonfinite ? 1 : 0;
      if (nonfinite) {
        found_.look(i, 0, part, nullptr, false);
        fill_nan(means_[i]);
      }
    }
  }

  static std::span<float> floats(TensorView part) {
    return {static_cast<float*>(part.data), static_cast<std::size_t>(part.elements)};
  }

  Communicator& comm_;
  std::vector<ExchangeLayer> layers_;
  std::vector<Group> groups_;  // 1 or 2
  std::vector<TensorView> means_;
  std::vector<std::uint8_t> flags_;
  NonFiniteTable found_;
  float weight_ = 1;
};

}  // namespace

std::unique_ptr<Exchange> make_dense_exchange(Communicator& comm,
                                              std::vector<ExchangeLayer> layers) {
  return std::make_unique<DenseExchange>(comm, std::move(layers));
}

}  // namespace thinwire
