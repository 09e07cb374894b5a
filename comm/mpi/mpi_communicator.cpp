#include "comm/mpi/mpi_communicator.h"

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <utility>

#include "comm/wire_bytes.h"

namespace thinwire {

namespace {

// Open MPI over TCP: a fragment carries up to 64 KiB (btl_tcp's eager limit and larger) behind a
// header of some 32 bytes (8 of btl_tcp and up to 24 of ob1).
constexpr std::uint64_t kHeaderBytes = 32;

std::string mpi_error(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  if (MPI_Error_string(code, text, &length) != MPI_SUCCESS) {
    return "MPI error " + std::to_string(code);
  }
  return {text, static_cast<std::size_t>(length)};
}

void check(int code, const char* call, int rank) {
  if (code != MPI_SUCCESS) {
    throw TransportError(std::string(call) + " at rank " + std::to_string(rank) +
                         " failed: " + mpi_error(code));
  }
}

// A contiguous datatype of `bytes` bytes, more than an int can count.
class Block {
 public:
  Block(std::size_t bytes, std::size_t max_count) {
    const std::size_t chunk = std::min(max_count, std::size_t{1} << 20);
    const std::size_t chunks = bytes / chunk;
    if (chunks > max_count) {
      throw InvalidArgument("an MPI message of " + std::to_string(bytes) + " bytes: at most " +
                            std::to_string(chunk * max_count));
    }
    MPI_Datatype parts[2];
    MPI_Type_contiguous(static_cast<int>(chunk), MPI_BYTE, &parts[0]);
    MPI_Type_contiguous(static_cast<int>(bytes % chunk), MPI_BYTE, &parts[1]);
    const int counts[2] = {static_cast<int>(chunks), 1};
    const MPI_Aint offsets[2] = {0, static_cast<MPI_Aint>(chunks * chunk)};
    MPI_Type_create_struct(2, counts, offsets, parts, &type_);
    MPI_Type_commit(&type_);
    MPI_Type_free(&parts[0]);
    MPI_Type_free(&parts[1]);
  }
  // MPI keeps the type until transfers that use it are done.
  ~Block() { MPI_Type_free(&type_); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  MPI_Datatype type() const { return type_; }

 private:
  MPI_Datatype type_ = MPI_DATATYPE_NULL;
};

// Waits between two polls: spin while the answer may come within microseconds, give the core to a
// peer on the same machine next, sleep when the wire is the slow part.
class BackOff {
 public:
  void pause() {
    ++polls_;
    if (polls_ <= kSpins) {
      return;
    }
    if (polls_ <= kSpins + kYields) {
      std::this_thread::yield();
      return;
    }
    std::this_thread::sleep_for(sleep_);
    sleep_ = std::min(sleep_ * 5 / 4, std::chrono::microseconds(200));
  }

 private:
  static constexpr int kSpins = 20;
  static constexpr int kYields = 200;
  int polls_ = 0;
  std::chrono::microseconds sleep_{20};
};

struct Shared {
  MPI_Comm comm = MPI_COMM_NULL;
  int rank = 0;
  std::atomic<bool> aborted{false};
  std::atomic<bool> failed{false};
};

class MpiTransfer final : public Transfer {
 public:
  explicit MpiTransfer(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}

  // The slot of one more request, to be filled by the caller at once.
  MPI_Request* add() { return &requests_.emplace_back(MPI_REQUEST_NULL); }
  void reserve(std::size_t requests) { requests_.reserve(requests); }

  bool done() override {
    if (finished_ || error_ != MPI_SUCCESS || shared_->aborted) {
      return true;
    }
    int flag = 0;
    error_ = requests_.size() == 1 ? MPI_Test(requests_.data(), &flag, MPI_STATUS_IGNORE)
                                   : MPI_Testall(static_cast<int>(requests_.size()),
                                                 requests_.data(), &flag, MPI_STATUSES_IGNORE);
    finished_ = error_ == MPI_SUCCESS && flag != 0;
    return finished_ || error_ != MPI_SUCCESS;
  }

  void wait(Deadline deadline) override {
    BackOff back_off;
    while (!done()) {
      if (Clock::now() >= deadline) {
        shared_->failed = true;
        throw TransportError("mpi transfer at rank " + std::to_string(shared_->rank) +
                             " did not end by its deadline");
      }
      back_off.pause();
    }
    if (finished_) {
      return;
    }
    shared_->failed = true;
    check(error_, "MPI_Test", shared_->rank);
    throw TransportError("mpi transfer at rank " + std::to_string(shared_->rank) + " was aborted");
  }

