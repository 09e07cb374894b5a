#include "optim/optimizer.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "comm/state_key.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/error.h"
#include "compressors/core/simd.h"
#include "optim/groups.h"

namespace thinwire::optim {
namespace {

constexpr int kStateVersion = 1;
constexpr const char* kResumeHint =
    "restore what the same rank of a job with the same model and optimizer saved";

std::string entry_key(const std::string& slot, const std::string& layer) {
  return slot + "/" + layer;
}

// Where the rounding of an fp32 weight is not what stands there, somebody else has set the weight:
// that is what counts.
template <typename T>
void follow_weights(const T* weights, std::span<float> master) {
  for (std::size_t i = 0; i < master.size(); ++i) {
    if (from_float<T>(master[i]).bits != weights[i].bits) {
      master[i] = to_float(weights[i]);
    }
  }
}

}  // namespace

std::vector<Member> all_layers(const GradientReducer& reducer) {
  std::vector<Member> members;
  for (std::size_t i = 0; i < reducer.layers().size(); ++i) {
    members.push_back({.layer = i, .group = 0});
  }
  return members;
}

Optimizer::Optimizer(GradientReducer& reducer, std::string name, std::vector<Member> members)
    : reducer_(reducer), name_(std::move(name)), members_(std::move(members)) {
  apply_environment_simd();
  if (reducer.op() != ReduceOp::kMean) {
    refuse("expected a reducer of means, got one of sums", "ReducerOptions::op = ReduceOp::kMean");
  }
  member_of_.assign(reducer.layers().size(), members_.size());
  for (std::size_t i = 0; i < members_.size(); ++i) {
    const std::size_t index = members_[i].layer;
    if (index >= reducer.layers().size()) {
      refuse("layer index " + std::to_string(index) + " given, the reducer has " +
                 std::to_string(reducer.layers().size()) + " layers",
             "make the optimizer for parameters of the reducer's model");
    }
    const Layer& layer = reducer.layers()[index];
    if (member_of_[index] != members_.size()) {
      refuse("parameter '" + layer.name + "' is there twice", "list each parameter once");
    }
    if (layer.dtype != DType::kF32 && !is_16_bit(layer.dtype)) {
      refuse("parameter '" + layer.name + "': expected fp32, bf16 or fp16, got " +
                 std::string(thinwire::name(layer.dtype)),
             "keep the parameter in fp32");
    }
    member_of_[index] = i;
    if (is_16_bit(layer.dtype) && master_ == nullptr) {
      master_ = &add_slot("master", SlotKind::kOptionalLocal);
    }
  }
  note_compressed();
}

void Optimizer::note_compressed() {
  compressed_.clear();
  for (std::size_t i = 0; i < size(); ++i) {
    compressed_.push_back(has_codec(i) && reducer_.size() > 1);
  }
  any_compressed_ = std::find(compressed_.begin(), compressed_.end(), true) != compressed_.end();
}

std::size_t Optimizer::groups() const {
  std::size_t count = 0;
  for (const Member& member : members_) {
    count = std::max(count, member.group + 1);
  }
  return count;
}

Optimizer::Slot& Optimizer::add_slot(std::string name, SlotKind kind) {
  Slot& slot = slots_.emplace_back();
  slot.name = std::move(name);
  slot.local = kind == SlotKind::kLocal || kind == SlotKind::kOptionalLocal;
  slot.optional = kind == SlotKind::kOptional || kind == SlotKind::kOptionalLocal;
  slot.values.resize(members_.size());
  for (std::size_t i = 0; !slot.optional && i < members_.size(); ++i) {
    ensure(slot, i);
  }
  return slot;
}

std::span<float> Optimizer::ensure(Slot& slot, std::size_t i) {
  std::vector<float>& values = slot.values[i];
  if (const auto n = static_cast<std::size_t>(elements(i)); values.size() != n) {
    values.resize(n);
    ++slots_version_;
  }
  return values;
}

void Optimizer::drop(Slot& slot, std::size_t i) {
  if (!slot.values[i].empty()) {
    slot.values[i].clear();
    ++slots_version_;
  }
}

void Optimizer::for_ranges(std::int64_t n, const Range& f) const {
  if (parallel_for_) {
    parallel_for_(n, f);
  } else {
    f(0, n);
  }
}

void Optimizer::refuse(const std::string& what, const std::string& hint) const {
  throw InvalidArgument("rank " + std::to_string(reducer_.rank()) + ", " + name_ + ": " + what +
                        "\nhint: " + hint);
}

void Optimizer::check(std::span<const Parameter> parameters) const {
  if (parameters.size() != members_.size()) {
    refuse("expected " + std::to_string(members_.size()) + " parameters, got " +
               std::to_string(parameters.size()),
           "give one a member, in the same order");
  }
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const auto check_view = [&](const TensorView& view, const char* what) {
      if (view.dtype != layer(i).dtype || view.elements != elements(i)) {
        refuse(std::string(what) + " of '" + layer(i).name + "': expected " +
                   std::string(thinwire::name(layer(i).dtype)) + " of " +
                   std::to_string(elements(i)) + " elements, got " +
                   std::string(thinwire::name(view.dtype)) + " of " + std::to_string(view.elements),
               "make a new reducer and optimizer for a changed model");
      }
    };
    check_view(parameters[i].weights, "weights");
    if (parameters[i].grad.data != nullptr) {
      check_view(parameters[i].grad, "gradient");
    }
  }
}

