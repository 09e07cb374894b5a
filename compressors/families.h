// The families of this version. Pure functions, thread-safe.
#pragma once

#include <span>

#include "compressors/core/family.h"

namespace thinwire {

// In the order in which documents list them.
std::span<const Family* const> families();
// The options that every family takes.
std::span<const FamilyOption> common_options();

}  // namespace thinwire
