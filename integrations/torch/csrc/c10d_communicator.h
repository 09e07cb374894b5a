// A thinwire::Communicator over a c10d backend: the transport of PyTorch jobs. The backend is a
// private one over the group's ranks, made by the Python side; its verbs are called directly on
// memory wrapped by at::from_blob, without the GIL. Thread safety as communicator.h; owns its share
// of backend and store, never the memory.
//
// Failure: the first failed wait closes the group's connections, so that every peer blocked in it
// fails at once, too, instead of at its own deadline.
//
// Gloo is the backend this is tuned to. Beside it small blocks go over connections of their own
// (comm/asio/peer_connections.h); larger ones go over Gloo, whose thread moves them while the
// caller does something else, and so does what those connections have no room for. Of any other it
// needs _allgather_base and alltoall_base on CPU tensors of bytes, fp32 and fp64, and an abort()
// that ends the work in flight; none promises that its own allreduce gives the same bits
// everywhere, so there the sum of n bytes sends (P-1) n and needs a buffer of P n.
#pragma once

#include <ATen/ATen.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "comm/asio/peer_connections.h"
#include "comm/communicator.h"

namespace thinwire {

struct C10dOptions {
  // The rank of this group whose process serves the store; -1 when none of them does. A store that
  // does not answer the roll call convicts it.
  int store_host = -1;
  // How long the ranks may take to connect.
  std::chrono::milliseconds connect_limit{60'000};
};

class C10dCommunicator final : public Communicator {
 public:
  // `store` holds keys of this group only (a PrefixStore) over a connection of its own. Collective
  // over Gloo, since it connects the ranks: TransportError names those that could not be reached.
  C10dCommunicator(c10::intrusive_ptr<c10d::Backend> backend, c10::intrusive_ptr<c10d::Store> store,
                   C10dOptions options = {});
  // After a failure the backend is destroyed on a thread of its own: its destructor waits for
  // threads that may still be blocked.
  ~C10dCommunicator() override;

  int rank() const override { return backend_->getRank(); }
  int size() const override { return backend_->getSize(); }
  std::string name() const override { return "c10d:" + backend_name_; }
  CommunicatorTraits traits() const override;

  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override;
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override;
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override;

  std::vector<int> roll_call(std::chrono::milliseconds grace) override;
  void abort() noexcept override;
  std::uint64_t sent_bytes() const override { return sent_bytes_; }

 private:
  class WorkTransfer;
  class MeshTransfer;

  // Runs `start` unless the group has failed; a throw becomes TransportError.
  template <typename Start>
  std::unique_ptr<Transfer> issue(const char* what, Start&& start);

  void connect_peers();
  void check_blocks(const char* what, std::size_t expected, std::size_t got) const;
  const MessageFraming& framing(std::size_t block) const;
  int next_tag();
  std::unique_ptr<Transfer> sum_of_allgather(at::Tensor data);

  c10::intrusive_ptr<c10d::Backend> backend_;
  c10::intrusive_ptr<c10d::Store> store_;
  C10dOptions options_;
  std::string backend_name_;
  bool is_gloo_;
  std::unique_ptr<PeerConnections> peers_;  // for small blocks; none but beside Gloo
  int tag_ = 0;
  std::atomic<bool> aborted_{false};
  std::atomic<std::uint64_t> sent_bytes_{0};
};

}  // namespace thinwire
