#include "comm/plan_search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <string_view>
#include <utility>

#include "comm/exchange.h"
#include "comm/formatted.h"
#include "comm/gather_choice.h"
#include "compressors/adaptive/gradient_sample.h"
#include "compressors/adaptive/planner.h"
#include "compressors/core/error.h"
#include "compressors/core/random.h"
#include "compressors/families.h"

namespace thinwire {
namespace {

constexpr double kLeastContraction = 0.7;  // of the reference's, see update_errors()
constexpr double kRounding = 1e-9;         // of sums in another order
constexpr float kNewer = 0.5;              // weight of a new sample beside the older ones
constexpr int kLeastSmallBits = 4;         // a value of a small layer, where it is not dense

// What gradients are taken for before any was seen: heavy tails, no structure.
ErrorCurves usual_curves() {
  GradientSample sample;
  constexpr std::int64_t kRows = 128;
  sample.extents.rows = sample.extents.columns = kRows;
  sample.tensor = sample.extents;
  const RandomStream stream = random_stream(0, 0, -1);
  for (std::int64_t i = 0; i < kRows * kRows; ++i) {
    const auto words = random_block(stream, static_cast<std::uint64_t>(i));
    const auto unit = [](std::uint32_t word) { return static_cast<double>(word) * 0x1p-32; };
    const double sum = unit(words[0]) + unit(words[1]) + unit(words[2]) - 1.5;
    sample.values.push_back(static_cast<float>(sum / (0.05 + unit(words[3]))));
  }
  return measure_errors(sample);
}

bool suits_small(const CandidateCodec& candidate) {
  return candidate.curve == Curve::kNone ||
         (candidate.curve == Curve::kQuantize && candidate.parameter >= kLeastSmallBits);
}

std::optional<CandidateCodec> candidate(const std::string& spec) {
  if (spec.empty()) return std::nullopt;
  return candidate_of(make_codec(spec));
}

}  // namespace

std::vector<PlanSearch::Option> PlanSearch::options_of(const Layer& layer,
                                                       const Policy::Choice& choice) {
  const AutoOptions& automatic = *choice.automatic;
  std::vector<std::string_view> families(automatic.families.begin(), automatic.families.end());
  std::vector<Option> options;
  for (CandidateCodec& candidate : make_candidates(layer.shape, layer.dtype, families)) {
    if (!choice.small.empty() && !suits_small(candidate)) continue;
    CommonOptions common = automatic.options_for(candidate.curve == Curve::kTopK);
    if (candidate.curve == Curve::kLowRank) common.storage = ResidualStorage::kFP32;
    Codec codec = make_codec(candidate.spec + common_text(common));
    options.push_back({std::move(codec), std::move(candidate)});
  }
  return options;
}

std::vector<Codec> PlanSearch::codecs(const std::vector<Layer>& layers, const Plan& plan) {
  std::map<std::string, Codec> codecs;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Policy::Choice& choice = plan.choices[i];
    if (choice.automatic) {
      for (Option& option : options_of(layers[i], choice)) {
        codecs.emplace(option.codec.spec, std::move(option.codec));
      }
    } else {
      codecs.emplace(choice.codec.spec, choice.codec);
    }
  }
  std::vector<Codec> result;
  for (auto& [spec, codec] : codecs) result.push_back(std::move(codec));
  return result;
}

PlanSearch::PlanSearch(const std::vector<Layer>& layers, const Plan& plan, int ranks,
                       const std::vector<CodecSpeed>& speeds)
    : layers_(layers), base_(plan), ranks_(ranks) {
  const std::vector<Codec> known = codecs(layers, plan);
  for (std::size_t i = 0; i < known.size(); ++i) {
    speeds_.emplace(known[i].spec, speeds.at(i));
  }
  const ErrorCurves usual = usual_curves();
  for (std::size_t i = 0; i < layers.size(); ++i) {
    states_.push_back(state_of(i));
    states_.back().curves = usual;
    if (!states_.back().automatic) continue;
    automatic_.push_back(i);
    if (plan.choices[i].small.empty()) judged_.push_back(i);
  }
}

