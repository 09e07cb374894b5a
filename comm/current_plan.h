// CurrentPlan: the plan that a reducer goes by. Read on any thread, replaced between steps.
#pragma once

#include <memory>
#include <mutex>
#include <utility>

#include "comm/policy.h"

namespace thinwire {

class CurrentPlan {
 public:
  explicit CurrentPlan(Plan plan) { set(std::move(plan)); }
  std::shared_ptr<const Plan> get() const {
    const std::lock_guard lock(mutex_);
    return plan_;
  }
  void set(Plan plan) {
    auto next = std::make_shared<const Plan>(std::move(plan));
    const std::lock_guard lock(mutex_);
    plan_ = std::move(next);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Plan> plan_;
};

}  // namespace thinwire
