// Requantising exchange: each layer is cut into P ranges; every rank sends each range's body to the
// range's owner (alltoall), who sums the P of them in fp32 in rank order, re-encodes the sum with a
// residual of its own, and sends that to all (allgather).
//
// One message layout serves both transfers: the message to, and from, owner p holds a 24-byte
// header and one slot for each layer's range that p owns, at multiples of 4; all messages have the
// size of the largest, a multiple of 8, the slack zero.
#include <algorithm>
#include <utility>

#include "comm/collectives/common.h"
#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/payload.h"

namespace thinwire {

using namespace collectives;

namespace {

// What all ranks draw alike (Context::sender).
constexpr std::int32_t kEveryone = -1;

// A range's own random stream: the layer's hash mixed with the range's begin (the finaliser of
// splitmix64, Steele et al., OOPSLA 2014).
std::uint64_t range_hash(std::uint64_t layer_hash, std::int64_t begin) {
  std::uint64_t x = layer_hash + 0x9E3779B97F4A7C15U * (static_cast<std::uint64_t>(begin) + 1);
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31U);
}

// A range of less in its slot costs more in the body's header, and in entries rounded up, than it
// saves: 8 entries of topk in fp32, whose header takes 6 bytes.
constexpr std::size_t kLeastRangeBytes = 48;
// Ranges begin cache lines of an fp32 tensor.
constexpr std::int64_t kLineElements = 16;

constexpr std::int64_t divide_up(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Elements of each range of a layer but the last.
std::int64_t range_length(const ExchangeLayer& layer, std::int64_t ranks) {
  const std::int64_t n = layer.elements;
  if (layer.split_ranges > 0) {
    return divide_up(divide_up(n, layer.split_ranges), kLineElements) * kLineElements;
  }
  // Granularity 0: the codec takes the tensor whole, and one owner gets all of it.
  const std::int64_t granularity = layer.payload->traits().granularity;
  return granularity == 0 ? n : divide_up(divide_up(n, granularity), ranks) * granularity;
}

struct Range {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  int owner = 0;
  std::size_t offset = 0;  // of its slot in messages to and from the owner
  std::size_t bytes = 0;
  std::uint64_t hash = 0;
  Memory* worker = nullptr;
  Memory* own = nullptr;  // at the owner

  std::int64_t elements() const { return end - begin; }
  bool empty() const { return begin == end; }
};

class RequantisingExchange final : public Exchange {
 public:
  RequantisingExchange(Communicator& comm, std::vector<ExchangeLayer> layers, MemoryStore& memories)
      : comm_(comm),
        ranks_(static_cast<std::size_t>(comm.size())),
        layers_(std::move(layers)),
        ranges_(layers_.size() * ranks_),
        owned_elements_(ranks_),
        bodies_(ranks_),
        flags_(layers_.size()),
        found_(layers_) {
    std::vector<std::size_t> ends(ranks_, kPayloadHeaderBytes);
    std::size_t workspace = 0;
    std::int64_t scratch = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      if (layers_[i].payload == nullptr) {
        refuse_layer(comm_.rank(), layers_[i], "a payload codec expected\nhint: send it dense");
      }
      plan_ranges(i, memories, ends);
      const std::int64_t longest = range(i, 0).elements();
      workspace = std::max(workspace, layers_[i].payload->workspace_bytes(longest));
      scratch = std::max(scratch, longest);
    }
    message_bytes_ = round_up(*std::max_element(ends.begin(), ends.end()), 8);
    outgoing_ = AlignedBuffer(message_bytes_ * ranks_);
    incoming_ = AlignedBuffer(message_bytes_ * ranks_);
    reencoded_ = AlignedBuffer(message_bytes_);
    workspace_ = AlignedBuffer(workspace);
    std::size_t residual = 0;
    for (std::size_t i = 0; i < ranges_.size(); ++i) {
      for (const Memory* memory : {ranges_[i].worker, ranges_[i].own}) {
        residual = std::max(residual, residual_scratch_bytes(*layers_[i / ranks_].payload, memory));
      }
    }
    residual_ = AlignedBuffer(residual);
    scratch_ = AlignedBuffer(static_cast<std::size_t>(scratch) * sizeof(float));
    grads_.reserve(layers_.size());
  }

  int transfers() const override { return 2; }

  std::unique_ptr<Transfer> start(std::uint64_t step, float weight,
                                  std::span<const Gradient> grads) override {
    check_gradients(comm_.rank(), layers_, grads);
    step_ = step;
    weight_ = weight;
    grads_.assign(grads.begin(), grads.end());
    found_.clear();
    for (std::size_t owner = 0; owner < ranks_; ++owner) {
      encode_for(static_cast<int>(owner));
    }
    let_go(grads_);
    return comm_.alltoall(outgoing_.bytes(), incoming_.bytes());
  }

  std::unique_ptr<Transfer> next() override {
    const int self = comm_.rank();
    for (int sender = 0; sender < comm_.size(); ++sender) {
      open_payload(part(incoming_, sender), owned_elements_[static_cast<std::size_t>(self)],
                   sender);
    }
    PayloadHeader header;
    header.elements = owned_elements_[static_cast<std::size_t>(self)];
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Range& own = owned_range(i, self);
      if (!own.empty() && reencode(i, own)) {
        header.flags |= kFlagNonFinite;
      }
    }
    seal_payload(header, reencoded_.bytes());
    return comm_.allgather(reencoded_.bytes(), incoming_.bytes());
  }

