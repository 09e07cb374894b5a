#include "comm/state_key.h"

#include <algorithm>
#include <charconv>

namespace thinwire {
namespace {

// The whole of `text` as a number that is not negative.
std::optional<std::int64_t> number(std::string_view text) {
  std::int64_t value = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

}  // namespace

std::string StateKey::text() const {
  return role + "/" + layer + "/" + std::to_string(begin) + ":" + std::to_string(end);
}

ParsedStateKey parse_state_key(std::string_view text) {
  ParsedStateKey key;
  key.role = text.substr(0, text.find('/'));
  const std::string_view rest = text.substr(std::min(key.role.size() + 1, text.size()));
  const std::size_t slash = rest.rfind('/');
  const std::size_t colon = rest.rfind(':');
  key.layer = rest.substr(0, slash);
  if (slash == std::string_view::npos || colon == std::string_view::npos || colon < slash) {
    return key;
  }
  const auto begin = number(rest.substr(slash + 1, colon - slash - 1));
  const auto end = number(rest.substr(colon + 1));
  if (begin && end) {
    key.range = {*begin, *end};
  }
  return key;
}

}  // namespace thinwire
