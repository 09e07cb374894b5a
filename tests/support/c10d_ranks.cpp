#include "tests/support/c10d_ranks.h"

#include <csignal>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <utility>

#include "integrations/torch/csrc/c10d_communicator.h"

namespace thinwire::testing {

namespace {

using Device = std::shared_ptr<gloo::transport::Device>;
using Store = c10::intrusive_ptr<c10d::Store>;

// One event loop for all ranks: with one a rank, most of the time would go to switching threads.
Device loopback_device() {
  // As Python does: Gloo writes to connections that a peer may have closed.
  std::signal(SIGPIPE, SIG_IGN);
  return c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1");
}

// Returns when all ranks are connected. Gloo's constructor may return at one rank before it does at
// another, which the first one must not leave so early.
c10::intrusive_ptr<c10d::Backend> gloo_backend(const Store& store, const Device& device, int rank,
                                               int size) {
  auto options = c10d::ProcessGroupGloo::Options::create(std::chrono::seconds(60));
  options->devices.push_back(device);
  auto backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
      c10::make_intrusive<c10d::PrefixStore>("gloo", store), rank, size, std::move(options));
  std::vector<std::string> keys;
  for (int peer = 0; peer < size; ++peer) {
    keys.push_back("connected/" + std::to_string(peer));
  }
  store->set(keys[static_cast<std::size_t>(rank)], "1");
  store->wait(keys);
  return backend;
}

// A backend of which nothing is known but the verbs of every backend: Gloo under another name.
class OtherBackend final : public c10d::Backend {
 public:
  explicit OtherBackend(c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return "other"; }

  c10::intrusive_ptr<c10d::Work> _allgather_base(at::Tensor& out, at::Tensor& in,
                                                 const c10d::AllgatherOptions& options) override {
    return gloo_->_allgather_base(out, in, options);
  }

  c10::intrusive_ptr<c10d::Work> alltoall_base(at::Tensor& out, at::Tensor& in,
                                               std::vector<std::int64_t>& out_counts,
                                               std::vector<std::int64_t>& in_counts,
                                               const c10d::AllToAllOptions& options) override {
    return gloo_->alltoall_base(out, in, out_counts, in_counts, options);
  }

  // A receive that times out closes Gloo's connections.
  void abort() override {
    constexpr int kUnusedTag = 1 << 20;
    for (int i = 1; i < getSize(); ++i) {
      std::vector<at::Tensor> nothing{at::empty({1}, at::kByte)};
      try {
        gloo_->recv(nothing, (getRank() + i) % getSize(), kUnusedTag)
            ->wait(std::chrono::milliseconds(1));
      } catch (const std::exception&) {
        // the time-out itself
      }
    }
  }

 private:
  c10::intrusive_ptr<c10d::Backend> gloo_;
};

using Wrap = c10::intrusive_ptr<c10d::Backend> (*)(c10::intrusive_ptr<c10d::Backend>);

std::vector<Ranks> groups(const std::string& label, const std::vector<int>& sizes, Wrap wrap) {
  std::vector<Ranks> all;
  for (const int size : sizes) {
    all.push_back(thread_ranks(label, size, [size, wrap] {
      const Store store = c10::make_intrusive<c10d::HashStore>();
      return [size, wrap, store, device = loopback_device()](int rank) {
        return std::make_unique<C10dCommunicator>(wrap(gloo_backend(store, device, rank, size)),
                                                  store);
      };
    }));
  }
  return all;
}

}  // namespace

std::vector<Ranks> c10d_gloo_ranks(const std::vector<int>& sizes) {
  return groups("gloo", sizes, [](c10::intrusive_ptr<c10d::Backend> gloo) { return gloo; });
}

std::vector<Ranks> c10d_other_ranks(const std::vector<int>& sizes) {
  return groups("other", sizes, [](c10::intrusive_ptr<c10d::Backend> gloo) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<OtherBackend>(std::move(gloo)));
  });
}

}  // namespace thinwire::testing
