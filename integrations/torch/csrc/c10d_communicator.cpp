#include "integrations/torch/csrc/c10d_communicator.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <string_view>
#include <thread>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>

#include "comm/wire_bytes.h"

namespace thinwire {
namespace {

using std::chrono::milliseconds;

// Tags of messages are below it, far more than can be in flight.
constexpr int kUnusedTags = 1 << 20;

// What a rank publishes before its error where it has no address.
constexpr std::string_view kNoAddress = "none: ";

// Blocks up to this size go over connections of their own, where there is room for them.
constexpr std::size_t kSmallBlockBytes = 64 * 1024;

at::Tensor bytes_tensor(std::span<const std::byte> bytes) {
  return at::from_blob(const_cast<std::byte*>(bytes.data()),
                       {static_cast<std::int64_t>(bytes.size())}, at::TensorOptions(at::kByte));
}

std::string failure(const char* what, int rank, bool late, const char* cause) {
  return std::string(what) + " on rank " + std::to_string(rank) +
         (late ? " did not finish before the deadline" : std::string(" failed: ") + cause);
}

milliseconds until(Deadline deadline) {
  const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
  return std::max(left, milliseconds(1));  // c10d reads 0 as "no timeout"
}

// What the roll call has found; shared with a thread that may outlive the communicator, since a
// store whose host is stuck never returns.
struct RollCall {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<char> present;
  bool store_answered = false;
  bool finished = false;
};

std::string roll_call_key(int rank) { return "present/" + std::to_string(rank); }

void look_for_peers(const c10::intrusive_ptr<c10d::Store>& store, int rank, Deadline end,
                    const std::shared_ptr<RollCall>& call) {
  try {
    store->set(roll_call_key(rank), "1");
    std::vector<char> present(call->present.size(), 0);
    for (;;) {
      std::size_t found = 0;
      for (std::size_t peer = 0; peer < present.size(); ++peer) {
        if (!present[peer]) {
          present[peer] = store->check({roll_call_key(static_cast<int>(peer))});
        }
        found += present[peer] ? 1 : 0;
      }
      {
        const std::lock_guard lock(call->mutex);
        call->present = present;
        call->store_answered = true;
      }
      if (found == present.size() || Clock::now() >= end) {
        break;
      }
      std::this_thread::sleep_for(milliseconds(20));
    }
  } catch (const std::exception&) {
    // The store is gone, or went with its host when that had seen enough: what it said stands.
  }
  const std::lock_guard lock(call->mutex);
  call->finished = true;
  call->changed.notify_all();
}

}  // namespace

// A collective of the backend's own. The first wait() that succeeds runs `finish`.
class C10dCommunicator::WorkTransfer final : public Transfer {
 public:
  WorkTransfer(C10dCommunicator& comm, const char* what, c10::intrusive_ptr<c10d::Work> work,
               std::function<void()> finish = nullptr)
      : comm_(comm), what_(what), work_(std::move(work)), finish_(std::move(finish)) {}

  // The memory is the caller's: never leave it to a transfer still running. Only after abort() can
  // one be destroyed undone, and then it ends at once.
  ~WorkTransfer() override {
    try {
      if (!work_->isCompleted()) {
        work_->wait();
      }
    } catch (const std::exception&) {
    }
  }

  bool done() override { return work_->isCompleted(); }

  void wait(Deadline deadline) override {
    try {
      work_->wait(until(deadline));
    } catch (const std::exception& error) {
      const bool late = !work_->isCompleted();
      comm_.abort();
      throw TransportError(failure(what_, comm_.rank(), late, error.what()));
    }
    if (finish_) {
      std::exchange(finish_, nullptr)();
    }
  }

