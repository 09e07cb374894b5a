#include "comm/collectives/common.h"

#include <cstring>

#include "compressors/core/codec_support.h"

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
      gradient.source.dtype != DType::kF32 || layer.names_nonfinite ||
      encodes_opened(*layer.payload, *memory)) {
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

void zero_slack(std::span<std::byte> slot, std::size_t used) {
  if (used < slot.size()) {
    std::memset(slot.data() + used, 0, slot.size() - used);
  }
}

}  // namespace thinwire::collectives