 private:
  std::shared_ptr<Shared> shared_;
  std::vector<MPI_Request> requests_;
  bool finished_ = false;
  int error_ = MPI_SUCCESS;
};

class MpiCommunicator final : public Communicator {
 public:
  MpiCommunicator(MPI_Comm parent, MpiOptions options)
      : options_(options), shared_(std::make_shared<Shared>()) {
    int flag = 0;
    MPI_Initialized(&flag);
    if (flag == 0) {
      throw Error("MPI is not initialised\nhint: call MPI_Init_thread before");
    }
    MPI_Finalized(&flag);
    if (flag != 0) {
      throw Error("MPI is finalised already\nhint: make communicators before MPI_Finalize");
    }
    int level = MPI_THREAD_SINGLE;
    MPI_Query_thread(&level);
    if (level < MPI_THREAD_MULTIPLE) {
      throw Error("MPI was initialised with thread level " + std::to_string(level) +
                  ", MPI_THREAD_MULTIPLE (" + std::to_string(MPI_THREAD_MULTIPLE) +
                  ") is needed\nhint: MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, "
                  "&provided)");
    }
    check(MPI_Comm_dup(parent, &shared_->comm), "MPI_Comm_dup", 0);
    MPI_Comm_set_errhandler(shared_->comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(shared_->comm, &rank_);
    MPI_Comm_size(shared_->comm, &size_);
    shared_->rank = rank_;
  }

  ~MpiCommunicator() override {
    int finalized = 0;
    MPI_Finalized(&finalized);
    // A failed group has transfers that never end; freeing it would wait for them.
    if (finalized == 0 && !shared_->failed && !shared_->aborted) {
      MPI_Comm_free(&shared_->comm);
    }
  }
  MpiCommunicator(const MpiCommunicator&) = delete;
  MpiCommunicator& operator=(const MpiCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "mpi"; }
  // Identical bits: comm/ALGORITHMS.md, and the tests.
  CommunicatorTraits traits() const override {
    return {.identical_allreduce = true, .survives_failure = false};
  }

  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    if (data.dtype != DType::kF32 && data.dtype != DType::kF64) {
      throw InvalidArgument("mpi allreduce_sum at rank " + std::to_string(rank_) +
                            ": fp32 or fp64 expected, got " +
                            std::string(thinwire::name(data.dtype)));
    }
    auto transfer = begin();
    const MPI_Datatype type = data.dtype == DType::kF32 ? MPI_FLOAT : MPI_DOUBLE;
    const auto chunk = static_cast<std::int64_t>(options_.max_count);
    transfer->reserve(static_cast<std::size_t>(data.elements / chunk + 1));
    for (std::int64_t at = 0; at < data.elements; at += chunk) {
      const TensorView part = data.slice(at, std::min(at + chunk, data.elements));
      check(MPI_Iallreduce(MPI_IN_PLACE, part.data, static_cast<int>(part.elements), type, MPI_SUM,
                           shared_->comm, transfer->add()),
            "MPI_Iallreduce", rank_);
      sent_bytes_ += binomial_wire_bytes(part.bytes());
    }
    return transfer;
  }

  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    if (out.size() != in.size() * static_cast<std::size_t>(size_)) {
      throw InvalidArgument("mpi allgather at rank " + std::to_string(rank_) + ": out of " +
                            std::to_string(in.size() * static_cast<std::size_t>(size_)) +
                            " bytes expected, got " + std::to_string(out.size()));
    }
    auto transfer = begin();
    if (in.empty()) {
      return transfer;
    }
    with_block(in.size(), [&](int count, MPI_Datatype type) {
      check(MPI_Iallgather(in.data(), count, type, out.data(), count, type, shared_->comm,
                           transfer->add()),
            "MPI_Iallgather", rank_);
    });
    sent_bytes_ += allgather_wire_bytes(in.size(), size_, {.header = kHeaderBytes});
    return transfer;
  }

  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    const auto ranks = static_cast<std::size_t>(size_);
    if (out.size() != in.size() || in.size() % ranks != 0) {
      throw InvalidArgument("mpi alltoall at rank " + std::to_string(rank_) +
                            ": in and out of the same multiple of " + std::to_string(ranks) +
                            " bytes expected, got " + std::to_string(in.size()) + " and " +
                            std::to_string(out.size()));
    }
    auto transfer = begin();
    if (in.empty()) {
      return transfer;
    }
    with_block(in.size() / ranks, [&](int count, MPI_Datatype type) {
      check(MPI_Ialltoall(in.data(), count, type, out.data(), count, type, shared_->comm,
                          transfer->add()),
            "MPI_Ialltoall", rank_);
    });
    sent_bytes_ += alltoall_wire_bytes(in.size() / ranks, size_, {.header = kHeaderBytes});
    return transfer;
  }

  std::vector<int> roll_call(std::chrono::milliseconds /*grace*/) override { return {}; }
  void abort() noexcept override { shared_->aborted = true; }
  std::uint64_t sent_bytes() const override { return sent_bytes_; }

 private:
  std::unique_ptr<MpiTransfer> begin() {
    if (shared_->aborted || shared_->failed) {
      throw TransportError("mpi group at rank " + std::to_string(rank_) +
                           " is unusable: a transfer failed or it was aborted");
    }
    return std::make_unique<MpiTransfer>(shared_);
  }

  template <typename Call>
  void with_block(std::size_t bytes, Call&& call) {
    if (bytes <= options_.max_count) {
      call(static_cast<int>(bytes), MPI_BYTE);
    } else {
      const Block block(bytes, options_.max_count);
      call(1, block.type());
    }
  }

  // Open MPI's in-place MPI_Iallreduce: a binomial tree to rank 0, to which every other rank sends
  // its data once, and another one back, in which rank r has the children r + 2^k for all 2^k > r.
  std::uint64_t binomial_wire_bytes(std::size_t bytes) const {
    std::uint64_t messages = rank_ == 0 ? 0 : 1;
    for (int bit = 1; bit < size_; bit *= 2) {
      messages += bit > rank_ && rank_ + bit < size_ ? 1 : 0;
    }
    return messages_wire_bytes(messages, bytes, {.header = kHeaderBytes});
  }

  MpiOptions options_;
  std::shared_ptr<Shared> shared_;
  int rank_ = 0;
  int size_ = 1;
  std::uint64_t sent_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_mpi_communicator(MPI_Comm parent, MpiOptions options) {
  return std::make_unique<MpiCommunicator>(parent, options);
}

}  // namespace thinwire
