#include "comm/memory_table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "comm/state_key.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 2> kRoles = {"worker", "owner"};          // by MemoryRole
constexpr std::array<std::string_view, 3> kParts = {"", ".velocity", ".state"};  // by Part

bool remembers(const Codec& codec) {
  if (!codec.options.error_feedback) {
    return false;
  }
  if (codec.payload) {
    return !codec.payload->traits().lossless;
  }
  return codec.linear && !codec.linear->traits().lossless;
}

// The largest number of the type for what lies beyond.
template <typename T>
T saturated(float x) {
  if constexpr (std::is_same_v<T, BF16>) {
    return to_bf16_saturated(x);
  } else if constexpr (std::is_same_v<T, FP16>) {
    return to_fp16_saturated(x);
  } else {
    return from_float<T>(x);
  }
}

[[noreturn]] void refuse(const std::string& what) {
  throw InvalidArgument("cannot restore the reducer's state: " + what +
                        "\nhint: restore a state saved by the same rank of a job with the same "
                        "model, policy and world size");
}

}  // namespace

MemoryTable::MemoryTable(const std::vector<Layer>& layers, std::shared_ptr<const Plan> plan)
    : layers_(layers), plan_(std::move(plan)) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    index_.emplace(layers[i].name, i);
    info_.push_back(describe(layers[i], plan_->choices[i]));
  }
}

MemoryTable::LayerInfo MemoryTable::describe(const Layer& layer, const Policy::Choice& choice) {
  const Codec& codec = choice.codec;
  return {.elements = layer.elements(),
          .remembers = remembers(codec),
          .options = {.transactional = codec.options.transactional,
                      .storage = codec.options.storage,
                      .decay = codec.options.decay},
          .codec = &codec,
          .split_ranges = choice.split_ranges,
          .gathered = choice.gathered};
}

MemoryTable::Pending MemoryTable::pending(std::size_t layer, float owner_weight) {
  Pending sum;
  const auto add = [&](const Slot& slot, std::span<const float> values, float weight,
                       std::vector<float>& to) {
    to.resize(static_cast<std::size_t>(info_[layer].elements));
    for (std::size_t i = 0; i < values.size(); ++i) {
      to[static_cast<std::size_t>(slot.begin) + i] += weight * values[i];
    }
  };
  for (auto held = first_of(layer); held != memories_.end() && held->first.layer == layer; ++held) {
    const auto& [slot, memory] = *held;
    std::vector<float> residual(static_cast<std::size_t>(memory->elements()));
    memory->read(residual);
    const bool owner = slot.role == MemoryRole::kOwner;
    add(slot, residual, owner ? owner_weight : 1.0F, sum.residual);
    if (!owner && !memory->velocity().empty()) add(slot, memory->velocity(), 1, sum.velocity);
  }
  return sum;
}

void MemoryTable::set_plan(std::shared_ptr<const Plan> plan, float owner_weight) {
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const Policy::Choice& choice = plan->choices[i];
    if (info_[i].same_memories(choice)) {
      info_[i].codec = &choice.codec;
      continue;
    }
    const auto [residual, velocity] = pending(i, owner_weight);
    forget(i);
    info_[i] = describe(layers_[i], choice);
    if (!residual.empty()) {
      put_residual(i, residual);
      if (needs(whole(i)).velocity && !velocity.empty()) {
        at(whole(i)).restore_velocity(velocity);
      }
    }
  }
  plan_ = std::move(plan);
}

TensorView MemoryTable::residual(std::size_t layer) {
  const auto one = first_of(layer);
  if (one != memories_.end() && one->first == whole(layer)) {
    if (const auto stored = one->second->as_stored()) return *stored;
  }
  bool any = false;
  for (auto held = first_of(layer); held != memories_.end() && held->first.layer == layer; ++held) {
    const auto& [slot, memory] = *held;
    if (slot.role != MemoryRole::kWorker) continue;
    if (!any) copy_.assign(static_cast<std::size_t>(info_[layer].elements), 0);
    any = true;
    memory->read(std::span(copy_).subspan(static_cast<std::size_t>(slot.begin),
                                          static_cast<std::size_t>(slot.end - slot.begin)));
  }
  return any ? view(copy_) : TensorView();
}

