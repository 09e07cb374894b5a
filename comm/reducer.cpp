#include "comm/reducer.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>
#include <optional>
#include <unordered_set>
#include <utility>

#include "comm/current_plan.h"
#include "comm/handshake.h"
#include "comm/memory_table.h"
#include "comm/peer_lost.h"
#include "comm/reducer_thread.h"
#include "comm/summary.h"
#include "compressors/core/payload.h"
#include "compressors/core/version.h"

namespace thinwire {
namespace {

constexpr int kStateVersion = 1;

std::string describe(const Layer& layer) {
  return "'" + layer.name + "' " + std::string(name(layer.dtype)) + " " + layer.shape_text();
}

void check_table(const std::vector<Layer>& layers) {
  std::unordered_set<std::string_view> names;
  for (const Layer& layer : layers) {
    if (!names.insert(layer.name).second) {
      throw InvalidArgument("two layers are named '" + layer.name +
                            "'; expected a name for each\nhint: list a tied weight once");
    }
  }
}

std::vector<HandshakeField> handshake_fields(const std::vector<Layer>& layers, const Policy& policy,
                                             const ReducerOptions& options) {
  std::vector<HandshakeField> fields = {
      {"library version", std::string(version())},
      {"payload format", std::to_string(kPayloadVersion)},
      {"policy", policy.text()},
      {"operation", options.op == ReduceOp::kMean ? "mean" : "sum"},
      {"stream", options.stream},
      {"ride_along_bytes", std::to_string(options.ride_along_bytes)},
      {"link", std::to_string(options.link.latency_seconds * 1e6) + " us, " +
                   std::to_string(options.link.bytes_per_second) + " bytes/s"},
      {"split_from_ranks", std::to_string(options.split_from_ranks)},
      {"number of layers", std::to_string(layers.size())},
  };
  for (std::size_t i = 0; i < layers.size(); ++i) {
    fields.push_back({"layer " + std::to_string(i), describe(layers[i])});
  }
  return fields;
}

void check_state(bool same, const std::string& what, const std::string& expected,
                 const std::string& got) {
  if (!same) {
    throw InvalidArgument("cannot restore the reducer's state: " + what + ": expected " + expected +
                          ", got " + got +
                          "\nhint: restore a state saved by the same rank of a job with the same "
                          "model, policy and world size");
  }
}

}  // namespace

class GradientReducer::Impl {
 public:
  Impl(std::unique_ptr<Communicator> comm, std::vector<Layer> layers, Policy policy,
       ReducerOptions options)
      : layers_(std::move(layers)),
        policy_(std::move(policy)),
        options_(std::move(options)),
        rank_(comm->rank()),
        size_(comm->size()) {
    check_table(layers_);
    // A plan that cannot be made must not keep this rank from the handshake the others wait in: a
    // policy that differs between ranks is better told as that.
    std::exception_ptr error;
    try {
      Plan plan = Plan::make(policy_, layers_);
      plan.choose_routes(layers_, size_, options_.link, options_.split_from_ranks);
      plan_.emplace(std::move(plan));
    } catch (const PolicyError&) {
      error = std::current_exception();
    }
    if (size_ > 1) {
      greet(*comm);
    }
    if (error) {
      std::rethrow_exception(error);
    }
    memories_.emplace(layers_, plan_->get());
    seen_.resize(layers_.size());
    if (size_ > 1) {
      thread_.emplace(std::move(comm), layers_, *plan_, *memories_, options_);
    }
  }

  std::shared_ptr<Reduction> reduce(Bucket bucket, std::function<void(std::exception_ptr)> done) {
    const std::lock_guard lock(mutex_);
    check_bucket(bucket);
    auto reduction = std::make_shared<PendingReduction>();
    const bool last = bucket.last;
    std::vector<std::size_t> indices;
    for (const BucketLayer& entry : bucket.layers) {
      indices.push_back(entry.layer);
    }
    if (thread_) {
      thread_->submit({.bucket = std::move(bucket),
                       .abandon = false,
                       .reduction = reduction,
                       .done = std::move(done)});
    } else {
      for (const BucketLayer& entry : bucket.layers) {
        const TensorView source = entry.source.data == nullptr ? entry.grad : entry.source;
        if (!memories_->release(entry.layer, source, entry.grad) &&
            source.data != entry.grad.data) {
          std::memmove(entry.grad.data, source.data, source.bytes());
        }
      }
      reduction->complete(nullptr);
      if (done) {
        done(nullptr);
      }
    }
    mark_seen(indices);
    if (last) {
      if (!thread_) memories_->commit();
      close_step();
    } else {
      open_ = true;
    }
    return reduction;
  }

