// The text side of codec specs and policies: tokens that know their place, and the error that
// quotes the text, puts ^ under the place and names the nearest valid spelling. Pure functions,
// thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace thinwire {

// A part of a text: [at, at + text.size()).
struct SpecToken {
  std::string_view text;
  std::size_t at = 0;
};

struct SpecOption {
  SpecToken name;
  std::optional<SpecToken> value;  // what follows '='
};

// `family[:main][,option[=value]]...`, split but not understood. Views into the caller's text.
struct SpecTokens {
  std::string_view text;
  SpecToken family;
  std::optional<SpecToken> main;
  std::vector<SpecOption> options;
};

// PolicyError on an empty part or a misplaced sign.
SpecTokens split_spec(std::string_view text);

// PolicyError: `what`, the text with ^ under `place`, and the text with `place` replaced by
// `instead` as the spelling to use (left out when `instead` is empty); `more` follows it.
[[noreturn]] void fail_spec(std::string_view text, SpecToken place, const std::string& what,
                            std::string_view instead, const std::string& more = {});
// NotAvailable in the same form: known to the design, `there_is` says what to use.
[[noreturn]] void unavailable_spec(std::string_view text, SpecToken place, const std::string& what,
                                   const std::string& there_is);

// Shortest text that reads back as the same number.
std::string number_text(double value);

}  // namespace thinwire
