#include "comm/gloo/gloo_communicator.h"

#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/alltoall.h>
#include <gloo/barrier.h>
#include <gloo/math.h>
#include <gloo/rendezvous/context.h>
#include <gloo/transport/tcp/device.h>

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

#include "comm/wire_bytes.h"

namespace thinwire {

namespace {

using std::chrono::milliseconds;
using ContextPtr = std::shared_ptr<gloo::Context>;

// A rank that leaves resets its connections, so that bytes which its peers have not read are lost:
// it waits this long for all to come to the end.
constexpr milliseconds kGoodbye{2'000};
// After abort: for the collective in flight to let go of the caller's memory.
constexpr milliseconds kLetGo{10'000};

milliseconds until(Deadline deadline) {
  return std::max(milliseconds(1),
                  std::chrono::duration_cast<milliseconds>(deadline - Clock::now()));
}

// Gloo writes to sockets without MSG_NOSIGNAL: a peer that closed would end this process. While it
// lives, the calling thread, and threads that it starts, get the error code alone.
class SigpipeBlocked {
 public:
  SigpipeBlocked() {
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, &before_);
  }
  ~SigpipeBlocked() {
    if (sigismember(&before_, SIGPIPE) == 0) {
      // A pending one belongs to this thread: taken back before the mask is.
      sigset_t pipe;
      sigemptyset(&pipe);
      sigaddset(&pipe, SIGPIPE);
      const timespec now{};
      while (sigtimedwait(&pipe, nullptr, &now) == SIGPIPE) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }
  SigpipeBlocked(const SigpipeBlocked&) = delete;
  SigpipeBlocked& operator=(const SigpipeBlocked&) = delete;

 private:
  sigset_t before_;
};

struct Job {
  std::function<void()> work;
  bool done = false;
  std::exception_ptr error;
};

// Runs jobs one after the other on its own thread. Thread-safe.
class OrderedExecutor {
 public:
  OrderedExecutor() : thread_([this] { run(); }) {}
  // Runs what was submitted, then ends.
  ~OrderedExecutor() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  OrderedExecutor(const OrderedExecutor&) = delete;
  OrderedExecutor& operator=(const OrderedExecutor&) = delete;

  std::shared_ptr<Job> submit(std::function<void()> work) {
    auto job = std::make_shared<Job>();
    job->work = std::move(work);
    {
      const std::lock_guard lock(mutex_);
      jobs_.push_back(job);
    }
    changed_.notify_all();
    return job;
  }

  bool done(const Job& job) {
    const std::lock_guard lock(mutex_);
    return job.done;
  }

  // False when the deadline passes first; rethrows what the job threw.
  bool wait(const Job& job, Deadline deadline) {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_until(lock, deadline, [&] { return job.done; })) {
      return false;
    }
    if (job.error) {
      std::rethrow_exception(job.error);
    }
    return true;
  }

 private:
  void run() {
    const SigpipeBlocked sigpipe;
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return stop_ || !jobs_.empty(); });
      if (jobs_.empty()) {
        return;
      }
      const std::shared_ptr<Job> job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      std::exception_ptr error;
      try {
        job->work();
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      job->work = nullptr;
      job->error = error;
      job->done = true;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Job>> jobs_;
  bool stop_ = false;
  std::thread thread_;  // last: it uses the others
};

// The connections and their fate; shared with transfers, which may outlive the communicator.
class Group {
 public:
  Group(int rank, int size, gloo::rendezvous::Store& store, const GlooOptions& options)
      : rank_(rank), options_(options) {
    if (size == 1) {
      return;
    }
    const SigpipeBlocked sigpipe;  // for the event loop's thread, which the device starts
    try {
      gloo::transport::tcp::attr attr;
      attr.hostname = options.hostname;
      attr.iface = options.interface;
      auto device = gloo::transport::tcp::CreateDevice(attr);
      auto context = std::make_shared<gloo::rendezvous::Context>(rank, size);
      context->setTimeout(options.connect_timeout);
      context->connectFullMesh(store, device);
      context->setTimeout(options.collective_timeout);
      context_ = context;
    } catch (const std::exception& error) {
      throw TransportError("gloo rank " + std::to_string(rank) + " of " + std::to_string(size) +
                           " could not connect to its peers: " + error.what());
    }
  }

  void refuse_if_unusable() const {
    if (unusable_) {
      throw TransportError("gloo group at rank " + std::to_string(rank_) +
                           " is unusable: a transfer failed or it was aborted");
    }
  }

  bool unusable() const { return unusable_; }

  const ContextPtr& context() const { return context_; }

  using Buffer = gloo::transport::UnboundBuffer;

  // The buffers whose waits close() must end; for as long as it lives, within the buffers' life.
  class Interruptible {
   public:
    Interruptible(Group& group, std::vector<Buffer*> buffers) : group_(group) {
      const std::lock_guard lock(group_.waits_mutex_);
      group_.waits_ = std::move(buffers);
    }
    ~Interruptible() {
      const std::lock_guard lock(group_.waits_mutex_);
      group_.waits_.clear();
    }
    Interruptible(const Interruptible&) = delete;
    Interruptible& operator=(const Interruptible&) = delete;

   private:
    Group& group_;
  };

  // On the executor's thread.
  void collective(const char* verb, const std::function<void(Group&)>& work) {
    refuse_if_unusable();
    try {
      work(*this);
      refuse_if_unusable();  // an interrupted wait looks like a finished one to Gloo
    } catch (const std::exception& error) {
      close();
      throw TransportError("gloo " + std::string(verb) + " at rank " + std::to_string(rank_) +
                           " failed: " + error.what());
    }
  }

  // Ends what is in flight, here and at the peers. Gloo's own way to wake its waiters is a wait
  // that times out: it fails every pair of the context and what is pending on it.
  void close() noexcept {
    if (unusable_.exchange(true) || !context_) {
      return;
    }
    try {
      char nothing = 0;
      context_->createUnboundBuffer(&nothing, 1)->waitRecv(milliseconds(1));
    } catch (const std::exception&) {
      // the time-out itself
    }
    // A send that failed while it was being written is on no list of its pair, and its waiter would
    // sleep on. Woken, it meets a failed pair at its next step.
    const std::lock_guard lock(waits_mutex_);
    for (Buffer* buffer : waits_) {
      buffer->abortWaitSend();
      buffer->abortWaitRecv();
    }
  }

  bool wait(OrderedExecutor& executor, const Job& job, Deadline deadline) {
    if (executor.wait(job, deadline)) {
      return true;
    }
    close();
    // The collective fails now; before it has, it may write into the caller's memory.
    try {
      executor.wait(job, Clock::now() + kLetGo);
    } catch (const TransportError&) {
      // expected, and told by the caller
    }
    return false;
  }

 private:
  int rank_;
  GlooOptions options_;
  ContextPtr context_;  // null in a group of one
  std::atomic<bool> unusable_{false};
  std::mutex waits_mutex_;
  std::vector<Buffer*> waits_;
};

class GlooTransfer final : public Transfer {
 public:
  GlooTransfer(std::shared_ptr<OrderedExecutor> executor, std::shared_ptr<Group> group,
               std::shared_ptr<Job> job, const char* verb, int rank)
      : executor_(std::move(executor)),
        group_(std::move(group)),
        job_(std::move(job)),
        verb_(verb),
        rank_(rank) {}

  bool done() override { return executor_->done(*job_); }

  void wait(Deadline deadline) override {
    if (!group_->wait(*executor_, *job_, deadline)) {
      throw TransportError("gloo " + std::string(verb_) + " at rank " + std::to_string(rank_) +
                           " did not end by its deadline");
    }
  }

 private:
  std::shared_ptr<OrderedExecutor> executor_;
  std::shared_ptr<Group> group_;
  std::shared_ptr<Job> job_;
  const char* verb_;
  int rank_;
};

template <typename T>
void ring_allreduce(Group& group, TensorView data, std::uint32_t tag) {
  auto buffer = group.context()->createUnboundBuffer(data.data, data.bytes());
  const std::vector<Group::Buffer*> waits = {buffer.get()};
  gloo::AllreduceOptions options(group.context());
  options.setAlgorithm(gloo::AllreduceOptions::Algorithm::RING);
  options.setOutput<T>(std::move(buffer));
  options.setReduceFunction(
      static_cast<void (*)(void*, const void*, const void*, std::size_t)>(&gloo::sum<T>));
  options.setTag(tag);
  const Group::Interruptible interruptible(group, waits);
  gloo::allreduce(options);
}

// Allgather and alltoall: the same options by other names.
template <typename Options>
void exchange_bytes(Group& group, std::span<const std::byte> in, std::span<std::byte> out,
                    std::uint32_t tag, void (*collective)(Options&)) {
  if (in.empty()) {
    return;
  }
  if (!group.context()) {
    std::memcpy(out.data(), in.data(), in.size());
    return;
  }
  // Gloo does not write through the input pointer.
  auto from = group.context()->createUnboundBuffer(const_cast<std::byte*>(in.data()), in.size());
  auto to = group.context()->createUnboundBuffer(out.data(), out.size());
  const std::vector<Group::Buffer*> waits = {from.get(), to.get()};
  Options options(group.context());
  options.template setInput<char>(std::move(from));
  options.template setOutput<char>(std::move(to));
  options.setTag(tag);
  const Group::Interruptible interruptible(group, waits);
  collective(options);
}

class GlooCommunicator final : public Communicator {
 public:
  GlooCommunicator(int rank, int size, std::shared_ptr<gloo::rendezvous::Store> store,
                   const GlooOptions& options)
      : rank_(rank),
        size_(size),
        store_(std::move(store)),
        group_(std::make_shared<Group>(rank, size, *store_, options)),
        executor_(std::make_shared<OrderedExecutor>()) {}

  ~GlooCommunicator() override {
    if (size_ > 1 && !group_->unusable()) {
      say_goodbye();
    }
    group_->close();
  }
  GlooCommunicator(const GlooCommunicator&) = delete;
  GlooCommunicator& operator=(const GlooCommunicator&) = delete;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string name() const override { return "gloo"; }
  CommunicatorTraits traits() const override {
    return {.identical_allreduce = true, .survives_failure = true};
  }

  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    if (data.dtype != DType::kF32 && data.dtype != DType::kF64) {
      throw InvalidArgument("gloo allreduce_sum at rank " + std::to_string(rank_) +
                            ": fp32 or fp64 expected, got " +
                            std::string(thinwire::name(data.dtype)));
    }
    sent_bytes_ += gloo_allreduce_wire_bytes(data.bytes(), size_);
    return start("allreduce", [data, tag = tag_++](Group& group) {
      if (data.elements == 0 || !group.context()) {
        return;
      }
      if (data.dtype == DType::kF32) {
        ring_allreduce<float>(group, data, tag);
      } else {
        ring_allreduce<double>(group, data, tag);
      }
    });
  }

  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    if (out.size() != in.size() * static_cast<std::size_t>(size_)) {
      throw InvalidArgument("gloo allgather at rank " + std::to_string(rank_) + ": out of " +
                            std::to_string(in.size() * static_cast<std::size_t>(size_)) +
                            " bytes expected, got " + std::to_string(out.size()));
    }
    // Gloo's ring sends each block in two halves.
    sent_bytes_ += 2 * allgather_wire_bytes((in.size() + 1) / 2, size_, kGlooFraming);
    return start("allgather", [in, out, tag = tag_++](Group& group) {
      exchange_bytes<gloo::AllgatherOptions>(group, in, out, tag, &gloo::allgather);
    });
  }

  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    const auto ranks = static_cast<std::size_t>(size_);
    if (out.size() != in.size() || in.size() % ranks != 0) {
      throw InvalidArgument("gloo alltoall at rank " + std::to_string(rank_) +
                            ": in and out of the same multiple of " + std::to_string(ranks) +
                            " bytes expected, got " + std::to_string(in.size()) + " and " +
                            std::to_string(out.size()));
    }
    sent_bytes_ += alltoall_wire_bytes(in.size() / ranks, size_, kGlooFraming);
    return start("alltoall", [in, out, tag = tag_++](Group& group) {
      exchange_bytes<gloo::AlltoallOptions>(group, in, out, tag, &gloo::alltoall);
    });
  }

