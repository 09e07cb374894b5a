#include "comm/auto_tuner.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <unordered_map>
#include <utility>

#include "comm/plan_judge.h"
#include "compressors/adaptive/candidates.h"
#include "compressors/adaptive/error_curves.h"
#include "compressors/adaptive/gradient_sample.h"
#include "compressors/adaptive/planner.h"
#include "compressors/core/error.h"
#include "compressors/core/random.h"
#include "compressors/families.h"

namespace thinwire {
namespace {

using Reason = PlanJudge::Reason;
using Verdict = PlanJudge::Verdict;

constexpr int kWindow = 5;                  // steps; the first after a change counts for nothing
constexpr double kSampleShare = 0.02;       // of a window's time, for the sampling of gradients
constexpr double kReportShare = 0.01;       // of a window's time, for the reports' wire
constexpr std::size_t kMostSampled = 16;    // layers a window
constexpr double kSlack = 0.005;            // of a step: plans as fast
constexpr double kOverBudget = 1.05;        // a plan that loses more is left
constexpr double kLessError = 0.9;          // a plan that loses less than this is worth a trial
constexpr double kProbeDense = 2;           // times the present step
constexpr double kNetworkChanged = 2;       // what bytes cost is this much more, or less,
constexpr double kChangeMatters = 0.25;     // by this share of a step or more
constexpr double kTelling = 0.03;           // of a step: what bytes must take to be told from noise
constexpr double kLeastContraction = 0.7;   // of the reference's, see update_errors()
constexpr double kUnknownBytes = 4;         // times what is sent now: measure the network first
constexpr std::uint64_t kLinkWindows = 20;  // that a measured network is good for
constexpr std::uint64_t kLinkRest = 4;      // windows from one measurement to the next, at least
constexpr std::uint64_t kMostRest = 16;     // windows from one solution of the plan to the next
constexpr double kRounding = 1e-9;          // of sums in another order
constexpr double kNewer = 0.5;              // weight of a new sample beside the older ones
constexpr double kMostScale = 20;           // of codecs' speeds on a busy machine

// What a report holds before its lists.
enum Head : std::size_t { kStructure, kSeconds, kWork, kContention, kSampling, kHeads };

std::string format(const char* text, double a) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), text, a);  // NOLINT(*-vararg)
  return buffer.data();
}
std::string milliseconds(double seconds) { return format("%.1f ms", 1e3 * seconds); }
std::string megabytes(double bytes) { return format("%.3g MB", 1e-6 * bytes); }

// Of finite values; NaN without any.
double median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return !std::isfinite(value); });
  if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Of finite values; NaN without any.
double least_of(const std::vector<double>& values) {
  double least = std::numeric_limits<double>::quiet_NaN();
  for (const double value : values) least = std::fmin(least, value);
  return least;
}

struct Option {
  Codec codec;
  CandidateCodec candidate;
};

struct LayerState {
  bool automatic = false;
  std::vector<Option> options;  // of one that is not automatic: its codec
  std::optional<CandidateCodec> reference;
  double budget_factor = 1;
  std::optional<CandidateCodec> bound;
  ErrorCurves curves;
  bool known = false;
  // One an option.
  std::vector<LayerCost> costs;
  std::vector<double> errors;
  std::vector<std::uint8_t> allowed;
  double budget = 0;  // the layer's part
};

std::vector<Option> options_of(const Layer& layer, const AutoOptions& automatic) {
  std::vector<std::string_view> families(automatic.families.begin(), automatic.families.end());
  std::vector<Option> options;
  for (CandidateCodec& candidate : make_candidates(layer.shape, layer.dtype, families)) {
    CommonOptions common = automatic.options;
    if (candidate.curve == Curve::kLowRank) common.storage = ResidualStorage::kFP32;
    Codec codec = make_codec(candidate.spec + common_text(common));
    options.push_back({std::move(codec), std::move(candidate)});
  }
  return options;
}

// What gradients are taken for before any was seen: heavy tails, no structure.
ErrorCurves usual_curves() {
  GradientSample sample;
  constexpr std::int64_t kRows = 128;
  sample.extents.rows = sample.extents.columns = kRows;
  sample.tensor = sample.extents;
  const RandomStream stream = random_stream(0, 0, -1);
  for (std::int64_t i = 0; i < kRows * kRows; ++i) {
    const auto words = random_block(stream, static_cast<std::uint64_t>(i));
    const auto unit = [](std::uint32_t word) { return static_cast<double>(word) * 0x1p-32; };
    const double sum = unit(words[0]) + unit(words[1]) + unit(words[2]) - 1.5;
    sample.values.push_back(static_cast<float>(sum / (0.05 + unit(words[3]))));
  }
  return measure_errors(sample);
}

}  // namespace

