// ReducerThread: the communication thread of one reducer. Buckets come in through a queue; steps
// run one after another.
//
// Schedule: transfer s of a step's bucket i is issued at tick i + s. Tick t starts bucket t, then
// issues the next transfers of buckets t-1, t-2, ... in that order; after the step's last bucket
// the ticks go on until nothing is left to issue. The order depends on the sequence of buckets
// alone, so all ranks issue the same transfers in the same order without asking each other, and
// the encode of a bucket overlaps the wire time of those before. Finishing issues nothing, so a
// bucket is finished whenever its transfers are done.
//
// The public calls may come from any thread; everything else runs on the thread itself.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "comm/auto_tuner.h"
#include "comm/bucket_layout.h"
#include "comm/communicator.h"
#include "comm/current_plan.h"
#include "comm/exchange.h"
#include "comm/gradient_method.h"
#include "comm/memory_table.h"
#include "comm/metered_communicator.h"
#include "comm/policy.h"
#include "comm/reducer.h"
#include "comm/trace.h"
#include "comm/watchdog.h"

namespace thinwire {

class PendingReduction final : public Reduction {
 public:
  void wait() override;
  void complete(std::exception_ptr error);

 private:
  std::mutex mutex_;
  std::condition_variable ready_changed_;
  bool ready_ = false;
  std::exception_ptr error_;
};

struct ReductionJob {
  Bucket bucket;
  bool abandon = false;  // ends the step with a rollback; the bucket is empty
  std::shared_ptr<PendingReduction> reduction;
  std::function<void(std::exception_ptr)> done;
  Clock::time_point submitted = {};
};

// Of all steps so far.
struct ReducerCounters {
  std::uint64_t step = 0;  // the next one
  std::uint64_t steps = 0;
  std::uint64_t skipped_steps = 0;
  bool last_skipped = false;
  std::uint64_t wire_bytes = 0;
  std::uint64_t dense_wire_bytes = 0;
  std::size_t memory_bytes = 0;
  std::size_t buffer_bytes = 0;
  double encode_seconds = 0;
  double decode_seconds = 0;
  double wait_seconds = 0;
  std::vector<std::uint64_t> nonfinite_steps;  // one a layer
  std::vector<std::size_t> joint_bytes;        // Exchange::joint_bytes, one a layer
};

class ReducerThread {
 public:
  // The references outlive the thread. The communicator has at least two ranks.
  ReducerThread(std::unique_ptr<Communicator> comm, const std::vector<Layer>& layers,
                CurrentPlan& plan, MemoryTable& memories, const ReducerOptions& options);
  // Runs what is queued, waits for what is in flight, ends the thread.
  ~ReducerThread();

  // Throws the failure of an earlier step, if there was one.
  void submit(ReductionJob job);
  // Blocks until nothing is queued or in flight and no step is open on the thread; then the memory
  // table may be used by the caller until the next submit().
  void wait_idle() const;
  // Between steps, when idle.
  void set_step(std::uint64_t step);
  // Between steps, when idle; the method outlives the thread.
  void follow(GradientMethod& method);
  // Between steps, when idle. Once it was called, local steps share where NaN and Inf are.
  void set_loss_scale(double scale);
  // Between steps, when idle: what is pending is kept.
  void adopt(Plan plan);
  // Between steps, when idle: compared with the other ranks' before the next step.
  void policy_changed(const std::string& policy);
  // Between steps, when idle: the plan of a job that goes on, a codec's spec a layer.
  void go_on_with(const std::vector<std::string>& codecs);
  // What the tuner of an `auto` policy has decided since the last call, a line each.
  std::vector<std::string> take_decisions();
  // What went wrong beside the steps since the last call, a line each.
  std::vector<std::string> take_warnings();

  // Throws the failure of an earlier step, if there was one.
  void check() const;
  ReducerCounters counters() const;
  // A step failed for good; submit() throws.
  bool failed() const;
  void abort() noexcept;

 private:
  struct ActiveBucket {
    ReductionJob job;
    BucketLayout* layout = nullptr;
    bool finished = false;
    std::size_t number = 0;  // within the step
  };

  // tunes: a tuner is started before the first step, while the first gradients are computed.
  void run(bool tunes);
  void run_step(ReductionJob first);
  std::optional<ReductionJob> await_step();
  std::optional<ReductionJob> await_bucket();

