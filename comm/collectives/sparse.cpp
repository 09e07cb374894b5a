// Sparse exchange: one message a rank holds every layer's body in a slot of planned size; all
// messages go to all ranks, and each rank accumulates them in rank order. Bodies of any payload
// codec will do. Layers without a codec ride along as raw fp32 values; layers that their codec
// encodes as one share a slot.
//
// Message: 24-byte header, then the raw layers (4 bytes an element), then the codecs' slots at
// multiples of 4, the whole a multiple of 8.
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "comm/collectives/common.h"
#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/error.h"
#include "compressors/core/payload.h"

namespace thinwire {

using namespace collectives;

namespace {

// Of one layer, that a rank sends: the wire time of a collective's latency, or less, from 0.3
// Gbit/s on.
constexpr std::size_t kGatheredBytes = 16'384;

class SparseExchange final : public Exchange {
 public:
  SparseExchange(Communicator& comm, std::vector<ExchangeLayer> layers, MemoryStore& memories)
      : comm_(comm),
        layers_(std::move(layers)),
        memories_(layers_.size()),
        slot_of_(layers_.size()),
        flags_(layers_.size()),
        found_(layers_) {
    bodies_.resize(static_cast<std::size_t>(comm_.size()));
    plan_slots();
    plan_message();
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const ExchangeLayer& layer = layers_[i];
      if (layer.payload != nullptr) {
        memories_[i] = memories.memory(layer.name, 0, layer.elements, MemoryRole::kWorker);
      }
    }
    allocate();
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
    for (const Slot& slot : slots_) {
      if (is_raw(slot)) {
        load_f32(grads_[slot.first()].source, own_raw(slot));
      } else if (encode(slot)) {
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
    for (const Slot& slot : slots_) {
      is_raw(slot) ? sum_raw(slot) : sum_bodies(slot);
      for (const std::size_t i : slot.layers) {
        if (flags_[i] == 0) {
          continue;
        }
        if (is_raw(slot)) {
          found_.look(i, 0, view(own_raw(slot)), nullptr, true);
        }
        fill_nan(grads_[i].mean);
      }
    }
    return flags_;
  }

  std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const override {
    return found_[layer];
  }

  std::size_t joint_bytes(std::size_t layer) const override {
    const Slot& slot = slots_[slot_of_[layer]];
    if (!slot.joint() || slot.elements == 0) {
      return 0;
    }
    const double share =
        static_cast<double>(layers_[layer].elements) / static_cast<double>(slot.elements);
    return static_cast<std::size_t>(std::llround(share * static_cast<double>(slot.bytes)));
  }

  std::size_t buffer_bytes() const override {
    return message_.size() + gathered_.size() + workspace_.size() + residual_.size() +
           scratch_.size();
  }

 private:
  // What a message holds of one layer, or of several that are encoded as one.
  struct Slot {
    std::vector<std::size_t> layers;  // ascending
    std::int64_t elements = 0;
    std::string label;  // for messages
    std::size_t offset = 0;
    std::size_t bytes = 0;

    std::size_t first() const { return layers.front(); }
    bool joint() const { return layers.size() > 1; }
  };

  const PayloadCodec* codec(const Slot& slot) const { return layers_[slot.first()].payload; }
  bool is_raw(const Slot& slot) const { return codec(slot) == nullptr; }

  void plan_slots() {
    std::map<std::string, std::size_t> joint;  // slots, by their codec's name
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const ExchangeLayer& layer = layers_[i];
      std::size_t at = slots_.size();
      if (layer.payload != nullptr && layer.payload->joint() != nullptr) {
        at = joint.emplace(layer.payload->name(), at).first->second;
      }
      if (at == slots_.size()) {
        slots_.emplace_back().label = layer.name;
      }
      slot_of_[i] = at;
      slots_[at].layers.push_back(i);
      slots_[at].elements += layer.elements;
      elements_ += static_cast<std::uint64_t>(layer.elements);
    }
    for (Slot& slot : slots_) {
      if (slot.joint()) {
        slot.label += " to ";
        slot.label += layers_[slot.layers.back()].name;
        slot.label += " (" + std::to_string(slot.layers.size()) + " layers)";
      }
    }
  }

