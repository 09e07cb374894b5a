// Groups: the options of an optimizer's parameter groups, as its user sets them between steps and
// as the step on its way sees them. set() and now() may be called beside begin() and at_begin().
#pragma once

#include <algorithm>
#include <cstddef>
#include <mutex>
#include <string>
#include <vector>

#include "optim/optim_kernels.h"
#include "optim/schedules.h"

namespace thinwire::optim {

// InvalidArgument, naming group, option, the range expected and the value, for one out of range.
void check_options(const std::string& optimizer, std::size_t group, const SgdOptions& options);
void check_options(const std::string& optimizer, std::size_t group, const AdamOptions& options);
// "lr=0.1, momentum=0.9".
std::string options_text(const SgdOptions& options);
std::string options_text(const AdamOptions& options);
// Of what all groups have in common.
std::string settings_text(const FreezeOptions& options);
std::string settings_text(const ZeroOneOptions& options);
// Shortest decimal that reads as the same number.
std::string number_text(double value);
// With weight decay that does not enter the moments.
std::vector<AdamOptions> decoupled(std::vector<AdamOptions> groups);
[[noreturn]] void refuse_group_count(const std::string& optimizer, std::size_t expected,
                                     std::size_t got);

template <typename Options>
class Groups {
 public:
  // `count`: as many as the parameters name, at least; later ones are as many as the first.
  Groups(const std::string& optimizer, std::size_t count, std::vector<Options> groups)
      : optimizer_(optimizer), count_(std::max(count, groups.size())) {
    set(std::move(groups));
    begin();
  }

  void set(std::vector<Options> groups) {
    if (groups.size() != count_) {
      refuse_group_count(optimizer_, count_, groups.size());
    }
    for (std::size_t i = 0; i < groups.size(); ++i) {
      check_options(optimizer_, i, groups[i]);
    }
    const std::lock_guard lock(mutex_);
    now_ = std::move(groups);
  }
  Options now(std::size_t group) const {
    const std::lock_guard lock(mutex_);
    return now_[group];
  }
  // What at_begin() gives from now on.
  void begin() {
    const std::lock_guard lock(mutex_);
    at_begin_ = now_;
  }
  const Options& at_begin(std::size_t group) const { return at_begin_[group]; }
  std::vector<std::string> text() const {
    const std::lock_guard lock(mutex_);
    std::vector<std::string> lines;
    for (const Options& options : now_) {
      lines.push_back(options_text(options));
    }
    return lines;
  }

 private:
  const std::string optimizer_;
  const std::size_t count_;
  mutable std::mutex mutex_;
  std::vector<Options> now_;
  std::vector<Options> at_begin_;
};

}  // namespace thinwire::optim
