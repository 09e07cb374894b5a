#include "compressors/core/spec_reader.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <system_error>

#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 2> kSwitch = {"off", "on"};

std::string word(SpecToken token) { return std::string(token.text); }

// The first digits of a text that is no number; `least` where there are none.
std::string whole_number(SpecToken token, std::int64_t least) {
  std::string digits;
  for (const char c : token.text) {
    if (c >= '0' && c <= '9' && digits.size() < 15)
      digits += c;
    else if (!digits.empty())
      break;
  }
  return digits.empty() ? std::to_string(least) : digits;
}

}  // namespace

SpecReader::SpecReader(const SpecTokens& tokens, Words known, std::span<const LaterWord> later)
    : tokens_(tokens) {
  for (const SpecOption& option : tokens.options) check_name(option, known, later);
}

void SpecReader::no_main() const {
  if (!tokens_.main) return;
  const std::size_t end = tokens_.main->at + tokens_.main->text.size();
  const std::size_t begin = tokens_.family.at + tokens_.family.text.size();
  const SpecToken place{tokens_.text.substr(begin, end - begin), begin};
  std::string without(tokens_.text);
  without.erase(begin, end - begin);
  fail_spec(tokens_.text, place, "\"" + word(tokens_.family) + "\" takes nothing after :", {},
            "did you mean \"" + without + "\"?");
}

const SpecToken& SpecReader::needed_main(std::string_view what, std::string_view example) const {
  if (tokens_.main) return *tokens_.main;
  fail_spec(tokens_.text, tokens_.family, word(tokens_.family) + " needs " + std::string(what),
            example);
}

std::optional<SpecToken> SpecReader::text(std::string_view name, std::string_view example) const {
  const SpecOption* option = find(name);
  if (option == nullptr) return std::nullopt;
  return value_of(*option, example);
}

std::size_t SpecReader::choice(std::string_view name, Words words, std::size_t otherwise,
                               std::span<const LaterWord> later) const {
  const SpecOption* option = find(name);
  if (option == nullptr) return otherwise;
  const SpecToken value = value_of(*option, words[otherwise]);
  const auto found = std::find(words.begin(), words.end(), value.text);
  if (found != words.end()) return static_cast<std::size_t>(found - words.begin());
  for (const LaterWord& known : later) {
    if (value.text == known.word) {
      unavailable_spec(tokens_.text, value, std::string(name) + "=" + word(value),
                       std::string(known.there_is));
    }
  }
  fail_spec(tokens_.text, value, "\"" + word(value) + "\" is no value of " + std::string(name),
            nearest_spelling(value.text, words), std::string(name) + " is one of: " + join(words));
}

bool SpecReader::flag(std::string_view name, bool otherwise) const {
  const SpecOption* option = find(name);
  if (option != nullptr && !option->value) return true;
  return choice(name, kSwitch, otherwise ? 1 : 0) == 1;
}

std::int64_t SpecReader::integer(std::string_view name, std::int64_t otherwise, std::int64_t least,
                                 std::int64_t most) const {
  const SpecOption* option = find(name);
  if (option == nullptr) return otherwise;
  return integer(name, value_of(*option, std::to_string(otherwise)), least, most);
}

std::int64_t SpecReader::integer(std::string_view name, SpecToken token, std::int64_t least,
                                 std::int64_t most) const {
  std::int64_t value = 0;
  const char* end = token.text.data() + token.text.size();
  const auto [rest, error] = std::from_chars(token.text.data(), end, value);
  const std::string range =
      "a whole number in [" + std::to_string(least) + ", " + std::to_string(most) + "]";
  if (rest != end || error == std::errc::invalid_argument) {
    fail_spec(tokens_.text, token, word(token) + " is not " + range, whole_number(token, least),
              std::string(name) + " is " + range);
  }
  if (error == std::errc::result_out_of_range) {
    value = token.text.starts_with('-') ? std::numeric_limits<std::int64_t>::min()
                                        : std::numeric_limits<std::int64_t>::max();
  }
  if (value < least || value > most || error == std::errc::result_out_of_range) {
    fail_spec(tokens_.text, token, std::string(name) + " is out of range",
              std::to_string(std::clamp(value, least, most)), std::string(name) + " is " + range);
  }
  return value;
}

