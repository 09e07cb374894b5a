#include "comm/watchdog.h"

#include <algorithm>
#include <utility>

namespace thinwire {

Watchdog::Watchdog(std::chrono::milliseconds limit, std::function<void()> bark)
    : limit_(limit), bark_(std::move(bark)), thread_([this] { run(); }) {}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  stop_changed_.notify_all();
  thread_.join();
}

void Watchdog::run() {
  const auto nap = std::max(limit_ / 4, std::chrono::milliseconds(10));
  std::unique_lock lock(mutex_);
  while (!stop_changed_.wait_for(lock, nap, [this] { return stopping_; })) {
    const Clock::rep armed_at = armed_at_.load();
    if (armed_at != 0 && Clock::now() - Clock::time_point(Clock::duration(armed_at)) > limit_) {
      lock.unlock();
      bark_();
      return;
    }
  }
}

}  // namespace thinwire
