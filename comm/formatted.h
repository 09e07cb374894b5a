// A number as text, for messages.
#pragma once

#include <array>
#include <cstdio>
#include <string>

namespace thinwire {

// `format`: of printf, with one %-conversion of a double; at most 63 characters come of it.
inline std::string formatted(const char* format, double value) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), format, value);  // NOLINT(*-vararg)
  return buffer.data();
}

}  // namespace thinwire