class AutoTuner::Impl {
 public:
  Impl(const std::vector<Layer>& layers, const Plan& plan, int ranks, const LinkModel& link,
       const std::vector<CodecSpeed>& speeds, std::vector<BucketReady> buckets)
      : layers_(layers),
        base_(plan),
        ranks_(ranks),
        link_(link),
        buckets_(std::move(buckets)),
        judge_({}) {
    const std::vector<Codec> codecs = AutoTuner::codecs(layers, plan);
    for (std::size_t i = 0; i < codecs.size(); ++i) {
      speeds_.emplace(codecs[i].spec, speeds.at(i));
    }
    const ErrorCurves usual = usual_curves();
    for (std::size_t i = 0; i < layers.size(); ++i) {
      states_.push_back(state_of(i));
      states_.back().curves = usual;
      key_hashes_.push_back(
          Key{.stream = "auto", .parameter = layers[i].name, .begin = 0, .end = 0}.hash());
      if (states_.back().automatic) automatic_.push_back(i);
    }
    if (buckets_.empty()) {
      BucketReady all;
      for (std::size_t i = layers.size(); i-- > 0;) all.layers.push_back(i);
      buckets_ = {std::move(all)};
    }
    update_errors();
    update_costs();
    judge_ = PlanJudge(best().id);
    log("begins with " + describe(judge_.current()));
    choose_wanted(1);
  }

  Plan plan() const {
    Plan plan = base_;
    for (std::size_t a = 0; a < automatic_.size(); ++a) {
      const LayerState& state = states_[automatic_[a]];
      const std::size_t option = judge_.current()[a];
      Policy::Choice& choice = plan.choices[automatic_[a]];
      choice.codec = state.options[option].codec;
      choice.reason = "auto: " + reason(state, option);
    }
    return plan;
  }

  void go_on_with(const std::vector<std::string>& codecs) {
    PlanId id;
    for (const std::size_t i : automatic_) {
      const std::vector<Option>& options = states_[i].options;
      const auto found = std::find_if(options.begin(), options.end(), [&](const Option& option) {
        return option.codec.spec == codecs.at(i);
      });
      if (found == options.end()) {
        throw InvalidArgument("layer '" + layers_[i].name + "': the saved plan has '" + codecs[i] +
                              "', which the policy '" + base_.choices[i].automatic->text +
                              "' does not choose from");
      }
      id.push_back(static_cast<std::uint16_t>(found - options.begin()));
    }
    judge_.adopt(id);
    steps_.clear();
    fresh_ = true;
    log("goes on with " + describe(id));
  }

  std::span<const std::size_t> wanted() const { return wanted_now_; }

  void sample(std::size_t layer, TensorView gradient, std::span<const float> residual) {
    samples_.emplace_back().layer = layer;
    take_sample({.grad = gradient,
                 .shape = layers_[layer].shape,
                 .residual = residual,
                 .decay = base_.choices[layer].codec.options.decay},
                key_hashes_[layer], window_, samples_.back().sample);
  }

  void end_step(const StepTimes& step) {
    sampling_seconds_ += step.sampling;
    for (Sampled& sampled : samples_) {
      curves_[sampled.layer] = measure_errors(sampled.sample, wants_low_rank(sampled.layer));
    }
    samples_.clear();
    const std::uint32_t structure = structure_of(step);
    if (structure != structure_) {
      structure_ = structure;
      steps_.clear();
      fresh_ = true;
    }
    if (std::exchange(fresh_, false)) {
      // The first step after a change makes its buffers.
    } else {
      steps_.push_back(step);
    }
    choose_now();
  }

  void skip_step() { samples_.clear(); }

  bool due() const { return steps_.size() + 1 >= kWindow; }

