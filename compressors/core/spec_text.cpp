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

std::size_t spelling_distance(std::string_view a, std::string_view b) {
  constexpr std::size_t kStep = 2;
  const auto replace = [](char x, char y) -> std::size_t {
    if (x == y) return 0;
    const auto lower = [](char c) { return std::tolower(static_cast<unsigned char>(c)); };
    return lower(x) == lower(y) ? 1 : kStep;
  };
  // Rows i - 2, i - 1 and i of the usual table.
  std::vector<std::size_t> before(b.size() + 1);
  std::vector<std::size_t> above(b.size() + 1);
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) above[j] = kStep * j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    row[0] = kStep * i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min(
          {above[j] + kStep, row[j - 1] + kStep, above[j - 1] + replace(a[i - 1], b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        row[j] = std::min(row[j], before[j - 2] + kStep);
      }
    }
    before.swap(above);
    above.swap(row);
  }
  return above[b.size()];
}

std::string_view nearest_spelling(std::string_view text,
                                  std::span<const std::string_view> candidates) {
  return *std::min_element(candidates.begin(), candidates.end(),
                           [text](std::string_view a, std::string_view b) {
                             return spelling_distance(text, a) < spelling_distance(text, b);
                           });
}

std::string join(std::span<const std::string_view> words) {
  std::string text;
  for (const std::string_view word : words) {
    if (!text.empty()) text += ", ";
    text += word;
  }
  return text;
}

std::string number_text(double value) {
  std::array<char, 32> buffer{};
  const auto result = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), result.ptr};
}

}  // namespace thinwire
