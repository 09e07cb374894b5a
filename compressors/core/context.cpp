#include "compressors/core/context.h"

#include <array>

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace thinwire {

std::uint64_t Key::hash() const {
  // Lengths are hashed too, so that no two keys join to the same text.
  const std::array<std::uint64_t, 6> fields = {
      stream.size(),
      XXH3_64bits(stream.data(), stream.size()),
      parameter.size(),
      XXH3_64bits(parameter.data(), parameter.size()),
      static_cast<std::uint64_t>(begin),
      static_cast<std::uint64_t>(end),
  };
  return XXH3_64bits(fields.data(), sizeof(fields));
}

}  // namespace thinwire
