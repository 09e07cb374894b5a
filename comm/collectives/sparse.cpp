// Sparse exchange: one message a rank holds every layer's body in a slot of planned size; all
// messages go to all ranks, and each rank accumulates them in rank order. Layers without a codec
// ride along as raw fp32 values.
//
// Message: 24-byte header, then the raw layers (4 bytes an element), then the codecs' slots at
// multiples of 4, the whole a multiple of 8.
#include <algorithm>
#include <utility>

#include "comm/collectives/common.h"
#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/payload.h"

namespace thinwire {

using namespace collectives;

namespace {

class SparseExchange final : public Exchange {
 public:
  SparseExchange(Communicator& comm, std::vector<ExchangeLayer> layers, MemoryStore& memories)
      : comm_(comm),
        layers_(std::move(layers)),
        slots_(layers_.size()),
        flags_(layers_.size()),
        found_(layers_) {
    bodies_.resize(static_cast<std::size_t>(comm_.size()));
    plan_message();
    std::size_t workspace = 0;
    std::size_t residual = 0;
    std::int64_t scratch = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const ExchangeLayer& layer = layers_[i];
      elements_ += static_cast<std::uint64_t>(layer.elements);
      if (layer.payload != nullptr) {
        workspace = std::max(workspace, layer.payload->workspace_bytes(layer.elements));
        slots_[i].memory = memories.memory(layer.name, 0, layer.elements, MemoryRole::kWorker);
        residual = std::max(residual, scratch_bytes(slots_[i].memory));
      }
      if (layer.dtype != DType::kF32) {
        scratch = std::max(scratch, layer.elements);
      }
    }
    message_ = AlignedBuffer(message_bytes_);
    gathered_ = AlignedBuffer(message_bytes_ * static_cast<std::size_t>(comm_.size()));
    workspace_ = AlignedBuffer(workspace);
    residual_ = AlignedBuffer(residual);
    scratch_ = AlignedBuffer(static_cast<std::size_t>(scratch) * sizeof(float));
    grads_.reserve(layers_.size());
  }

  int transfers() const override { return 1; }

  std::unique_ptr<Transfer> start(std::uint64_t step, float weight,
                                  std::span<const Gradient> grads) override {
    check_gradients(comm_.rank(), layers_, grads);
    step_ = step;
    weight_ = weight;
    grads_.assign(grads.begin(), grads.end());
    found_.clear();
    PayloadHeader header;
    header.elements = elements_;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const std::span<std::byte> slot = message_.bytes().subspan(slots_[i].offset, slots_[i].bytes);
      if (layers_[i].payload == nullptr) {
        load_f32(grads_[i].source, own_raw(i));
      } else if (encode(i, slot)) {
        header.flags |= kFlagNonFinite;
      }
    }
    seal_payload(header, message_.bytes());
    let_go(grads_);
    return comm_.allgather(message_.bytes(), gathered_.bytes());
  }

  std::unique_ptr<Transfer> next() override {
    throw InvalidArgument("a sparse exchange has one transfer; next() was called");
  }

