#include "optim/groups.h"

#include <array>
#include <charconv>

#include "compressors/core/error.h"

namespace thinwire::optim {
namespace {

struct Place {
  const std::string& optimizer;
  std::size_t group;

  void check(bool holds, const char* option, const char* expected, double got) const {
    if (!holds) {
      throw InvalidArgument(optimizer + ", parameter group " + std::to_string(group) + ": " +
                            option + ": expected " + expected + ", got " + number_text(got));
    }
  }
};

}  // namespace

std::string number_text(double value) {
  std::array<char, 32> text{};
  const auto [end, error] = std::to_chars(text.data(), text.data() + text.size(), value);
  return {text.data(), end};
}

void check_options(const std::string& optimizer, std::size_t group, const SgdOptions& o) {
  const Place place{optimizer, group};
  place.check(o.lr >= 0, "lr", "0 or more", o.lr);
  place.check(o.momentum >= 0 && o.momentum < 1, "momentum", "a value in [0, 1)", o.momentum);
  place.check(o.weight_decay >= 0, "weight_decay", "0 or more", o.weight_decay);
  place.check(!o.nesterov || o.momentum > 0, "nesterov", "a momentum above 0", o.momentum);
}

void check_options(const std::string& optimizer, std::size_t group, const AdamOptions& o) {
  const Place place{optimizer, group};
  place.check(o.lr >= 0, "lr", "0 or more", o.lr);
  place.check(o.beta1 >= 0 && o.beta1 < 1, "beta1", "a value in [0, 1)", o.beta1);
  place.check(o.beta2 >= 0 && o.beta2 < 1, "beta2", "a value in [0, 1)", o.beta2);
  place.check(o.eps > 0, "eps", "more than 0", o.eps);
  place.check(o.weight_decay >= 0, "weight_decay", "0 or more", o.weight_decay);
}

std::string options_text(const SgdOptions& o) {
  return "lr=" + number_text(o.lr) + ", momentum=" + number_text(o.momentum) +
         ", weight_decay=" + number_text(o.weight_decay) + (o.nesterov ? ", nesterov" : "");
}

std::string options_text(const AdamOptions& o) {
  return "lr=" + number_text(o.lr) + ", beta1=" + number_text(o.beta1) +
         ", beta2=" + number_text(o.beta2) + ", eps=" + number_text(o.eps) +
         ", weight_decay=" + number_text(o.weight_decay) + (o.decoupled ? ", decoupled" : "") +
         (o.bias_correction ? "" : ", no bias correction");
}

std::string settings_text(const FreezeOptions& o) {
  return "beta2=" + number_text(o.beta2) + ", ratio=" + number_text(o.ratio) +
         ", min_steps=" + std::to_string(o.min_steps) + ", at_step=" + std::to_string(o.at_step) +
         ", variance_floor=" + number_text(o.floor);
}

std::string settings_text(const ZeroOneOptions& o) {
  return "kappa=" + std::to_string(o.kappa) +
         ", var_freeze_step=" + std::to_string(o.var_freeze_step) +
         ", local_step_scaler=" + std::to_string(o.local_step_scaler) +
         ", local_step_clipper=" + std::to_string(o.local_step_clipper) +
         ", variance_floor=" + number_text(o.floor);
}

std::vector<AdamOptions> decoupled(std::vector<AdamOptions> groups) {
  for (AdamOptions& options : groups) {
    options.decoupled = true;
  }
  return groups;
}

void refuse_group_count(const std::string& optimizer, std::size_t expected, std::size_t got) {
  throw InvalidArgument(optimizer + ": expected options for " + std::to_string(expected) +
                        " parameter groups, got " + std::to_string(got));
}

}  // namespace thinwire::optim
