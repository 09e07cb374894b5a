// The only place where C++ reads the environment. Thread-safe (reads once per call).
#pragma once

#include <optional>
#include <string>

namespace thinwire {

// THINWIRE_SIMD: see simd.h; applied when the first kernel is dispatched.
std::optional<std::string> environment_simd();
// THINWIRE_POLICY: the policy of programs that have no other way to say it.
std::optional<std::string> environment_policy();
// The user's folder for what may be made anew: thinwire in XDG_CACHE_HOME, else in HOME's .cache.
std::optional<std::string> environment_cache_folder();
// GLOO_SOCKET_IFNAME: the network interfaces that Gloo uses, separated by commas.
std::optional<std::string> environment_gloo_interfaces();
// Whether thresholds of glibc's malloc are set: by MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_,
// MALLOC_MMAP_MAX_, MALLOC_TOP_PAD_, or glibc.malloc in GLIBC_TUNABLES.
bool environment_sets_malloc();

}  // namespace thinwire