bool Optimizer::step(std::span<const Parameter> parameters) {
  check(parameters);
  if (const std::uint64_t reduced = reducer_.steps(); reduced == std::exchange(reduced_, reduced)) {
    refuse("step() without gradients reduced since the last one",
           "reduce each step's gradients; with DistributedDataParallel, let the last backward() "
           "before step() run outside of no_sync()");
  }
  if (reducer_.last_step_skipped()) {
    return false;
  }
  begin_update();
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& parameter = parameters[i];
    if (parameter.grad.data == nullptr || elements(i) == 0) {
      continue;
    }
    if (is_16_bit(parameter.weights.dtype)) {
      update_rounded(i, parameter);
    } else {
      update(i,
             {static_cast<float*>(parameter.weights.data), static_cast<std::size_t>(elements(i))},
             parameter.grad);
    }
  }
  ++steps_;
  end_update();
  return true;
}

void Optimizer::update_rounded(std::size_t i, const Parameter& parameter) {
  const std::span<float> master = ensure(*master_, i);
  visit(parameter.weights, [&](auto* weights) {
    using T = std::remove_pointer_t<decltype(weights)>;
    if constexpr (sizeof(T) == 2) {
      follow_weights(weights, master);
      update(i, master, parameter.grad);
      for (std::size_t j = 0; j < master.size(); ++j) {
        weights[j] = from_float<T>(master[j]);
      }
    }
  });
}

std::vector<HandshakeField> Optimizer::fields() const {
  std::vector<HandshakeField> fields = {{"optimizer", name_}};
  for (const auto& [name, values] : numbers()) {
    std::string text;
    for (const double value : values) {
      text += (text.empty() ? "" : " ") + number_text(value);
    }
    fields.push_back({name_ + "'s " + name, text});
  }
  fields.push_back({name_ + "'s settings", settings_text()});
  const std::vector<std::string> options = options_text();
  for (std::size_t i = 0; i < options.size(); ++i) {
    fields.push_back({"parameter group " + std::to_string(i), options[i]});
  }
  for (std::size_t i = 0; i < members_.size(); ++i) {
    fields.push_back({"parameter " + std::to_string(i),
                      "'" + layer(i).name + "' of group " + std::to_string(group(i))});
  }
  return fields;
}

StepMode Optimizer::begin_step() { return begin(); }