PlanSearch::LayerState PlanSearch::state_of(std::size_t layer) const {
  LayerState state;
  const Policy::Choice& choice = base_.choices[layer];
  if (!choice.automatic) {
    state.options.push_back({choice.codec, {}});
    return state;
  }
  const AutoOptions& automatic = *choice.automatic;
  state.automatic = true;
  state.options = options_of(layers_[layer], choice);
  // A small layer makes room for its own error alone.
  const bool small = !choice.small.empty();
  state.budget_factor = small ? 1 : automatic.factor;
  state.reference = candidate(small ? "q" + std::to_string(kLeastSmallBits) : automatic.reference);
  state.bound = candidate(automatic.at_least);
  return state;
}

bool PlanSearch::wants_low_rank(std::size_t layer) const {
  const LayerState& state = states_[layer];
  const auto is = [](const CandidateCodec& c) { return c.curve == Curve::kLowRank; };
  return std::any_of(state.options.begin(), state.options.end(),
                     [&](const Option& option) { return is(option.candidate); }) ||
         (state.reference && is(*state.reference)) || (state.bound && is(*state.bound));
}

void PlanSearch::see(std::size_t layer, const ErrorCurves& curves) {
  // The step is skipped, or its gradients are lost anyway.
  if (curves.nonfinite() || !std::all_of(curves.values().begin(), curves.values().end(),
                                         [](float value) { return std::isfinite(value); })) {
    return;
  }
  LayerState& state = states_[layer];
  if (!std::exchange(state.known, true)) {
    state.curves = curves;
    return;
  }
  ErrorCurves newer = curves;
  newer *= kNewer;
  state.curves *= 1 - kNewer;
  state.curves += newer;
}

void PlanSearch::update(const Circumstances& now) {
  now_ = now;
  update_errors();
  update_costs();
}

void PlanSearch::update_errors() {
  // Layers that were not seen yet are taken for as large, an element, as the others.
  double squares = 0;
  double elements = 0;
  for (const std::size_t i : automatic_) {
    if (!states_[i].known) continue;
    squares += states_[i].curves.squared_norm();
    elements += static_cast<double>(layers_[i].elements());
  }
  const double an_element = squares > 0 && elements > 0 ? squares / elements : 1;
  budget_ = 0;
  for (const std::size_t i : automatic_) {
    LayerState& state = states_[i];
    const double norm =
        std::sqrt(state.known ? state.curves.squared_norm()
                              : an_element * static_cast<double>(layers_[i].elements()));
    state.errors.clear();
    state.allowed.clear();
    const double bound = state.bound ? norm * error(*state.bound, state.curves)
                                     : std::numeric_limits<double>::infinity();
    // With error feedback a step converges by 1 - error^2 of what is left (Stich et al., Sparsified
    // SGD with Memory, NeurIPS 2018): what a layer loses there no other layer makes up for.
    const double reference = state.reference ? error(*state.reference, state.curves) : 1.0;
    const double least =
        state.budget_factor > 1 ? 0 : kLeastContraction * (1 - reference * reference);
    for (const Option& option : state.options) {
      const double relative = error(option.candidate, state.curves);
      state.errors.push_back(norm * relative);
      state.allowed.push_back(norm * relative <= bound * (1 + kRounding) &&
                              1 - relative * relative >= least);
    }
    state.budget = state.budget_factor * norm * reference;
    budget_ += state.budget;
  }
}

void PlanSearch::update_costs() {
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    LayerState& state = states_[i];
    state.costs.clear();
    state.costs_by_owners.clear();
    for (const Option& option : state.options) {
      CodecSpeed speed = speeds_.at(option.codec.spec);
      speed.encode *= now_.speed_scale;
      speed.decode *= now_.speed_scale;
      speed.decode_more *= now_.speed_scale;
      const PayloadCodec* payload = option.codec.payload.get();
      const bool gathers_it =
          payload != nullptr && gathers(*payload, layers_[i].elements(), ranks_);
      const auto cost = [&](bool gathered) {
        LayerCost cost = layer_cost(layers_[i], option.codec, gathered, speed, now_.link, ranks_);
        cost.wire += now_.unforeseen_per_byte * cost.sent;
        return cost;
      };
      state.costs.push_back(cost(gathers_it));
      state.costs_by_owners.push_back(gathers_it ? cost(false) : state.costs.back());
    }
  }
}