  void plan_message() {
    std::size_t offset = kPayloadHeaderBytes;
    for (const bool raw : {true, false}) {
      for (Slot& slot : slots_) {
        if (is_raw(slot) != raw) {
          continue;
        }
        const ExchangeLayer& layer = layers_[slot.first()];
        if (raw && (layer.dtype == DType::kF64 || layer.dtype == DType::kOther)) {
          refuse_layer(comm_.rank(), layer,
                       std::string(name(layer.dtype)) +
                           " without a codec does not fit a sparse message\nhint: send it dense");
        }
        slot.offset = offset;
        slot.bytes =
            raw ? static_cast<std::size_t>(layer.elements) * sizeof(float) : slot_bytes(slot);
        offset += round_up(slot.bytes, 4);
      }
    }
    message_bytes_ = round_up(offset, 8);
  }

  std::size_t slot_bytes(const Slot& slot) const {
    try {
      return codec(slot)->slot_bytes(slot.elements);
    } catch (const InvalidArgument& error) {
      if (!slot.joint()) {
        throw;
      }
      throw InvalidArgument("rank " + std::to_string(comm_.rank()) + ", layers " + slot.label +
                            ", encoded as one: " + error.what() +
                            "; here smaller buckets, or scope=layer");
    }
  }

  void allocate() {
    std::size_t workspace = 0;
    std::size_t residual = 0;
    std::size_t widened = 0;
    std::size_t together = 0;
    for (const Slot& slot : slots_) {
      std::size_t slot_residual = 0;
      std::size_t slot_widened = 0;
      for (const std::size_t i : slot.layers) {
        slot_residual += is_raw(slot) ? 0 : residual_scratch_bytes(*codec(slot), memories_[i]);
        slot_widened += sums_in_place(i) ? 0 : static_cast<std::size_t>(layers_[i].elements);
      }
      residual = std::max(residual, slot_residual);
      widened = std::max(widened, slot_widened);
      together = std::max(together, slot.layers.size());
      if (slot.joint()) {
        workspace = std::max(workspace, codec(slot)->joint()->joint_workspace_bytes(
                                            slot.elements, slot.layers.size()));
      } else if (!is_raw(slot)) {
        workspace = std::max(workspace, codec(slot)->workspace_bytes(slot.elements));
      }
    }
    message_ = AlignedBuffer(message_bytes_);
    gathered_ = AlignedBuffer(message_bytes_ * static_cast<std::size_t>(comm_.size()));
    workspace_ = AlignedBuffer(workspace);
    residual_ = AlignedBuffer(residual);
    scratch_ = AlignedBuffer(widened * sizeof(float));
    grads_.reserve(layers_.size());
    parts_.reserve(together);
    dithers_.reserve(together);
    sums_.reserve(together);
  }

  std::span<const std::byte> message_of(int sender) const {
    return gathered_.bytes().subspan(static_cast<std::size_t>(sender) * message_bytes_,
                                     message_bytes_);
  }

  // The decoded sum goes straight into an fp32 gradient.
  bool sums_in_place(std::size_t i) const { return layers_[i].dtype == DType::kF32; }

  Context context(const Slot& slot) const {
    const ExchangeLayer& first = layers_[slot.first()];
    Context ctx =
        codec_context(first, first.key_hash, step_, comm_.rank(), comm_.size(), workspace_.bytes());
    ctx.loss_scale = grads_[slot.first()].loss_scale;
    if (slot.joint()) {
      ctx.parameter = slot.label;
      ctx.shape = {};
    }
    return ctx;
  }

  // Returns whether a gradient held NaN or Inf.
  bool encode(const Slot& slot) {
    const std::span<std::byte> out = message_.bytes().subspan(slot.offset, slot.bytes);
    const Context ctx = context(slot);
    parts_.clear();
    dithers_.clear();
    for (const std::size_t i : slot.layers) {
      give_memory(layers_[i], grads_[i], 0, layers_[i].elements, memories_[i]);
      parts_.push_back({grads_[i].source, memories_[i]});
      dithers_.push_back(dither_of(layers_[i].key_hash, ctx));
    }
    const auto& [source, memory] = parts_.front();
    const EncodeResult result =
        slot.joint() ? thinwire::encode(*codec(slot), ctx, parts_, dithers_, residual_.bytes(), out)
                     : thinwire::encode(*codec(slot), ctx, source, memory, dithers_.front(),
                                        residual_.bytes(), out);
    zero_slack(out, result.bytes);
    if (result.nonfinite) {
      for (const std::size_t i : slot.layers) {
        found_.look(i, 0, grads_[i].source, memories_[i], true);
      }
    }
    return result.nonfinite;
  }

