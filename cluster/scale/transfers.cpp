#include "cluster/scale/transfers.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace thinwire {

namespace {

class Done final : public Transfer {
 public:
  bool done() override { return true; }
  void wait(Deadline /*deadline*/) override {}
};

class Recorder final : public Communicator {
 public:
  Recorder(int ranks, std::vector<RecordedTransfer>& log) : ranks_(ranks), log_(log) {}

  int rank() const override { return 0; }
  int size() const override { return ranks_; }
  std::string name() const override { return "recorder"; }
  CommunicatorTraits traits() const override { return {.identical_allreduce = true}; }

  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    return record(RecordedTransfer::Verb::kAllreduce, data.bytes());
  }
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    return repeat(RecordedTransfer::Verb::kAllgather, in, out);
  }
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    return repeat(RecordedTransfer::Verb::kAlltoall,
                  in.first(in.size() / static_cast<std::size_t>(ranks_)), out);
  }

  std::vector<int> roll_call(std::chrono::milliseconds /*grace*/) override { return {}; }
  void abort() noexcept override {}
  std::uint64_t sent_bytes() const override { return 0; }

 private:
  std::unique_ptr<Transfer> record(RecordedTransfer::Verb verb, std::size_t bytes) {
    log_.push_back({.verb = verb, .bytes = bytes});
    return std::make_unique<Done>();
  }
  std::unique_ptr<Transfer> repeat(RecordedTransfer::Verb verb, std::span<const std::byte> part,
                                   std::span<std::byte> out) {
    for (std::size_t at = 0; at < out.size(); at += part.size()) {
      std::memcpy(out.data() + at, part.data(), part.size());
    }
    return record(verb, part.size());
  }

  int ranks_;
  std::vector<RecordedTransfer>& log_;
};

}  // namespace

std::unique_ptr<Communicator> make_recorder(int ranks, std::vector<RecordedTransfer>& log) {
  return std::make_unique<Recorder>(ranks, log);
}

std::size_t memory_bytes(const RecordedTransfer& transfer, int ranks) {
  return transfer.bytes * (transfer.verb == RecordedTransfer::Verb::kAllreduce
                               ? 1
                               : static_cast<std::size_t>(ranks));
}

void replay(Communicator& comm, const RecordedTransfer& transfer, std::span<std::byte> memory) {
  const std::span<std::byte> out = memory.first(memory_bytes(transfer, comm.size()));
  const auto start = [&] {
    switch (transfer.verb) {
      case RecordedTransfer::Verb::kAllreduce:
        return comm.allreduce_sum(
            {out.data(), static_cast<std::int64_t>(out.size() / sizeof(float)), DType::kF32});
      case RecordedTransfer::Verb::kAllgather:
        return comm.allgather(out.first(transfer.bytes), out);
      case RecordedTransfer::Verb::kAlltoall:
        break;
    }
    return comm.alltoall(out, out);
  };
  start()->wait(Clock::now() + std::chrono::hours(1));
}

}  // namespace thinwire