  std::vector<float> report() {
    std::vector<float> report(kHeads);
    const auto over_steps = [&](auto&& value) {
      std::vector<double> values;
      for (const StepTimes& step : steps_) values.push_back(value(step));
      return static_cast<float>(median(std::move(values)));
    };
    report[kStructure] = static_cast<float>(structure_ & 0xFFFFFFU);
    report[kSeconds] = over_steps([](const StepTimes& s) { return s.seconds; });
    report[kWork] = over_steps([](const StepTimes& s) { return s.work; });
    report[kContention] = over_steps([](const StepTimes& s) { return s.contention; });
    report[kSampling] = static_cast<float>(sampling_seconds_);
    const StepTimes& any = steps_.back();
    for (std::size_t b = 0; b < any.buckets.size(); ++b) {
      report.push_back(over_steps([b](const StepTimes& s) { return s.buckets[b].ready; }));
    }
    for (const StepTimes& step : steps_) {
      for (std::size_t t = 0; t < any.transfers.size(); ++t) {
        report.push_back(static_cast<float>(transfer_seconds(step, t)));
      }
    }
    for (const std::size_t layer : wanted_) {
      const auto found = curves_.find(layer);
      report.push_back(found == curves_.end() ? 0.0F : 1.0F);
      const ErrorCurves none;
      const ErrorCurves& curves = found == curves_.end() ? none : found->second;
      report.insert(report.end(), curves.values().begin(), curves.values().end());
    }
    return report;
  }

  bool decide(std::span<const float> reports) {
    const PlanId before = judge_.current();
    digest(reports);
    ++window_;
    const double transfers_off = learn_link();
    learn_speeds();
    update_errors();
    update_costs();
    const bool changed = link_windows_ > kLinkRest &&
                         (transfers_off > kNetworkChanged || transfers_off < 1 / kNetworkChanged);
    if (changed) {
      log("transfers take " + format("%.2g", transfers_off) +
          " times as long as expected: the network has changed");
      judge_.network_changed();
      solve_rest_ = 0;
      wants_link_ = true;
    }
    forget_what_loses_too_much();
    // What was measured of a trial that the network has ended says nothing of the plan before it.
    const bool ended = judge_.current() != before;
    const bool trial = judge_.on_trial();
    const PlanId tried = judge_.current();
    const Verdict verdict = ended ? Verdict::kNone : judge_.measured(digest_.seconds);
    tell(verdict, trial, tried);
    if (verdict != Verdict::kTakenBack && !changed) consider();
    return finish(before);
  }

  bool wants_link() const { return wants_link_; }
  const LinkModel& link() const { return link_; }

  bool set_link(const LinkModel& link) {
    const PlanId before = judge_.current();
    wants_link_ = false;
    link_ = link;
    link_windows_ = 0;
    update_costs();
    consider();
    return finish(before);
  }

  std::vector<std::string> take_log() { return std::exchange(log_, {}); }

 private:
  struct Sampled {
    std::size_t layer = 0;
    GradientSample sample;
  };
  struct Digest {
    double seconds = 0;
    double work = 0;
    double contention = 0;
    double sampling = 0;
    std::vector<double> transfers;
    std::vector<TransferTime> kinds;  // verb and bytes of each
  };
  struct Proposal {
    PlanId id;
    double seconds = 0;  // after the last gradient, what the work takes from others included
    double error = 0;
    double sent = 0;
    bool feasible = false;
  };

  LayerState state_of(std::size_t i) const {
    LayerState state;
    const Policy::Choice& choice = base_.choices[i];
    if (!choice.automatic) {
      state.options.push_back({choice.codec, {}});
      return state;
    }
    const AutoOptions& automatic = *choice.automatic;
    state.automatic = true;
    state.options = options_of(layers_[i], automatic);
    state.budget_factor = automatic.factor;
    const auto candidate = [](const std::string& spec) -> std::optional<CandidateCodec> {
      if (spec.empty()) return std::nullopt;
      return candidate_of(make_codec(spec));
    };
    state.reference = candidate(automatic.reference);
    state.bound = candidate(automatic.at_least);
    return state;
  }

  static std::string reason(const LayerState& state, std::size_t option) {
    const double norm = std::sqrt(state.curves.squared_norm());
    if (state.options[option].codec.is_none()) return "uncompressed";
    if (!state.known || norm == 0) return "its gradients were not seen yet";
    return "loses " + format("%.3g", state.errors[option] / norm) + " of its norm a step";
  }

  bool wants_low_rank(std::size_t layer) const {
    const auto& options = states_[layer].options;
    const LayerState& state = states_[layer];
    const auto is = [](const CandidateCodec& c) { return c.curve == Curve::kLowRank; };
    return std::any_of(options.begin(), options.end(),
                       [&](const Option& option) { return is(option.candidate); }) ||
           (state.reference && is(*state.reference)) || (state.bound && is(*state.bound));
  }

