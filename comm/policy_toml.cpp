#include "comm/policy_toml.h"

#define TOML_HEADER_ONLY 1
#include <toml++/toml.h>

#include <algorithm>

#include "compressors/core/error.h"
#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

class TomlReader {
 public:
  explicit TomlReader(std::string_view source) : source_(source) {}

  [[noreturn]] void fail(const toml::source_region& at, const std::string& what,
                         const std::string& hint) const {
    throw PolicyError(source_ + ":" + std::to_string(at.begin.line) + ":" +
                      std::to_string(at.begin.column) + ": " + what + "\nhint: " + hint);
  }

  void check_keys(const toml::table& table, const std::vector<std::string_view>& known,
                  const std::string& where) const {
    for (auto&& [key, node] : table) {
      const std::string name(key.str());
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        fail(key.source(),
             "unknown key '" + name + "' " + where + "; expected one of " + join(known),
             "did you mean '" + std::string(nearest_spelling(name, known)) + "'?");
      }
    }
  }

  std::optional<std::string> text(const toml::table& table, const char* key) const {
    const toml::node* node = table.get(key);
    if (node == nullptr) {
      return std::nullopt;
    }
    if (!node->is_string()) {
      fail(node->source(), std::string("'") + key + "' must be a string",
           std::string("write ") + key + " = \"...\"");
    }
    return node->as_string()->get();
  }

  std::optional<std::int64_t> count(const toml::table& table, const char* key) const {
    const toml::node* node = table.get(key);
    if (node == nullptr) {
      return std::nullopt;
    }
    if (!node->is_integer() || node->as_integer()->get() < 0) {
      fail(node->source(), std::string("'") + key + "' must be a whole number of at least 0",
           std::string("write ") + key + " = 1024");
    }
    return node->as_integer()->get();
  }

  PolicyRuleText rule(const toml::table& table) const {
    check_keys(table, {"name", "dims", "min_elements", "max_elements", "policy"}, "in a [[rule]]");
    PolicyRuleText rule;
    rule.line = static_cast<std::int64_t>(table.source().begin.line);
    rule.name = text(table, "name").value_or("");
    if (const auto dims = count(table, "dims")) {
      rule.dims = static_cast<int>(std::min<std::int64_t>(*dims, 1000));
    }
    rule.min_elements = count(table, "min_elements");
    rule.max_elements = count(table, "max_elements");
    const auto policy = text(table, "policy");
    if (!policy) {
      fail(table.source(), "this [[rule]] has no 'policy'",
           "add policy = \"topk:0.01\", or policy = \"none\" to leave its layers dense");
    }
    rule.policy = *policy;
    return rule;
  }

 private:
  std::string source_;
};

}  // namespace

PolicyText parse_policy_toml(std::string_view text, std::string_view source) {
  const TomlReader reader(source);
  toml::table table;
  try {
    table = toml::parse(text);
  } catch (const toml::parse_error& error) {
    reader.fail(error.source(), std::string(error.description()),
                "a policy is one line such as topk:0.01, or TOML with policy = \"topk:0.01\"");
  }
  reader.check_keys(table, {"policy", "min_elements", "rule"}, "at the top level");

  PolicyText result;
  result.policy = reader.text(table, "policy").value_or("none");
  result.min_elements = reader.count(table, "min_elements");
  if (const toml::node* rules = table.get("rule")) {
    if (!rules->is_array_of_tables()) {
      reader.fail(rules->source(), "'rule' must be an array of tables",
                  "write each rule under a line [[rule]], with two brackets");
    }
    for (const toml::node& node : *rules->as_array()) {
      result.rules.push_back(reader.rule(*node.as_table()));
    }
  }
  return result;
}

}  // namespace thinwire