  // Where the slot's layers are summed: sums_.
  void choose_sums(const Slot& slot) {
    sums_.clear();
    std::span<float> scratch = scratch_.floats(scratch_.size() / sizeof(float));
    for (const std::size_t i : slot.layers) {
      const auto n = static_cast<std::size_t>(layers_[i].elements);
      if (sums_in_place(i)) {
        sums_.push_back({static_cast<float*>(grads_[i].mean.data), n});
      } else {
        sums_.push_back(scratch.first(n));
        scratch = scratch.subspan(n);
      }
    }
  }

  void sum_raw(const Slot& slot) {
    const std::size_t i = slot.first();
    choose_sums(slot);
    const bool nonfinite = sum_scaled(gathered_.bytes().data() + slot.offset, message_bytes_,
                                      comm_.size(), weight_, sums_.front());
    flags_[i] = nonfinite ? 1 : 0;
    if (sums_in_place(i) || nonfinite) {
      return;
    }
    store_f32(sums_.front(), grads_[i].mean);
    flags_[i] = overflowed(grads_[i].mean) ? 1 : 0;
  }

  void sum_bodies(const Slot& slot) {
    for (int sender = 0; sender < comm_.size(); ++sender) {
      bodies_[static_cast<std::size_t>(sender)] =
          message_of(sender).subspan(slot.offset, slot.bytes);
    }
    const bool nonfinite = std::any_of(bodies_.begin(), bodies_.end(), is_nonfinite_body);
    if (!nonfinite) {
      choose_sums(slot);
      if (slot.joint()) {
        codec(slot)->joint()->sum_joint(context(slot), bodies_, weight_, sums_);
      } else {
        codec(slot)->sum(context(slot), bodies_, weight_, sums_.front());
      }
    }
    for (std::size_t k = 0; k < slot.layers.size(); ++k) {
      const std::size_t i = slot.layers[k];
      if (!nonfinite && !sums_in_place(i)) {
        store_f32(sums_[k], grads_[i].mean);
      }
      flags_[i] = nonfinite || is_flagged(*codec(slot), grads_[i].mean) ? 1 : 0;
    }
  }

  // The values of a layer without a codec as this rank sends them.
  std::span<float> own_raw(const Slot& slot) const {
    return {reinterpret_cast<float*>(message_.bytes().data() + slot.offset),
            static_cast<std::size_t>(slot.elements)};
  }

  Communicator& comm_;
  std::vector<ExchangeLayer> layers_;
  std::vector<Memory*> memories_;  // one a layer
  std::vector<Slot> slots_;
  std::vector<std::size_t> slot_of_;  // each layer's
  std::vector<Gradient> grads_;
  std::vector<JointCodec::Part> parts_;  // of one slot, as the next three
  std::vector<Dither> dithers_;
  std::vector<std::span<float>> sums_;
  std::vector<std::span<const std::byte>> bodies_;  // by sender
  std::vector<std::uint8_t> flags_;
  NonFiniteTable found_;
  std::uint64_t elements_ = 0;
  std::size_t message_bytes_ = 0;
  AlignedBuffer message_;
  AlignedBuffer gathered_;  // size() messages
  AlignedBuffer workspace_;
  AlignedBuffer residual_;  // unpacked, where memories keep it in fewer bytes
  AlignedBuffer scratch_;   // fp32 sums of one slot's bf16 and fp16 layers
  std::uint64_t step_ = 0;
  float weight_ = 1;
};

}  // namespace

bool gathers(const PayloadCodec& codec, std::int64_t n, int ranks) {
  return !codec.traits().sparse && n > 0 &&
         codec.slot_bytes(n) * static_cast<std::size_t>(ranks - 1) <= kGatheredBytes;
}

std::unique_ptr<Exchange> make_sparse_exchange(Communicator& comm,
                                               std::vector<ExchangeLayer> layers,
                                               MemoryStore& memories) {
  return std::make_unique<SparseExchange>(comm, std::move(layers), memories);
}

}  // namespace thinwire
