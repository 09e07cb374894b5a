#include "comm/link_model.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "comm/gather.h"

namespace thinwire {
namespace {

constexpr double kEnough = 0.02;  // seconds of a transfer that say what a byte costs
constexpr std::size_t kFewBytes = 64;
constexpr int kRepeats = 5;
constexpr std::size_t kFirstBytes = 4096;
constexpr std::size_t kMostBytes = std::size_t{1} << 24;
constexpr std::size_t kMostGathered = std::size_t{1} << 26;  // of all ranks
constexpr std::size_t kGrowth = 8;
constexpr std::size_t kTellingBytes = std::size_t{1} << 21;
constexpr double kTelling = 3;  // times what a transfer of few bytes takes, in which noise is lost
// What a clock and a scheduler can tell: no verb costs less.
constexpr double kLeastFixed = 1e-6;
constexpr double kLeastPerByte = 1e-12;

// What the transport writes to as long as it is not done; see gather().
struct Buffers {
  std::vector<float> in;
  std::vector<float> out;
};

class Prober {
 public:
  Prober(Communicator& comm, Deadline deadline) : comm_(comm), deadline_(deadline) {}

  VerbCost probe(Verb verb) {
    seconds(verb, kFewBytes);  // connections may be made with the first
    double few = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kRepeats; ++i) {
      few = std::min(few, seconds(verb, kFewBytes));
    }
    VerbCost cost{.fixed = std::max(few, kLeastFixed), .per_byte = kLeastPerByte};
    const auto ranks = static_cast<std::size_t>(comm_.size());
    for (std::size_t bytes = kFirstBytes; bytes <= kMostBytes; bytes *= kGrowth) {
      if (verb == Verb::kAllgather && bytes * ranks > kMostGathered) break;
      const double took = std::min(seconds(verb, bytes), seconds(verb, bytes));
      const double sent = sent_payload(verb, bytes, comm_.size());
      cost.per_byte = std::max((took - cost.fixed) / sent, kLeastPerByte);
      if (took > kEnough || (bytes >= kTellingBytes && took > kTelling * cost.fixed)) break;
    }
    return cost;
  }

 private:
  // The ranks' least, so that all decide alike.
  double seconds(Verb verb, std::size_t bytes) {
    const double mine = run(verb, bytes);
    const std::vector<double> all = gather<double>(comm_, std::span(&mine, 1), deadline_);
    return *std::min_element(all.begin(), all.end());
  }

  double run(Verb verb, std::size_t bytes) {
    const auto p = static_cast<std::size_t>(comm_.size());
    const std::size_t block = (bytes / sizeof(float) + p - 1) / p;
    auto buffers = std::make_unique<Buffers>();
    buffers->in.resize(verb == Verb::kAllgather ? bytes / sizeof(float) : block * p);
    buffers->out.resize(verb == Verb::kAllgather ? buffers->in.size() * p : block * p);
    const auto in = std::as_writable_bytes(std::span(buffers->in));
    const auto out = std::as_writable_bytes(std::span(buffers->out));
    const auto began = Clock::now();
    try {
      start(verb, *buffers, in, out)->wait(deadline_);
    } catch (...) {
      if (!comm_.traits().survives_failure) static_cast<void>(new auto(std::move(buffers)));
      throw;
    }
    return std::chrono::duration<double>(Clock::now() - began).count();
  }

  std::unique_ptr<Transfer> start(Verb verb, Buffers& buffers, std::span<std::byte> in,
                                  std::span<std::byte> out) {
    switch (verb) {
      case Verb::kAllreduce:
        return comm_.allreduce_sum({.data = buffers.in.data(),
                                    .elements = static_cast<std::int64_t>(buffers.in.size()),
                                    .dtype = DType::kF32});
      case Verb::kAllgather:
        return comm_.allgather(in, out);
      case Verb::kAlltoall:
        return comm_.alltoall(in, out);
    }
    return nullptr;
  }

  Communicator& comm_;
  const Deadline deadline_;
};

}  // namespace

void LinkModel::observe(Verb verb, double sent, double seconds) {
  if (!(seconds > 0) || !std::isfinite(seconds)) {
    return;
  }
  VerbCost& cost = (*this)[verb];
  const double wire = cost.per_byte * sent;
  if (wire > cost.fixed) {
    const double ratio = std::clamp((seconds - cost.fixed) / wire, 1.0 / 8, 8.0);
    cost.per_byte = std::max(cost.per_byte * (1 + ratio) / 2, kLeastPerByte);
  } else {
    const double ratio = std::clamp((seconds - wire) / cost.fixed, 1.0 / 8, 8.0);
    cost.fixed = std::max(cost.fixed * (1 + ratio) / 2, kLeastFixed);
  }
}

LinkModel link_model(const Link& link, int ranks) {
  const double per_byte = 1 / link.bytes_per_second;
  LinkModel model;
  model[Verb::kAllreduce] = {.fixed = ring_allreduce_seconds(link, ranks, 0), .per_byte = per_byte};
  model[Verb::kAllgather] = {.fixed = allgather_seconds(link, ranks, 0), .per_byte = per_byte};
  model[Verb::kAlltoall] = {.fixed = alltoall_seconds(link, ranks, 0), .per_byte = per_byte};
  return model;
}

Link link_of(const LinkModel& model, int ranks) {
  const VerbCost& gather = model[Verb::kAllgather];
  return {.latency_seconds = gather.fixed / std::max(1, ranks - 1),
          .bytes_per_second = 1 / gather.per_byte};
}

LinkModel probe_link(Communicator& comm, Deadline deadline) {
  LinkModel link;
  Prober prober(comm, deadline);
  for (std::size_t verb = 0; verb < kVerbs; ++verb) {
    link.verbs[verb] = prober.probe(static_cast<Verb>(verb));
  }
  return link;
}

}  // namespace thinwire
