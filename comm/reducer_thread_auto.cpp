// What a communication thread does for the policy `auto`: it sees to the tuner's measurements, and
// goes by its plans.
#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <utility>

#include "comm/gather.h"
#include "comm/link_model.h"
#include "comm/plan_search.h"
#include "comm/reducer_thread.h"
#include "comm/stopwatch.h"
#include "compressors/adaptive/codec_speeds.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

// Seconds that the program's main thread spent on a core, and waiting for one; zeros where the
// system does not tell.
std::array<double, 2> scheduled() {
  std::array<double, 2> seconds = {};
  std::ifstream file("/proc/self/schedstat");
  file >> seconds[0] >> seconds[1];
  for (double& value : seconds) value *= 1e-9;
  return seconds;
}

double seconds_between(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<double>(end - begin).count();
}

// What the slowest rank takes, so that all reckon with the same.
std::vector<CodecSpeed> slowest_speeds(Communicator& comm, const std::vector<Codec>& codecs,
                                       Deadline deadline) {
  CodecSpeeds measured(CodecSpeeds::user_cache());
  measured.measure(codecs);
  std::vector<double> mine;
  for (const Codec& codec : codecs) {
    const CodecSpeed& speed = measured.of(codec.spec);
    mine.insert(mine.end(), {speed.encode, speed.decode, speed.decode_more});
  }
  const std::vector<double> all = gather<double>(comm, std::span<const double>(mine), deadline);
  for (std::size_t i = 0; i < all.size(); ++i) {
    double& slowest = mine[i % mine.size()];
    slowest = std::max(slowest, all[i]);
  }
  std::vector<CodecSpeed> speeds;
  for (std::size_t i = 0; i < mine.size(); i += 3) {
    speeds.push_back({.encode = mine[i], .decode = mine[i + 1], .decode_more = mine[i + 2]});
  }
  return speeds;
}

// The ranks decide by the same numbers; should that ever not give the same plan, no step may begin.
void check_same_plan(Communicator& comm, const Plan& plan, Deadline deadline) {
  std::string text;
  for (const Policy::Choice& choice : plan.choices) {
    text += choice.codec.spec + " " + std::to_string(choice.split_ranges) +
            (choice.gathered ? " gathered\n" : "\n");
  }
  const std::uint64_t mine = Key{.stream = "plan", .parameter = text, .begin = 0, .end = 0}.hash();
  const std::vector<std::uint64_t> all = gather<std::uint64_t>(comm, std::span(&mine, 1), deadline);
  for (std::size_t rank = 0; rank < all.size(); ++rank) {
    if (all[rank] != all[0]) {
      throw MismatchError("rank " + std::to_string(rank) +
                          " chose another plan than rank 0 from "
                          "the same measurements\nhint: run the same build of thinwire on every "
                          "rank");
    }
  }
}

}  // namespace

void ReducerThread::start_tuner() {
  const TraceSpan span(trace_.get(), "auto", "start the tuner");
  wait_began_ = Clock::now();
  arm();
  const Deadline deadline = wait_began_ + options_.deadline;
  const std::vector<CodecSpeed> speeds =
      slowest_speeds(*comm_, PlanSearch::codecs(layers_, *plan_), deadline);
  const LinkModel link = probe(deadline);
  link_ = link_of(link, comm_->size());
  tuner_ = std::make_unique<AutoTuner>(layers_, *plan_, comm_->size(), link, speeds);
  if (!resumed_.empty()) tuner_->go_on_with(resumed_);
  chosen_from_ = 0;
  for (const Policy::Choice& choice : plan_->choices) {
    if (choice.automatic) {
      chosen_from_ = std::max(chosen_from_, choice.automatic->options.start_step);
    }
  }
  adopt(tuner_->plan());
  check_same_plan(*comm_, *plan_, deadline);
  leave_out_transfers();
  step_ended_ = Clock::now();
  take_log();
  const std::lock_guard lock(mutex_);
  wants_tuner_ = false;
}

