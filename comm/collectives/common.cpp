#include "comm/collectives/common.h"

#include <cstring>

#include "compressors/core/codec_support.h"
#include "compressors/core/random.h"

namespace thinwire::collectives {

void refuse_layer(int rank, const ExchangeLayer& layer, const std::string& what) {
  throw InvalidArgument("rank " + std::to_string(rank) + ", layer " + std::string(layer.name) +
                        ": " + what);
}

void check_gradients(int rank, std::span<const ExchangeLayer> layers,
                     std::span<const Gradient> grads) {
  if (grads.size() != layers.size()) {
    throw InvalidArgument("rank " + std::to_string(rank) + ": " + std::to_string(layers.size()) +
                          " gradients expected, got " + std::to_string(grads.size()));
  }
  for (std::size_t i = 0; i < layers.size(); ++i) {
    for (const TensorView& view : {grads[i].source, grads[i].mean}) {
      if (view.elements != layers[i].elements || view.dtype != layers[i].dtype) {
        refuse_layer(rank, layers[i],
                     std::to_string(layers[i].elements) + " elements of " +
                         std::string(name(layers[i].dtype)) + " expected, got " +
                         std::to_string(view.elements) + " of " + std::string(name(view.dtype)));
      }
    }
  }
}

void give_memory(const ExchangeLayer& layer, const Gradient& gradient, std::int64_t begin,
                 std::int64_t end, Memory* memory) {
  if (gradient.owner == nullptr || memory == nullptr || !memory->transactional() ||
      gradient.source.dtype != DType::kF32 || layer.names_nonfinite) {
    return;
  }
  auto* data = static_cast<float*>(gradient.source.slice(begin, end).data);
  memory->adopt({gradient.owner, data});
}

void NonFiniteTable::look(std::size_t layer, std::int64_t begin, TensorView values,
                          const Memory* memory, bool own) {
  if (!layers_[layer].names_nonfinite) {
    return;
  }
  std::optional<NonFiniteFound>& known = found_[layer];
  const std::optional<PlacedValue> here = first_nonfinite(values, memory);
  if (!here) {
    return;
  }
  const NonFiniteFound found{.index = begin + here->index, .value = here->value, .own = own};
  if (!known || (own && !known->own) || (own == known->own && found.index < known->index)) {
    known = found;
  }
}

namespace {

// Apart from the codecs' own streams.
RandomStream dither(std::uint64_t key_hash, const Context& ctx) {
  constexpr std::uint64_t kDither = 0x52455349445541;
  return random_stream(key_hash ^ kDither, ctx.step, ctx.sender);
}

}  // namespace

EncodeResult encode(const PayloadCodec& codec, const Context& ctx, TensorView grad, Memory* memory,
                    std::span<std::byte> scratch, std::span<std::byte> slot) {
  if (memory == nullptr) return codec.encode(ctx, grad, nullptr, slot);
  memory->unpack(scratch);
  const EncodeResult result = codec.encode(ctx, grad, memory, slot);
  memory->pack(dither(ctx.key_hash, ctx));
  return result;
}

EncodeResult encode(const JointCodec& codec, const Context& ctx,
                    std::span<const JointCodec::Part> parts,
                    std::span<const std::uint64_t> key_hashes, std::span<std::byte> scratch,
                    std::span<std::byte> slot) {
  for (const auto& [grad, memory] : parts) {
    if (memory == nullptr) continue;
    memory->unpack(scratch);
    scratch = scratch.subspan(scratch_bytes(memory));
  }
  const EncodeResult result = codec.encode_joint(ctx, parts, slot);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].memory != nullptr) parts[i].memory->pack(dither(key_hashes[i], ctx));
  }
  return result;
}

void zero_slack(std::span<std::byte> slot, std::size_t used) {
  if (used < slot.size()) {
    std::memset(slot.data() + used, 0, slot.size() - used);
  }
}

}  // namespace thinwire::collectives
