#include "comm/loopback/loopback_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <string>
#include <utility>

#include "comm/wire_bytes.h"

namespace thinwire {

namespace {

enum class Verb { kAllreduce, kAllgather, kAlltoall };

const char* verb_name(Verb verb) {
  switch (verb) {
    case Verb::kAllreduce:
      return "allreduce_sum";
    case Verb::kAllgather:
      return "allgather";
    case Verb::kAlltoall:
      return "alltoall";
  }
  return "unknown";
}

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text;
  for (const int rank : ranks) {
    text += (text.empty() ? "" : ", ") + std::to_string(rank);
  }
  return text;
}

// One collective: what each rank has put in.
struct Operation {
  struct Part {
    bool present = false;
    const std::byte* in = nullptr;
    std::byte* out = nullptr;
  };
  Verb verb = Verb::kAllreduce;
  DType dtype = DType::kF32;
  std::size_t bytes = 0;  // of `in`; for allreduce of the tensor
  std::vector<Part> parts;
  int present = 0;
  bool done = false;
};

template <typename T>
void sum_in_rank_order(const Operation& op) {
  const std::size_t count = op.bytes / sizeof(T);
  constexpr std::size_t kBlock = 1024;
  T sum[kBlock];
  for (std::size_t begin = 0; begin < count; begin += kBlock) {
    const std::size_t n = std::min(kBlock, count - begin);
    std::memcpy(sum, op.parts[0].out + begin * sizeof(T), n * sizeof(T));
    for (std::size_t p = 1; p < op.parts.size(); ++p) {
      T block[kBlock];
      std::memcpy(block, op.parts[p].out + begin * sizeof(T), n * sizeof(T));
      for (std::size_t i = 0; i < n; ++i) {
        sum[i] += block[i];
      }
    }
    for (const Operation::Part& part : op.parts) {
      std::memcpy(part.out + begin * sizeof(T), sum, n * sizeof(T));
    }
  }
}

}  // namespace

// Everything the ranks share; one mutex over all of it, held while data moves, so that a rank that
// gives up never leaves while another writes into its memory.
class LoopbackHub {
 public:
  explicit LoopbackHub(int size)
      : size_(size),
        taken_(static_cast<std::size_t>(size)),
        dead_(static_cast<std::size_t>(size)),
        next_(static_cast<std::size_t>(size)),
        answers_(static_cast<std::size_t>(size)) {}

  int size() const { return size_; }

  void take(int rank) {
    const std::lock_guard lock(mutex_);
    if (rank < 0 || rank >= size_ || taken_[index(rank)]) {
      throw InvalidArgument("loopback rank " + std::to_string(rank) + " of a group of " +
                            std::to_string(size_) +
                            (rank < 0 || rank >= size_ ? " does not exist" : " is taken already"));
    }
    taken_[index(rank)] = 1;
  }

  std::shared_ptr<Operation> join(int rank, Verb verb, DType dtype, const std::byte* in,
                                  std::byte* out, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    if (dead_[index(rank)]) {
      throw TransportError("loopback rank " + std::to_string(rank) + " was killed");
    }
    throw_if_failed(rank, verb);
    std::shared_ptr<Operation> op = operation(next_[index(rank)]);
    check_same(rank, *op, verb, dtype, bytes);
    ++next_[index(rank)];
    op->parts[index(rank)] = {true, in, out};
    ++op->present;
    if (op->present == size_) {
      carry_out(*op);
      op->done = true;
      while (!open_.empty() && open_.front()->done) {
        open_.pop_front();
        ++first_open_;
      }
      changed_.notify_all();
    } else {
      for (int peer = 0; peer < size_; ++peer) {
        if (left_by_connection(peer) && !op->parts[index(peer)].present) {
          fail("rank " + std::to_string(peer) + " has left the group");
        }
      }
    }
    return op;
  }

  bool done(const Operation& op) {
    const std::lock_guard lock(mutex_);
    return op.done || failed_;
  }

  void wait(int rank, const Operation& op, Deadline deadline) {
    std::unique_lock lock(mutex_);
    changed_.wait_until(lock, deadline, [&] { return op.done || failed_; });
    if (op.done) {
      return;
    }
    if (!failed_) {
      std::vector<int> absent;
      for (int peer = 0; peer < size_; ++peer) {
        if (!op.parts[index(peer)].present) {
          absent.push_back(peer);
        }
      }
      fail("deadline passed at rank " + std::to_string(rank) + ": no " + verb_name(op.verb) +
           " of " + std::to_string(op.bytes) + " bytes from rank " + ranks_text(absent));
    }
    throw_if_failed(rank, op.verb);
  }

