#include <algorithm>
#include <numeric>
#include <span>

#include "comm/collective_cost.h"
#include "comm/exchange.h"
#include "comm/gather_choice.h"
#include "comm/policy.h"
#include "compressors/core/error.h"
#include "compressors/core/payload.h"
#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

constexpr std::size_t kNamesShown = 5;
// Split-reduce must gain a tenth: its alltoall, which crosses a network with all that it carries,
// suffers most from what a prediction does not know (docs/scale.md).
constexpr double kSplitShare = 1 / 1.1;

// A glob's stars would only add to the distance.
std::string without_wildcards(std::string glob) {
  std::erase_if(glob, [](char c) { return c == '*' || c == '?'; });
  return glob;
}

std::string rule_text(const PolicyRule& rule) {
  std::vector<std::string> parts;
  if (!rule.name_glob.empty()) {
    parts.push_back("name = \"" + rule.name_glob + "\"");
  }
  if (rule.dims) {
    parts.push_back("dims = " + std::to_string(*rule.dims));
  }
  if (rule.min_elements) {
    parts.push_back("min_elements = " + std::to_string(*rule.min_elements));
  }
  if (rule.max_elements) {
    parts.push_back("max_elements = " + std::to_string(*rule.max_elements));
  }
  return join(parts);
}

// The first few of the layers `which`, each with its shape and what `note` says of it.
template <typename Note>
std::string layers_text(const std::vector<Layer>& layers, const std::vector<std::size_t>& which,
                        Note&& note) {
  std::vector<std::string> shown;
  for (const std::size_t i : std::span(which).first(std::min(kNamesShown, which.size()))) {
    shown.push_back(layers[i].name + " " + layers[i].shape_text() + note(i));
  }
  return join(shown) + (which.size() > kNamesShown ? ", ..." : "");
}

// The same with what decided each.
std::string decided_text(const std::vector<Layer>& layers, const std::vector<std::size_t>& which,
                         const Plan& plan) {
  return layers_text(layers, which,
                     [&](std::size_t i) { return " (" + plan.choices[i].reason + ")"; });
}

std::vector<std::size_t> nearest_layers(const PolicyRule& rule, const std::vector<Layer>& layers) {
  std::vector<std::string_view> names;
  for (const Layer& layer : layers) {
    names.push_back(layer.name);
  }
  std::vector<std::size_t> nearest;
  const std::string glob = without_wildcards(rule.name_glob);
  for (const std::string_view near : nearest_spellings(glob, names, kNamesShown)) {
    nearest.push_back(
        static_cast<std::size_t>(std::find(names.begin(), names.end(), near) - names.begin()));
  }
  return nearest;
}

// Refuses rule `number` (from 0), which decides no layer.
[[noreturn]] void refuse_rule(const PolicyRule& rule, std::size_t number, const Plan& plan,
                              const std::vector<Layer>& layers) {
  const std::string which = "rule " + std::to_string(number + 1) + " (" + rule_text(rule) + ") ";
  std::vector<std::size_t> matched;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    if (rule.matches(layers[i])) {
      matched.push_back(i);
    }
  }
  if (matched.empty()) {
    throw PolicyError(which + "matches none of the " + std::to_string(layers.size()) +
                      " layers; the nearest are " +
                      layers_text(layers, nearest_layers(rule, layers),
                                  [](std::size_t) { return std::string(); }) +
                      "\nhint: correct the rule or remove it; names are globs over the whole "
                      "parameter name, * matches dots too");
  }
  throw PolicyError(which + "decides no layer; those that it matches are " +
                    decided_text(layers, matched, plan) +
                    "\nhint: the first rule that matches decides, and what goes dense by itself "
                    "must be matched by name; move the rule up, give it a name, or remove it");
}

}  // namespace

Plan Plan::make(const Policy& policy, const std::vector<Layer>& layers) {
  Plan plan;
  bool any = false;
  for (const Layer& layer : layers) {
    plan.choices.push_back(policy.choose(layer));
    const Policy::Choice& choice = plan.choices.back();
    any = any || !choice.codec.is_none() || choice.automatic;
  }
  for (std::size_t rule = 0; rule < policy.rules().size(); ++rule) {
    if (std::none_of(plan.choices.begin(), plan.choices.end(),
                     [&](const Policy::Choice& choice) { return choice.rule == rule; })) {
      refuse_rule(policy.rules()[rule], rule, plan, layers);
    }
  }
  if (!any && policy.compresses()) {
    std::vector<std::size_t> all(layers.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    throw PolicyError(
        "the policy compresses none of the " + std::to_string(layers.size()) +
        " layers: " + (all.empty() ? "the layer table is empty" : decided_text(layers, all, plan)) +
        "\nhint: lower min_elements, name the layers in a [[rule]], or use the "
        "policy none");
  }
  return plan;
}

std::vector<std::string> Plan::specs() const {
  std::vector<std::string> specs;
  for (const Policy::Choice& choice : choices) specs.push_back(choice.codec.spec);
  return specs;
}

Plan Plan::with_codecs(const std::vector<std::string>& specs) const {
  Plan plan = *this;
  for (std::size_t i = 0; i < plan.choices.size(); ++i) {
    Policy::Choice& choice = plan.choices[i];
    if (choice.automatic) {
      choice.codec = make_codec(specs.at(i));
      choice.reason = "auto: from a saved state";
    }
  }
  return plan;
}

bool Plan::chooses() const {
  return std::any_of(choices.begin(), choices.end(),
                     [](const Policy::Choice& choice) { return choice.automatic != nullptr; });
}

void Plan::choose_routes(const std::vector<Layer>& layers, int world_size, const Link& link,
                         int split_from_ranks) {
  choose_split(layers, world_size, link, split_from_ranks);
  GatherChoice gathered(world_size);
  for (std::size_t i = 0; i < choices.size(); ++i) {
    choices[i].gathered =
        gathered.add(choices[i].codec, layers[i].elements(), choices[i].split_ranges != 0);
  }
  if (!gathered.worth_it()) {
    for (Policy::Choice& choice : choices) {
      choice.gathered = false;
    }
  }
}

void Plan::choose_split(const std::vector<Layer>& layers, int world_size, const Link& link,
                        int split_from_ranks) {
  double gradient_bytes = 0;
  double to_all = 0;     // bytes of this rank's payloads
  double to_owners = 0;  // the same of the ranges that one owner gets
  for (std::size_t i = 0; i < choices.size(); ++i) {
    Policy::Choice& choice = choices[i];
    choice.split_ranges = 0;
    const std::int64_t n = layers[i].elements();
    if (choice.codec.payload == nullptr || n == 0 || world_size < split_from_ranks) {
      continue;
    }
    const PayloadCodec& codec = *choice.codec.payload;
    choice.split_ranges = split_ranges(codec, n, world_size);
    if (choice.split_ranges == 0) {
      continue;
    }
    gradient_bytes += static_cast<double>(n) * sizeof(float);
    to_all += static_cast<double>(codec.slot_bytes(n));
    to_owners += static_cast<double>(codec.slot_bytes(n / choice.split_ranges)) *
                 choice.split_ranges / world_size;
  }
  const double share = share_of_usual_bucket(gradient_bytes);
  const double header = kPayloadHeaderBytes;
  if (requantising_seconds(link, world_size, header + share * to_owners) >=
      kSplitShare * sparse_seconds(link, world_size, header + share * to_all)) {
    for (Policy::Choice& choice : choices) {
      choice.split_ranges = 0;
    }
  }
}

}  // namespace thinwire
