#include "comm/metered_communicator.h"

#include <utility>

namespace thinwire {
namespace {

class MeteredTransfer final : public Transfer {
 public:
  MeteredTransfer(std::unique_ptr<Transfer> transfer, TransferTime& time)
      : transfer_(std::move(transfer)), time_(time) {}

  bool done() override {
    const bool done = transfer_->done();
    if (done) finish(false);
    return done;
  }

  void wait(Deadline deadline) override {
    const bool awaited = !transfer_->done();
    transfer_->wait(deadline);
    finish(awaited);
  }

 private:
  void finish(bool awaited) {
    if (std::exchange(finished_, true)) {
      return;
    }
    time_.finished = Clock::now();
    time_.awaited = awaited;
  }

  const std::unique_ptr<Transfer> transfer_;
  TransferTime& time_;
  bool finished_ = false;
};

}  // namespace

double sent_payload(Verb verb, std::size_t bytes, int ranks) {
  const auto size = static_cast<double>(bytes);
  const double p = ranks;
  switch (verb) {
    case Verb::kAllreduce:
      return 2 * size * (p - 1) / p;
    case Verb::kAllgather:
      return size * (p - 1);
    case Verb::kAlltoall:
      return size * (p - 1) / p;
  }
  return 0;
}

std::unique_ptr<Transfer> MeteredCommunicator::allreduce_sum(TensorView data) {
  const auto issued = Clock::now();
  return meter(Verb::kAllreduce, data.bytes(), comm_->allreduce_sum(data), issued);
}

std::unique_ptr<Transfer> MeteredCommunicator::allgather(std::span<const std::byte> in,
                                                         std::span<std::byte> out) {
  const auto issued = Clock::now();
  return meter(Verb::kAllgather, in.size(), comm_->allgather(in, out), issued);
}

std::unique_ptr<Transfer> MeteredCommunicator::alltoall(std::span<const std::byte> in,
                                                        std::span<std::byte> out) {
  const auto issued = Clock::now();
  return meter(Verb::kAlltoall, in.size(), comm_->alltoall(in, out), issued);
}

std::vector<TransferTime> MeteredCommunicator::take() {
  std::vector<TransferTime> times(times_.begin(), times_.end());
  times_.clear();
  return times;
}

std::unique_ptr<Transfer> MeteredCommunicator::meter(Verb verb, std::size_t bytes,
                                                     std::unique_ptr<Transfer> transfer,
                                                     Clock::time_point issued) {
  TransferTime& time = times_.emplace_back();
  time.verb = verb;
  time.sent = sent_payload(verb, bytes, size());
  time.issued = issued;
  return std::make_unique<MeteredTransfer>(std::move(transfer), time);
}

}  // namespace thinwire