// Memories that memory() has given out stay where they are.
void MemoryTable::undo_split(std::size_t layer, float owner_weight) {
  const auto cut = [&](const Slot& slot) { return slot.layer == layer && slot != whole(layer); };
  if (std::none_of(memories_.begin(), memories_.end(),
                   [&](const auto& entry) { return cut(entry.first); })) {
    return;
  }
  const Pending sum = pending(layer, owner_weight);
  const bool given_out = memories_.contains(whole(layer)) && !restored_.contains(whole(layer));
  std::erase_if(memories_, [&](const auto& entry) { return cut(entry.first); });
  std::erase_if(restored_, cut);
  at(whole(layer)).restore(sum.residual);
  if (!given_out) restored_.insert(whole(layer));
}

void MemoryTable::put_residual(std::size_t layer, std::span<const float> residual) {
  at(whole(layer)).restore(residual);
  restored_.insert(whole(layer));
}

Memory* MemoryTable::memory(std::string_view name, std::int64_t begin, std::int64_t end,
                            MemoryRole role) {
  const auto found = index_.find(name);
  if (found == index_.end()) {
    throw InvalidArgument("no layer '" + std::string(name) + "' in the memory table");
  }
  if (!info_[found->second].remembers) {
    return nullptr;
  }
  const Slot slot{found->second, role, begin, end};
  cut_restored(slot);
  return &at(slot);
}

// A restored memory whose range holds that of `wanted` becomes one of that range, and others of
// what is left: with another number of ranks layers are cut at other places.
void MemoryTable::cut_restored(const Slot& wanted) {
  const auto whole = std::find_if(restored_.begin(), restored_.end(), [&](const Slot& slot) {
    return slot.layer == wanted.layer && slot.role == wanted.role && slot.begin <= wanted.begin &&
           slot.end >= wanted.end;
  });
  if (whole == restored_.end()) {
    return;
  }
  const Slot old = *whole;
  restored_.erase(whole);
  if (old == wanted) {
    return;
  }
  const std::unique_ptr<Memory> memory = std::move(memories_.extract(old).mapped());
  std::vector<float> residual(static_cast<std::size_t>(memory->elements()));
  memory->read(residual);
  const auto part = [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) {
      return;
    }
    const Slot slot{old.layer, old.role, begin, end};
    const auto of = [&](std::span<const float> values) {
      return values.subspan(static_cast<std::size_t>(begin - old.begin),
                            static_cast<std::size_t>(end - begin));
    };
    Memory& piece = at(slot);
    piece.restore(of(residual));
    if (!memory->velocity().empty()) piece.restore_velocity(of(memory->velocity()));
    if (slot != wanted) restored_.insert(slot);
  };
  part(old.begin, wanted.begin);
  part(wanted.begin, wanted.end);
  part(wanted.end, old.end);
}

MemoryTable::Memories::iterator MemoryTable::first_of(std::size_t layer) {
  return memories_.lower_bound({layer, MemoryRole::kWorker, 0, 0});
}

Memory& MemoryTable::at(const Slot& slot) {
  std::unique_ptr<Memory>& memory = memories_[slot];
  if (!memory) {
    MemoryOptions options = info_[slot.layer].options;
    options.needs = needs(slot);
    memory = std::make_unique<Memory>(slot.end - slot.begin, options);
  }
  return *memory;
}

MemoryNeeds MemoryTable::needs(const Slot& slot) const {
  const Codec& codec = *info_[slot.layer].codec;
  if (!info_[slot.layer].remembers) return {};
  return codec.payload ? codec.payload->memory_needs(slot.end - slot.begin)
                       : codec.linear->memory_needs(layers_[slot.layer].shape);
}

