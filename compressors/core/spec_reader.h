// SpecReader: the options of a split spec, read and checked; what a family makes its codec from.
// Every misreading is a PolicyError that shows the place and the nearest valid spelling; what the
// design has and this version lacks is NotAvailable. Refers to the caller's tokens.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/core/spec_text.h"

namespace thinwire {

using Words = std::span<const std::string_view>;

// Known to the design, not in this version.
struct LaterWord {
  std::string_view word;
  std::string_view there_is;  // what to use instead
};

class SpecReader {
 public:
  // Every option given must be one of `known`, once.
  SpecReader(const SpecTokens& tokens, Words known, std::span<const LaterWord> later = {});

  std::string_view family() const { return tokens_.family.text; }
  // What follows the colon.
  const std::optional<SpecToken>& main() const { return tokens_.main; }
  // Refuses what follows the colon.
  void no_main() const;
  // Refuses a spec without it; `what` it needs, with an example.
  const SpecToken& needed_main(std::string_view what, std::string_view example) const;

  // Index of the option's value in `words`; `otherwise` when the option is not given.
  std::size_t choice(std::string_view name, Words words, std::size_t otherwise,
                     std::span<const LaterWord> later = {}) const;
  // A switch: NAME, NAME=on or NAME=off.
  bool flag(std::string_view name, bool otherwise) const;
  // In [least, most].
  std::int64_t integer(std::string_view name, std::int64_t otherwise, std::int64_t least,
                       std::int64_t most) const;
  std::int64_t integer(std::string_view name, SpecToken token, std::int64_t least,
                       std::int64_t most) const;
  // In (0, 1] when `open`, else in [0, 1]. `example` stands in for what cannot be read.
  double share(std::string_view name, SpecToken token, bool open, std::string_view example) const;
  // The same for an option.
  double share(std::string_view name, double otherwise, bool open, std::string_view example) const;
  // Above 0 and finite.
  double positive(std::string_view name, double otherwise, std::string_view example) const;
  bool has(std::string_view name) const { return find(name) != nullptr; }
  // The value of an option that was given, as it stands there. `example` as above.
  std::optional<SpecToken> text(std::string_view name, std::string_view example) const;
  // Refuses the word before the colon, offering `instead`.
  [[noreturn]] void refuse_family(const std::string& what, std::string_view instead) const;
  // Refuses an option that was given, and has no other value to offer.
  [[noreturn]] void refuse_option(std::string_view name, const std::string& what,
                                  const std::string& hint) const;
  // Refuses the value of an option that was given.
  [[noreturn]] void refuse_value(std::string_view name, const std::string& what,
                                 std::string_view instead) const;

 private:
  const SpecOption* find(std::string_view name) const;
  SpecToken value_of(const SpecOption& option, std::string_view example) const;
  void check_name(const SpecOption& option, Words known, std::span<const LaterWord> later) const;

  const SpecTokens& tokens_;
};

}  // namespace thinwire