 private:
  C10dCommunicator& comm_;
  const char* what_;
  c10::intrusive_ptr<c10d::Work> work_;
  std::function<void()> finish_;
};

// One message to and one from each peer, sent by the caller's thread: Gloo's own collectives wake a
// worker for each step. Small blocks are received by that thread, too.
class C10dCommunicator::MeshTransfer final : public Transfer {
 public:
  // Block p of `in` goes to rank p (all of `in`, where there is one block), block p of `out` comes
  // from it.
  MeshTransfer(C10dCommunicator& comm, const char* what, std::span<const std::byte> in,
               std::span<std::byte> out)
      : comm_(comm), what_(what), out_(out), block_(out.size() / peers()) {
    if (block_ == 0) {
      return;
    }
    const bool one_block = in.size() == block_;
    const auto outgoing = [&](int p) { return one_block ? in : block_of(in, p); };
    tag_ = comm.next_tag();
    const bool small = comm.peers_ && block_ <= kSmallBlockBytes;
    if (small) {
      receipts_.assign(peers(), Receipt::kHere);
    }
    // Receives first: a sender over Gloo that finds one posted sends at once.
    for (int i = 1; i < comm.size(); ++i) {
      const int peer = (comm.rank() + comm.size() - i) % comm.size();
      if (small) {
        comm.peers_->receive(peer, block_of(out, peer), receipts_[static_cast<std::size_t>(peer)],
                             [this, peer] { fetch(peer); });
      } else {
        fetch(peer);
      }
    }
    for (int i = 1; i < comm.size(); ++i) {
      const int peer = (comm.rank() + i) % comm.size();
      if (!small || !comm.peers_->send(peer, outgoing(peer))) {
        std::vector<at::Tensor> tensors{bytes_tensor(outgoing(peer))};
        works_.push_back(comm.backend_->send(tensors, peer, tag_));
      }
    }
    const auto own = outgoing(comm.rank());
    std::memmove(block_of(out, comm.rank()).data(), own.data(), block_);
  }

  // Gloo cannot be asked whether a message has come without waiting for it.
  bool done() override {
    if (!error_.empty() || comm_.aborted_) {
      return true;
    }
    if (receipts_.empty()) {
      return next_ == works_.size();
    }
    comm_.peers_->poll();
    bool all = next_ == works_.size() && comm_.peers_->flushed();
    for (std::size_t peer = 0; peer < receipts_.size(); ++peer) {
      if (receipts_[peer] == Receipt::kPending) {
        if (comm_.peers_->failed(static_cast<int>(peer))) {
          return true;
        }
        all = false;
      }
    }
    return all;
  }

  void wait(Deadline deadline) override {
    if (!error_.empty()) {
      throw TransportError(error_);
    }
    try {
      for (const Receipt& receipt : receipts_) {
        comm_.peers_->wait(receipt, deadline);
      }
      if (!receipts_.empty()) {
        comm_.peers_->flush(deadline);
      }
      for (; next_ < works_.size(); ++next_) {
        works_[next_]->wait(until(deadline));
      }
    } catch (const std::exception& error) {
      const bool late = Clock::now() >= deadline;
      error_ = failure(what_, comm_.rank(), late, error.what());
      comm_.abort();
      throw TransportError(error_);
    }
  }

 private:
  using Receipt = PeerConnections::Receipt;

  std::size_t peers() const { return static_cast<std::size_t>(comm_.size()); }
  template <typename Bytes>
  Bytes block_of(Bytes bytes, int peer) const {
    return bytes.subspan(static_cast<std::size_t>(peer) * block_, block_);
  }

  // Receives that block over Gloo.
  void fetch(int peer) {
    std::vector<at::Tensor> tensors{bytes_tensor(block_of(out_, peer))};
    works_.push_back(comm_.backend_->recv(tensors, peer, tag_));
  }