  void begin_step();
  void begin(ReductionJob job);
  Gradient prepare(BucketLayer& entry);
  void issue_next(std::size_t newest);
  bool fully_issued(const ActiveBucket& bucket) const;
  bool all_done(const ActiveBucket& bucket) const;
  // Something comes of looking again after a while, even if no bucket does.
  bool awaits_transfers() const;
  // Finishes buckets in order; not blocking: stops at the first that is not done.
  bool finish_buckets(bool blocking);
  void finish(ActiveBucket& bucket);
  void wait(BucketGroup& group, const ActiveBucket& bucket);
  void leave_open_step();
  void end_step(bool abandoned);
  void start_tuner();
  void observe(std::vector<TransferTime> transfers, Clock::time_point end, bool counts);
  void tune();
  void renew_reasons();
  LinkModel probe(Deadline deadline);
  void leave_out_transfers();
  void take_log();
  void sample(std::size_t layer, TensorView gradient);

  // Of a trace, where there is one. The spans end with their scope.
  TraceSpan trace_bucket(const char* what, const ActiveBucket& bucket);
  TraceSpan trace_group(const char* what, const ActiveBucket& bucket, const BucketGroup& group);
  void trace_taken(const ActiveBucket& bucket);
  void trace_step(Clock::time_point end, bool skipped);
  void trace_transfers(const std::vector<TransferTime>& transfers);
  void write_trace();

  void share_flags();
  void refuse_if_over() const;  // with the lock held
  void zero_gradients();
  void complete(ActiveBucket& bucket, const std::exception_ptr& error);
  void drop_stale_layouts();

  BucketLayout& layout_of(const Bucket& bucket);
  std::exception_ptr nonfinite_error();
  std::string first_nonfinite();
  void fail(std::exception_ptr error);
  std::exception_ptr lose_peer(const TransportError& error);
  void end_stuck();
  void end_group();
  void arm();
  void disarm();
  void publish(bool skipped);

  // Layouts are destroyed after the communicator, whose threads may still know their buffers.
  // Layers, phase, mode.
  using LayoutKey = std::tuple<std::vector<std::size_t>, std::uint64_t, StepMode>;
  std::map<LayoutKey, BucketLayout> layouts_;
  const std::unique_ptr<MeteredCommunicator> comm_;
  const std::vector<Layer>& layers_;
  CurrentPlan& current_;
  std::shared_ptr<const Plan> plan_;  // current_'s, perhaps with older reasons
  MemoryTable& memories_;
  const ReducerOptions& options_;
  std::vector<std::uint64_t> key_hashes_;
  bool holds_results_ = false;  // some layer's policy may change every result at the step's end
  std::uint64_t sent_before_ = 0;

  // The step on its way.
  std::atomic<std::uint64_t> step_{0};  // the watchdog reads it, too
  StepMode mode_ = StepMode::kPolicy;
  float step_loss_scale_ = 1;
  bool shares_flags_ = false;  // in a local step
  std::deque<ActiveBucket> active_;
  std::vector<std::uint8_t> flagged_;  // one a layer: NaN or Inf on some rank
  // What this rank can tell of the first of them, by layer.
  std::map<std::size_t, NonFiniteFound> found_;
  double encode_seconds_ = 0;
  double decode_seconds_ = 0;
  double wait_seconds_ = 0;
  std::uint64_t dense_wire_bytes_ = 0;
  Clock::time_point wait_began_;

  Link link_;  // as given, or as measured

  // Of an `auto` policy.
  std::unique_ptr<AutoTuner> tuner_;
  Clock::time_point step_ended_;
  double work_before_ = 0;
  double judging_seconds_ = 0;                   // of samples, after the step
  double sampling_seconds_ = 0;                  // of this step, within encode_seconds_
  std::uint64_t chosen_from_ = 0;                // the step from which on all layers go by the plan
  std::array<double, 2> scheduled_before_ = {};  // seconds on a core, and waiting for one
  const ActiveBucket* waiting_for_ = nullptr;

  std::unique_ptr<Trace> trace_;  // null: none

  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable queue_changed_;
  mutable std::condition_variable idle_changed_;
  std::deque<ReductionJob> queue_;
  bool stopping_ = false;
  bool idle_ = true;
  std::exception_ptr failure_;
  ReducerCounters counters_;
  GradientMethod* method_ = nullptr;
  std::string policy_;               // after a change
  std::optional<float> loss_scale_;  // where one was told
  bool compare_ = false;  // policy and method with the other ranks', before the next step
  bool wants_tuner_ = false;
  std::vector<std::string> resumed_;  // what a tuner begins with; none: empty
  std::vector<std::string> decisions_;
  std::vector<std::string> warnings_;

  std::atomic<bool> aborted_{false};
  std::optional<Watchdog> watchdog_;
  std::thread thread_;
};

}  // namespace thinwire