void ReducerThread::go_on_with(const std::vector<std::string>& codecs) {
  if (tuner_) tuner_->go_on_with(codecs);
  adopt(plan_->with_codecs(codecs));
  const std::lock_guard lock(mutex_);
  if (!tuner_) resumed_ = codecs;
  compare_ = true;
}

void ReducerThread::sample(std::size_t layer, TensorView gradient) {
  if (!tuner_ || mode_ != StepMode::kPolicy) {
    return;
  }
  const std::span<const std::size_t> wanted = tuner_->wanted();
  if (std::binary_search(wanted.begin(), wanted.end(), layer)) {
    const Stopwatch stopwatch(sampling_seconds_);
    const TraceSpan span =
        trace_ ? TraceSpan(*trace_, "auto", "sample " + layers_[layer].name, {}) : TraceSpan();
    tuner_->sample(layer, gradient, memories_.residual(layer));
  }
}

// `counts`: the step was one as others are.
void ReducerThread::observe(std::vector<TransferTime> transfers, Clock::time_point end,
                            bool counts) {
  const double work = encode_seconds_ + decode_seconds_;
  const std::array<double, 2> now = scheduled();
  StepTimes step;
  step.seconds = seconds_between(step_ended_, end);
  step.work = work - work_before_ - sampling_seconds_;
  step.sampling = std::exchange(sampling_seconds_, 0) + std::exchange(judging_seconds_, 0);
  step.transfers = std::move(transfers);
  const double ran = now[0] - scheduled_before_[0];
  step.waited = now[1] - scheduled_before_[1];
  if (ran + step.waited > 0) step.contention = step.waited / (ran + step.waited);
  for (const ActiveBucket& bucket : active_) {
    BucketReady& entry = step.buckets.emplace_back();
    entry.ready = seconds_between(active_.back().job.submitted, bucket.job.submitted);
    for (const BucketLayer& layer : bucket.job.bucket.layers) entry.layers.push_back(layer.layer);
  }
  step_ended_ = end;
  work_before_ = work;
  scheduled_before_ = now;
  if (counts && mode_ == StepMode::kPolicy && step_ >= chosen_from_) {
    const Stopwatch stopwatch(judging_seconds_);
    const TraceSpan span(trace_.get(), "auto", "judge");
    tuner_->end_step(step);
  } else {
    tuner_->skip_step();
  }
}

void ReducerThread::tune() {
  const TraceSpan span(trace_.get(), "auto", "decide");
  wait_began_ = Clock::now();
  arm();
  const Deadline deadline = wait_began_ + options_.deadline;
  const std::vector<float> report = tuner_->report();
  bool changed = tuner_->decide(gather<float>(*comm_, std::span<const float>(report), deadline));
  if (tuner_->wants_link()) {
    changed = tuner_->set_link(probe(deadline)) || changed;
  }
  if (changed) {
    link_ = link_of(tuner_->link(), comm_->size());
    const TraceSpan change(trace_.get(), "auto", "change the plan");
    adopt(tuner_->plan());
    check_same_plan(*comm_, *plan_, deadline);
  } else {
    renew_reasons();
  }
  leave_out_transfers();
  take_log();
}

// What is known of a layer grows while its codec stays.
void ReducerThread::renew_reasons() {
  Plan plan = *plan_;
  const Plan known = tuner_->plan();
  for (std::size_t i = 0; i < plan.choices.size(); ++i) {
    plan.choices[i].reason = known.choices[i].reason;
  }
  current_.set(std::move(plan));
}

LinkModel ReducerThread::probe(Deadline deadline) {
  const TraceSpan span(trace_.get(), "auto", "measure the network");
  return probe_link(*comm_, deadline);
}

// The tuner is not to see them as the next step's.
void ReducerThread::leave_out_transfers() {
  const std::vector<TransferTime> transfers = comm_->take();
  if (trace_) trace_transfers(transfers);
}

void ReducerThread::take_log() {
  std::vector<std::string> log = tuner_->take_log();
  const std::lock_guard lock(mutex_);
  decisions_.insert(decisions_.end(), std::make_move_iterator(log.begin()),
                    std::make_move_iterator(log.end()));
}

}  // namespace thinwire
