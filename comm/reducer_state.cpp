#include "comm/reducer_state.h"

#include <algorithm>
#include <map>
#include <string_view>

#include "comm/state_key.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::string_view kWorker = "worker";
constexpr std::string_view kVelocity = "worker.velocity";
constexpr std::string_view kWorkerState = "worker.state";

[[noreturn]] void refuse(const std::string& what) {
  throw InvalidArgument("cannot carry the reducers' states over: " + what +
                        "\nhint: give the states that all ranks of one job saved at the same step");
}

// Of all ranks, by rank.
std::vector<const ReducerState*> in_order(std::span<const ReducerState> states) {
  if (states.empty()) {
    refuse("no state given");
  }
  const ReducerState& first = states.front();
  if (static_cast<std::size_t>(first.world_size) != states.size()) {
    refuse("expected the states of " + std::to_string(first.world_size) + " ranks, got " +
           std::to_string(states.size()));
  }
  std::vector<const ReducerState*> ordered(states.size(), nullptr);
  for (const ReducerState& state : states) {
    const std::string who = "rank " + std::to_string(state.rank) + ": ";
    const auto check = [&](const char* field, const std::string& expected, const std::string& got) {
      if (expected != got) {
        refuse(who + field + ": expected " + expected + " as on rank " +
               std::to_string(first.rank) + ", got " + got);
      }
    };
    check("version", std::to_string(first.version), std::to_string(state.version));
    check("world size", std::to_string(first.world_size), std::to_string(state.world_size));
    check("step", std::to_string(first.step), std::to_string(state.step));
    check("loss scale", std::to_string(first.loss_scale), std::to_string(state.loss_scale));
    check("policy", "'" + first.policy + "'", "'" + state.policy + "'");
    if (state.rank < 0 || state.rank >= state.world_size) {
      refuse(who + "expected a rank in [0, " + std::to_string(state.world_size) + ")");
    }
    const ReducerState*& place = ordered[static_cast<std::size_t>(state.rank)];
    if (place != nullptr) {
      refuse(who + "its state is there twice");
    }
    place = &state;
  }
  return ordered;
}

// Sums over ranks, by layer, over its elements from the first.
using Sums = std::map<std::string, std::vector<double>>;

void add(const StateEntry& entry, const ParsedStateKey& key, double weight, Sums& sums) {
  if (!key.range) {
    refuse("entry '" + entry.key + "' names no range; expected ROLE/NAME/BEGIN:END");
  }
  const auto begin = static_cast<std::size_t>(key.range->begin);
  const auto end = static_cast<std::size_t>(key.range->end);
  if (end < begin || end - begin != entry.values.size()) {
    refuse("entry '" + entry.key + "' has " + std::to_string(entry.values.size()) +
           " values; expected as many as its range");
  }
  std::vector<double>& sum = sums[std::string(key.layer)];
  sum.resize(std::max(sum.size(), begin + entry.values.size()));
  for (std::size_t i = 0; i < entry.values.size(); ++i) {
    sum[begin + i] += weight * static_cast<double>(entry.values[i]);
  }
}

std::int64_t elements_of(const Sums& sums, std::string_view layer) {
  const auto found = sums.find(std::string(layer));
  return found == sums.end() ? 0 : static_cast<std::int64_t>(found->second.size());
}

void emit(const Sums& sums, std::string_view role, std::vector<StateEntry>& entries) {
  for (const auto& [layer, sum] : sums) {
    StateEntry& entry = entries.emplace_back();
    entry.key =
        StateKey{
            .role = std::string(role), .layer = layer, .end = static_cast<std::int64_t>(sum.size())}
            .text();
    entry.values.reserve(sum.size());
    for (const double value : sum) {
      entry.values.push_back(static_cast<float>(value));
    }
  }
}

}  // namespace

ReducerState reshard(std::span<const ReducerState> states, int rank, int world_size, ReduceOp op) {
  if (world_size < 1 || rank < 0 || rank >= world_size) {
    throw InvalidArgument("cannot carry the reducers' states over: rank " + std::to_string(rank) +
                          " of " + std::to_string(world_size) + ": expected a rank in [0, " +
                          std::to_string(world_size) + ")");
  }
  const std::vector<const ReducerState*> ordered = in_order(states);
  if (static_cast<std::size_t>(world_size) == ordered.size()) {
    return *ordered[static_cast<std::size_t>(rank)];
  }
  const ReducerState& model =
      *ordered[static_cast<std::size_t>(rank) % ordered.size()];  // of a codec's own state
  const double ranks = static_cast<double>(ordered.size());
  const double target = op == ReduceOp::kMean ? 1.0 : static_cast<double>(world_size);
  const double worker = (op == ReduceOp::kMean ? 1.0 / ranks : 1.0) / target;
  ReducerState result = model;
  result.rank = rank;
  result.world_size = world_size;
  result.entries.clear();
  Sums residuals;
  Sums velocities;
  for (const ReducerState* state : ordered) {
    for (const StateEntry& entry : state->entries) {
      const ParsedStateKey key = parse_state_key(entry.key);
      if (key.role == kWorker) {
        add(entry, key, worker, residuals);
      } else if (key.role == "owner") {
        add(entry, key, 1.0 / target, residuals);
      } else if (key.role == kVelocity) {
        add(entry, key, worker, velocities);
      } else if (!key.role.ends_with(".state")) {
        refuse("entry '" + entry.key + "' has no known role");
      }
    }
  }
  emit(residuals, kWorker, result.entries);
  emit(velocities, kVelocity, result.entries);
  // A codec's own state is of one range; where a layer was split, others begin anew.
  for (const StateEntry& entry : model.entries) {
    const ParsedStateKey key = parse_state_key(entry.key);
    if (key.role == kWorkerState && key.range && key.range->begin == 0 &&
        key.range->end == elements_of(residuals, key.layer)) {
      result.entries.push_back(entry);
    }
  }
  return result;
}

}  // namespace thinwire
