// What a communication thread does for the policy `auto`: it sees to the tuner's measurements, and
// goes by its plans.
#include <algorithm>
#include <array>
#include <fstream>
#include <iterator>
#include <utility>

#include "comm/gather.h"
#include "comm/link_model.h"
#include "comm/reducer_thread.h"
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
  for (const std::string& spec : plan.specs()) text += spec + "\n";
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
  wait_began_ = Clock::now();
  arm();
  const Deadline deadline = wait_began_ + options_.deadline;
  const std::vector<CodecSpeed> speeds =
      slowest_speeds(*comm_, AutoTuner::codecs(layers_, *plan_), deadline);
  const LinkModel link = probe_link(*comm_, deadline);
  link_ = link_of(link, comm_->size());
  tuner_ = std::make_unique<AutoTuner>(layers_, *plan_, comm_->size(), link, speeds);
  if (!resumed_.empty()) tuner_->go_on_with(resumed_);
  adopt(tuner_->plan());
  check_same_plan(*comm_, *plan_, deadline);
  comm_->take();
  step_ended_ = Clock::now();
  take_log();
  const std::lock_guard lock(mutex_);
  wants_tuner_ = false;
}

void ReducerThread::go_on_with(const std::vector<std::string>& codecs) {
  if (tuner_) {
    tuner_->go_on_with(codecs);
    adopt(tuner_->plan());
  } else {
    resumed_ = codecs;
  }
}

void ReducerThread::sample(std::size_t layer, TensorView gradient) {
  if (!tuner_ || mode_ != StepMode::kPolicy) {
    return;
  }
  const std::span<const std::size_t> wanted = tuner_->wanted();
  if (std::find(wanted.begin(), wanted.end(), layer) != wanted.end()) {
    tuner_->sample(layer, gradient, memories_.residual(layer));
  }
}

// `counts`: the step was one as others are.
void ReducerThread::observe(Clock::time_point end, bool counts) {
  const double work = encode_seconds_ + decode_seconds_;
  const std::array<double, 2> now = scheduled();
  StepTimes step;
  step.seconds = seconds_between(step_ended_, end);
  step.work = work - work_before_;
  step.transfers = comm_->take();
  const double ran = now[0] - scheduled_before_[0];
  const double waited = now[1] - scheduled_before_[1];
  if (ran + waited > 0) step.contention = waited / (ran + waited);
  for (const ActiveBucket& bucket : active_) {
    BucketReady& entry = step.buckets.emplace_back();
    entry.ready = seconds_between(active_.back().job.submitted, bucket.job.submitted);
    for (const BucketLayer& layer : bucket.job.bucket.layers) entry.layers.push_back(layer.layer);
  }
  if (!active_.empty()) step.exposed = seconds_between(active_.back().job.submitted, end);
  step_ended_ = end;
  work_before_ = work;
  scheduled_before_ = now;
  if (counts && mode_ == StepMode::kPolicy) tuner_->end_step(step);
}

void ReducerThread::tune() {
  wait_began_ = Clock::now();
  arm();
  const Deadline deadline = wait_began_ + options_.deadline;
  const std::vector<float> report = tuner_->report();
  bool changed = tuner_->decide(gather<float>(*comm_, std::span<const float>(report), deadline));
  if (tuner_->wants_link()) {
    const LinkModel link = probe_link(*comm_, deadline);
    link_ = link_of(link, comm_->size());
    changed = tuner_->set_link(link) || changed;
  }
  if (changed) {
    adopt(tuner_->plan());
    check_same_plan(*comm_, *plan_, deadline);
  }
  comm_->take();
  take_log();
}

void ReducerThread::take_log() {
  std::vector<std::string> log = tuner_->take_log();
  const std::lock_guard lock(mutex_);
  decisions_.insert(decisions_.end(), std::make_move_iterator(log.begin()),
                    std::make_move_iterator(log.end()));
}

}  // namespace thinwire
