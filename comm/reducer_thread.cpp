#include "comm/reducer_thread.h"

#include <algorithm>
#include <cstring>

#include "comm/gather.h"
#include "comm/handshake.h"
#include "comm/stopwatch.h"
#include "comm/wire_bytes.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/context.h"
#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

// How long the thread sleeps between two looks at the transfers while it waits for a bucket. Short
// enough to move MPI along, long enough not to take the cores from the backward pass.
constexpr std::chrono::milliseconds kFirstNap{1};
constexpr std::chrono::milliseconds kLongestNap{4};

bool may_change_results(const Plan& plan) {
  return std::any_of(plan.choices.begin(), plan.choices.end(), [](const Policy::Choice& choice) {
    return choice.codec.options.nonfinite != NonFinite::kPropagate;
  });
}

// Layouts change when any layer is sent in another way than before.
std::uint64_t phase_at(const Plan& plan, std::uint64_t step) {
  std::uint64_t phase = 0;
  for (const Policy::Choice& choice : plan.choices) {
    phase = std::max(phase, choice.codec.phase_at(step));
  }
  return phase;
}

}  // namespace

void PendingReduction::wait() {
  std::unique_lock lock(mutex_);
  ready_changed_.wait(lock, [this] { return ready_; });
  if (error_) {
    std::rethrow_exception(error_);
  }
}

void PendingReduction::complete(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  ready_ = true;
  error_ = std::move(error);
  ready_changed_.notify_all();
}

ReducerThread::ReducerThread(std::unique_ptr<Communicator> comm, const std::vector<Layer>& layers,
                             CurrentPlan& plan, MemoryTable& memories,
                             const ReducerOptions& options)
    : comm_(std::make_unique<MeteredCommunicator>(std::move(comm))),
      layers_(layers),
      current_(plan),
      plan_(plan.get()),
      memories_(memories),
      options_(options),
      sent_before_(comm_->sent_bytes()),
      flagged_(layers.size()),
      link_(options.link) {
  if (!options.trace.file.empty()) {
    trace_ = std::make_unique<Trace>(options.trace, comm_->rank());
  }
  for (const Layer& layer : layers) {
    key_hashes_.push_back(
        Key{.stream = options.stream, .parameter = layer.name, .begin = 0, .end = layer.elements()}
            .hash());
  }
  holds_results_ = may_change_results(*plan_);
  wants_tuner_ = plan_->chooses();
  idle_ = !wants_tuner_;
  counters_.nonfinite_steps.resize(layers.size());
  counters_.joint_bytes.resize(layers.size());
  if (!comm_->traits().survives_failure) {
    watchdog_.emplace(options_.deadline + options_.roll_call_grace, [this] { end_stuck(); });
  }
  thread_ = std::thread([this, tunes = wants_tuner_] { run(tunes); });
}

ReducerThread::~ReducerThread() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  queue_changed_.notify_all();
  thread_.join();
  if (!comm_->traits().survives_failure && (aborted_ || failure_)) {
    // The transport may still write to the buffers of transfers that it could not end.
    static_cast<void>(new auto(std::move(layouts_)));
  }
}

void ReducerThread::submit(ReductionJob job) {
  {
    const std::lock_guard lock(mutex_);
    refuse_if_over();
    job.submitted = Clock::now();
    queue_.push_back(std::move(job));
    idle_ = false;
  }
  queue_changed_.notify_one();
}

void ReducerThread::refuse_if_over() const {
  if (failure_) {
    std::rethrow_exception(failure_);
  }
  if (aborted_.load()) {
    throw TransportError("the reducer was aborted\nhint: make a new reducer over a new group");
  }
}

void ReducerThread::check() const {
  const std::lock_guard lock(mutex_);
  refuse_if_over();
}

void ReducerThread::set_loss_scale(double scale) {
  const std::lock_guard lock(mutex_);
  loss_scale_ = static_cast<float>(scale);
}

void ReducerThread::wait_idle() const {
  std::unique_lock lock(mutex_);
  idle_changed_.wait(lock, [this] { return idle_; });
}

void ReducerThread::set_step(std::uint64_t step) {
  const std::lock_guard lock(mutex_);
  step_ = step;
  counters_.step = step;
  compare_ = compare_ || method_ != nullptr;
}

void ReducerThread::follow(GradientMethod& method) {
  const std::lock_guard lock(mutex_);
  method_ = &method;
  compare_ = true;
}