void Optimizer::plan_changed() { note_compressed(); }

bool Optimizer::prepare(std::size_t layer, TensorView gradient, TensorView out) {
  const std::size_t i = member_of_[layer];
  return i < members_.size() && gradient.elements > 0 && before(i, gradient, out);
}

Numbers Optimizer::numbers() const {
  Numbers numbers = {{"steps", {static_cast<double>(steps_)}}};
  save(numbers);
  return numbers;
}

OptimizerState Optimizer::state() const {
  OptimizerState state{.version = kStateVersion,
                       .method = name_,
                       .numbers = numbers(),
                       .shared = {},
                       .local = {},
                       .reducer = reducer_.state()};
  for (const Slot& slot : slots_) {
    for (std::size_t i = 0; i < members_.size(); ++i) {
      if (!slot.values[i].empty()) {
        (slot.local ? state.local : state.shared)
            .push_back({entry_key(slot.name, layer(i).name), slot.values[i]});
      }
    }
  }
  return state;
}

void Optimizer::restore(const OptimizerState& saved) {
  OptimizerState state = saved;
  if (state.version != kStateVersion || state.method != name_) {
    refuse("cannot restore a state of " + state.method + ", version " +
               std::to_string(state.version) + "; expected " + name_ + ", version " +
               std::to_string(kStateVersion),
           kResumeHint);
  }
  const double steps = expect(state.numbers, "steps", 1)[0];
  adapt(state);
  std::map<std::string, std::pair<Slot*, std::size_t>> places;
  for (Slot& slot : slots_) {
    for (std::size_t i = 0; i < members_.size(); ++i) {
      places.emplace(entry_key(slot.name, layer(i).name), std::pair(&slot, i));
    }
  }
  const auto check_entries = [&](const std::vector<StateEntry>& entries) {
    for (const StateEntry& entry : entries) {
      const auto place = places.find(entry.key);
      if (place == places.end()) {
        refuse("cannot restore '" + entry.key + "': no such parameter or state here", kResumeHint);
      }
      const std::int64_t expected = elements(place->second.second);
      if (static_cast<std::int64_t>(entry.values.size()) != expected) {
        refuse("cannot restore '" + entry.key + "': expected " + std::to_string(expected) +
                   " values, got " + std::to_string(entry.values.size()),
               kResumeHint);
      }
    }
  };
  check_entries(state.shared);
  check_entries(state.local);
  for (const Slot& slot : slots_) {
    for (std::size_t i = 0; i < members_.size(); ++i) {
      const std::string key = entry_key(slot.name, layer(i).name);
      const auto& entries = slot.local ? state.local : state.shared;
      const bool there = std::any_of(entries.begin(), entries.end(),
                                     [&](const StateEntry& entry) { return entry.key == key; });
      if (!there && !slot.values[i].empty() && !slot.optional) {
        refuse("cannot restore: '" + key + "' is missing", kResumeHint);
      }
    }
  }
  const Numbers before = numbers();
  try {
    load(state.numbers);
    reducer_.restore(state.reducer);
  } catch (...) {
    load(before);
    throw;
  }
  steps_ = static_cast<std::int64_t>(steps);
  reduced_ = reducer_.steps();
  for (Slot& slot : slots_) {
    for (std::vector<float>& values : slot.values) {
      slot.optional ? values.clear() : std::fill(values.begin(), values.end(), 0.0F);
    }
  }
  ++slots_version_;
  for (const auto* entries : {&state.shared, &state.local}) {
    for (const StateEntry& entry : *entries) {
      const auto [slot, i] = places.at(entry.key);
      const std::span<float> values = ensure(*slot, i);
      std::copy(entry.values.begin(), entry.values.end(), values.begin());
    }
  }
}

double Optimizer::compressed_norm(const Slot& slot) const {
  double norm = 0;
  for (std::size_t i = 0; i < size(); ++i) {
    norm += compressed(i) ? l1_norm(slot.values[i]) : 0;
  }
  return norm;
}