  void follow(std::shared_ptr<GradientMethod> method) {
    const std::lock_guard lock(mutex_);
    quiesce("follow()");
    if (method_) {
      throw InvalidArgument("rank " + std::to_string(rank_) +
                            ": the reducer follows an optimizer already; expected one\nhint: give "
                            "each model, and so each reducer, one optimizer");
    }
    if (const std::uint64_t step = thread_ ? thread_->counters().step : solo_steps_; step > 0) {
      throw InvalidArgument("rank " + std::to_string(rank_) + ": step " + std::to_string(step) +
                            " of the reducer; expected an optimizer before the first one\nhint: "
                            "make the optimizer before the first backward pass");
    }
    if (policy_.chooses()) {
      throw PolicyError("rank " + std::to_string(rank_) +
                        ": the policy 'auto' chooses codecs itself, and an optimizer that has a "
                        "say in how gradients are reduced needs to know them; expected another "
                        "policy\nhint: name a codec, topk:0.001 or onebit say, or use the "
                        "framework's own optimizer with auto");
    }
    adopt(with_options(*plan(), *method));
    method_ = std::move(method);
    if (thread_) {
      thread_->follow(*method_);
    }
  }

  void set_policy(Policy policy) {
    const std::lock_guard lock(mutex_);
    quiesce("set_policy()");
    if (thread_) {
      thread_->check();
    }
    Plan plan = Plan::make(policy, layers_);
    if (method_ && policy.chooses()) {
      throw PolicyError("rank " + std::to_string(rank_) +
                        ": the policy 'auto' does not go with an optimizer that has a say in how "
                        "gradients are reduced; expected the name of a codec");
    }
    if (method_) {
      method_->check_plan(plan);
      plan = with_options(std::move(plan), *method_);
    }
    adopt(std::move(plan));
    policy_ = std::move(policy);
    if (method_) {
      method_->plan_changed();
    }
    if (thread_) {
      thread_->policy_changed(policy_.text());
    }
  }

  void scale_memories(std::span<const float> factors) {
    if (factors.size() != layers_.size()) {
      throw InvalidArgument("rank " + std::to_string(rank_) + ": " +
                            std::to_string(factors.size()) + " factors, expected " +
                            std::to_string(layers_.size()) + ", one a layer");
    }
    const std::lock_guard lock(mutex_);
    quiesce("scale_memories()");
    memories_->scale(factors);
  }

  std::vector<double> residual_norms() const {
    const std::lock_guard lock(mutex_);
    quiesce("residual_norms()");
    return memories_->residual_norms();
  }

  int rank() const { return rank_; }
  ReduceOp op() const { return options_.op; }
  int size() const { return size_; }

  void abandon_step() {
    std::shared_ptr<PendingReduction> reduction;
    {
      const std::lock_guard lock(mutex_);
      if (!open_) {
        return;
      }
      close_step();
      if (!thread_) {
        memories_->rollback();
        ++solo_skipped_;
        solo_last_skipped_ = true;
        return;
      }
      reduction = std::make_shared<PendingReduction>();
      thread_->submit({.bucket = {}, .abandon = true, .reduction = reduction, .done = {}});
    }
    reduction->wait();
  }

  std::uint64_t steps() const { return thread_ ? thread_->counters().steps : solo_count_; }
  bool last_step_skipped() const {
    return thread_ ? thread_->counters().last_skipped : solo_last_skipped_;
  }

  void set_loss_scale(double scale) {
    if (!(scale > 0) || !std::isfinite(scale)) {
      throw InvalidArgument("loss scale: expected a positive finite number, got " +
                            std::to_string(scale));
    }
    const std::lock_guard lock(mutex_);
    quiesce("set_loss_scale()");
    if (scale != loss_scale_) {
      memories_->scale(static_cast<float>(scale / loss_scale_));
    }
    keep_loss_scale(scale);
  }

