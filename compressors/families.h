// The families of this version. Pure functions, thread-safe.
#pragma once

#include <span>
#include <string>

#include "compressors/core/family.h"
#include "compressors/core/spec.h"
#include "compressors/core/spec_reader.h"

namespace thinwire {

// In the order in which documents list them.
std::span<const Family* const> families();
// The options that every family takes.
std::span<const FamilyOption> common_options();
CommonOptions read_common(const SpecReader& reader);
// ",NAME=VALUE" of each that is not as by default.
std::string common_text(const CommonOptions& options);

}  // namespace thinwire