  // Which buckets and transfers a step has.
  static std::uint32_t structure_of(const StepTimes& step) {
    std::uint64_t hash = 0xCBF29CE484222325U;  // FNV-1a
    const auto add = [&hash](std::uint64_t value) { hash = (hash ^ value) * 0x100000001B3U; };
    for (const BucketReady& bucket : step.buckets) {
      add(bucket.layers.size());
      for (const std::size_t layer : bucket.layers) add(layer);
    }
    for (const TransferTime& transfer : step.transfers) {
      add(static_cast<std::uint64_t>(transfer.verb));
      add(static_cast<std::uint64_t>(transfer.sent));
    }
    return static_cast<std::uint32_t>(hash ^ (hash >> 32U));
  }

  // On a wire that carries one after another. NaN where its beginning or its end is not known.
  static double transfer_seconds(const StepTimes& step, std::size_t t) {
    const double unknown = std::numeric_limits<double>::quiet_NaN();
    const TransferTime& transfer = step.transfers[t];
    if (!transfer.awaited) return unknown;
    Clock::time_point began = transfer.issued;
    if (t > 0) {
      const TransferTime& last = step.transfers[t - 1];
      if (last.finished > transfer.issued && !last.awaited) return unknown;
      began = std::max(began, last.finished);
    }
    const double seconds = std::chrono::duration<double>(transfer.finished - began).count();
    return seconds > 0 ? seconds : unknown;
  }

  // Which layers this window samples, in turn.
  void choose_wanted(std::size_t count) {
    wanted_.clear();
    count = std::min(count, automatic_.size());
    for (std::size_t i = 0; i < count; ++i) {
      wanted_.push_back(automatic_[next_sampled_++ % automatic_.size()]);
    }
    curves_.clear();
    sampling_seconds_ = 0;
    choose_now();
  }

  // A share of them each step.
  void choose_now() {
    wanted_now_.clear();
    const std::size_t step = steps_.size();
    for (std::size_t i = step; i < wanted_.size(); i += kWindow - 1) {
      if (curves_.find(wanted_[i]) == curves_.end()) wanted_now_.push_back(wanted_[i]);
    }
    std::sort(wanted_now_.begin(), wanted_now_.end());
  }

  void digest(std::span<const float> reports) {
    const StepTimes& any = steps_.back();
    const std::size_t buckets = any.buckets.size();
    const std::size_t transfers = any.transfers.size();
    const std::size_t row = reports.size() / static_cast<std::size_t>(ranks_);
    const auto of = [&](std::size_t rank, std::size_t at) {
      return static_cast<double>(reports[rank * row + at]);
    };
    const auto most = [&](std::size_t at) {
      double value = of(0, at);
      for (std::size_t rank = 1; rank < static_cast<std::size_t>(ranks_); ++rank) {
        value = std::fmax(value, of(rank, at));
      }
      return value;
    };
    const auto least = [&](std::size_t at) {
      double value = of(0, at);
      for (std::size_t rank = 1; rank < static_cast<std::size_t>(ranks_); ++rank) {
        value = std::fmin(value, of(rank, at));
      }
      return value;
    };
    for (std::size_t rank = 1; rank < static_cast<std::size_t>(ranks_); ++rank) {
      if (of(rank, kStructure) != of(0, kStructure)) {
        throw MismatchError("rank " + std::to_string(rank) +
                            " reduces its gradients in other buckets than rank 0\nhint: every "
                            "rank must call reduce() with the same buckets in the same order");
      }
    }
    digest_.seconds = most(kSeconds);
    digest_.work = most(kWork);
    digest_.contention = most(kContention);
    digest_.sampling = most(kSampling);
    buckets_ = any.buckets;
    std::size_t at = kHeads;
    for (BucketReady& bucket : buckets_) bucket.ready = most(at++);
    // Kept in order, whatever the ranks' medians say.
    for (std::size_t b = buckets; b-- > 1;) {
      buckets_[b - 1].ready = std::min(buckets_[b - 1].ready, buckets_[b].ready);
    }
    digest_.transfers.clear();
    digest_.kinds = any.transfers;
    // In each step the rank that came last tells how long the wire took; of the steps, the fastest,
    // which the ranks' computation disturbed least.
    for (std::size_t t = 0; t < transfers; ++t) {
      std::vector<double> seconds;
      for (std::size_t s = 0; s < steps_.size(); ++s) {
        seconds.push_back(least(at + s * transfers + t));
      }
      digest_.transfers.push_back(least_of(seconds));
    }
    at += steps_.size() * transfers;
    for (const std::size_t layer : wanted_) {
      ErrorCurves sum;
      float count = 0;
      for (std::size_t rank = 0; rank < static_cast<std::size_t>(ranks_); ++rank) {
        const std::span<const float> values = reports.subspan(rank * row + at);
        if (values[0] == 0) continue;
        ErrorCurves curves;
        std::copy_n(values.begin() + 1, ErrorCurves::kValues, curves.values().begin());
        sum += curves;
        ++count;
      }
      at += 1 + ErrorCurves::kValues;
      if (count > 0) add_curves(states_[layer], sum, count);
    }
  }