  ReducerStats stats() const {
    ReducerStats stats;
    ReducerCounters counters;
    if (thread_) {
      counters = thread_->counters();
    } else {
      counters.steps = solo_count_;
      counters.skipped_steps = solo_skipped_;
      counters.nonfinite_steps.resize(layers_.size());
      counters.joint_bytes.resize(layers_.size());
    }
    stats.steps = counters.steps;
    stats.skipped_steps = counters.skipped_steps;
    stats.wire_bytes = counters.wire_bytes;
    stats.dense_wire_bytes = counters.dense_wire_bytes;
    if (counters.wire_bytes > 0) {
      stats.ratio =
          static_cast<double>(counters.dense_wire_bytes) / static_cast<double>(counters.wire_bytes);
      stats.ratio_bf16 = stats.ratio / 2;
    }
    stats.memory_bytes = counters.memory_bytes;
    stats.buffer_bytes = counters.buffer_bytes;
    stats.encode_seconds = counters.encode_seconds;
    stats.decode_seconds = counters.decode_seconds;
    stats.wait_seconds = counters.wait_seconds;
    const std::shared_ptr<const Plan> plan = plan_->get();
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      stats.layers.push_back(layer_stats(i, plan->choices[i], counters));
    }
    return stats;
  }

  std::vector<std::string> take_decisions() {
    return thread_ ? thread_->take_decisions() : std::vector<std::string>();
  }

  std::vector<std::string> take_warnings() {
    return thread_ ? thread_->take_warnings() : std::vector<std::string>();
  }

  double loss_scale() const { return loss_scale_; }
  std::shared_ptr<const Plan> plan() const { return plan_->get(); }
  const std::vector<Layer>& layers() const { return layers_; }
  std::string summary() const { return summarise(layers_, policy_, *plan(), size_); }

  ReducerState state() const {
    const std::lock_guard lock(mutex_);
    quiesce("state()");
    return {.version = kStateVersion,
            .rank = rank_,
            .world_size = size_,
            .step = thread_ ? thread_->counters().step : solo_steps_,
            .loss_scale = loss_scale_,
            .policy = policy_.text(),
            .codecs = policy_.chooses() ? plan()->specs() : std::vector<std::string>(),
            .entries = memories_->save()};
  }

  void restore(const ReducerState& state) {
    const std::lock_guard lock(mutex_);
    quiesce("restore()");
    const auto check_number = [](const char* what, int expected, int got) {
      check_state(expected == got, what, std::to_string(expected), std::to_string(got));
    };
    check_number("version", kStateVersion, state.version);
    check_number("rank", rank_, state.rank);
    check_number("world size", size_, state.world_size);
    check_state(state.policy == policy_.text(), "policy", "'" + policy_.text() + "'",
                "'" + state.policy + "'");
    if (policy_.chooses()) {
      check_state(state.codecs.size() == layers_.size(), "chosen codecs",
                  std::to_string(layers_.size()), std::to_string(state.codecs.size()));
    }
    const std::vector<std::string> before = plan()->specs();
    if (policy_.chooses()) go_on_with(state.codecs);
    try {
      memories_->restore(state.entries, owner_weight(options_.op, size_));
    } catch (...) {
      if (policy_.chooses()) go_on_with(before);
      throw;
    }
    if (state.loss_scale != loss_scale_) {
      keep_loss_scale(state.loss_scale);
    }
    if (thread_) {
      thread_->set_step(state.step);
    } else {
      solo_steps_ = state.step;
    }
  }

  void abort() noexcept {
    if (thread_) {
      thread_->abort();
    }
  }

 private:
  void keep_loss_scale(double scale) {
    loss_scale_ = scale;
    if (thread_) {
      thread_->set_loss_scale(scale);
    }
  }