  // A transfer destroyed in flight: its memory may go away, so nobody may complete it.
  void forget(int rank, const Operation& op) {
    const std::lock_guard lock(mutex_);
    if (!op.done && !failed_) {
      fail("rank " + std::to_string(rank) + " dropped a transfer in flight");
    }
  }

  void abort(int rank) {
    const std::lock_guard lock(mutex_);
    if (!failed_) {
      fail("aborted by rank " + std::to_string(rank));
    }
  }

  void leave(int rank) {
    const std::lock_guard lock(mutex_);
    connection_lost_.push_back(rank);
    fail_if_awaited(rank);
  }

  void kill(int rank, LoopbackGroup::Death death) {
    const std::lock_guard lock(mutex_);
    dead_[index(rank)] = 1;
    if (death == LoopbackGroup::Death::kConnection) {
      connection_lost_.push_back(rank);
      fail_if_awaited(rank);
    }
    changed_.notify_all();
  }

  void tamper(LoopbackGroup::Tamper tamper) {
    const std::lock_guard lock(mutex_);
    tamper_ = std::move(tamper);
  }

  std::vector<int> roll_call(int rank, std::chrono::milliseconds grace) {
    std::unique_lock lock(mutex_);
    if (dead_[index(rank)]) {
      throw TransportError("loopback rank " + std::to_string(rank) + " was killed");
    }
    const std::uint64_t call = ++answers_[index(rank)];
    changed_.notify_all();
    const auto missing = [&] {
      std::vector<int> ranks;
      for (int peer = 0; peer < size_; ++peer) {
        if (answers_[index(peer)] < call) {
          ranks.push_back(peer);
        }
      }
      return ranks;
    };
    changed_.wait_until(lock, Clock::now() + grace, [&] { return missing().empty(); });
    return missing();
  }

 private:
  static std::size_t index(int rank) { return static_cast<std::size_t>(rank); }

  bool left_by_connection(int rank) const {
    return std::find(connection_lost_.begin(), connection_lost_.end(), rank) !=
           connection_lost_.end();
  }

  void fail_if_awaited(int rank) {
    for (const auto& op : open_) {
      if (!op->done && op->present > 0 && !op->parts[index(rank)].present) {
        fail("rank " + std::to_string(rank) + " has left the group");
        return;
      }
    }
  }

  void fail(const std::string& why) {
    if (!failed_) {
      failed_ = true;
      why_ = why;
    }
    changed_.notify_all();
  }

  void throw_if_failed(int rank, Verb verb) const {
    if (failed_) {
      throw TransportError("loopback " + std::string(verb_name(verb)) + " at rank " +
                           std::to_string(rank) + " failed: " + why_);
    }
  }

  std::shared_ptr<Operation> operation(std::uint64_t number) {
    while (first_open_ + open_.size() <= number) {
      open_.push_back(std::make_shared<Operation>());
      open_.back()->parts.resize(static_cast<std::size_t>(size_));
    }
    return open_[number - first_open_];
  }

  void check_same(int rank, Operation& op, Verb verb, DType dtype, std::size_t bytes) {
    if (op.present == 0) {
      op.verb = verb;
      op.dtype = dtype;
      op.bytes = bytes;
    } else if (op.verb != verb || op.dtype != dtype || op.bytes != bytes) {
      const std::string why = "rank " + std::to_string(rank) + " calls " + verb_name(verb) +
                              " with " + std::to_string(bytes) + " bytes where others called " +
                              verb_name(op.verb) + " with " + std::to_string(op.bytes);
      fail(why);
      throw TransportError("loopback: " + why);
    }
  }

  void deliver(int sender, int receiver, const std::byte* from, std::byte* to, std::size_t n) {
    if (n == 0) {
      return;
    }
    std::memcpy(to, from, n);
    if (tamper_ && sender != receiver) {
      tamper_(sender, receiver, {to, n});
    }
  }

  void carry_out(const Operation& op) {
    if (op.verb == Verb::kAllreduce) {
      if (op.dtype == DType::kF64) {
        sum_in_rank_order<double>(op);
      } else {
        sum_in_rank_order<float>(op);
      }
      return;
    }
    const bool all = op.verb == Verb::kAllgather;
    const std::size_t block = all ? op.bytes : op.bytes / static_cast<std::size_t>(size_);
    for (int receiver = 0; receiver < size_; ++receiver) {
      for (int sender = 0; sender < size_; ++sender) {
        const std::byte* from = op.parts[index(sender)].in + (all ? 0 : index(receiver) * block);
        deliver(sender, receiver, from, op.parts[index(receiver)].out + index(sender) * block,
                block);
      }
    }
  }

  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<char> taken_;
  std::vector<char> dead_;
  std::vector<int> connection_lost_;
  std::vector<std::uint64_t> next_;              // per rank: number of its next collective
  std::deque<std::shared_ptr<Operation>> open_;  // from number first_open_ on
  std::uint64_t first_open_ = 0;
  bool failed_ = false;
  std::string why_;
  LoopbackGroup::Tamper tamper_;
  std::vector<std::uint64_t> answers_;  // per rank: roll calls answered
};