  static void add_curves(LayerState& state, ErrorCurves& sum, float count) {
    sum *= 1 / count;
    // The step is skipped, or its gradients are lost anyway.
    if (sum.nonfinite() || !std::all_of(sum.values().begin(), sum.values().end(),
                                        [](float value) { return std::isfinite(value); })) {
      return;
    }
    if (std::exchange(state.known, true)) {
      sum *= kNewer;
      state.curves *= 1 - kNewer;
      state.curves += sum;
    } else {
      state.curves = sum;
    }
  }

  // How many times as long as expected the transfers took, where it matters to the step. Few bytes
  // take what scheduling makes of them, which says nothing of the network.
  double learn_link() {
    ++link_windows_;
    double expected = 0;
    double bytes = 0;  // the part of it that they take
    double took = 0;
    for (std::size_t t = 0; t < digest_.transfers.size(); ++t) {
      if (!std::isfinite(digest_.transfers[t])) continue;
      const TransferTime& kind = digest_.kinds[t];
      const VerbCost& cost = link_[kind.verb];
      expected += cost.seconds(kind.sent);
      bytes += cost.per_byte * kind.sent;
      took += digest_.transfers[t];
    }
    const bool matters = std::abs(took - expected) > kChangeMatters * digest_.seconds;
    if (bytes > kTelling * digest_.seconds || matters) {
      for (std::size_t t = 0; t < digest_.transfers.size(); ++t) {
        link_.observe(digest_.kinds[t].verb, digest_.kinds[t].sent, digest_.transfers[t]);
      }
    }
    return matters && expected > 0 ? took / expected : 1;
  }

  // Codecs are slower on a busy machine than where they were measured.
  void learn_speeds() {
    contention_ += (std::clamp(2 * digest_.contention, 0.0, 1.0) - contention_) / 2;
    double work = 0;
    double encoded = 0;
    for_current([&](const LayerState& state, std::size_t option) {
      work += state.costs[option].work;
      if (!state.options[option].codec.is_none()) encoded += state.costs[option].work;
    });
    if (encoded > work / 2 && digest_.work > 0) {
      const double ratio = std::clamp(digest_.work / work, 0.25, 4.0);
      scale_ = std::clamp(scale_ * (1 + ratio) / 2, 0.25, kMostScale);
    }
  }

  template <typename Call>
  void for_current(Call&& call) const {
    std::size_t a = 0;
    for (const LayerState& state : states_) {
      call(state, state.automatic ? std::size_t{judge_.current()[a++]} : std::size_t{0});
    }
  }

  void update_errors() {
    // Layers that were not seen yet are taken for as large, an element, as the others.
    double squares = 0;
    double elements = 0;
    for (const std::size_t i : automatic_) {
      if (!states_[i].known) continue;
      squares += states_[i].curves.squared_norm();
      elements += static_cast<double>(layers_[i].elements());
    }
    const double an_element = squares > 0 && elements > 0 ? squares / elements : 1;
    for (const std::size_t i : automatic_) {
      LayerState& state = states_[i];
      const double norm =
          std::sqrt(state.known ? state.curves.squared_norm()
                                : an_element * static_cast<double>(layers_[i].elements()));
      state.errors.clear();
      state.allowed.clear();
      const double bound = state.bound ? norm * error(*state.bound, state.curves)
                                       : std::numeric_limits<double>::infinity();
      // With error feedback a step converges by 1 - error^2 of what is left (Stich et al.,
      // Sparsified SGD with Memory, NeurIPS 2018): what a layer loses there no other layer makes up
      // for.
      const double reference = state.reference ? error(*state.reference, state.curves) : 1.0;
      const double least =
          state.budget_factor > 1 ? 0 : kLeastContraction * (1 - reference * reference);
      for (const Option& option : state.options) {
        const double relative = error(option.candidate, state.curves);
        state.errors.push_back(norm * relative);
        state.allowed.push_back(
            norm * relative <= bound * (1 + kRounding) && 1 - relative * relative >= least ? 1 : 0);
      }
      state.budget = state.budget_factor * norm * reference;
    }
    budget_ = 0;
    for (const std::size_t i : automatic_) budget_ += states_[i].budget;
  }

