// What a communication thread tells its trace.
#include <algorithm>
#include <iterator>
#include <utility>

#include "comm/reducer_thread.h"

namespace thinwire {
namespace {

// So many codecs, or layers, are named; of the rest there is the number.
constexpr std::size_t kCodecsNamed = 2;
constexpr std::size_t kLayersNamed = 32;

std::string joined(std::vector<std::string> words, std::size_t named) {
  const std::size_t rest = words.size() - std::min(words.size(), named);
  words.resize(words.size() - rest);
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " + ") + word;
  return rest == 0 ? text : text + " and " + std::to_string(rest) + " more";
}

std::string bucket_name(std::size_t number) { return "bucket " + std::to_string(number); }

const char* verb_name(Verb verb) {
  switch (verb) {
    case Verb::kAllreduce:
      return "allreduce";
    case Verb::kAllgather:
      return "allgather";
    case Verb::kAlltoall:
      return "alltoall";
  }
  return "";
}

// What entries of a bucket are: which layers, how large.
class Entries {
 public:
  explicit Entries(const std::vector<Layer>& layers) : layers_(layers) {}

  void add(const BucketLayer& entry) {
    if (++count_ <= kLayersNamed) names_.push_back(layers_[entry.layer].name);
    bytes_ += entry.grad.bytes();
  }
  void tell(TraceArguments& arguments) && {
    if (count_ > kLayersNamed) {
      names_.push_back("and " + std::to_string(count_ - kLayersNamed) + " more");
    }
    arguments.emplace_back("layers", std::move(names_));
    arguments.emplace_back("gradient_bytes", bytes_);
  }

 private:
  const std::vector<Layer>& layers_;
  std::vector<std::string> names_;
  std::uint64_t bytes_ = 0;
  std::size_t count_ = 0;
};

}  // namespace

TraceSpan ReducerThread::trace_bucket(const char* what, const ActiveBucket& bucket) {
  return trace_ ? TraceSpan(*trace_, "thread", std::string(what) + " " + bucket_name(bucket.number),
                            {{"step", step_.load()}})
                : TraceSpan();
}

TraceSpan ReducerThread::trace_group(const char* what, const ActiveBucket& bucket,
                                     const BucketGroup& group) {
  if (!trace_) return {};
  std::vector<std::string> codecs;
  Entries entries(layers_);
  for (const std::size_t member : group.members) {
    const BucketLayer& entry = bucket.job.bucket.layers[member];
    const Codec& codec = plan_->choices[entry.layer].codec;
    const bool dense =
        mode_ != StepMode::kPolicy || codec.is_none() || step_ < codec.options.start_step;
    std::string spec = dense ? "none" : codec.spec;
    if (std::find(codecs.begin(), codecs.end(), spec) == codecs.end()) {
      codecs.push_back(std::move(spec));
    }
    entries.add(entry);
  }
  std::stable_partition(codecs.begin(), codecs.end(),
                        [](const std::string& codec) { return codec != "none"; });
  TraceArguments arguments = {{"step", step_.load()}, {"bucket", std::uint64_t{bucket.number}}};
  const std::string name = joined(codecs, kCodecsNamed);
  arguments.emplace_back("codecs", std::move(codecs));
  std::move(entries).tell(arguments);
  return {*trace_, "codec", std::string(what) + " " + name, std::move(arguments)};
}

void ReducerThread::trace_taken(const ActiveBucket& bucket) {
  if (!trace_) return;
  Entries entries(layers_);
  for (const BucketLayer& entry : bucket.job.bucket.layers) entries.add(entry);
  TraceArguments arguments = {{"step", step_.load()}};
  std::move(entries).tell(arguments);
  trace_->add(TraceLane::kQueue, {.category = "queue",
                                  .name = bucket_name(bucket.number),
                                  .begin = bucket.job.submitted,
                                  .end = Clock::now(),
                                  .arguments = std::move(arguments)});
}

void ReducerThread::trace_step(Clock::time_point end, bool skipped) {
  trace_->add(TraceLane::kStep, {.category = "step",
                                 .name = "step " + std::to_string(step_),
                                 .begin = active_.front().job.submitted,
                                 .end = end,
                                 .arguments = {{"step", step_.load()},
                                               {"buckets", std::uint64_t{active_.size()}},
                                               {"skipped", skipped}}});
}

void ReducerThread::trace_transfers(const std::vector<TransferTime>& transfers) {
  for (const TransferTime& transfer : transfers) {
    trace_->add(TraceLane::kWire,
                {.category = "wire",
                 .name = verb_name(transfer.verb),
                 .begin = transfer.issued,
                 .end = transfer.finished,
                 .arguments = {{"step", step_.load()},
                               {"payload_bytes", static_cast<std::uint64_t>(transfer.sent)},
                               {"awaited", transfer.awaited}}});
  }
}

// The time it takes is part of what is written the next time.
void ReducerThread::write_trace() {
  if (!trace_) return;
  const Clock::time_point began = Clock::now();
  std::string warning;
  try {
    warning = trace_->write();
  } catch (const std::exception& error) {  // of memory, say; the training is worth more
    warning = std::string("trace: ") + error.what() + "; no more steps are traced";
  }
  if (warning.empty()) {
    trace_->add(
        TraceLane::kThread,
        {.category = "thread", .name = "write the trace", .begin = began, .end = Clock::now()});
    return;
  }
  trace_.reset();
  const std::lock_guard lock(mutex_);
  warnings_.push_back(std::move(warning));
}

}  // namespace thinwire
