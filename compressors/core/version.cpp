#include "compressors/core/version.h"

namespace thinwire {

std::string_view version() { return TW_VERSION; }

}  // namespace thinwire