  std::span<const std::uint8_t> finish() override {
    for (int owner = 0; owner < comm_.size(); ++owner) {
      open_payload(part(incoming_, owner), owned_elements_[static_cast<std::size_t>(owner)], owner);
    }
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      flags_[i] = decode(i) ? 1 : 0;
      if (flags_[i] != 0) {
        fill_nan(grads_[i].mean);
      }
    }
    return flags_;
  }

  std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const override {
    return found_[layer];
  }

  std::size_t buffer_bytes() const override {
    return outgoing_.size() + incoming_.size() + reencoded_.size() + workspace_.size() +
           residual_.size() + scratch_.size();
  }

 private:
  // Range i of a layer is owned by (i + key hash) mod P, so that the short last ranges of many
  // layers do not all fall to the last rank.
  void plan_ranges(std::size_t layer_index, MemoryStore& memories, std::vector<std::size_t>& ends) {
    const ExchangeLayer& layer = layers_[layer_index];
    const std::int64_t n = layer.elements;
    const std::int64_t length = range_length(layer, static_cast<std::int64_t>(ranks_));
    for (std::size_t r = 0; r < ranks_; ++r) {
      Range& range = ranges_[layer_index * ranks_ + r];
      range.begin = std::min(static_cast<std::int64_t>(r) * length, n);
      range.end = std::min(range.begin + length, n);
      range.owner = static_cast<int>((r + layer.key_hash % ranks_) % ranks_);
      if (range.empty()) {
        continue;
      }
      range.hash = range_hash(layer.key_hash, range.begin);
      range.bytes = layer.payload->slot_bytes(range.elements());
      std::size_t& end = ends[static_cast<std::size_t>(range.owner)];
      range.offset = end;
      end += round_up(range.bytes, 4);
      owned_elements_[static_cast<std::size_t>(range.owner)] +=
          static_cast<std::uint64_t>(range.elements());
      range.worker = memories.memory(layer.name, range.begin, range.end, MemoryRole::kWorker);
      if (range.owner == comm_.rank()) {
        range.own = memories.memory(layer.name, range.begin, range.end, MemoryRole::kOwner);
      }
    }
  }

  const Range& range(std::size_t layer, std::size_t r) const { return ranges_[layer * ranks_ + r]; }
  const Range& owned_range(std::size_t layer, int owner) const {
    const auto p = static_cast<std::size_t>(owner);
    return range(layer, (p + ranks_ - layers_[layer].key_hash % ranks_) % ranks_);
  }
  std::span<std::byte> part(const AlignedBuffer& messages, int rank) const {
    return messages.bytes().subspan(static_cast<std::size_t>(rank) * message_bytes_,
                                    message_bytes_);
  }

  void encode_for(int owner) {
    const std::span<std::byte> message = part(outgoing_, owner);
    PayloadHeader header;
    header.elements = owned_elements_[static_cast<std::size_t>(owner)];
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Range& range = owned_range(i, owner);
      if (range.empty()) {
        continue;
      }
      const std::span<std::byte> slot = message.subspan(range.offset, range.bytes);
      const Context ctx = codec_context(layers_[i], range.hash, step_, comm_.rank(), comm_.size(),
                                        workspace_.bytes());
      give_memory(layers_[i], grads_[i], range.begin, range.end, range.worker);
      const TensorView source = grads_[i].source.slice(range.begin, range.end);
      const EncodeResult result = encode(*layers_[i].payload, ctx, source, range.worker,
                                         dither_of(range.hash, ctx), residual_.bytes(), slot);
      zero_slack(slot, result.bytes);
      if (result.nonfinite) {
        found_.look(i, range.begin, source, range.worker, true);
        header.flags |= kFlagNonFinite;
      }
    }
    seal_payload(header, message);
  }

  // Sums the P bodies of this rank's range and encodes the sum. Returns whether it is nonfinite.
  bool reencode(std::size_t i, const Range& own) {
    const ExchangeLayer& layer = layers_[i];
    const std::span<std::byte> slot = reencoded_.bytes().subspan(own.offset, own.bytes);
    for (int sender = 0; sender < comm_.size(); ++sender) {
      bodies_[static_cast<std::size_t>(sender)] =
          part(incoming_, sender).subspan(own.offset, own.bytes);
    }
    if (std::any_of(bodies_.begin(), bodies_.end(), is_nonfinite_body)) {
      slot[0] = static_cast<std::byte>(BodyMode::kNonFinite);
      zero_slack(slot, 1);
      return true;
    }
    const std::span<float> sum = scratch_.floats(static_cast<std::size_t>(own.elements()));
    const Context ctx =
        codec_context(layer, own.hash, step_, kEveryone, comm_.size(), workspace_.bytes());
    layer.payload->sum(ctx, bodies_, weight_, sum);
    const EncodeResult result = encode(*layer.payload, ctx, view(sum), own.own,
                                       dither_of(own.hash, ctx), residual_.bytes(), slot);
    zero_slack(slot, result.bytes);
    if (result.nonfinite) {
      found_.look(i, own.begin, view(sum), own.own, false);
    }
    return result.nonfinite;
  }

  // Returns whether any range is nonfinite.
  bool decode(std::size_t i) {
    const auto body = [&](const Range& range) {
      return part(incoming_, range.owner).subspan(range.offset, range.bytes);
    };
    const std::span<const Range> ranges(&ranges_[i * ranks_], ranks_);
    for (const Range& range : ranges) {
      if (!range.empty() && is_nonfinite_body(body(range))) {
        return true;
      }
    }
    for (const Range& range : ranges) {
      if (range.empty()) {
        continue;
      }
      const Context ctx =
          codec_context(layers_[i], range.hash, step_, kEveryone, comm_.size(), workspace_.bytes());
      with_sender(range.owner, layers_[i], [&] {
        layers_[i].payload->decode(ctx, body(range), grads_[i].mean.slice(range.begin, range.end));
      });
    }
    return is_flagged(*layers_[i].payload, grads_[i].mean);
  }

  Communicator& comm_;
  std::size_t ranks_;
  std::vector<ExchangeLayer> layers_;
  std::vector<Range> ranges_;                  // layers x P, some empty when a layer is small
  std::vector<std::uint64_t> owned_elements_;  // per owner, over all layers
  std::vector<Gradient> grads_;
  std::vector<std::span<const std::byte>> bodies_;  // of one range, by sender
  std::vector<std::uint8_t> flags_;
  NonFiniteTable found_;
  std::size_t message_bytes_ = 0;
  AlignedBuffer outgoing_;   // P messages, by owner
  AlignedBuffer incoming_;   // P messages, by sender, then by owner
  AlignedBuffer reencoded_;  // this owner's message to all
  AlignedBuffer workspace_;
  AlignedBuffer residual_;  // unpacked, where memories keep it in fewer bytes
  AlignedBuffer scratch_;   // fp32 sum of the longest range
  std::uint64_t step_ = 0;
  float weight_ = 1;
};

}  // namespace

int split_ranges(const PayloadCodec& codec, std::int64_t n, int ranks) {
  if (!codec.traits().splits) {
    return 0;
  }
  const std::size_t most = codec.slot_bytes(n) / kLeastRangeBytes;
  return static_cast<int>(std::clamp<std::size_t>(most, 1, static_cast<std::size_t>(ranks)));
}

std::unique_ptr<Exchange> make_requantising_exchange(Communicator& comm,
                                                     std::vector<ExchangeLayer> layers,
                                                     MemoryStore& memories) {
  return std::make_unique<RequantisingExchange>(comm, std::move(layers), memories);
}

}  // namespace thinwire