// By layer.
std::vector<std::size_t> PlanSearch::options_by(const PlanId& id) const {
  std::vector<std::size_t> options(layers_.size());
  for (std::size_t a = 0; a < automatic_.size(); ++a) options[automatic_[a]] = id[a];
  return options;
}

std::vector<LayerCost> PlanSearch::costs_by(const std::vector<std::size_t>& options) const {
  GatherChoice choice(ranks_);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    choice.add(states_[i].options[options[i]].codec, layers_[i].elements(), false);
  }
  const bool gathered = choice.worth_it();
  std::vector<LayerCost> costs;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const LayerState& state = states_[i];
    costs.push_back((gathered ? state.costs : state.costs_by_owners)[options[i]]);
  }
  return costs;
}

Proposal PlanSearch::evaluate(PlanId id) const {
  const std::vector<std::size_t> options = options_by(id);
  const std::vector<LayerCost> costs = costs_by(options);
  std::vector<LayerCost> wires = costs;
  for (LayerCost& cost : wires) cost.work = 0;
  Proposal proposal;
  for (const std::size_t i : automatic_) proposal.error += states_[i].errors[options[i]];
  const StepCost step = step_cost(now_.buckets, costs);
  const StepCost wire = step_cost(now_.buckets, wires);
  // Where cores are short, work that overlaps the backward pass makes that longer.
  proposal.seconds =
      (1 - now_.contention) * step.exposed + now_.contention * (wire.exposed + step.work);
  proposal.sent = step.sent;
  proposal.feasible = proposal.error <= budget_ * (1 + kRounding);
  proposal.id = std::move(id);
  return proposal;
}

// The least time by these routes alone.
Proposal PlanSearch::best_by(const Routes& routes, double slack) const {
  PlanProblem problem;
  problem.budget = budget_;
  problem.slack = slack;
  std::vector<std::vector<std::size_t>> which;  // option of each candidate
  std::vector<std::size_t> order;
  const double first = now_.buckets.empty() ? 0 : now_.buckets.front().ready;
  const auto allows = [&](Route route) { return routes[static_cast<std::size_t>(route)]; };
  // By owners alone: what may be gathered goes to them, too.
  const bool owners = allows(Route::kRequantising) && !allows(Route::kSparse);
  for (const BucketReady& bucket : now_.buckets) {
    std::array<double, kRoutes> fixed{};
    for (const std::size_t i : bucket.layers) {
      const LayerState& state = states_[i];
      order.push_back(i);
      auto& candidates = problem.layers.emplace_back();
      auto& options = which.emplace_back();
      for (std::size_t o = 0; o < state.options.size(); ++o) {
        const LayerCost& cost = (owners ? state.costs_by_owners : state.costs)[o];
        const auto route = static_cast<std::size_t>(cost.route);
        if (state.automatic && (!state.allowed[o] || !routes[route])) continue;
        candidates.push_back(
            {.cost = cost.seconds(), .error = state.automatic ? state.errors[o] : 0.0});
        options.push_back(o);
        fixed[route] = std::max(fixed[route], cost.fixed);
      }
    }
    problem.buckets.push_back({.end = problem.layers.size(),
                               .ready = bucket.ready - first,
                               .fixed = *std::max_element(fixed.begin(), fixed.end())});
  }
  const PlanSolution solution = solve(problem);
  std::vector<std::size_t> options(layers_.size());
  for (std::size_t k = 0; k < order.size(); ++k) options[order[k]] = which[k][solution.choice[k]];
  PlanId id;
  for (const std::size_t i : automatic_) id.push_back(static_cast<std::uint16_t>(options[i]));
  return evaluate(std::move(id));
}

PlanId PlanSearch::dense() const {
  PlanId id;
  for (const std::size_t i : automatic_) {
    const auto& options = states_[i].options;
    const auto none = std::find_if(options.begin(), options.end(),
                                   [](const Option& o) { return o.codec.is_none(); });
    id.push_back(static_cast<std::uint16_t>(none - options.begin()));
  }
  return id;
}