void ReducerThread::adopt(Plan plan) {
  plan.choose_routes(layers_, comm_->size(), link_, options_.split_from_ranks);
  current_.set(std::move(plan));
  layouts_.clear();
  plan_ = current_.get();
  memories_.set_plan(plan_, owner_weight(options_.op, comm_->size()));
  holds_results_ = may_change_results(*plan_);
  const std::lock_guard lock(mutex_);
  std::fill(counters_.joint_bytes.begin(), counters_.joint_bytes.end(), 0);
}

void ReducerThread::policy_changed(const std::string& policy) {
  const std::lock_guard lock(mutex_);
  policy_ = policy;
  compare_ = true;
  wants_tuner_ = plan_->chooses();
  tuner_.reset();
  resumed_.clear();
}

std::vector<std::string> ReducerThread::take_decisions() {
  const std::lock_guard lock(mutex_);
  return std::exchange(decisions_, {});
}

std::vector<std::string> ReducerThread::take_warnings() {
  const std::lock_guard lock(mutex_);
  return std::exchange(warnings_, {});
}

ReducerCounters ReducerThread::counters() const {
  const std::lock_guard lock(mutex_);
  return counters_;
}

bool ReducerThread::failed() const {
  const std::lock_guard lock(mutex_);
  return failure_ != nullptr;
}

void ReducerThread::abort() noexcept {
  {
    const std::lock_guard lock(mutex_);
    aborted_ = true;
  }
  comm_->abort();
  queue_changed_.notify_all();
}

void ReducerThread::run(bool tunes) {
  if (tunes) {
    try {
      start_tuner();
    } catch (...) {
      fail(std::current_exception());
    }
    disarm();
    write_trace();
  }
  while (std::optional<ReductionJob> job = await_step()) {
    try {
      run_step(std::move(*job));
    } catch (...) {
      fail(std::current_exception());
    }
    disarm();
    write_trace();
  }
}

std::optional<ReductionJob> ReducerThread::await_step() {
  std::unique_lock lock(mutex_);
  if (queue_.empty()) {
    idle_ = true;
    idle_changed_.notify_all();
  }
  queue_changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
  if (queue_.empty()) {
    return std::nullopt;
  }
  ReductionJob job = std::move(queue_.front());
  queue_.pop_front();
  return job;
}

void ReducerThread::run_step(ReductionJob first) {
  std::optional<ReductionJob> job = std::move(first);
  bool abandoned = false;
  for (bool last = false; !last; job = last ? std::nullopt : await_bucket()) {
    if (!job) {
      leave_open_step();
      return;
    }
    last = job->bucket.last;
    abandoned = job->abandon;
    begin(std::move(*job));
    issue_next(active_.size() - 1);
  }
  while (!std::all_of(active_.begin(), active_.end(),
                      [this](const ActiveBucket& bucket) { return fully_issued(bucket); })) {
    issue_next(active_.size());
  }
  finish_buckets(true);
  end_step(abandoned);
}

// The next bucket of the open step; meanwhile looks after the transfers in flight. None when the
// reducer ends.
std::optional<ReductionJob> ReducerThread::await_bucket() {
  disarm();
  auto nap = kFirstNap;
  std::unique_lock lock(mutex_);
  while (queue_.empty()) {
    if (aborted_) {
      throw TransportError("aborted");
    }
    if (stopping_) {
      return std::nullopt;
    }
    lock.unlock();
    const bool progress = finish_buckets(false);
    disarm();  // the next bucket may take its time
    const bool awaits = awaits_transfers();
    lock.lock();
    nap = progress ? kFirstNap : std::min(2 * nap, kLongestNap);
    const auto awake = [this] { return stopping_ || aborted_ || !queue_.empty(); };
    if (awaits) {
      queue_changed_.wait_for(lock, nap, awake);
    } else {
      queue_changed_.wait(lock, awake);
    }
  }
  ReductionJob job = std::move(queue_.front());
  queue_.pop_front();
  return job;
}