double SpecReader::share(std::string_view name, SpecToken token, bool open,
                         std::string_view example) const {
  double value = 0;
  const char* end = token.text.data() + token.text.size();
  const auto [rest, error] = std::from_chars(token.text.data(), end, value);
  const std::string range = std::string(name) + " is a number in " + (open ? "(0, 1]" : "[0, 1]");
  if (rest == token.text.data() || rest != end) {
    std::string instead(example);
    if (rest != token.text.data() && token.text.substr(token.text.size() - 1) == "%" &&
        rest + 1 == end && value > 0 && value <= 100) {
      instead = number_text(value / 100);
    }
    fail_spec(tokens_.text, token, word(token) + " is not a number", instead, range);
  }
  const bool fits = error == std::errc() && value <= 1 && (open ? value > 0 : value >= 0);
  if (!fits) {
    fail_spec(tokens_.text, token, std::string(name) + " is out of range",
              value > 1 ? "1" : (open ? example : "0"), range);
  }
  return value;
}

double SpecReader::share(std::string_view name, double otherwise, bool open,
                         std::string_view example) const {
  const SpecOption* option = find(name);
  return option == nullptr ? otherwise : share(name, value_of(*option, example), open, example);
}

double SpecReader::positive(std::string_view name, double otherwise,
                            std::string_view example) const {
  const SpecOption* option = find(name);
  if (option == nullptr) return otherwise;
  const SpecToken token = value_of(*option, example);
  double value = 0;
  const char* end = token.text.data() + token.text.size();
  const auto [rest, error] = std::from_chars(token.text.data(), end, value);
  if (rest != end || error != std::errc() || !(value > 0) || !std::isfinite(value)) {
    fail_spec(tokens_.text, token, word(token) + " is not a number above 0", example,
              std::string(name) + " is a number above 0");
  }
  return value;
}

void SpecReader::refuse_family(const std::string& what, std::string_view instead) const {
  fail_spec(tokens_.text, tokens_.family, what, instead);
}

void SpecReader::refuse_option(std::string_view name, const std::string& what,
                               const std::string& hint) const {
  fail_spec(tokens_.text, find(name)->name, what, {}, hint);
}

void SpecReader::refuse_value(std::string_view name, const std::string& what,
                              std::string_view instead) const {
  fail_spec(tokens_.text, *find(name)->value, what, instead);
}

const SpecOption* SpecReader::find(std::string_view name) const {
  for (const SpecOption& option : tokens_.options) {
    if (option.name.text == name) return &option;
  }
  return nullptr;
}

SpecToken SpecReader::value_of(const SpecOption& option, std::string_view example) const {
  if (option.value) return *option.value;
  fail_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\" has no value",
            word(option.name) + "=" + std::string(example));
}

void SpecReader::check_name(const SpecOption& option, Words known,
                            std::span<const LaterWord> later) const {
  const std::string_view name = option.name.text;
  if (std::find(known.begin(), known.end(), name) == known.end()) {
    for (const LaterWord& one : later) {
      if (name == one.word) {
        unavailable_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\"",
                         std::string(one.there_is));
      }
    }
    fail_spec(tokens_.text, option.name,
              "\"" + word(option.name) + "\" is no option of " + word(tokens_.family),
              nearest_spelling(name, known),
              "options of " + word(tokens_.family) + ": " + join(known));
  }
  for (const SpecOption& other : tokens_.options) {
    if (&other == &option) break;
    if (other.name.text == name) {
      fail_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\" given twice", {},
                "leave one out");
    }
  }
}

}  // namespace thinwire
