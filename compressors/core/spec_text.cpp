#include "compressors/core/spec_text.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::size_t kMaxSpecBytes = 256;

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\n' || c == '\r'; }

SpecToken trim(SpecToken token) {
  while (!token.text.empty() && is_space(token.text.front())) {
    token.text.remove_prefix(1);
    ++token.at;
  }
  while (!token.text.empty() && is_space(token.text.back())) token.text.remove_suffix(1);
  return token;
}

// One column a byte, so that the mark below stands where it should.
std::string printable(std::string_view text) {
  std::string out(text);
  for (char& c : out) {
    if (std::isprint(static_cast<unsigned char>(c)) == 0) c = '?';
  }
  return out;
}

std::string marked(std::string_view text, SpecToken place) {
  const std::size_t width = std::max<std::size_t>(1, place.text.size());
  return "\n  " + printable(text) + "\n  " + std::string(place.at, ' ') + std::string(width, '^');
}

// The part of `rest` before the first of `signs`; moves `rest` behind it.
SpecToken take_until(SpecToken& rest, std::string_view signs) {
  const std::size_t length = std::min(rest.text.find_first_of(signs), rest.text.size());
  const SpecToken token{rest.text.substr(0, length), rest.at};
  rest.text.remove_prefix(length);
  rest.at += length;
  return trim(token);
}

void skip_sign(SpecToken& rest) {
  rest.text.remove_prefix(1);
  ++rest.at;
}

SpecOption split_option(std::string_view text, SpecToken& rest) {
  SpecOption option;
  option.name = take_until(rest, "=,");
  if (option.name.text.empty()) {
    fail_spec(text, option.name, "an option is missing here", {},
              "write family:main,option=value, for example topk:0.01,values=q8");
  }
  if (rest.text.starts_with('=')) {
    skip_sign(rest);
    option.value = take_until(rest, ",");
    if (option.value->text.empty()) {
      fail_spec(text, *option.value,
                "option \"" + std::string(option.name.text) + "\" has no value after =", {});
    }
  }
  return option;
}

}  // namespace

SpecTokens split_spec(std::string_view text) {
  if (text.size() > kMaxSpecBytes) {
    throw PolicyError("policy of " + std::to_string(text.size()) + " bytes, expected at most " +
                      std::to_string(kMaxSpecBytes) + " in one line: \"" +
                      printable(text.substr(0, 40)) + "...\"");
  }
  SpecTokens tokens;
  tokens.text = text;
  SpecToken rest = trim({text, 0});
  tokens.family = take_until(rest, ":,=");
  if (tokens.family.text.empty()) {
    fail_spec(text, tokens.family, "a policy begins with a family", {},
              "for example topk:0.01,values=q8 or q4 or bf16 or none");
  }
  if (rest.text.starts_with('=')) {
    fail_spec(text, {rest.text.substr(0, 1), rest.at},
              "\"" + printable(tokens.family.text) + "\" is followed by =, expected :", ":");
  }
  if (rest.text.starts_with(':')) {
    skip_sign(rest);
    tokens.main = take_until(rest, ",");
    if (tokens.main->text.empty()) {
      fail_spec(text, *tokens.main,
                "\"" + printable(tokens.family.text) + "\" has no value after :", {});
    }
  }
  while (rest.text.starts_with(',')) {
    skip_sign(rest);
    tokens.options.push_back(split_option(text, rest));
  }
  return tokens;
}

void fail_spec(std::string_view text, SpecToken place, const std::string& what,
               std::string_view instead, const std::string& more) {
  std::string message =
      "policy \"" + printable(text) + "\": " + printable(what) + marked(text, place);
  std::string hint;
  if (!instead.empty()) {
    std::string corrected(text);
    corrected.replace(place.at, place.text.size(), instead);
    hint = "did you mean \"" + printable(corrected) + "\"?";
  }
  if (!more.empty()) hint += (hint.empty() ? "" : " ") + more;
  if (!hint.empty()) message += "\nhint: " + hint;
  throw PolicyError(message);
}

void unavailable_spec(std::string_view text, SpecToken place, const std::string& what,
                      const std::string& there_is) {
  throw NotAvailable("policy \"" + printable(text) + "\": " + what + " is not in this version" +
                     marked(text, place) + "\nhint: " + there_is);
}

std::string number_text(double value) {
  std::array<char, 32> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), result.ptr};
}

}  // namespace thinwire