BucketLayout& ReducerThread::layout_of(const Bucket& bucket) {
  std::vector<std::size_t> layers;
  for (const BucketLayer& entry : bucket.layers) {
    layers.push_back(entry.layer);
  }
  LayoutKey key{std::move(layers), phase_at(*plan_, step_), mode_};
  const auto found = layouts_.find(key);
  if (found != layouts_.end()) {
    return found->second;
  }
  const TraceSpan span(trace_.get(), "thread", "make buffers");
  const LayoutContext context{.comm = *comm_,
                              .layers = layers_,
                              .plan = *plan_,
                              .key_hashes = key_hashes_,
                              .memories = memories_,
                              .mode = mode_,
                              .means = options_.op == ReduceOp::kMean,
                              .ride_along_bytes = options_.ride_along_bytes};
  BucketLayout layout = make_bucket_layout(context, std::get<0>(key), step_);
  return layouts_.emplace(std::move(key), std::move(layout)).first->second;
}

void ReducerThread::begin_step() {
  GradientMethod* method = nullptr;
  bool compare = false;
  bool told = false;
  std::string policy;
  {
    const std::lock_guard lock(mutex_);
    method = method_;
    compare = std::exchange(compare_, false);
    if (compare) policy = policy_;
    step_loss_scale_ = loss_scale_.value_or(1.0F);
    told = loss_scale_.has_value();
  }
  if (compare) {
    const TraceSpan span(trace_.get(), "thread", "compare policies");
    std::vector<HandshakeField> fields;
    if (method != nullptr) fields = method->fields();
    if (!policy.empty()) fields.push_back({"policy", policy});
    if (plan_->chooses()) fields.push_back({"chosen codecs", join(plan_->specs())});
    shake_hands(*comm_, fields, Clock::now() + options_.deadline);
  }
  if (wants_tuner_) start_tuner();
  mode_ = method == nullptr ? StepMode::kPolicy : method->begin_step();
  shares_flags_ = mode_ == StepMode::kLocal && told;
}

// Where a layer is read and written, after the step's method has seen it.
Gradient ReducerThread::prepare(BucketLayer& entry) {
  Gradient gradient{.source = entry.source.data == nullptr ? entry.grad : entry.source,
                    .mean = entry.grad,
                    .owner = std::move(entry.owner),
                    .loss_scale = step_loss_scale_};
  const TensorView out = gradient.owner ? gradient.source : gradient.mean;
  sample(entry.layer, gradient.source);
  if (method_ != nullptr) {
    if (method_->prepare(entry.layer, gradient.source, out)) {
      gradient.source = out;
    }
  }
  const bool dense = memories_.forgets(entry.layer) ||
                     step_ < plan_->choices[entry.layer].codec.options.start_step;
  if (mode_ == StepMode::kPolicy && dense && memories_.release(entry.layer, gradient.source, out)) {
    gradient.source = out;
  }
  return gradient;
}

void ReducerThread::begin(ReductionJob job) {
  const Stopwatch stopwatch(encode_seconds_);
  ActiveBucket& bucket = active_.emplace_back();
  bucket.job = std::move(job);
  bucket.number = active_.size() - 1;
  trace_taken(bucket);
  const TraceSpan span = trace_bucket("begin", bucket);
  waiting_for_ = &bucket;
  wait_began_ = Clock::now();
  arm();
  if (active_.size() == 1) {
    begin_step();
  }
  bucket.layout = &layout_of(bucket.job.bucket);
  bucket.layout->last_step = step_;
  const float weight =
      options_.op == ReduceOp::kMean ? 1.0F / static_cast<float>(comm_->size()) : 1.0F;
  std::int64_t elements = 0;
  for (const BucketLayer& entry : bucket.job.bucket.layers) {
    elements += entry.grad.elements;
    if (mode_ == StepMode::kLocal && entry.source.data != nullptr) {
      std::memmove(entry.grad.data, entry.source.data, entry.grad.bytes());
    }
    if (shares_flags_ && !all_finite(entry.grad, nullptr)) {
      flagged_[entry.layer] = 1;
      const PlacedValue first = *thinwire::first_nonfinite(entry.grad, nullptr);
      found_.emplace(entry.layer,
                     NonFiniteFound{.index = first.index, .value = first.value, .own = true});
    }
  }
  for (BucketGroup& group : bucket.layout->groups) {
    std::vector<Gradient> grads;
    grads.reserve(group.members.size());
    for (const std::size_t member : group.members) {
      BucketLayer& entry = bucket.job.bucket.layers[member];
      grads.push_back(prepare(entry));
    }
    const TraceSpan encode = trace_group("encode", bucket, group);
    group.issued = 0;
    group.transfer = group.exchange->start(step_, weight, grads);
    group.issued = 1;
  }
  dense_wire_bytes_ += ring_allreduce_wire_bytes(
      static_cast<std::uint64_t>(elements) * sizeof(float), comm_->size());
}

