#include "comm/glob.h"

#include <cstddef>

namespace thinwire {
namespace {

// Matches one character against the set that opens at glob[0] == '['. Returns the set's length, or
// 0 when it is not closed: then '[' stands for itself.
std::size_t set_length(std::string_view glob) {
  const std::size_t first = glob.size() > 1 && glob[1] == '!' ? 2 : 1;
  const std::size_t close = glob.find(']', first + 1);
  return close == std::string_view::npos ? 0 : close + 1;
}

bool set_holds(std::string_view set, char c) {
  const bool negated = set[1] == '!';
  bool found = false;
  for (std::size_t i = negated ? 2 : 1; i + 1 < set.size(); ++i) {
    if (i + 3 < set.size() && set[i + 1] == '-') {
      found = found || (set[i] <= c && c <= set[i + 2]);
      i += 2;
    } else {
      found = found || set[i] == c;
    }
  }
  return found != negated;
}

// Length of the glob's first element when it matches `c`, else 0. The element is not '*'.
std::size_t element_matching(std::string_view glob, char c) {
  if (glob.empty()) {
    return 0;
  }
  if (glob[0] == '[') {
    if (const std::size_t length = set_length(glob); length > 0) {
      return set_holds(glob.substr(0, length), c) ? length : 0;
    }
  }
  return glob[0] == '?' || glob[0] == c ? 1 : 0;
}

}  // namespace

bool glob_match(std::string_view glob, std::string_view text) {
  // After a mismatch, the last '*' takes one more character: O(|glob| * |text|).
  std::size_t g = 0;
  std::size_t t = 0;
  std::size_t star = std::string_view::npos;
  std::size_t star_text = 0;
  while (t < text.size()) {
    if (g < glob.size() && glob[g] == '*') {
      star = g++;
      star_text = t;
    } else if (const std::size_t length = element_matching(glob.substr(g), text[t]); length > 0) {
      g += length;
      ++t;
    } else if (star != std::string_view::npos) {
      g = star + 1;
      t = ++star_text;
    } else {
      return false;
    }
  }
  while (g < glob.size() && glob[g] == '*') {
    ++g;
  }
  return g == glob.size();
}

}  // namespace thinwire
