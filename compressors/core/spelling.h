// Words in error messages: those nearest to a misspelt one, and lists of them. Pure functions,
// thread-safe.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace thinwire {

// Insertions, deletions, replacements and swaps of neighbours that turn a into b, letter case
// counting less than a replacement (returns half steps).
std::size_t spelling_distance(std::string_view a, std::string_view b);
// The candidate with the least distance, the first of equals; `candidates` is not empty.
std::string_view nearest_spelling(std::string_view text,
                                  std::span<const std::string_view> candidates);
// At most `count` candidates, nearest first; equals keep the candidates' order.
std::vector<std::string_view> nearest_spellings(std::string_view text,
                                                std::span<const std::string_view> candidates,
                                                std::size_t count);

// "a, b, c"
template <typename Words>
std::string join(const Words& words) {
  std::string text;
  for (const auto& word : words) {
    if (!text.empty()) text += ", ";
    text += word;
  }
  return text;
}

}  // namespace thinwire
