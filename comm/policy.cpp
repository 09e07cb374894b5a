#include "comm/policy.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <sstream>

#include "comm/glob.h"
#include "comm/policy_toml.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::int64_t kDefaultMinElements = 1024;

std::string_view trim(std::string_view text) {
  const auto is_space = [](char c) { return std::isspace(static_cast<unsigned char>(c)) != 0; };
  while (!text.empty() && is_space(text.front())) {
    text.remove_prefix(1);
  }
  while (!text.empty() && is_space(text.back())) {
    text.remove_suffix(1);
  }
  return text;
}

// A codec spec never has several lines, and '=' never follows its first word.
bool looks_like_toml(std::string_view text) {
  if (text.find('\n') != std::string_view::npos || text.front() == '[' || text.front() == '#') {
    return true;
  }
  std::size_t i = 0;
  while (i < text.size() &&
         (std::isalnum(static_cast<unsigned char>(text[i])) != 0 || text[i] == '_')) {
    ++i;
  }
  while (i < text.size() && text[i] == ' ') {
    ++i;
  }
  return i > 0 && i < text.size() && text[i] == '=';
}

std::string read_policy_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    throw PolicyError("cannot read the policy file '" + path +
                      "'\nhint: @FILE needs a readable, non-empty TOML file; give its full path "
                      "when the ranks start in other folders");
  }
  return text.str();
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
    }
    result += c;
  }
  return result + "\"";
}

std::string canonical_rule(const PolicyRule& rule) {
  std::string text = "[[rule]]\n";
  if (!rule.name_glob.empty()) {
    text += "name = " + quoted(rule.name_glob) + "\n";
  }
  if (rule.dims) {
    text += "dims = " + std::to_string(*rule.dims) + "\n";
  }
  if (rule.min_elements) {
    text += "min_elements = " + std::to_string(*rule.min_elements) + "\n";
  }
  if (rule.max_elements) {
    text += "max_elements = " + std::to_string(*rule.max_elements) + "\n";
  }
  return text + "policy = " + quoted(rule.prescription.spec()) + "\n";
}

// The gradients' own optimizer has its momentum.
Prescription prescribe(std::string_view spec) {
  if (is_auto(spec)) {
    auto automatic = std::make_shared<const AutoOptions>(parse_auto(spec));
    Codec dense = make_codec("none" + automatic->common);
    return {std::move(dense), std::move(automatic)};
  }
  Codec codec = make_codec(spec);
  if (codec.payload && codec.payload->memory_needs(1).velocity) {
    throw PolicyError("policy \"" + std::string(spec) +
                      "\": momentum correction belongs to the optimizer DGCSGD; with another one "
                      "its momentum would count twice\nhint: leave out momentum, nesterov, clip "
                      "and clip_norm");
  }
  return {std::move(codec), {}};
}

// Runs prescribe and puts the place of the spec before its message.
Prescription prescribe_at(const std::string& spec, const std::string& place) {
  try {
    return prescribe(spec);
  } catch (const NotAvailable& error) {
    throw NotAvailable(place + ": " + error.what());
  } catch (const PolicyError& error) {
    throw PolicyError(place + ": " + error.what());
  }
}

// Dense, but obeying what the policy says about NaN and Inf.
Codec dense_like(const Codec& codec) {
  Codec dense;
  dense.spec = "none";
  dense.options.nonfinite = codec.options.nonfinite;
  return dense;
}

}  // namespace

std::int64_t Layer::elements() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) {
    product *= extent;
  }
  return product;
}

std::string Layer::shape_text() const {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += i == 0 ? "" : ", ";
    text += std::to_string(shape[i]);
  }
  return text + "]";
}

bool PolicyRule::matches(const Layer& layer) const {
  const std::int64_t elements = layer.elements();
  return (name_glob.empty() || glob_match(name_glob, layer.name)) &&
         (!dims || *dims == static_cast<int>(layer.shape.size())) &&
         (!min_elements || elements >= *min_elements) &&
         (!max_elements || elements <= *max_elements);
}

