// The start-up handshake against a peer that may send anything: the first 16 bytes are its hello,
// what follows its text. Only the library's own errors may come out.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "comm/handshake.h"

namespace {

using namespace thinwire;

class Done final : public Transfer {
 public:
  bool done() override { return true; }
  void wait(Deadline /*deadline*/) override {}
};

// Rank 0 of two; rank 1 reads its blocks from `script`, zeros where that ends.
class Scripted final : public Communicator {
 public:
  explicit Scripted(std::span<const std::byte> script) : script_(script) {}

  int rank() const override { return 0; }
  int size() const override { return 2; }
  std::string name() const override { return "scripted"; }
  CommunicatorTraits traits() const override { return {}; }
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    const auto peer = std::copy(in.begin(), in.end(), out.begin());
    const auto sent = script_.first(std::min(in.size(), script_.size()));
    std::fill(std::copy(sent.begin(), sent.end(), peer), out.end(), std::byte{0});
    script_ = script_.subspan(sent.size());
    return std::make_unique<Done>();
  }
  std::unique_ptr<Transfer> allreduce_sum(TensorView /*data*/) override { refuse(); }
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> /*in*/,
                                     std::span<std::byte> /*out*/) override {
    refuse();
  }
  std::vector<int> roll_call(std::chrono::milliseconds /*grace*/) override { return {}; }
  void abort() noexcept override {}
  std::uint64_t sent_bytes() const override { return 0; }

 private:
  [[noreturn]] static void refuse() { throw std::logic_error("a handshake only gathers"); }

  std::span<const std::byte> script_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Scripted comm(std::as_bytes(std::span(data, size)));
  try {
    shake_hands(comm, {{"version", "1"}, {"policy", "topk:0.01"}, {"layer 0", "a.weight 3x4"}},
                Clock::now());
  } catch (const MismatchError&) {
  } catch (const CorruptPayload&) {
  }
  return 0;
}
