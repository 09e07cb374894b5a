// MeteredCommunicator: a communicator that times its transfers, for the cost model.
// As thread-safe as the one it wraps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "comm/communicator.h"

namespace thinwire {

enum class Verb : std::uint8_t { kAllreduce, kAllgather, kAlltoall };
inline constexpr std::size_t kVerbs = 3;

// Payload that one rank puts on the wire: 2 (P - 1) / P of an allreduce's bytes, P - 1 times an
// allgather's own, (P - 1) / P of an alltoall's.
double sent_payload(Verb verb, std::size_t bytes, int ranks);

struct TransferTime {
  Verb verb = Verb::kAllreduce;
  double sent = 0;  // sent_payload()
  Clock::time_point issued;
  Clock::time_point finished;
  // Somebody waited for its end, which is known for that; else it was found at an end some time
  // before.
  bool awaited = false;
};

class MeteredCommunicator final : public Communicator {
 public:
  explicit MeteredCommunicator(std::unique_ptr<Communicator> comm) : comm_(std::move(comm)) {}

  int rank() const override { return comm_->rank(); }
  int size() const override { return comm_->size(); }
  std::string name() const override { return comm_->name(); }
  CommunicatorTraits traits() const override { return comm_->traits(); }
  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override;
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override;
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override;
  std::vector<int> roll_call(std::chrono::milliseconds grace) override {
    return comm_->roll_call(grace);
  }
  void abort() noexcept override { comm_->abort(); }
  std::uint64_t sent_bytes() const override { return comm_->sent_bytes(); }

  // Those issued since the last call, in that order. Not while any is in flight.
  std::vector<TransferTime> take();

 private:
  std::unique_ptr<Transfer> meter(Verb verb, std::size_t bytes, std::unique_ptr<Transfer> transfer,
                                  Clock::time_point issued);

  const std::unique_ptr<Communicator> comm_;
  std::deque<TransferTime> times_;
};

}  // namespace thinwire