namespace {

class LoopbackTransfer final : public Transfer {
 public:
  LoopbackTransfer(std::shared_ptr<LoopbackHub> hub, int rank, std::shared_ptr<Operation> op)
      : hub_(std::move(hub)), op_(std::move(op)), rank_(rank) {}
  ~LoopbackTransfer() override { hub_->forget(rank_, *op_); }
  LoopbackTransfer(const LoopbackTransfer&) = delete;
  LoopbackTransfer& operator=(const LoopbackTransfer&) = delete;

  bool done() override { return hub_->done(*op_); }
  void wait(Deadline deadline) override { hub_->wait(rank_, *op_, deadline); }

 private:
  std::shared_ptr<LoopbackHub> hub_;
  std::shared_ptr<Operation> op_;
  int rank_;
};

class LoopbackCommunicator final : public Communicator {
 public:
  LoopbackCommunicator(std::shared_ptr<LoopbackHub> hub, int rank)
      : hub_(std::move(hub)), rank_(rank) {
    hub_->take(rank);
  }
  ~LoopbackCommunicator() override { hub_->leave(rank_); }
  LoopbackCommunicator(const LoopbackCommunicator&) = delete;
  LoopbackCommunicator& operator=(const LoopbackCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return hub_->size(); }
  std::string name() const override { return "loopback"; }
  CommunicatorTraits traits() const override {
    return {.identical_allreduce = true, .survives_failure = true};
  }

  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    if (data.dtype != DType::kF32 && data.dtype != DType::kF64) {
      throw InvalidArgument("loopback allreduce_sum at rank " + std::to_string(rank_) +
                            ": fp32 or fp64 expected, got " +
                            std::string(thinwire::name(data.dtype)));
    }
    auto* bytes = static_cast<std::byte*>(data.data);
    auto transfer = start(Verb::kAllreduce, data.dtype, bytes, bytes, data.bytes());
    sent_bytes_ += ring_allreduce_wire_bytes(data.bytes(), size());
    return transfer;
  }

  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    if (out.size() != in.size() * static_cast<std::size_t>(size())) {
      throw InvalidArgument("loopback allgather at rank " + std::to_string(rank_) + ": out of " +
                            std::to_string(in.size() * static_cast<std::size_t>(size())) +
                            " bytes expected, got " + std::to_string(out.size()));
    }
    auto transfer = start(Verb::kAllgather, DType::kOther, in.data(), out.data(), in.size());
    sent_bytes_ += allgather_wire_bytes(in.size(), size());
    return transfer;
  }

  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    const auto ranks = static_cast<std::size_t>(size());
    if (out.size() != in.size() || in.size() % ranks != 0) {
      throw InvalidArgument("loopback alltoall at rank " + std::to_string(rank_) +
                            ": in and out of the same multiple of " + std::to_string(ranks) +
                            " bytes expected, got " + std::to_string(in.size()) + " and " +
                            std::to_string(out.size()));
    }
    auto transfer = start(Verb::kAlltoall, DType::kOther, in.data(), out.data(), in.size());
    sent_bytes_ += alltoall_wire_bytes(in.size() / ranks, size());
    return transfer;
  }

  std::vector<int> roll_call(std::chrono::milliseconds grace) override {
    return hub_->roll_call(rank_, grace);
  }
  void abort() noexcept override { hub_->abort(rank_); }
  std::uint64_t sent_bytes() const override { return sent_bytes_; }

 private:
  std::unique_ptr<Transfer> start(Verb verb, DType dtype, const std::byte* in, std::byte* out,
                                  std::size_t bytes) {
    return std::make_unique<LoopbackTransfer>(hub_, rank_,
                                              hub_->join(rank_, verb, dtype, in, out, bytes));
  }

  std::shared_ptr<LoopbackHub> hub_;
  int rank_;
  std::uint64_t sent_bytes_ = 0;
};

}  // namespace

LoopbackGroup::LoopbackGroup(int size) {
  if (size < 1) {
    throw InvalidArgument("loopback group of " + std::to_string(size) + " ranks: at least 1");
  }
  hub_ = std::make_shared<LoopbackHub>(size);
}

LoopbackGroup::~LoopbackGroup() = default;

std::unique_ptr<Communicator> LoopbackGroup::communicator(int rank) {
  return std::make_unique<LoopbackCommunicator>(hub_, rank);
}

void LoopbackGroup::kill(int rank, Death death) { hub_->kill(rank, death); }

void LoopbackGroup::tamper(Tamper tamper) { hub_->tamper(std::move(tamper)); }

}  // namespace thinwire