  C10dCommunicator& comm_;
  const char* what_;
  std::span<std::byte> out_;
  std::size_t block_;
  int tag_ = 0;
  std::vector<Receipt> receipts_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
  std::size_t next_ = 0;
  std::string error_;
};

C10dCommunicator::C10dCommunicator(c10::intrusive_ptr<c10d::Backend> backend,
                                   c10::intrusive_ptr<c10d::Store> store, C10dOptions options)
    : backend_(std::move(backend)),
      store_(std::move(store)),
      options_(options),
      backend_name_(backend_->getBackendName()),
      is_gloo_(backend_name_ == "gloo") {
  if (is_gloo_ && size() > 1) {
    connect_peers();
  }
}

C10dCommunicator::~C10dCommunicator() {
  if (aborted_) {
    std::thread([backend = std::move(backend_)]() mutable { backend.reset(); }).detach();
  }
}

// Each rank's address, or why it has none, is exchanged by the store.
void C10dCommunicator::connect_peers() {
  const Deadline deadline = Clock::now() + options_.connect_limit;
  std::vector<std::string> keys;
  for (int peer = 0; peer < size(); ++peer) {
    keys.push_back("address/" + std::to_string(peer));
  }
  const auto publish = [&](const std::string& text) {
    store_->set(keys[static_cast<std::size_t>(rank())],
                std::vector<std::uint8_t>(text.begin(), text.end()));
  };
  try {
    peers_ = std::make_unique<PeerConnections>(rank(), size(), default_peer_host());
  } catch (const TransportError& error) {
    publish(std::string(kNoAddress) + error.what());
    throw;
  }
  std::vector<std::string> addresses;
  try {
    publish(peers_->address());
    store_->wait(keys, until(deadline));
    for (const std::string& key : keys) {
      const std::vector<std::uint8_t> bytes = store_->get(key);
      addresses.emplace_back(bytes.begin(), bytes.end());
    }
  } catch (const std::exception& error) {
    throw TransportError("rank " + std::to_string(rank()) +
                         " did not learn the addresses of all ranks: " + error.what() +
                         "\nhint: call thinwire.torch.compress() on every rank, for the same "
                         "models in the same order");
  }
  for (const std::string& address : addresses) {
    if (address.starts_with(kNoAddress)) {
      throw TransportError(address.substr(kNoAddress.size()));
    }
  }
  peers_->connect(addresses, deadline);
}

CommunicatorTraits C10dCommunicator::traits() const {
  // Gloo reduces each chunk in ring order at one rank and sends the sum to all; for other backends
  // each rank sums in rank order.
  return {.identical_allreduce = true, .survives_failure = true};
}

template <typename Start>
std::unique_ptr<Transfer> C10dCommunicator::issue(const char* what, Start&& start) {
  if (aborted_) {
    throw TransportError(std::string(what) + ": the group was aborted");
  }
  try {
    return start();
  } catch (const std::exception& error) {
    abort();
    throw TransportError(std::string(what) + " on rank " + std::to_string(rank()) +
                         " could not start: " + error.what());
  }
}

std::unique_ptr<Transfer> C10dCommunicator::allreduce_sum(TensorView data) {
  if (data.dtype != DType::kF32 && data.dtype != DType::kF64) {
    throw InvalidArgument("allreduce_sum: expected fp32 or fp64, got " +
                          std::string(thinwire::name(data.dtype)));
  }
  at::Tensor tensor = at::from_blob(data.data, {data.elements},
                                    data.dtype == DType::kF32 ? at::kFloat : at::kDouble);
  if (!is_gloo_) {
    return sum_of_allgather(std::move(tensor));
  }
  sent_bytes_ += gloo_allreduce_wire_bytes(data.bytes(), size());
  return issue("allreduce", [&] {
    std::vector<at::Tensor> tensors{tensor};
    return std::make_unique<WorkTransfer>(*this, "allreduce", backend_->allreduce(tensors));
  });
}

std::unique_ptr<Transfer> C10dCommunicator::sum_of_allgather(at::Tensor data) {
  sent_bytes_ += allgather_wire_bytes(data.nbytes(), size(), kGlooFraming);
  return issue("allreduce", [&]() -> std::unique_ptr<Transfer> {
    if (data.numel() == 0) {
      return std::make_unique<MeshTransfer>(*this, "allreduce", std::span<const std::byte>(),
                                            std::span<std::byte>());
    }
    at::Tensor all = at::empty({size() * data.numel()}, data.options());
    auto work = backend_->_allgather_base(all, data);
    const auto sum = [all, data, ranks = size()] {
      const std::vector<at::Tensor> blocks = all.view({ranks, data.numel()}).unbind();
      data.copy_(blocks[0]);
      for (std::size_t rank = 1; rank < blocks.size(); ++rank) {
        data.add_(blocks[rank]);
      }
    };
    return std::make_unique<WorkTransfer>(*this, "allreduce", std::move(work), sum);
  });
}

std::unique_ptr<Transfer> C10dCommunicator::allgather(std::span<const std::byte> in,
                                                      std::span<std::byte> out) {
  check_blocks("allgather", in.size() * static_cast<std::size_t>(size()), out.size());
  sent_bytes_ += allgather_wire_bytes(in.size(), size(), framing(in.size()));
  return issue("allgather", [&]() -> std::unique_ptr<Transfer> {
    if (is_gloo_ || out.empty()) {
      return std::make_unique<MeshTransfer>(*this, "allgather", in, out);
    }
    at::Tensor input = bytes_tensor(in);
    at::Tensor output = bytes_tensor(out);
    return std::make_unique<WorkTransfer>(*this, "allgather",
                                          backend_->_allgather_base(output, input));
  });
}

std::unique_ptr<Transfer> C10dCommunicator::alltoall(std::span<const std::byte> in,
                                                     std::span<std::byte> out) {
  check_blocks("alltoall", in.size(), out.size());
  const std::size_t block = in.size() / static_cast<std::size_t>(size());
  sent_bytes_ += alltoall_wire_bytes(block, size(), framing(block));
  return issue("alltoall", [&]() -> std::unique_ptr<Transfer> {
    if (is_gloo_ || out.empty()) {
      return std::make_unique<MeshTransfer>(*this, "alltoall", in, out);
    }
    at::Tensor input = bytes_tensor(in);
    at::Tensor output = bytes_tensor(out);
    std::vector<std::int64_t> equal;
    return std::make_unique<WorkTransfer>(*this, "alltoall",
                                          backend_->alltoall_base(output, input, equal, equal));
  });
}

void C10dCommunicator::check_blocks(const char* what, std::size_t expected, std::size_t got) const {
  if (expected != got || got % static_cast<std::size_t>(size()) != 0) {
    throw InvalidArgument(std::string(what) + " over " + std::to_string(size()) +
                          " ranks: expected an output of " + std::to_string(expected) +
                          " bytes in equal blocks, got " + std::to_string(got));
  }
}

// Blocks that are announced and then sent over Gloo, which is rare, are not told apart.
const MessageFraming& C10dCommunicator::framing(std::size_t block) const {
  return peers_ && block <= kSmallBlockBytes ? kPeerFraming : kGlooFraming;
}

int C10dCommunicator::next_tag() { return std::exchange(tag_, (tag_ + 1) % kUnusedTags); }

std::vector<int> C10dCommunicator::roll_call(milliseconds grace) {
  auto call = std::make_shared<RollCall>();
  call->present.assign(static_cast<std::size_t>(size()), 0);
  std::thread([store = store_, rank = rank(), end = Clock::now() + grace, call] {
    look_for_peers(store, rank, end, call);
  }).detach();

  std::unique_lock lock(call->mutex);
  call->changed.wait_for(lock, grace + milliseconds(500), [&] { return call->finished; });
  if (!call->store_answered) {
    return options_.store_host >= 0 && options_.store_host != rank()
               ? std::vector<int>{options_.store_host}
               : std::vector<int>{};
  }
  std::vector<int> missing;
  for (int peer = 0; peer < size(); ++peer) {
    if (!call->present[static_cast<std::size_t>(peer)]) {
      missing.push_back(peer);
    }
  }
  return missing;
}

void C10dCommunicator::abort() noexcept {
  if (aborted_.exchange(true)) {
    return;
  }
  try {
    backend_->abort();
  } catch (...) {
  }
  if (peers_) {
    peers_->abort();
  }
  if (is_gloo_) {
    // Gloo has no abort, but a receive that times out closes all connections of its context, and
    // contexts (one a network interface) serve tags in turn. A peer whose connection is closed
    // already refuses at once; then the next one's is tried.
    constexpr int kContexts = 8;
    for (int tag = kUnusedTags; tag < kUnusedTags + kContexts; ++tag) {
      for (int i = 1; i < size(); ++i) {
        try {
          std::vector<at::Tensor> nothing{at::empty({1}, at::kByte)};
          backend_->recv(nothing, (rank() + i) % size(), tag)->wait(milliseconds(1));
        } catch (...) {
        }
      }
    }
  }
}

}  // namespace thinwire