Policy Policy::parse(std::string_view text) {
  text = trim(text);
  if (text.empty()) {
    throw PolicyError(
        "the policy is empty\nhint: write none to leave every gradient uncompressed, or for "
        "example topk:0.01,values=q8");
  }
  if (text.front() == '@') {
    const std::string path(trim(text.substr(1)));
    return from_toml(read_policy_file(path), path);
  }
  if (looks_like_toml(text)) {
    return from_toml(text, "policy");
  }
  Policy policy;
  policy.fallback_ = prescribe(text);
  policy.min_elements_ = kDefaultMinElements;
  policy.text_ = policy.fallback_.spec();
  return policy;
}

Policy Policy::from_toml(std::string_view text, const std::string& source) {
  const PolicyText parsed = parse_policy_toml(text, source);
  Policy policy;
  policy.fallback_ = prescribe_at(parsed.policy, source + ": policy");
  policy.min_elements_ = parsed.min_elements.value_or(kDefaultMinElements);
  for (const PolicyRuleText& rule : parsed.rules) {
    const std::string place = source + ": rule " + std::to_string(policy.rules_.size() + 1) +
                              " (line " + std::to_string(rule.line) + ")";
    policy.rules_.push_back({.name_glob = rule.name,
                             .dims = rule.dims,
                             .min_elements = rule.min_elements,
                             .max_elements = rule.max_elements,
                             .prescription = prescribe_at(rule.policy, place)});
  }
  policy.text_ = policy.fallback_.spec();
  if (policy.min_elements_ != kDefaultMinElements || !policy.rules_.empty()) {
    policy.text_ = "policy = " + quoted(policy.fallback_.spec()) +
                   "\nmin_elements = " + std::to_string(policy.min_elements_) + "\n";
    for (const PolicyRule& rule : policy.rules_) {
      policy.text_ += canonical_rule(rule);
    }
  }
  return policy;
}

Policy::Choice Policy::choose(const Layer& layer) const {
  if (layer.dtype == DType::kOther) {
    return {dense_like(fallback_.codec), "untouched: no floating-point gradient"};
  }
  const std::int64_t elements = layer.elements();
  std::string small;  // why the layer is
  if (layer.shape.size() <= 1) {
    small = std::to_string(layer.shape.size()) +
            (layer.shape.size() == 1 ? " dimension" : " dimensions");
  } else if (elements < min_elements_) {
    small = std::to_string(elements) + " < " + std::to_string(min_elements_) + " elements";
  }
  const Prescription* prescription = &fallback_;
  std::string reason = "default";
  std::optional<std::size_t> decided;
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    const bool may_decide = small.empty() || !rules_[i].name_glob.empty();
    if (may_decide && rules_[i].matches(layer)) {
      prescription = &rules_[i].prescription;
      decided = i;
      reason = "rule " + std::to_string(i + 1);
      if (!rules_[i].name_glob.empty()) {
        reason += ": " + rules_[i].name_glob;
        small.clear();
      }
      break;
    }
  }
  if (prescription->is_none()) {
    return {prescription->codec, reason, decided};
  }
  const Codec& codec = prescription->codec;
  std::string unfit;  // what no codec takes
  if (elements == 0) {
    unfit = "0 elements";
  } else if (layer.dtype == DType::kF64) {
    unfit = "fp64";
  }
  if (prescription->automatic && unfit.empty()) {
    reason = small.empty() ? "auto: nothing is measured yet" : "dense: " + small;
    return {codec, reason, decided, prescription->automatic, small};
  }
  if (unfit.empty()) {
    unfit = small;
  }
  if (unfit.empty() && codec.linear && !codec.linear->gains(layer.shape)) {
    unfit = "too small for " + codec.linear->name();
  }
  if (!unfit.empty()) {
    return {dense_like(codec), "dense: " + unfit, decided};
  }
  return {codec, reason, decided};
}

bool Policy::compresses() const {
  return !fallback_.is_none() || std::any_of(rules_.begin(), rules_.end(), [](const auto& rule) {
    return !rule.prescription.is_none();
  });
}

bool Policy::chooses() const {
  return fallback_.automatic || std::any_of(rules_.begin(), rules_.end(), [](const auto& rule) {
           return rule.prescription.automatic != nullptr;
         });
}

}  // namespace thinwire