  // Through the store: it does not depend on the connections that failed.
  std::vector<int> roll_call(milliseconds grace) override {
    const Deadline end = Clock::now() + grace;
    const std::string call = "thinwire/roll_call/" + std::to_string(++roll_calls_) + "/";
    std::vector<int> missing;
    try {
      store_->set(call + std::to_string(rank_), {1});
    } catch (const std::exception& error) {
      throw TransportError("gloo roll call at rank " + std::to_string(rank_) +
                           ": the store is out of reach: " + error.what());
    }
    for (int peer = 0; peer < size_; ++peer) {
      try {
        if (peer != rank_) {
          store_->wait({call + std::to_string(peer)}, until(end));
        }
      } catch (const std::exception&) {
        missing.push_back(peer);
      }
    }
    return missing;
  }

  void abort() noexcept override { group_->close(); }
  std::uint64_t sent_bytes() const override { return sent_bytes_; }

 private:
  template <typename Work>
  std::unique_ptr<Transfer> start(const char* verb, Work work) {
    group_->refuse_if_unusable();
    auto job = executor_->submit(
        [group = group_, verb, work = std::move(work)] { group->collective(verb, work); });
    return std::make_unique<GlooTransfer>(executor_, group_, std::move(job), verb, rank_);
  }

  void say_goodbye() noexcept {
    try {
      start("goodbye", [tag = tag_++](Group& group) {
        gloo::BarrierOptions options(group.context());
        options.setTag(tag);
        options.setTimeout(kGoodbye);
        gloo::barrier(options);
      })->wait(Clock::now() + 2 * kGoodbye);
    } catch (const std::exception&) {
      // A peer is gone already, or does not mean to leave: nothing is owed to it.
    }
  }

  int rank_;
  int size_;
  std::shared_ptr<gloo::rendezvous::Store> store_;
  std::shared_ptr<Group> group_;
  std::shared_ptr<OrderedExecutor> executor_;
  std::uint32_t tag_ = 0;
  int roll_calls_ = 0;
  std::uint64_t sent_bytes_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_gloo_communicator(int rank, int size,
                                                     std::shared_ptr<gloo::rendezvous::Store> store,
                                                     const GlooOptions& options) {
  if (size < 1 || rank < 0 || rank >= size || !store) {
    throw InvalidArgument("gloo rank " + std::to_string(rank) + " of " + std::to_string(size) +
                          ": a rank in [0, size) and a store expected");
  }
  return std::make_unique<GlooCommunicator>(rank, size, std::move(store), options);
}

}  // namespace thinwire
