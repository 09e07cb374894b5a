// The TOML form of a policy as plain values, before its codec specs are looked at. Pure functions,
// thread-safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thinwire {

struct PolicyRuleText {
  std::string name;  // empty: any
  std::optional<int> dims;
  std::optional<std::int64_t> min_elements;
  std::optional<std::int64_t> max_elements;
  std::string policy;
  std::int64_t line = 0;  // where the rule stands, from 1
};

struct PolicyText {
  std::string policy = "none";
  std::optional<std::int64_t> min_elements;
  std::vector<PolicyRuleText> rules;
};

// `source` names the text in messages ("policy.toml", "policy"). PolicyError for what is no TOML,
// unknown keys (with the nearest valid one), wrong types and negative numbers.
PolicyText parse_policy_toml(std::string_view text, std::string_view source);

}  // namespace thinwire
