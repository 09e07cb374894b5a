// Watchdog: calls back once when a piece of work takes longer than allowed. For transports whose
// blocking calls cannot be cancelled. arm() and disarm() may come from any thread, cheaply: they
// only store a time.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

#include "comm/communicator.h"

namespace thinwire {

class Watchdog {
 public:
  // `bark` runs on the watchdog's thread, at most once, up to a quarter of `limit` late.
  Watchdog(std::chrono::milliseconds limit, std::function<void()> bark);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  void arm() { armed_at_.store(Clock::now().time_since_epoch().count()); }
  void disarm() { armed_at_.store(0); }

 private:
  void run();

  const std::chrono::milliseconds limit_;
  const std::function<void()> bark_;
  std::atomic<Clock::rep> armed_at_{0};  // 0: not armed
  std::mutex mutex_;
  std::condition_variable stop_changed_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace thinwire
