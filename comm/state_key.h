// StateKey: the text under which a part of a memory is saved, ROLE/NAME/BEGIN:END. Values; pure
// functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace thinwire {

struct StateKey {
  std::string role = "worker";  // worker or owner; worker.velocity, worker.state, ... of its parts
  std::string layer;            // may hold '/'
  std::int64_t begin = 0;       // [begin, end) in elements of the layer
  std::int64_t end = 0;

  std::string text() const;
};

// The key that a text is. `range` is empty where the text names none; its numbers are not negative,
// and may be the wrong way round.
struct ParsedStateKey {
  std::string_view role;
  std::string_view layer;
  struct Range {
    std::int64_t begin = 0;
    std::int64_t end = 0;
  };
  std::optional<Range> range;
};
ParsedStateKey parse_state_key(std::string_view text);

}  // namespace thinwire