  Plan with_options(Plan plan, const GradientMethod& method) const {
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      Codec& codec = plan.choices[i].codec;
      const std::string options = codec.is_none() ? std::string() : method.codec_options(i, codec);
      if (!options.empty()) {
        codec = make_codec(codec.spec + options);
      }
    }
    return plan;
  }

  void go_on_with(const std::vector<std::string>& codecs) {
    if (thread_) {
      thread_->go_on_with(codecs);
    } else {
      adopt(plan()->with_codecs(codecs));
    }
  }

  void adopt(Plan plan) {
    if (thread_) {
      thread_->adopt(std::move(plan));
    } else {
      plan_->set(std::move(plan));
      memories_->set_plan(plan_->get(), owner_weight(options_.op, size_));
    }
  }

  void greet(Communicator& comm) const {
    const auto began = Clock::now();
    try {
      shake_hands(comm, handshake_fields(layers_, policy_, options_), began + options_.deadline);
    } catch (const TransportError& error) {
      LossReport report{.rank = rank_,
                        .world_size = size_,
                        .step = 0,
                        .waited = Clock::now() - began,
                        .deadline = options_.deadline,
                        .cause = "in the handshake: " + std::string(error.what())};
      const PeerLost lost = lost_peer(comm, std::move(report), options_.roll_call_grace);
      if (!comm.traits().survives_failure) {
        if (options_.report) {
          options_.report(lost.what());
        }
        options_.end_program ? options_.end_program() : comm.abort();
      }
      throw PeerLost(lost);
    }
  }

  std::string where(std::size_t layer) const {
    return "rank " + std::to_string(rank_) + ", layer '" + layers_[layer].name + "': ";
  }

  void check_view(std::size_t index, const TensorView& grad) const {
    const Layer& layer = layers_[index];
    if (grad.dtype != layer.dtype) {
      throw InvalidArgument(where(index) + "expected " + std::string(name(layer.dtype)) + ", got " +
                            std::string(name(grad.dtype)) +
                            "\nhint: gradients keep the layer table's dtype; make a new reducer "
                            "after changing it");
    }
    if (grad.elements != layer.elements() || (grad.data == nullptr && grad.elements > 0)) {
      throw InvalidArgument(where(index) + "expected " + std::to_string(layer.elements()) +
                            " elements (shape " + layer.shape_text() + "), got " +
                            std::to_string(grad.data == nullptr ? 0 : grad.elements) +
                            "\nhint: a tensor keeps its shape between steps; make a new reducer "
                            "for a changed model");
    }
  }

  void check_bucket(const Bucket& bucket) const {
    std::unordered_set<std::size_t> within;
    for (const BucketLayer& entry : bucket.layers) {
      if (entry.layer >= layers_.size()) {
        throw InvalidArgument("rank " + std::to_string(rank_) + ": layer index " +
                              std::to_string(entry.layer) + " given, the table has " +
                              std::to_string(layers_.size()) + " layers");
      }
      const Layer& layer = layers_[entry.layer];
      if (layer.dtype == DType::kOther) {
        throw InvalidArgument(where(entry.layer) +
                              "expected fp32, bf16, fp16 or fp64 gradients, got integers or "
                              "another type\nhint: integers are no gradients; reduce them with "
                              "the transport's own allreduce");
      }
      check_view(entry.layer, entry.grad);
      if (entry.source.data != nullptr) {
        check_view(entry.layer, entry.source);
      }
      if (seen_[entry.layer] != 0 || !within.insert(entry.layer).second) {
        throw InvalidArgument(where(entry.layer) +
                              "given twice in one step\nhint: mark the step's last bucket with "
                              "last = true, or end an unfinished step with abandon_step()");
      }
    }
  }

  void mark_seen(const std::vector<std::size_t>& indices) {
    for (const std::size_t layer : indices) {
      seen_[layer] = 1;
    }
  }

  void close_step() {
    std::fill(seen_.begin(), seen_.end(), std::uint8_t{0});
    open_ = false;
    if (!thread_) {
      ++solo_steps_;
      ++solo_count_;
      solo_last_skipped_ = false;
    }
  }

  // Waits for steps that are complete but on their way; memory is at a committed step then.
  void quiesce(const char* call) const {
    if (!thread_) {
      return;
    }
    if (open_ && !thread_->failed()) {
      throw InvalidArgument("rank " + std::to_string(rank_) + ": " + call +
                            " within a step; expected the step's last bucket before it\nhint: "
                            "call it between steps, or end the step with abandon_step()");
    }
    thread_->wait_idle();
  }

  LayerStats layer_stats(std::size_t i, const Policy::Choice& choice,
                         const ReducerCounters& counters) const {
    LayerStats stats{.name = layers_[i].name,
                     .elements = layers_[i].elements(),
                     .codec = choice.codec.is_none() ? "none" : choice.codec.spec,
                     .reason = choice.reason,
                     .slot_bytes = size_ > 1 ? message_bytes(layers_[i], choice.codec) : 0,
                     .ratio = 1,
                     .nonfinite_steps = counters.nonfinite_steps[i]};
    if (counters.joint_bytes[i] > 0) {
      stats.slot_bytes = counters.joint_bytes[i];
    }
    if (stats.slot_bytes > 0) {
      stats.ratio =
          4.0 * static_cast<double>(stats.elements) / static_cast<double>(stats.slot_bytes);
    }
    return stats;
  }

  const std::vector<Layer> layers_;
  Policy policy_;
  const ReducerOptions options_;
  const int rank_;
  const int size_;
  std::optional<CurrentPlan> plan_;
  std::optional<MemoryTable> memories_;
  mutable std::mutex mutex_;  // of the caller's side: the open step
  std::vector<std::uint8_t> seen_;
  bool open_ = false;
  std::atomic<double> loss_scale_ = 1;
  // World size 1: the next step, how many there were, how many of them were abandoned.
  std::uint64_t solo_steps_ = 0;
  std::uint64_t solo_count_ = 0;
  std::uint64_t solo_skipped_ = 0;
  bool solo_last_skipped_ = false;
  std::shared_ptr<GradientMethod> method_;
  std::optional<ReducerThread> thread_;  // last: ends first
};