  void update_costs() {
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      LayerState& state = states_[i];
      state.costs.clear();
      for (const Option& option : state.options) {
        CodecSpeed speed = speeds_.at(option.codec.spec);
        speed.encode *= scale_;
        speed.decode *= scale_;
        speed.decode_more *= scale_;
        state.costs.push_back(layer_cost(layers_[i], option.codec, speed, link_, ranks_));
      }
    }
  }

  // By layer.
  std::vector<std::size_t> options_by(const PlanId& id) const {
    std::vector<std::size_t> options(layers_.size());
    for (std::size_t a = 0; a < automatic_.size(); ++a) options[automatic_[a]] = id[a];
    return options;
  }

  Proposal evaluate_plan(PlanId id) const {
    const std::vector<std::size_t> options = options_by(id);
    std::vector<const Codec*> codecs;
    std::vector<LayerCost> costs;
    std::vector<LayerCost> wires;
    Proposal proposal;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      codecs.push_back(&states_[i].options[options[i]].codec);
      costs.push_back(states_[i].costs[options[i]]);
      wires.push_back(costs.back());
      wires.back().work = 0;
      if (states_[i].automatic) proposal.error += states_[i].errors[options[i]];
    }
    const StepCost step = step_cost(buckets_, codecs, costs, link_);
    const StepCost wire = step_cost(buckets_, codecs, wires, link_);
    // Where cores are short, work that overlaps the backward pass makes that longer.
    proposal.seconds = (1 - contention_) * step.exposed + contention_ * (wire.exposed + step.work);
    proposal.sent = step.sent;
    proposal.feasible = proposal.error <= budget_ * (1 + kRounding);
    proposal.id = std::move(id);
    return proposal;
  }

  using Routes = std::array<bool, kRoutes>;

  // The least time by these routes alone.
  Proposal best_by(const Routes& routes, double slack) const {
    PlanProblem problem;
    problem.budget = budget_;
    problem.slack = slack;
    std::vector<std::vector<std::size_t>> which;  // option of each candidate
    std::vector<std::size_t> order;
    const double first = buckets_.empty() ? 0 : buckets_.front().ready;
    for (const BucketReady& bucket : buckets_) {
      std::array<double, kRoutes> fixed{};
      for (const std::size_t i : bucket.layers) {
        const LayerState& state = states_[i];
        order.push_back(i);
        auto& candidates = problem.layers.emplace_back();
        auto& options = which.emplace_back();
        for (std::size_t o = 0; o < state.options.size(); ++o) {
          const Codec& codec = state.options[o].codec;
          const auto route = static_cast<std::size_t>(route_of(codec));
          if (state.automatic && (state.allowed[o] == 0 || !routes[route])) continue;
          candidates.push_back(
              {.cost = state.costs[o].seconds(), .error = state.automatic ? state.errors[o] : 0.0});
          options.push_back(o);
          fixed[route] =
              std::max(fixed[route], route_seconds(static_cast<Route>(route), codec, link_));
        }
      }
      problem.buckets.push_back({.end = problem.layers.size(),
                                 .ready = bucket.ready - first,
                                 .fixed = *std::max_element(fixed.begin(), fixed.end())});
    }
    const PlanSolution solution = solve(problem);
    std::vector<std::size_t> options(layers_.size());
    for (std::size_t k = 0; k < order.size(); ++k) options[order[k]] = which[k][solution.choice[k]];
    PlanId id;
    for (const std::size_t i : automatic_) id.push_back(static_cast<std::uint16_t>(options[i]));
    return evaluate_plan(std::move(id));
  }

  PlanId dense() const {
    PlanId id;
    for (const std::size_t i : automatic_) {
      const auto& options = states_[i].options;
      const auto none = std::find_if(options.begin(), options.end(),
                                     [](const Option& o) { return o.codec.is_none(); });
      id.push_back(static_cast<std::uint16_t>(none - options.begin()));
    }
    return id;
  }

  // A bucket pays for each collective that it needs, so plans that keep to one kind are solved
  // beside those that may mix them.
  Proposal best() const {
    const double slack = kSlack * digest_.seconds;
    Proposal best = evaluate_plan(dense());
    for (const Routes& routes :
         {Routes{true, true, true, true}, Routes{true, true, false, false},
          Routes{true, false, true, false}, Routes{true, false, false, true}}) {
      Proposal proposal = best_by(routes, slack);
      if (!proposal.feasible) continue;
      const bool faster = proposal.seconds < best.seconds - slack;
      const bool as_fast = proposal.seconds <= best.seconds + slack;
      if (faster || (as_fast && proposal.error < best.error)) best = std::move(proposal);
    }
    return best;
  }

  void forget_what_loses_too_much() {
    for (const PlanId& id : judge_.known()) {
      if (evaluate_plan(id).error > kOverBudget * budget_) judge_.forget(id);
    }
  }

  void consider() {
    if (judge_.on_trial()) {
      return;
    }
    const Proposal now = evaluate_plan(judge_.current());
    const bool over = now.error > kOverBudget * budget_;
    if (solve_rest_ > 0 && !over) {
      --solve_rest_;
      return;
    }
    const Proposal other = best();
    // Solved ever more rarely while the answer stays.
    last_rest_ = other.id == last_best_ ? std::min(2 * last_rest_ + 1, kMostRest) : 0;
    solve_rest_ = last_rest_;
    last_best_ = other.id;
    const auto predicted = [&](const Proposal& p) {
      return digest_.seconds + p.seconds - now.seconds;
    };
    const auto numbers = [&](const Proposal& p) {
      return ": predicted " + milliseconds(predicted(p)) + " a step, now " +
             milliseconds(digest_.seconds) + "; loses " +
             format("%.3g", budget_ > 0 ? p.error / budget_ : 0) + " of the budget, now " +
             format("%.3g", budget_ > 0 ? now.error / budget_ : 0);
    };
    if (over && other.feasible && other.id != now.id) {
      judge_.adopt(other.id);
      log("goes on with " + describe(other.id) + numbers(other));
      return;
    }
    const bool thick = other.sent > kUnknownBytes * now.sent;
    if (thick && other.id != now.id && link_windows_ > kLinkWindows &&
        predicted(other) < digest_.seconds) {
      wants_link_ = true;
      return;
    }
    if (judge_.consider(other.id, predicted(other), Reason::kFaster) ||
        (other.error < kLessError * now.error &&
         judge_.consider(other.id, predicted(other), Reason::kBetter))) {
      log("tries " + describe(other.id) + numbers(other));
      return;
    }
    const Proposal plain = evaluate_plan(dense());
    if (predicted(plain) < kProbeDense * digest_.seconds &&
        judge_.consider(plain.id, predicted(plain), Reason::kProbe)) {
      log("tries " + describe(plain.id) + numbers(plain));
    }
  }

  void tell(Verdict verdict, bool trial, const PlanId& tried) {
    const auto measured = [&](const PlanId& id) {
      const auto seconds = judge_.seconds(id);
      return seconds ? milliseconds(*seconds) + " a step" : std::string("not measured");
    };
    if (verdict == Verdict::kKept) {
      log("keeps " + describe(tried) + ": " + milliseconds(digest_.seconds) + " a step");
    } else if (verdict == Verdict::kTakenBack) {
      log((trial ? "takes back " : "leaves ") + describe(tried) + ", " + measured(tried) +
          ": goes on with " + describe(judge_.current()) + ", " + measured(judge_.current()));
    }
  }

  bool finish(const PlanId& before) {
    const double window = kWindow * digest_.seconds;
    if (!wanted_.empty()) sample_cost_ = digest_.sampling / static_cast<double>(wanted_.size());
    const double report = link_[Verb::kAllgather].per_byte *
                          sent_payload(Verb::kAllgather, 4 * ErrorCurves::kValues, ranks_);
    const double count =
        std::min(sample_cost_ > 0 ? kSampleShare * window / sample_cost_ : kMostSampled,
                 report > 0 ? kReportShare * window / report : kMostSampled);
    sampling_credit_ = std::min(sampling_credit_ + count, static_cast<double>(kMostSampled));
    steps_.clear();
    choose_wanted(static_cast<std::size_t>(sampling_credit_));
    sampling_credit_ -= std::floor(sampling_credit_);
    const bool changed = judge_.current() != before;
    fresh_ = fresh_ || changed;
    return changed;
  }

  // "2 x topk:0.001,values=q8, 1 x none (0.21 MB a step)"; bytes are those that a rank sends.
  std::string describe(const PlanId& id) const {
    std::map<std::string, int> counts;
    const std::vector<std::size_t> options = options_by(id);
    for (const std::size_t i : automatic_) {
      ++counts[states_[i].options[options[i]].codec.spec];
    }
    std::string text;
    for (const auto& [spec, count] : counts) {
      text += (text.empty() ? "" : ", ") + std::to_string(count) + " x " + spec;
    }
    return text + " (" + megabytes(evaluate_plan(id).sent) + " a step)";
  }

  void log(std::string line) { log_.push_back("auto: " + std::move(line)); }

  const std::vector<Layer>& layers_;
  const Plan base_;
  const int ranks_;
  LinkModel link_;
  std::unordered_map<std::string, CodecSpeed> speeds_;  // by spec
  std::vector<LayerState> states_;
  std::vector<std::size_t> automatic_;
  std::vector<std::uint64_t> key_hashes_;
  std::vector<BucketReady> buckets_;
  double budget_ = 0;
  double scale_ = 1;       // of speeds_
  double contention_ = 0;  // how much of the work makes the backward pass longer
  PlanJudge judge_;

  // The window on its way.
  std::uint32_t structure_ = 0;
  bool fresh_ = true;
  std::vector<StepTimes> steps_;
  std::vector<std::size_t> wanted_;
  std::vector<std::size_t> wanted_now_;
  std::vector<Sampled> samples_;
  std::map<std::size_t, ErrorCurves> curves_;
  double sampling_seconds_ = 0;

  Digest digest_;
  std::uint64_t window_ = 0;
  std::uint64_t link_windows_ = 0;
  bool wants_link_ = false;
  std::size_t next_sampled_ = 0;
  double sample_cost_ = 0;        // seconds a layer
  double sampling_credit_ = 0;    // layers
  std::uint64_t solve_rest_ = 0;  // windows to go without solving
  std::uint64_t last_rest_ = 0;
  PlanId last_best_;
  std::vector<std::string> log_;
};