// A bucket pays for each collective that it needs, so plans that keep to one kind are solved beside
// those that may mix them.
Proposal PlanSearch::best(double slack) const {
  Proposal best = evaluate(dense());
  for (const Routes& routes :
       {Routes{true, true, true, true}, Routes{true, true, false, false},
        Routes{true, false, true, false}, Routes{true, false, false, true}}) {
    Proposal proposal = best_by(routes, slack);
    if (!proposal.feasible) continue;
    const bool faster = proposal.seconds < best.seconds - slack;
    const bool as_fast = proposal.seconds <= best.seconds + slack;
    if (faster || (as_fast && proposal.error < best.error)) best = std::move(proposal);
  }
  return best;
}

double PlanSearch::codec_work(const PlanId& id) const {
  const std::vector<std::size_t> options = options_by(id);
  const std::vector<LayerCost> costs = costs_by(options);
  double work = 0;
  double encoded = 0;
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    work += costs[i].work;
    if (!states_[i].options[options[i]].codec.is_none()) encoded += costs[i].work;
  }
  return encoded > work / 2 ? work : 0;
}

std::string PlanSearch::reason(const LayerState& state, std::size_t option) {
  const double norm = std::sqrt(state.curves.squared_norm());
  if (state.options[option].codec.is_none()) return "uncompressed";
  if (!state.known || norm == 0) return "its gradients were not seen yet";
  return "loses " + formatted("%.3g", state.errors[option] / norm) + " of its norm a step";
}

Plan PlanSearch::plan(const PlanId& id) const {
  Plan plan = base_;
  for (std::size_t a = 0; a < automatic_.size(); ++a) {
    const LayerState& state = states_[automatic_[a]];
    Policy::Choice& choice = plan.choices[automatic_[a]];
    choice.codec = state.options[id[a]].codec;
    if (choice.small.empty()) {
      choice.reason = "auto: " + reason(state, id[a]);
    } else {
      choice.reason = (choice.codec.is_none() ? "dense: " : "auto: ") + choice.small;
    }
  }
  return plan;
}

PlanId PlanSearch::id_of(const std::vector<std::string>& specs) const {
  PlanId id;
  for (const std::size_t i : automatic_) {
    const std::vector<Option>& options = states_[i].options;
    const auto found = std::find_if(options.begin(), options.end(), [&](const Option& option) {
      return option.codec.spec == specs.at(i);
    });
    if (found == options.end()) {
      throw InvalidArgument("layer '" + layers_[i].name + "': the saved plan has '" + specs[i] +
                            "', which the policy '" + base_.choices[i].automatic->text +
                            "' does not choose from\nhint: load the state of a job with this "
                            "policy and version, or start without what is pending");
    }
    id.push_back(static_cast<std::uint16_t>(found - options.begin()));
  }
  return id;
}

std::string PlanSearch::describe(const PlanId& id) const {
  struct Group {
    int layers = 0;
    std::map<double, std::string> parameters = {};
  };
  std::map<std::pair<std::string, std::string>, Group> groups;  // by what stands around those
  const std::vector<std::size_t> options = options_by(id);
  for (const std::size_t i : automatic_) {
    const Option& option = states_[i].options[options[i]];
    const std::string& spec = option.codec.spec;
    const std::size_t comma = std::min(spec.find(','), spec.size());
    const std::size_t begin = std::min(spec.find(':'), comma - 1) + 1;
    Group& group = groups[{spec.substr(0, begin), spec.substr(comma)}];
    ++group.layers;
    group.parameters.emplace(option.candidate.parameter, spec.substr(begin, comma - begin));
  }
  std::string text;
  for (const auto& [around, group] : groups) {
    const std::string& least = group.parameters.begin()->second;
    const std::string& most = group.parameters.rbegin()->second;
    text += (text.empty() ? "" : ", ") + std::to_string(group.layers) + " x " + around.first +
            least + (most == least ? "" : " to " + most) + around.second;
  }
  return text + " (" + formatted("%.3g MB", 1e-6 * evaluate(id).sent) + " a step)";
}

}  // namespace thinwire
