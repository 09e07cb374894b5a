// What the exchanges share: message layout, checks, the context of a codec call. Internal
// to comm/collectives. Not thread-safe.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/collectives/kernels.h"
#include "comm/exchange.h"
#include "compressors/core/aligned_buffer.h"
#include "compressors/core/codec.h"
#include "compressors/core/encode.h"
#include "compressors/core/random.h"

namespace thinwire::collectives {

constexpr std::size_t round_up(std::size_t n, std::size_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// InvalidArgument, with rank and layer named, unless every gradient has its layer's dtype and size.
void check_gradients(int rank, std::span<const ExchangeLayer> layers,
                     std::span<const Gradient> grads);

[[noreturn]] void refuse_layer(int rank, const ExchangeLayer& layer, const std::string& what);

// The context of one codec call on a layer (or a range of it, of hash `key_hash`) for `world_size`
// ranks.
inline Context codec_context(const ExchangeLayer& layer, std::uint64_t key_hash, std::uint64_t step,
                             std::int32_t sender, std::int32_t world_size,
                             std::span<std::byte> workspace) {
  Context ctx;
  ctx.workspace = workspace;
  ctx.step = step;
  ctx.sender = sender;
  ctx.world_size = world_size;
  ctx.key_hash = key_hash;
  ctx.parameter = layer.name;
  ctx.shape = layer.shape;
  return ctx;
}

// Whether the body says that a rank had NaN or Inf.
inline bool is_nonfinite_body(std::span<const std::byte> body) {
  return !body.empty() && body[0] == static_cast<std::byte>(BodyMode::kNonFinite);
}

// Whether the mean of bodies of which none says so is to be flagged: a lossless codec sends NaN and
// Inf as they are, and they come through every sum, as in a dense exchange.
inline bool is_flagged(const PayloadCodec& codec, TensorView mean) {
  return codec.traits().lossless ? has_nonfinite(mean) : overflowed(mean);
}

// Before elements [begin, end) of a gradient are encoded: their memory, where nobody else needs it,
// is given to the residual.
void give_memory(const ExchangeLayer& layer, const Gradient& gradient, std::int64_t begin,
                 std::int64_t end, Memory* memory);

// What nonfinite_found() answers, one a layer.
class NonFiniteTable {
 public:
  explicit NonFiniteTable(std::span<const ExchangeLayer> layers)
      : layers_(layers), found_(layers.size()) {}

  void clear() { std::fill(found_.begin(), found_.end(), std::nullopt); }
  // Looks in elements [begin, begin + values.elements) of a layer; keeps the first found so far,
  // rather an own one.
  void look(std::size_t layer, std::int64_t begin, TensorView values, const Memory* memory,
            bool own);
  std::optional<NonFiniteFound> operator[](std::size_t layer) const { return found_[layer]; }

 private:
  std::span<const ExchangeLayer> layers_;
  std::vector<std::optional<NonFiniteFound>> found_;
};

// What rounds the residual of a layer, or of a range of it, of this hash.
inline Dither dither_of(std::uint64_t key_hash, const Context& ctx) {
  return make_dither(key_hash, ctx.step, ctx.sender);
}

// After all are encoded: what no residual keeps is freed.
inline void let_go(std::span<Gradient> gradients) {
  for (Gradient& gradient : gradients) gradient.owner.reset();
}

// Zeroes what an encoder left of its slot, so that a message's bytes depend on its bodies alone.
void zero_slack(std::span<std::byte> slot, std::size_t used);

// Runs `work` on a body of `sender`; a CorruptPayload comes out with rank and layer named.
template <typename Work>
void with_sender(int sender, const ExchangeLayer& layer, Work&& work) {
  try {
    work();
  } catch (const CorruptPayload& error) {
    throw CorruptPayload("message of rank " + std::to_string(sender) + ", layer " +
                         std::string(layer.name) + ": " + error.what());
  }
}

}  // namespace thinwire::collectives