// One tick for the buckets before `newest`.
void ReducerThread::issue_next(std::size_t newest) {
  for (std::size_t i = newest; i-- > 0;) {
    for (BucketGroup& group : active_[i].layout->groups) {
      if (!active_[i].finished && group.issued < group.exchange->transfers()) {
        wait(group, active_[i]);
        const Stopwatch stopwatch(encode_seconds_);
        const TraceSpan span = trace_group("encode on", active_[i], group);
        group.transfer = group.exchange->next();
        ++group.issued;
      }
    }
  }
}

bool ReducerThread::fully_issued(const ActiveBucket& bucket) const {
  return bucket.finished || std::all_of(bucket.layout->groups.begin(), bucket.layout->groups.end(),
                                        [](const BucketGroup& group) {
                                          return group.issued >= group.exchange->transfers();
                                        });
}

bool ReducerThread::all_done(const ActiveBucket& bucket) const {
  return std::all_of(bucket.layout->groups.begin(), bucket.layout->groups.end(),
                     [](const BucketGroup& group) { return group.transfer->done(); });
}

// What is fully issued is to be finished: its transfers may have ended since somebody looked.
bool ReducerThread::awaits_transfers() const {
  return std::any_of(active_.begin(), active_.end(), [this](const ActiveBucket& bucket) {
    return !bucket.finished && (fully_issued(bucket) || !all_done(bucket));
  });
}

bool ReducerThread::finish_buckets(bool blocking) {
  bool any = false;
  for (ActiveBucket& bucket : active_) {
    if (bucket.finished) {
      continue;
    }
    if (!fully_issued(bucket) || (!blocking && !all_done(bucket))) {
      break;
    }
    finish(bucket);
    any = true;
  }
  return any;
}

void ReducerThread::finish(ActiveBucket& bucket) {
  for (BucketGroup& group : bucket.layout->groups) {
    wait(group, bucket);
    const Stopwatch stopwatch(decode_seconds_);
    const TraceSpan span = trace_group("decode", bucket, group);
    const std::span<const std::uint8_t> flags = group.exchange->finish();
    for (std::size_t i = 0; i < group.members.size(); ++i) {
      const std::size_t layer = bucket.job.bucket.layers[group.members[i]].layer;
      flagged_[layer] |= flags[i];
      if (flags[i] != 0) {
        if (const auto found = group.exchange->nonfinite_found(i)) {
          found_.emplace(layer, *found);
        }
      }
    }
    group.transfer.reset();
  }
  bucket.finished = true;
  if (!holds_results_ && !shares_flags_ && !bucket.job.bucket.last) {
    complete(bucket, nullptr);
  }
}

void ReducerThread::wait(BucketGroup& group, const ActiveBucket& bucket) {
  const Stopwatch stopwatch(wait_seconds_);
  const TraceSpan span = trace_bucket("wait", bucket);
  waiting_for_ = &bucket;
  wait_began_ = Clock::now();
  arm();
  group.transfer->wait(wait_began_ + options_.deadline);
}

// The reducer ends within a step. What is in flight was issued by all ranks, so it can be waited
// for; the rest of the schedule is not known.
void ReducerThread::leave_open_step() {
  for (ActiveBucket& bucket : active_) {
    for (BucketGroup& group : bucket.layout->groups) {
      if (!bucket.finished) {
        wait(group, bucket);
      }
    }
  }
  finish_buckets(true);
  memories_.rollback();
  const auto error = std::make_exception_ptr(
      InvalidArgument("the reducer ended before the last bucket of step " + std::to_string(step_) +
                      "\nhint: wait for the step, or abandon_step()"));
  for (ActiveBucket& bucket : active_) {
    complete(bucket, error);
  }
  active_.clear();
}

void ReducerThread::share_flags() {
  const TraceSpan span(trace_.get(), "wait", "share where NaN is");
  wait_began_ = Clock::now();
  arm();
  const std::vector<std::uint8_t> all = gather<std::uint8_t>(
      *comm_, std::span<const std::uint8_t>(flagged_), wait_began_ + options_.deadline);
  for (std::size_t i = 0; i < all.size(); ++i) {
    flagged_[i % flagged_.size()] |= all[i];
  }
  for (const ActiveBucket& bucket : active_) {
    for (const BucketLayer& entry : bucket.job.bucket.layers) {
      if (flagged_[entry.layer] != 0) fill_nan(entry.grad);
    }
  }
}

