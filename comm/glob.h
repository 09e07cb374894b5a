// Shell-style globs over layer names: * any run of characters (dots and slashes included), ? one
// character, [abc], [a-z], [!abc] a set; nothing else is special. Pure, thread-safe.
#pragma once

#include <string_view>

namespace thinwire {

bool glob_match(std::string_view glob, std::string_view text);

}  // namespace thinwire