void Optimizer::refuse_start(const Plan& plan, const std::string& instead) const {
  for (std::size_t i = 0; i < size(); ++i) {
    const Codec& wanted = codec(plan, i);
    if (!wanted.is_none() && reducer_.size() > 1 && wanted.options.start_step > 0) {
      throw PolicyError(name_ + ": layer '" + layer(i).name + "' has the policy '" + wanted.spec +
                        "'; expected no start=\nhint: " + instead);
    }
  }
}

void Optimizer::refuse_other_members(const Plan& plan, IsKind is, const std::string& why) const {
  const std::shared_ptr<const Plan> current = reducer_.plan();
  for (std::size_t i = 0; i < size(); ++i) {
    const Codec& now = codec(*current, i);
    const Codec& next = codec(plan, i);
    if (is(now) != is(next)) {
      throw PolicyError(name_ + ": layer '" + layer(i).name + "': cannot go from the policy '" +
                        now.spec + "' to '" + next.spec + "': " + why +
                        "\nhint: change the codecs of the layers that have one");
    }
  }
}

std::vector<float> Optimizer::take(std::vector<StateEntry>& entries, const std::string& key) {
  const auto found = std::find_if(entries.begin(), entries.end(),
                                  [&](const StateEntry& entry) { return entry.key == key; });
  std::vector<float> values;
  if (found != entries.end()) {
    values = std::move(found->values);
    entries.erase(found);
  }
  return values;
}

void Optimizer::settle_residual(OptimizerState& state, std::size_t i, double factor) const {
  const std::vector<float> residual =
      take(state.reducer.entries, StateKey{.layer = layer(i).name, .end = elements(i)}.text());
  const auto find = [&](const char* slot) -> std::vector<float>* {
    for (auto* entries : {&state.shared, &state.local}) {
      for (StateEntry& entry : *entries) {
        if (entry.key == entry_key(slot, layer(i).name) && entry.values.size() == residual.size()) {
          return &entry.values;
        }
      }
    }
    return nullptr;
  };
  std::vector<float>* m = find("exp_avg");
  const std::vector<float>* v = find("exp_avg_sq");
  const double unscaled = factor / state.reducer.loss_scale;
  for (std::size_t j = 0; m != nullptr && v != nullptr && j < residual.size(); ++j) {
    if ((*v)[j] != 0) {
      (*m)[j] += static_cast<float>(unscaled * static_cast<double>(residual[j]));
    }
  }
}

void Optimizer::save(const FreezeRule& rule, Numbers& numbers) {
  const FreezeState& state = rule.state();
  numbers["freeze"] = {static_cast<double>(state.steps), static_cast<double>(state.frozen_after)};
  numbers["freeze_norms"] = state.norms;
}

void Optimizer::load(FreezeRule& rule, const Numbers& numbers) const {
  const std::vector<double>& counters = expect(numbers, "freeze", 2);
  const auto norms = numbers.find("freeze_norms");
  rule.restore({.steps = static_cast<std::int64_t>(counters[0]),
                .frozen_after = static_cast<std::int64_t>(counters[1]),
                .norms = norms == numbers.end() ? std::vector<double>() : norms->second});
}

bool Optimizer::is_frozen(const OptimizerState& state) const {
  return expect(state.numbers, "freeze", 2)[1] > 0;
}

const std::vector<double>& Optimizer::expect(const Numbers& numbers, const std::string& name,
                                             std::size_t count) const {
  const auto found = numbers.find(name);
  if (found == numbers.end() || found->second.size() != count) {
    refuse("cannot restore: expected " + std::to_string(count) + " numbers '" + name + "', got " +
               std::to_string(found == numbers.end() ? 0 : found->second.size()),
           kResumeHint);
  }
  return found->second;
}

}  // namespace thinwire::optim
