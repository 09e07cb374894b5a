#include <algorithm>
#include <cctype>

#include "comm/policy.h"
#include "compressors/core/error.h"
#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

constexpr std::size_t kNamesShown = 5;

std::string shape_text(const Layer& layer) {
  std::string text;
  for (const std::int64_t extent : layer.shape) {
    text += text.empty() ? "" : "x";
    text += std::to_string(extent);
  }
  return text.empty() ? "scalar" : text;
}

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

[[noreturn]] void refuse_rule(const PolicyRule& rule, std::size_t number,
                              const std::vector<Layer>& layers) {
  const std::string glob = without_wildcards(rule.name_glob);
  std::vector<std::string_view> names;
  for (const Layer& layer : layers) {
    names.push_back(layer.name);
  }
  std::vector<std::string> shown;
  for (const std::string_view near : nearest_spellings(glob, names, kNamesShown)) {
    const auto layer =
        std::find_if(layers.begin(), layers.end(), [&](const Layer& l) { return l.name == near; });
    shown.push_back(layer->name + " (" + shape_text(*layer) + ")");
  }
  throw PolicyError("rule " + std::to_string(number) + " (" + rule_text(rule) +
                    ") matches none of the " + std::to_string(layers.size()) +
                    " layers; the nearest are " + join(shown) +
                    "\nhint: correct the rule or remove it; names are globs over the whole "
                    "parameter name, * matches dots too");
}

}  // namespace

Plan Plan::make(const Policy& policy, const std::vector<Layer>& layers) {
  Plan plan;
  bool any = false;
  for (const Layer& layer : layers) {
    plan.choices.push_back(policy.choose(layer));
    any = any || !plan.choices.back().codec.is_none();
  }
  for (std::size_t i = 0; i < policy.rules().size(); ++i) {
    const PolicyRule& rule = policy.rules()[i];
    if (std::none_of(layers.begin(), layers.end(),
                     [&](const Layer& layer) { return rule.matches(layer); })) {
      refuse_rule(rule, i + 1, layers);
    }
  }
  if (!any && policy.compresses()) {
    std::vector<std::string> shown;
    for (std::size_t i = 0; i < std::min(kNamesShown, layers.size()); ++i) {
      shown.push_back(layers[i].name + " (" + shape_text(layers[i]) + ", " +
                      plan.choices[i].reason + ")");
    }
    throw PolicyError("the policy compresses none of the " + std::to_string(layers.size()) +
                      " layers: " + (shown.empty() ? "the layer table is empty" : join(shown)) +
                      (layers.size() > kNamesShown ? ", ..." : "") +
                      "\nhint: lower min_elements, name the layers in a [[rule]], or use the "
                      "policy none");
  }
  return plan;
}

}  // namespace thinwire
