#include "comm/memory_table.h"

#include <charconv>
#include <utility>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::string_view kWorkerPrefix = "worker/";
constexpr std::string_view kOwnerPrefix = "owner/";

bool remembers(const Codec& codec) {
  if (!codec.options.error_feedback) {
    return false;
  }
  if (codec.payload) {
    return !codec.payload->traits().lossless;
  }
  return codec.linear && !codec.linear->traits().lossless;
}

// The whole of `text` as a number; -1 when it is none.
std::int64_t number(std::string_view text) {
  std::int64_t value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? value : -1;
}

[[noreturn]] void refuse(const std::string& what) {
  throw InvalidArgument("cannot restore the reducer's state: " + what +
                        "\nhint: restore a state saved by the same rank of a job with the same "
                        "model, policy and world size");
}

}  // namespace

MemoryTable::MemoryTable(const std::vector<Layer>& layers, const Plan& plan) : layers_(layers) {
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Codec& codec = plan.choices[i].codec;
    index_.emplace(layers[i].name, i);
    info_.push_back(
        {.elements = layers[i].elements(),
         .remembers = remembers(codec),
         .options = {.transactional = codec.options.transactional, .decay = codec.options.decay}});
  }
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
  return &at({found->second, role, begin, end});
}

Memory& MemoryTable::at(const Slot& slot) {
  std::unique_ptr<Memory>& memory = memories_[slot];
  if (!memory) {
    memory = std::make_unique<Memory>(slot.end - slot.begin, info_[slot.layer].options);
  }
  return *memory;
}

void MemoryTable::commit() {
  for (auto& [slot, memory] : memories_) {
    memory->commit();
  }
}

void MemoryTable::rollback() {
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

std::string MemoryTable::key_text(const Slot& slot) const {
  return std::string(slot.role == MemoryRole::kWorker ? kWorkerPrefix : kOwnerPrefix) +
         layers_[slot.layer].name + "/" + std::to_string(slot.begin) + ":" +
         std::to_string(slot.end);
}

MemoryTable::Slot MemoryTable::parse_key(const std::string& key) const {
  std::string_view rest = key;
  Slot slot;
  if (rest.starts_with(kWorkerPrefix)) {
    rest.remove_prefix(kWorkerPrefix.size());
  } else if (rest.starts_with(kOwnerPrefix)) {
    slot.role = MemoryRole::kOwner;
    rest.remove_prefix(kOwnerPrefix.size());
  } else {
    refuse("entry '" + key + "' has no known role; expected worker/... or owner/...");
  }
  const std::size_t slash = rest.rfind('/');
  const std::size_t colon = rest.rfind(':');
  if (slash == std::string_view::npos || colon == std::string_view::npos || colon < slash) {
    refuse("entry '" + key + "' names no range; expected ROLE/NAME/BEGIN:END");
  }
  slot.begin = number(rest.substr(slash + 1, colon - slash - 1));
  slot.end = number(rest.substr(colon + 1));
  const auto found = index_.find(rest.substr(0, slash));
  if (found == index_.end()) {
    refuse("entry '" + key + "' belongs to a layer that this table does not have");
  }
  slot.layer = found->second;
  const LayerInfo& info = info_[slot.layer];
  if (slot.begin < 0 || slot.end < slot.begin || slot.end > info.elements) {
    refuse("entry '" + key +
           "' lies outside its layer: expected a range within 0:" + std::to_string(info.elements));
  }
  if (!info.remembers) {
    refuse("entry '" + key + "' belongs to a layer that keeps no residual under this policy");
  }
  return slot;
}

std::vector<StateEntry> MemoryTable::save() const {
  std::vector<StateEntry> entries;
  for (const auto& [slot, memory] : memories_) {
    const std::span<const float> residual = memory->current();
    entries.push_back({key_text(slot), {residual.begin(), residual.end()}});
  }
  return entries;
}

void MemoryTable::restore(const std::vector<StateEntry>& entries) {
  std::map<Slot, const StateEntry*> wanted;
  for (const StateEntry& entry : entries) {
    const Slot slot = parse_key(entry.key);
    if (static_cast<std::int64_t>(entry.residual.size()) != slot.end - slot.begin) {
      refuse("entry '" + entry.key + "' has " + std::to_string(entry.residual.size()) +
             " values, its range " + std::to_string(slot.end - slot.begin));
    }
    if (!wanted.emplace(slot, &entry).second) {
      refuse("entry '" + entry.key + "' stands there twice");
    }
  }
  for (auto& [slot, memory] : memories_) {
    if (!wanted.contains(slot)) {
      memory->clear();
    }
  }
  for (const auto& [slot, entry] : wanted) {
    at(slot).restore(entry->residual);
  }
}

}  // namespace thinwire
