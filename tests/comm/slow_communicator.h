// SlowCommunicator: another communicator on a made-up network.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/communicator.h"

namespace thinwire::testing {

// A network of some bytes a second, one transfer after another, which may change.
class SlowCommunicator final : public Communicator {
 public:
  SlowCommunicator(std::unique_ptr<Communicator> comm, const std::atomic<double>& rate)
      : comm_(std::move(comm)), rate_(rate) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  std::string name() const override { return "slow"; }
  CommunicatorTraits traits() const override { return comm_->traits(); }
  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    return slow(2.0 * static_cast<double>(data.bytes()), comm_->allreduce_sum(data));
  }
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    return slow(static_cast<double>(out.size()), comm_->allgather(in, out));
  }
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    return slow(static_cast<double>(in.size()), comm_->alltoall(in, out));
  }
  std::vector<int> roll_call(std::chrono::milliseconds grace) override {
    return comm_->roll_call(grace);
  }
  void abort() noexcept override { comm_->abort(); }
  std::uint64_t sent_bytes() const override { return comm_->sent_bytes(); }

 private:
  class SlowTransfer final : public Transfer {
   public:
    SlowTransfer(std::unique_ptr<Transfer> transfer, Clock::time_point end)
        : transfer_(std::move(transfer)), end_(end) {}
    bool done() override { return transfer_->done() && Clock::now() >= end_; }
    void wait(Deadline deadline) override {
      transfer_->wait(deadline);
      std::this_thread::sleep_until(end_);
    }

   private:
    std::unique_ptr<Transfer> transfer_;
    Clock::time_point end_;
  };

  std::unique_ptr<Transfer> slow(double bytes, std::unique_ptr<Transfer> transfer) {
    free_ = std::max(free_, Clock::now()) + std::chrono::duration_cast<Clock::duration>(
                                                std::chrono::duration<double>(bytes / rate_));
    return std::make_unique<SlowTransfer>(std::move(transfer), free_);
  }

  std::unique_ptr<Communicator> comm_;
  const std::atomic<double>& rate_;
  Clock::time_point free_;
};

}  // namespace thinwire::testing