GradientReducer::GradientReducer(std::unique_ptr<Communicator> comm, std::vector<Layer> layers,
                                 Policy policy, ReducerOptions options)
    : impl_(std::make_unique<Impl>(std::move(comm), std::move(layers), std::move(policy),
                                   std::move(options))) {}

GradientReducer::~GradientReducer() = default;

std::shared_ptr<Reduction> GradientReducer::reduce(Bucket bucket,
                                                   std::function<void(std::exception_ptr)> done) {
  return impl_->reduce(std::move(bucket), std::move(done));
}

void GradientReducer::follow(std::shared_ptr<GradientMethod> method) {
  impl_->follow(std::move(method));
}
void GradientReducer::scale_memories(std::span<const float> factors) {
  impl_->scale_memories(factors);
}
std::vector<double> GradientReducer::residual_norms() const { return impl_->residual_norms(); }
int GradientReducer::rank() const { return impl_->rank(); }
ReduceOp GradientReducer::op() const { return impl_->op(); }
int GradientReducer::size() const { return impl_->size(); }
void GradientReducer::abandon_step() { impl_->abandon_step(); }
std::uint64_t GradientReducer::steps() const { return impl_->steps(); }
bool GradientReducer::last_step_skipped() const { return impl_->last_step_skipped(); }
void GradientReducer::set_loss_scale(double scale) { impl_->set_loss_scale(scale); }
void GradientReducer::set_policy(Policy policy) { impl_->set_policy(std::move(policy)); }
double GradientReducer::loss_scale() const { return impl_->loss_scale(); }
ReducerStats GradientReducer::stats() const { return impl_->stats(); }
std::shared_ptr<const Plan> GradientReducer::plan() const { return impl_->plan(); }
const std::vector<Layer>& GradientReducer::layers() const { return impl_->layers(); }
std::vector<std::string> GradientReducer::take_decisions() { return impl_->take_decisions(); }
std::vector<std::string> GradientReducer::take_warnings() { return impl_->take_warnings(); }
std::string GradientReducer::summary() const { return impl_->summary(); }
ReducerState GradientReducer::state() const { return impl_->state(); }
void GradientReducer::restore(const ReducerState& state) { impl_->restore(state); }
void GradientReducer::abort() noexcept { impl_->abort(); }

}  // namespace thinwire