std::int64_t MemoryTable::elements(const Slot& slot, Part part) const {
  if (part == Part::kState) return needs(slot).state;
  return part == Part::kVelocity && !needs(slot).velocity ? 0 : slot.end - slot.begin;
}

void MemoryTable::commit() {
  for (auto& [slot, memory] : memories_) {
    memory->commit();
  }
  for (const auto& [layer, rest] : released_) {
    forget(layer);
    if (!rest.empty()) put_residual(layer, rest);
  }
  released_.clear();
}

void MemoryTable::rollback() {
  released_.clear();
  for (auto& [slot, memory] : memories_) {
    if (info_[slot.layer].options.transactional) {
      memory->rollback();
    } else {
      memory->commit();
    }
  }
}

std::size_t MemoryTable::bytes() const {
  std::size_t bytes = 0;
  for (const auto& [slot, memory] : memories_) {
    bytes += memory->bytes();
  }
  return bytes;
}

void MemoryTable::scale(float factor) {
  for (auto& [slot, memory] : memories_) {
    memory->scale(factor);
  }
}

void MemoryTable::scale(std::span<const float> factors) {
  for (auto& [slot, memory] : memories_) {
    if (factors[slot.layer] != 1.0F) memory->scale(factors[slot.layer]);
  }
}

bool MemoryTable::release(std::size_t layer, TensorView source, TensorView out) {
  auto held = first_of(layer);
  if (held == memories_.end() || held->first.layer != layer) {
    return false;
  }
  if (out.data != source.data) {
    std::memmove(out.data, source.data, source.bytes());
  }
  std::vector<float>& rest = released_[layer];
  for (; held != memories_.end() && held->first.layer == layer; ++held) {
    const auto& [slot, memory] = *held;
    if (slot.role != MemoryRole::kWorker) {
      continue;
    }
    std::vector<float> residual(static_cast<std::size_t>(memory->elements()));
    memory->read(residual);
    visit(out.slice(slot.begin, slot.end), [&](auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      for (std::size_t i = 0; i < residual.size(); ++i) {
        if constexpr (std::is_same_v<T, double>) {
          values[i] += double{residual[i]};
        } else {
          const float sum = to_float(values[i]) + residual[i];
          values[i] = from_float<T>(sum);
          if (std::isfinite(sum) && !std::isfinite(to_float(values[i]))) {
            values[i] = saturated<T>(sum);
            rest.resize(static_cast<std::size_t>(info_[layer].elements));
            rest[static_cast<std::size_t>(slot.begin) + i] = sum - to_float(values[i]);
          }
        }
      }
    });
  }
  return true;
}

void MemoryTable::forget(std::size_t layer) {
  const auto first = [](std::size_t of) { return Slot{of, MemoryRole::kWorker, 0, 0}; };
  memories_.erase(first_of(layer), first_of(layer + 1));
  restored_.erase(restored_.lower_bound(first(layer)), restored_.lower_bound(first(layer + 1)));
}

std::vector<double> MemoryTable::residual_norms() const {
  std::vector<double> norms(layers_.size());
  std::vector<float> residual;
  for (const auto& [slot, memory] : memories_) {
    if (slot.role == MemoryRole::kWorker) {
      residual.resize(static_cast<std::size_t>(memory->elements()));
      memory->read(residual);
      for (const float value : residual) {
        norms[slot.layer] += static_cast<double>(value) * static_cast<double>(value);
      }
    }
  }
  for (double& norm : norms) {
    norm = std::sqrt(norm);
  }
  return norms;
}

std::string MemoryTable::key_text(const Slot& slot, Part part) const {
  return StateKey{.role = std::string(kRoles[static_cast<std::size_t>(slot.role)]) +
                          std::string(kParts[static_cast<std::size_t>(part)]),
                  .layer = layers_[slot.layer].name,
                  .begin = slot.begin,
                  .end = slot.end}
      .text();
}

