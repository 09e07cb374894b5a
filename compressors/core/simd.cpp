#include "compressors/core/simd.h"

#include <hwy/highway.h>
#include <hwy/targets.h>

#include <cctype>
#include <mutex>

#include "compressors/core/environment.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

std::string target_name(std::int64_t target) {
  // Highway's code without SIMD, which has two names because compilers differ in what they bear.
  if (target == HWY_EMU128 || target == HWY_SCALAR) return "scalar";
  std::string name = hwy::TargetName(target);
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

// Bits of all targets that this process can run, better targets in lower bits.
std::int64_t runnable_targets() {
  static const std::int64_t targets = hwy::SupportedTargets() & HWY_TARGETS;
  return targets;
}

std::vector<std::int64_t> split(std::int64_t targets) {
  std::vector<std::int64_t> bits;
  for (; targets != 0; targets &= targets - 1) bits.push_back(targets & -targets);
  return bits;
}

}  // namespace

std::vector<std::string> simd_targets() {
  std::vector<std::string> names;
  for (const std::int64_t target : split(runnable_targets())) names.push_back(target_name(target));
  return names;
}

std::string simd_target() {
  (void)runnable_targets();
  return target_name(split(hwy::SupportedTargets() & HWY_TARGETS).front());
}

void set_simd_limit(std::string_view target) {
  const std::int64_t runnable = runnable_targets();
  std::int64_t allowed = target.empty() ? runnable : 0;
  for (const std::int64_t bit : split(runnable)) {
    if (target_name(bit) == target) allowed = runnable & ~(bit - 1);
  }
  if (allowed == 0) {
    std::string known;
    for (const std::string& name : simd_targets()) known += " " + name;
    throw InvalidArgument("SIMD target \"" + std::string(target) + "\": expected one of" + known +
                          "\nhint: THINWIRE_SIMD takes one of these, or nothing");
  }
  hwy::SetSupportedTargetsForTest(allowed == runnable ? 0 : allowed);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

void apply_environment_simd() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (const auto target = environment_simd()) set_simd_limit(*target);
  });
}

}  // namespace thinwire
