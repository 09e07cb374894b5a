// The library's version, "MAJOR.MINOR.PATCH", as in CMakeLists.txt. Ranks compare it at start-up.
// Thread-safe.
#pragma once

#include <string_view>

namespace thinwire {

std::string_view version();

}  // namespace thinwire