std::pair<MemoryTable::Slot, MemoryTable::Part> MemoryTable::parse_key(
    const std::string& key) const {
  const ParsedStateKey parsed = parse_state_key(key);
  const std::size_t dot = std::min(parsed.role.find('.'), parsed.role.size());
  const auto* role = std::find(kRoles.begin(), kRoles.end(), parsed.role.substr(0, dot));
  const auto* part = std::find(kParts.begin(), kParts.end(), parsed.role.substr(dot));
  if (role == kRoles.end() || part == kParts.end()) {
    refuse("entry '" + key + "' has no known role; expected worker/... or owner/...");
  }
  if (!parsed.range) {
    refuse("entry '" + key + "' names no range; expected ROLE/NAME/BEGIN:END");
  }
  Slot slot{.layer = 0,
            .role = static_cast<MemoryRole>(role - kRoles.begin()),
            .begin = parsed.range->begin,
            .end = parsed.range->end};
  const auto found = index_.find(parsed.layer);
  if (found == index_.end()) {
    refuse("entry '" + key + "' belongs to a layer that this table does not have");
  }
  slot.layer = found->second;
  const LayerInfo& info = info_[slot.layer];
  if (slot.end < slot.begin || slot.end > info.elements) {
    refuse("entry '" + key +
           "' lies outside its layer: expected a range within 0:" + std::to_string(info.elements));
  }
  const auto kind = static_cast<Part>(part - kParts.begin());
  // What is held after a change of plan until the next step comes without one.
  if (!info.remembers && (slot.role != MemoryRole::kWorker || kind != Part::kResidual)) {
    refuse("entry '" + key + "' belongs to a layer that keeps no residual under this policy");
  }
  return {slot, kind};
}

std::vector<StateEntry> MemoryTable::save() const {
  std::vector<StateEntry> entries;
  const auto add = [&](const Slot& slot, Part part, std::span<const float> values) {
    entries.push_back({key_text(slot, part), {values.begin(), values.end()}});
  };
  for (const auto& [slot, memory] : memories_) {
    std::vector<float> residual(static_cast<std::size_t>(memory->elements()));
    memory->read(residual);
    add(slot, Part::kResidual, residual);
    if (!memory->velocity().empty()) add(slot, Part::kVelocity, memory->velocity());
    if (!memory->state().empty()) add(slot, Part::kState, memory->state());
  }
  return entries;
}

void MemoryTable::restore(const std::vector<StateEntry>& entries, float owner_weight) {
  std::map<std::pair<Slot, Part>, const StateEntry*> wanted;
  for (const StateEntry& entry : entries) {
    const auto [slot, part] = parse_key(entry.key);
    const std::int64_t expected = elements(slot, part);
    if (static_cast<std::int64_t>(entry.values.size()) != expected) {
      refuse("entry '" + entry.key + "' has " + std::to_string(entry.values.size()) +
             " values, expected " + std::to_string(expected));
    }
    if (!wanted.emplace(std::pair(slot, part), &entry).second) {
      refuse("entry '" + entry.key + "' stands there twice");
    }
  }
  for (const Slot& slot : restored_) {
    memories_.erase(slot);
  }
  std::vector<Slot> given_out;
  for (auto& [slot, memory] : memories_) {
    memory->clear();
    given_out.push_back(slot);
  }
  restored_.clear();
  for (const auto& [place, entry] : wanted) {
    if (std::find(given_out.begin(), given_out.end(), place.first) == given_out.end()) {
      restored_.insert(place.first);
    }
    Memory& memory = at(place.first);
    switch (place.second) {
      case Part::kResidual:
        memory.restore(entry->values);
        break;
      case Part::kVelocity:
        memory.restore_velocity(entry->values);
        break;
      case Part::kState:
        memory.restore_state(entry->values);
        break;
    }
  }
  for (const Slot& slot : given_out) {
    cut_restored(slot);
  }
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const PayloadCodec* codec = info_[i].codec->payload.get();
    if (codec == nullptr) continue;
    if (info_[i].gathered || (codec->traits().splits && info_[i].split_ranges == 0)) {
      undo_split(i, owner_weight);
    }
  }
}

}  // namespace thinwire
