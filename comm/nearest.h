// The words nearest to a misspelt one, by edit distance. For error messages. Pure, thread-safe.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace thinwire {

std::size_t edit_distance(std::string_view a, std::string_view b);

// At most `count` candidates, nearest first; ties keep the candidates' order.
std::vector<std::string> nearest(std::string_view word, const std::vector<std::string>& candidates,
                                 std::size_t count);

}  // namespace thinwire