  std::span<const std::uint8_t> finish() override {
    for (int sender = 0; sender < comm_.size(); ++sender) {
      open_payload(message_of(sender), elements_, sender);
    }
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const bool nonfinite = layers_[i].payload == nullptr ? sum_raw(i) : sum_bodies(i);
      flags_[i] = nonfinite ? 1 : 0;
      if (nonfinite) {
        if (layers_[i].payload == nullptr) {
          found_.look(i, 0, view(own_raw(i)), nullptr, true);
        }
        fill_nan(grads_[i].mean);
      }
    }
    return flags_;
  }

  std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const override {
    return found_[layer];
  }

  std::size_t buffer_bytes() const override {
    return message_.size() + gathered_.size() + workspace_.size() + residual_.size() +
           scratch_.size();
  }

 private:
  struct Slot {
    std::size_t offset = 0;
    std::size_t bytes = 0;
    Memory* memory = nullptr;
  };

  void plan_message() {
    std::size_t offset = kPayloadHeaderBytes;
    for (const bool raw : {true, false}) {
      for (std::size_t i = 0; i < layers_.size(); ++i) {
        const ExchangeLayer& layer = layers_[i];
        if ((layer.payload == nullptr) != raw) {
          continue;
        }
        if (raw && (layer.dtype == DType::kF64 || layer.dtype == DType::kOther)) {
          refuse_layer(comm_.rank(), layer,
                       std::string(name(layer.dtype)) +
                           " without a codec does not fit a sparse message\nhint: send it dense");
        }
        slots_[i].offset = offset;
        slots_[i].bytes = raw ? static_cast<std::size_t>(layer.elements) * sizeof(float)
                              : layer.payload->slot_bytes(layer.elements);
        offset += round_up(slots_[i].bytes, 4);
      }
    }
    message_bytes_ = round_up(offset, 8);
  }

  std::span<const std::byte> message_of(int sender) const {
    return gathered_.bytes().subspan(static_cast<std::size_t>(sender) * message_bytes_,
                                     message_bytes_);
  }

  // The decoded sum goes straight into an fp32 gradient.
  bool sums_in_place(std::size_t i) const { return layers_[i].dtype == DType::kF32; }

  // Returns whether the gradient held NaN or Inf.
  bool encode(std::size_t i, std::span<std::byte> slot) {
    const Context ctx =
        codec_context(layers_[i], layers_[i].key_hash, step_, comm_.rank(), workspace_.bytes());
    give_memory(layers_[i], grads_[i], 0, layers_[i].elements, slots_[i].memory);
    const EncodeResult result = collectives::encode(*layers_[i].payload, ctx, grads_[i].source,
                                                    slots_[i].memory, residual_.bytes(), slot);
    zero_slack(slot, result.bytes);
    if (result.nonfinite) {
      found_.look(i, 0, grads_[i].source, slots_[i].memory, true);
    }
    return result.nonfinite;
  }

  std::span<float> sum_target(std::size_t i) const {
    const auto n = static_cast<std::size_t>(layers_[i].elements);
    if (sums_in_place(i)) {
      return {static_cast<float*>(grads_[i].mean.data), n};
    }
    return scratch_.floats(n);
  }

  bool sum_raw(std::size_t i) {
    const std::span<float> sum = sum_target(i);
    const bool nonfinite = sum_scaled(gathered_.bytes().data() + slots_[i].offset, message_bytes_,
                                      comm_.size(), weight_, sum);
    if (sums_in_place(i) || nonfinite) {
      return nonfinite;
    }
    store_f32(sum, grads_[i].mean);
    return overflowed(grads_[i].mean);
  }

  bool sum_bodies(std::size_t i) {
    for (int sender = 0; sender < comm_.size(); ++sender) {
      bodies_[static_cast<std::size_t>(sender)] = body(i, sender);
    }
    if (std::any_of(bodies_.begin(), bodies_.end(), is_nonfinite_body)) {
      return true;
    }
    const std::span<float> sum = sum_target(i);
    const Context ctx =
        codec_context(layers_[i], layers_[i].key_hash, step_, comm_.rank(), workspace_.bytes());
    layers_[i].payload->sum(ctx, bodies_, weight_, sum);
    if (!sums_in_place(i)) {
      store_f32(sum, grads_[i].mean);
    }
    return is_flagged(*layers_[i].payload, grads_[i].mean);
  }

  // The values of a layer without a codec as this rank sends them.
  std::span<float> own_raw(std::size_t i) const {
    return {reinterpret_cast<float*>(message_.bytes().data() + slots_[i].offset),
            static_cast<std::size_t>(layers_[i].elements)};
  }

  std::span<const std::byte> body(std::size_t i, int sender) const {
    return message_of(sender).subspan(slots_[i].offset, slots_[i].bytes);
  }

  Communicator& comm_;
  std::vector<ExchangeLayer> layers_;
  std::vector<Slot> slots_;
  std::vector<Gradient> grads_;
  std::vector<std::span<const std::byte>> bodies_;  // of one layer, by sender
  std::vector<std::uint8_t> flags_;
  NonFiniteTable found_;
  std::uint64_t elements_ = 0;
  std::size_t message_bytes_ = 0;
  AlignedBuffer message_;
  AlignedBuffer gathered_;  // size() messages
  AlignedBuffer workspace_;
  AlignedBuffer residual_;  // unpacked, where memories keep it in fewer bytes
  AlignedBuffer scratch_;   // fp32 sum of one bf16, fp16 or fp64 layer
  std::uint64_t step_ = 0;
  float weight_ = 1;
};

}  // namespace

std::unique_ptr<Exchange> make_sparse_exchange(Communicator& comm,
                                               std::vector<ExchangeLayer> layers,
                                               MemoryStore& memories) {
  return std::make_unique<SparseExchange>(comm, std::move(layers), memories);
}

}  // namespace thinwire
