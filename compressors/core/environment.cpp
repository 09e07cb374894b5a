#include "compressors/core/environment.h"

#include <cstdlib>

namespace thinwire {
namespace {

std::optional<std::string> read(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return std::string(value);
}

}  // namespace

std::optional<std::string> environment_simd() { return read("THINWIRE_SIMD"); }
std::optional<std::string> environment_policy() { return read("THINWIRE_POLICY"); }

std::optional<std::string> environment_gloo_interfaces() { return read("GLOO_SOCKET_IFNAME"); }

bool environment_sets_malloc() {
  for (const char* name : {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_",
                           "MALLOC_TOP_PAD_"}) {
    if (read(name)) return true;
  }
  const auto tunables = read("GLIBC_TUNABLES");
  return tunables && tunables->find("glibc.malloc") != std::string::npos;
}

std::optional<std::string> environment_cache_folder() {
  if (const auto cache = read("XDG_CACHE_HOME")) return *cache + "/thinwire";
  if (const auto home = read("HOME")) return *home + "/.cache/thinwire";
  return std::nullopt;
}

}  // namespace thinwire
