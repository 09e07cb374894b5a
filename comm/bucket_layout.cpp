#include "comm/bucket_layout.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace thinwire {

namespace {

using Members = std::vector<std::size_t>;

struct Split {
  Members sparse;
  Members requantising;  // and sparse ones that are split-reduced
  Members linear;
  Members dense;    // fp32, bf16, fp16
  Members dense16;  // bf16 and fp16, where they are worth messages of their own
  Members dense64;  // fp64
};

// A 16-bit gradient's cast to its own type, which loses nothing. Never destroyed: layouts of static
// reducers may outlive other statics.
const PayloadCodec& own_cast(DType dtype) {
  static const Codec& bf16 = *new Codec(make_codec("bf16,ef=off"));
  static const Codec& fp16 = *new Codec(make_codec("fp16,ef=off"));
  return dtype == DType::kBF16 ? *bf16.payload : *fp16.payload;
}

class NoMemories final : public MemoryStore {
 public:
  Memory* memory(std::string_view, std::int64_t, std::int64_t, MemoryRole) override {
    return nullptr;
  }
};

bool compressed_at(const LayoutContext& context, const Codec& codec, std::uint64_t step) {
  return context.mode == StepMode::kPolicy && !codec.is_none() && step >= codec.options.start_step;
}

Split split_layers(const LayoutContext& context, const std::vector<std::size_t>& indices,
                   std::uint64_t step) {
  Split split;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const Layer& layer = context.layers[indices[i]];
    const Codec& codec = context.plan.choices[indices[i]].codec;
    if (!compressed_at(context, codec, step)) {
      (layer.dtype == DType::kF64 ? split.dense64 : split.dense).push_back(i);
    } else if (codec.linear) {
      split.linear.push_back(i);
    } else {
      const Policy::Choice& choice = context.plan.choices[indices[i]];
      const bool allgathered =
          choice.gathered || (codec.payload->traits().sparse && choice.split_ranges == 0);
      (allgathered ? split.sparse : split.requantising).push_back(i);
    }
  }
  return split;
}

// The allgather sends every raw value P - 1 times, an allreduce twice; but it is there anyway.
void let_small_layers_ride(const LayoutContext& context, const std::vector<std::size_t>& indices,
                           Split& split) {
  if (split.sparse.empty() || split.dense.empty()) {
    return;
  }
  std::size_t bytes = 0;
  for (const std::size_t i : split.dense) {
    bytes += static_cast<std::size_t>(context.layers[indices[i]].elements()) * sizeof(float);
  }
  if (bytes * static_cast<std::size_t>(context.comm.size() - 1) > context.ride_along_bytes) {
    return;
  }
  Members merged;
  std::merge(split.sparse.begin(), split.sparse.end(), split.dense.begin(), split.dense.end(),
             std::back_inserter(merged));
  split.sparse = std::move(merged);
  split.dense.clear();
}

// The allreduce sums in fp32 and sends 4 bytes an element. In 2 bytes, summed in fp32 by owners and
// rounded once as the result is anyway, they take a transfer more.
void keep_16_bits(const LayoutContext& context, const std::vector<std::size_t>& indices,
                  Split& split) {
  Members narrow;
  Members others;
  std::size_t bytes = 0;
  for (const std::size_t i : split.dense) {
    const Layer& layer = context.layers[indices[i]];
    if (is_16_bit(layer.dtype)) {
      narrow.push_back(i);
      bytes += static_cast<std::size_t>(layer.elements()) * sizeof(float);
    } else {
      others.push_back(i);
    }
  }
  if (context.means && bytes > context.ride_along_bytes) {
    split.dense16 = std::move(narrow);
    split.dense = std::move(others);
  }
}

std::vector<ExchangeLayer> exchange_layers(const LayoutContext& context,
                                           const std::vector<std::size_t>& indices,
                                           const Members& members, std::uint64_t step,
                                           bool by_cast = false) {
  std::vector<ExchangeLayer> result;
  for (const std::size_t i : members) {
    const Layer& layer = context.layers[indices[i]];
    const Codec& codec = context.plan.choices[indices[i]].codec;
    ExchangeLayer& entry = result.emplace_back();
    entry.name = layer.name;
    entry.shape = layer.shape;
    entry.elements = layer.elements();
    entry.dtype = layer.dtype;
    entry.key_hash = context.key_hashes[indices[i]];
    entry.names_nonfinite = codec.options.nonfinite == NonFinite::kError;
    if (compressed_at(context, codec, step)) {
      entry.payload = codec.payload_at(step);
      entry.linear = codec.linear.get();
      entry.split_ranges = context.plan.choices[indices[i]].split_ranges;
    } else if (by_cast) {
      entry.payload = &own_cast(layer.dtype);
    }
  }
  return result;
}

}  // namespace

BucketLayout make_bucket_layout(const LayoutContext& context,
                                const std::vector<std::size_t>& indices, std::uint64_t step) {
  BucketLayout layout;
  if (context.mode == StepMode::kLocal) {
    return layout;
  }
  Split split = split_layers(context, indices, step);
  let_small_layers_ride(context, indices, split);
  keep_16_bits(context, indices, split);

  const auto add = [&](Members members, auto&& make, bool by_cast = false) {
    if (members.empty()) {
      return;
    }
    BucketGroup& group = layout.groups.emplace_back();
    group.exchange = make(exchange_layers(context, indices, members, step, by_cast));
    group.members = std::move(members);
  };
  const auto dense = [&](std::vector<ExchangeLayer> layers) {
    return make_dense_exchange(context.comm, std::move(layers));
  };
  add(std::move(split.dense), dense);
  add(std::move(split.dense64), dense);
  add(
      std::move(split.dense16),
      [&](std::vector<ExchangeLayer> layers) {
        NoMemories none;
        return make_requantising_exchange(context.comm, std::move(layers), none);
      },
      true);
  add(std::move(split.requantising), [&](std::vector<ExchangeLayer> layers) {
    return make_requantising_exchange(context.comm, std::move(layers), context.memories);
  });
  add(std::move(split.linear), [&](std::vector<ExchangeLayer> layers) {
    return make_linear_exchange(context.comm, std::move(layers), context.memories);
  });
  add(std::move(split.sparse), [&](std::vector<ExchangeLayer> layers) {
    return make_sparse_exchange(context.comm, std::move(layers), context.memories);
  });
  return layout;
}

}  // namespace thinwire