void ReducerThread::end_step(bool abandoned) {
  const TraceSpan span(trace_.get(), "thread", "end of the step");
  if (shares_flags_) {
    share_flags();
  }
  const bool nonfinite =
      std::any_of(flagged_.begin(), flagged_.end(), [](std::uint8_t flag) { return flag != 0; });
  const bool skipped = abandoned || nonfinite;
  if (skipped) {
    memories_.rollback();
  } else {
    memories_.commit();
  }
  std::exception_ptr error;
  if (nonfinite) {
    error = nonfinite_error();
    for (std::size_t i = 0; i < flagged_.size(); ++i) {
      if (flagged_[i] != 0 && plan_->choices[i].codec.options.nonfinite == NonFinite::kSkipStep) {
        zero_gradients();
        break;
      }
    }
  }
  publish(skipped);
  const Clock::time_point end = Clock::now();
  for (ActiveBucket& bucket : active_) {
    complete(bucket, error);
  }
  std::vector<TransferTime> transfers = comm_->take();
  if (trace_) {
    trace_transfers(transfers);
    trace_step(end, skipped);
  }
  if (tuner_) observe(std::move(transfers), end, !skipped);
  active_.clear();
  waiting_for_ = nullptr;
  std::fill(flagged_.begin(), flagged_.end(), std::uint8_t{0});
  found_.clear();
  drop_stale_layouts();
  ++step_;
  if (tuner_ && tuner_->due()) tune();
}

void ReducerThread::zero_gradients() {
  for (const ActiveBucket& bucket : active_) {
    for (const BucketLayer& entry : bucket.job.bucket.layers) {
      std::memset(entry.grad.data, 0, entry.grad.bytes());
    }
  }
}

void ReducerThread::complete(ActiveBucket& bucket, const std::exception_ptr& error) {
  const std::shared_ptr<PendingReduction> reduction = std::move(bucket.job.reduction);
  if (!reduction) {
    return;  // already complete
  }
  const auto done = std::move(bucket.job.done);
  bucket.job.reduction = nullptr;
  const TraceSpan span = trace_bucket("hand out", bucket);
  reduction->complete(error);
  if (done) {
    try {
      done(error);
    } catch (...) {  // the reduction itself is complete; its callback cannot change that
    }
  }
}

// A framework that rebuilds its buckets never comes back to the old ones, nor a phase to an earlier
// one; but modes come and go.
void ReducerThread::drop_stale_layouts() {
  const auto fresh = [this](const BucketLayout& layout) { return layout.last_step + 2 > step_; };
  std::erase_if(layouts_, [&](const auto& entry) {
    const auto& [layers, phase, mode] = entry.first;
    return !std::any_of(layouts_.begin(), layouts_.end(), [&](const auto& other) {
      return std::get<0>(other.first) == layers && std::get<1>(other.first) == phase &&
             fresh(other.second);
    });
  });
}

void ReducerThread::publish(bool skipped) {
  const std::uint64_t sent = comm_->sent_bytes() - sent_before_;
  const std::lock_guard lock(mutex_);
  std::size_t buffer_bytes = 0;
  for (const auto& [key, layout] : layouts_) {
    for (const BucketGroup& group : layout.groups) {
      buffer_bytes += group.exchange->buffer_bytes();
      for (std::size_t i = 0; layout.last_step == step_ && i < group.members.size(); ++i) {
        counters_.joint_bytes[std::get<0>(key)[group.members[i]]] = group.exchange->joint_bytes(i);
      }
    }
  }
  counters_.step = step_ + 1;
  ++counters_.steps;
  counters_.skipped_steps += skipped ? 1 : 0;
  counters_.last_skipped = skipped;
  counters_.wire_bytes = sent;
  counters_.dense_wire_bytes = dense_wire_bytes_;
  counters_.memory_bytes = memories_.bytes();
  counters_.buffer_bytes = buffer_bytes;
  counters_.encode_seconds = encode_seconds_;
  counters_.decode_seconds = decode_seconds_;
  counters_.wait_seconds = wait_seconds_;
  for (std::size_t i = 0; i < flagged_.size(); ++i) {
    counters_.nonfinite_steps[i] += flagged_[i];
  }
}

void ReducerThread::arm() {
  if (watchdog_) {
    watchdog_->arm();
  }
}

void ReducerThread::disarm() {
  if (watchdog_) {
    watchdog_->disarm();
  }
}

}  // namespace thinwire
