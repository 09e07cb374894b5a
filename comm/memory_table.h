// MemoryTable: the memories of a layer table, by layer, element range and role. They belong to
// keys, not to buckets, so they survive bucket rebuilds. One thread at a time.
#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "comm/exchange.h"
#include "comm/policy.h"
#include "comm/reducer.h"
#include "compressors/core/memory.h"

namespace thinwire {

// What an owner's residual counts beside a worker's.
inline float owner_weight(ReduceOp op, int ranks) {
  return op == ReduceOp::kMean ? static_cast<float>(ranks) : 1.0F;
}

class MemoryTable final : public MemoryStore {
 public:
  // `layers` outlive the table; the plan has a choice for each.
  MemoryTable(const std::vector<Layer>& layers, std::shared_ptr<const Plan> plan);

  Memory* memory(std::string_view name, std::int64_t begin, std::int64_t end,
                 MemoryRole role) override;

  // End of a step: what was written becomes current, or is forgotten. Memories of layers with
  // transactional=off cannot forget: they keep the step's gradient either way.
  void commit();
  void rollback();
  void scale(float factor);
  // factors[i]: of layer i.
  void scale(std::span<const float> factors);
  // L2, of what the ranges of a layer's workers hold now; 0 where nothing is kept. One a layer.
  std::vector<double> residual_norms() const;

  // What workers hold of the layer, fp32 or bf16, or an fp32 copy of it, to be read only; of no
  // elements where nothing is held. Valid until the
  // next call of any.
  TensorView residual(std::size_t layer);

  // Another plan for the same layers. Where a layer's codec is another one, or it begins or ends
  // to be split-reduced or gathered, what is pending becomes its worker's residual: the sum of what
  // workers hold, and of what owners hold times `owner_weight`. A velocity stays where both codecs
  // have one; a codec's own state is forgotten. Memories of such layers that were given out before
  // are gone.
  void set_plan(std::shared_ptr<const Plan> plan, float owner_weight);

  // Adds what the layer's workers hold to `source`, rounded once into `out`, which is `source` or
  // apart, and forgets it at commit(); what lies beyond the largest number of the type stays.
  // False, and nothing is written, where nothing is held. Not in steps in which memory() is called
  // for the layer.
  bool release(std::size_t layer, TensorView source, TensorView out);
  // The layer's codec keeps no residual: what it holds is to be released.
  bool forgets(std::size_t layer) const { return !info_[layer].remembers; }

  // Bytes held now, all generations.
  std::size_t bytes() const;

  // One entry a part of a memory, in the order of their keys.
  std::vector<StateEntry> save() const;
  // Replaces everything; memories without an entry are cleared. What owners hold of a layer that
  // has none here is put together as by set_plan(). InvalidArgument, with nothing changed, when an
  // entry names no layer, range or role of this table.
  void restore(const std::vector<StateEntry>& entries, float owner_weight);

 private:
  struct Slot {
    std::size_t layer = 0;
    MemoryRole role = MemoryRole::kWorker;
    std::int64_t begin = 0;
    std::int64_t end = 0;
    auto operator<=>(const Slot&) const = default;
  };
  using Memories = std::map<Slot, std::unique_ptr<Memory>>;
  enum class Part : std::uint8_t { kResidual, kVelocity, kState };
  struct LayerInfo {
    std::int64_t elements = 0;
    bool remembers = false;
    MemoryOptions options;
    const Codec* codec = nullptr;  // in plan_
    int split_ranges = 0;
    bool gathered = false;

    // Both keep what they hold in the same memories.
    bool same_memories(const Policy::Choice& choice) const {
      return choice.codec.spec == codec->spec && choice.split_ranges == split_ranges &&
             choice.gathered == gathered;
    }
  };
  // What a layer's memories hold together, over all its elements; empty where they hold nothing.
  struct Pending {
    std::vector<float> residual;
    std::vector<float> velocity;
  };

  static LayerInfo describe(const Layer& layer, const Policy::Choice& choice);
  Pending pending(std::size_t layer, float owner_weight);
  void undo_split(std::size_t layer, float owner_weight);
  Slot whole(std::size_t layer) const {
    return {layer, MemoryRole::kWorker, 0, info_[layer].elements};
  }
  // Of a layer's memories, which follow one another.
  Memories::iterator first_of(std::size_t layer);
  void forget(std::size_t layer);
  void put_residual(std::size_t layer, std::span<const float> residual);
  MemoryNeeds needs(const Slot& slot) const;
  std::int64_t elements(const Slot& slot, Part part) const;
  std::string key_text(const Slot& slot, Part part) const;
  std::pair<Slot, Part> parse_key(const std::string& key) const;
  Memory& at(const Slot& slot);
  void cut_restored(const Slot& wanted);

  const std::vector<Layer>& layers_;
  std::shared_ptr<const Plan> plan_;
  std::unordered_map<std::string_view, std::size_t> index_;
  std::vector<LayerInfo> info_;
  Memories memories_;
  std::set<Slot> restored_;  // those of memories_ that memory() has not given out yet
  // By layer, in this step: what stays, nothing in most.
  std::map<std::size_t, std::vector<float>> released_;
  std::vector<float> copy_;  // residual()'s
};

}  // namespace thinwire
