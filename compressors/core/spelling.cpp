#include "compressors/core/spelling.h"

#include <algorithm>
#include <cctype>
#include <utility>

namespace thinwire {

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
  return nearest_spellings(text, candidates, 1).front();
}

std::vector<std::string_view> nearest_spellings(std::string_view text,
                                                std::span<const std::string_view> candidates,
                                                std::size_t count) {
  std::vector<std::pair<std::size_t, std::string_view>> ranked;
  ranked.reserve(candidates.size());
  for (const std::string_view candidate : candidates) {
    ranked.emplace_back(spelling_distance(text, candidate), candidate);
  }
  std::stable_sort(ranked.begin(), ranked.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<std::string_view> result;
  for (std::size_t i = 0; i < std::min(count, ranked.size()); ++i) {
    result.push_back(ranked[i].second);
  }
  return result;
}

}  // namespace thinwire