AutoTuner::AutoTuner(const std::vector<Layer>& layers, const Plan& plan, int ranks,
                     const LinkModel& link, const std::vector<CodecSpeed>& speeds,
                     std::vector<BucketReady> buckets)
    : impl_(std::make_unique<Impl>(layers, plan, ranks, link, speeds, std::move(buckets))) {}

AutoTuner::~AutoTuner() = default;

std::vector<Codec> AutoTuner::codecs(const std::vector<Layer>& layers, const Plan& plan) {
  std::map<std::string, Codec> codecs;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Policy::Choice& choice = plan.choices[i];
    if (choice.automatic) {
      for (Option& option : options_of(layers[i], *choice.automatic)) {
        codecs.emplace(option.codec.spec, std::move(option.codec));
      }
    } else {
      codecs.emplace(choice.codec.spec, choice.codec);
    }
  }
  std::vector<Codec> result;
  for (auto& [spec, codec] : codecs) result.push_back(std::move(codec));
  return result;
}

Plan AutoTuner::plan() const { return impl_->plan(); }
void AutoTuner::go_on_with(const std::vector<std::string>& codecs) { impl_->go_on_with(codecs); }
std::span<const std::size_t> AutoTuner::wanted() const { return impl_->wanted(); }
void AutoTuner::sample(std::size_t layer, TensorView gradient, std::span<const float> residual) {
  impl_->sample(layer, gradient, residual);
}
void AutoTuner::end_step(const StepTimes& step) { impl_->end_step(step); }
bool AutoTuner::due() const { return impl_->due(); }
std::vector<float> AutoTuner::report() { return impl_->report(); }
bool AutoTuner::decide(std::span<const float> reports) { return impl_->decide(reports); }
bool AutoTuner::wants_link() const { return impl_->wants_link(); }
const LinkModel& AutoTuner::link() const { return impl_->link(); }
void AutoTuner::skip_step() { impl_->skip_step(); }
bool AutoTuner::set_link(const LinkModel& link) { return impl_->set_link(link); }
std::vector<std::string> AutoTuner::take_log() { return impl_->take_log(); }

}  // namespace thinwire
