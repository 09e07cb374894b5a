// Runs a body once for every SIMD target this machine has, and lifts the limit afterwards.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "compressors/core/simd.h"

namespace thinwire {

template <typename F>
void for_each_simd_target(F&& body) {
  for (const std::string& target : simd_targets()) {
    SCOPED_TRACE("SIMD target " + target);
    set_simd_limit(target);
    body();
  }
  set_simd_limit("");
}

}  // namespace thinwire
