#include "comm/auto_tuner.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "comm/formatted.h"
#include "comm/plan_judge.h"
#include "comm/plan_search.h"
#include "compressors/adaptive/error_curves.h"
#include "compressors/adaptive/gradient_sample.h"

namespace thinwire {
namespace {

using Reason = PlanJudge::Reason;
using Verdict = PlanJudge::Verdict;

constexpr int kWindow = 5;              // steps; the first after a change counts for nothing
constexpr double kSampleShare = 0.005;  // of a window's time, for the sampling of gradients;
constexpr double kFirstShare = 0.01;    // until every layer was sampled so many times:
constexpr std::size_t kFirstRounds = 2;
constexpr double kReportShare = 0.01;       // of a window's time, for the reports' wire
constexpr std::size_t kMostSampled = 16;    // layers a window
constexpr double kSlack = 0.005;            // of a step: plans as fast
constexpr double kOverBudget = 1.05;        // a plan that loses more is left
constexpr double kLessError = 0.9;          // a plan that loses less than this is worth a trial
constexpr double kProbeDense = 2;           // times the present step
constexpr double kNetworkChanged = 2;       // what bytes cost is this much more, or less,
constexpr double kChangeMatters = 0.25;     // by this share of a step or more
constexpr double kTelling = 0.03;           // of a step: what bytes must take to be told from noise
constexpr double kTellingBytes = 0.1;       // of uncompressed gradients': what a trial's plans must
                                            // differ by to tell what bytes take
constexpr double kUnknownBytes = 4;         // times what is sent now: measure the network first
constexpr std::uint64_t kLinkWindows = 20;  // that a measured network is good for
constexpr std::uint64_t kLinkRest = 4;      // windows from one measurement to the next, at least
constexpr std::uint64_t kMostRest = 16;     // windows from one solution of the plan to the next
constexpr double kMostScale = 20;           // of codecs' speeds on a busy machine

std::string milliseconds(double seconds) { return formatted("%.1f ms", 1e3 * seconds); }

}  // namespace

class AutoTuner::Impl {
 public:
  Impl(const std::vector<Layer>& layers, const Plan& plan, int ranks, const LinkModel& link,
       const std::vector<CodecSpeed>& speeds)
      : layers_(layers),
        base_(plan),
        ranks_(ranks),
        search_(layers, plan, ranks, speeds),
        judge_({}) {
    now_.link = link;
    BucketReady& all = now_.buckets.emplace_back();  // at once, until more is known
    for (std::size_t i = layers.size(); i-- > 0;) all.layers.push_back(i);
    for (const Layer& layer : layers) {
      key_hashes_.push_back(
          Key{.stream = "auto", .parameter = layer.name, .begin = 0, .end = 0}.hash());
    }
    search_.update(now_);
    judge_ = PlanJudge(search_.best(0).id);
    log("begins with " + search_.describe(judge_.current()));
    choose_wanted(1);
  }

  Plan plan() const { return search_.plan(judge_.current()); }

  void go_on_with(const std::vector<std::string>& codecs) {
    const PlanId id = search_.id_of(codecs);
    judge_.adopt(id);
    steps_.clear();
    fresh_ = true;
    log("goes on with " + search_.describe(id));
  }

  std::span<const std::size_t> wanted() const { return wanted_now_; }

  void sample(std::size_t layer, TensorView gradient, TensorView residual) {
    samples_.emplace_back().layer = layer;
    take_sample({.grad = gradient,
                 .shape = layers_[layer].shape,
                 .residual = residual,
                 .decay = base_.choices[layer].codec.options.decay},
                key_hashes_[layer], windows_, samples_.back().sample);
  }

  void end_step(const StepTimes& step) {
    sampling_seconds_ += step.sampling;
    for (Sampled& sampled : samples_) {
      curves_[sampled.layer] =
          measure_errors(sampled.sample, search_.wants_low_rank(sampled.layer));
    }
    samples_.clear();
    const std::uint32_t structure = step.structure();
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

  std::vector<float> report() const {
    SampledCurves sampled;
    for (const std::size_t layer : wanted_) {
      const auto found = curves_.find(layer);
      sampled.push_back(found == curves_.end() ? std::nullopt : std::optional(found->second));
    }
    return write_report(steps_, sampling_seconds_, sampled);
  }

  bool decide(std::span<const float> reports) {
    const PlanId before = judge_.current();
    window_ = read_reports(reports, ranks_, steps_, wanted_.size());
    now_.buckets = window_.buckets;
    for (std::size_t i = 0; i < wanted_.size(); ++i) {
      if (window_.curves[i]) search_.see(wanted_[i], *window_.curves[i]);
    }
    ++windows_;
    const double transfers_off = learn_link();
    learn_speeds();
    search_.update(now_);
    const bool changed = link_windows_ > kLinkRest &&
                         (transfers_off > kNetworkChanged || transfers_off < 1 / kNetworkChanged);
    if (changed) {
      log("transfers take " + formatted("%.2g", transfers_off) +
          " times as long as expected: the network has changed");
      judge_.network_changed();
      now_.unforeseen_per_byte = 0;
      solve_rest_ = 0;
      wants_link_ = true;
    }
    forget_what_loses_too_much();
    // What was measured of a trial that the network has ended says nothing of the plan before it.
    const bool ended = judge_.current() != before;
    const PlanId tried = judge_.tried();
    const PlanId untried = judge_.before();
    const Verdict verdict = ended ? Verdict::kNone : judge_.measured(window_.seconds);
    tell(verdict, tried);
    if (verdict == Verdict::kKept || verdict == Verdict::kTakenBack) learn_bytes(untried, tried);
    if (verdict != Verdict::kTakenBack && !changed) consider();
    return finish(before);
  }

  bool wants_link() const { return wants_link_; }
  const LinkModel& link() const { return now_.link; }

  bool set_link(const LinkModel& link) {
    const PlanId before = judge_.current();
    wants_link_ = false;
    now_.link = link;
    link_windows_ = 0;
    bytes_doubted_ = false;
    search_.update(now_);
    consider();
    return finish(before);
  }

  std::vector<std::string> take_log() { return std::exchange(log_, {}); }

 private:
  struct Sampled {
    std::size_t layer = 0;
    GradientSample sample;
  };

  // Which layers this window samples, in turn.
  void choose_wanted(std::size_t count) {
    wanted_.clear();
    count = std::min(count, search_.judged().size());
    for (std::size_t i = 0; i < count; ++i) {
      wanted_.push_back(search_.judged()[next_sampled_++ % search_.judged().size()]);
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

  // How many times as long as expected the transfers took, where it matters to the step. Few bytes
  // take what scheduling makes of them, and a rank that waits for a core lets the others wait for
  // its part of a transfer: both say nothing of the network, which is therefore taken for what it
  // was at its fastest where cores are short; what bytes take then beyond that, trials tell. So
  // that there is one even where the network was taken for too fast, many bytes are once held for
  // the cause of all that waiting.
  double learn_link() {
    ++link_windows_;
    double expected = 0;
    double bytes = 0;  // the part of it that they take
    double took = 0;
    double sent = 0;
    for (std::size_t t = 0; t < window_.transfers.size(); ++t) {
      if (!std::isfinite(window_.transfers[t])) continue;
      const TransferTime& kind = window_.kinds[t];
      const VerbCost& cost = now_.link[kind.verb];
      expected += cost.seconds(kind.sent);
      bytes += cost.per_byte * kind.sent;
      took += window_.transfers[t];
      sent += kind.sent;
    }
    const double wire = took > expected ? std::max(expected, took - window_.waited) : took;
    const bool matters = std::abs(wire - expected) > kChangeMatters * window_.seconds;
    if (bytes > kTelling * window_.seconds || matters) {
      for (std::size_t t = 0; t < window_.transfers.size(); ++t) {
        now_.link.observe(window_.kinds[t].verb, window_.kinds[t].sent,
                          wire / took * window_.transfers[t]);
      }
    }
    const double waiting = took - wire;
    if (!bytes_doubted_ && waiting > kChangeMatters * window_.seconds &&
        sent > kTellingBytes * search_.evaluate(search_.dense()).sent) {
      bytes_doubted_ = true;
      now_.unforeseen_per_byte += waiting / sent;
    }
    return matters && expected > 0 ? wire / expected : 1;
  }

  // Codecs are slower on a busy machine than where they were measured.
  void learn_speeds() {
    now_.contention += (std::clamp(2 * window_.contention, 0.0, 1.0) - now_.contention) / 2;
    const double work = search_.codec_work(judge_.current());
    if (work > 0 && window_.work > 0) {
      const double ratio = std::clamp(window_.work / work, 0.25, 4.0);
      now_.speed_scale = std::clamp(now_.speed_scale * (1 + ratio) / 2, 0.25, kMostScale);
    }
  }

  // What a trial took more than predicted.
  void learn_bytes(const PlanId& before, const PlanId& tried) {
    const Proposal from = search_.evaluate(before);
    const Proposal to = search_.evaluate(tried);
    const double sent = to.sent - from.sent;
    const auto seconds = [&](const PlanId& id) { return judge_.seconds(id).value_or(0); };
    if (std::abs(sent) < kTellingBytes * search_.evaluate(search_.dense()).sent) return;
    const double off = seconds(tried) - seconds(before) - (to.seconds - from.seconds);
    now_.unforeseen_per_byte = std::max(0.0, now_.unforeseen_per_byte + off / sent / 2);
    search_.update(now_);
  }

  void forget_what_loses_too_much() {
    for (const PlanId& id : judge_.known()) {
      if (search_.evaluate(id).error > kOverBudget * search_.budget()) judge_.forget(id);
    }
  }

  void consider() {
    if (judge_.on_trial()) {
      return;
    }
    const Proposal now = search_.evaluate(judge_.current());
    const bool over = now.error > kOverBudget * search_.budget();
    if (solve_rest_ > 0 && !over) {
      --solve_rest_;
      return;
    }
    const Proposal other = search_.best(kSlack * window_.seconds);
    // Solved ever more rarely while the answer stays.
    last_rest_ = other.id == last_best_ ? std::min(2 * last_rest_ + 1, kMostRest) : 0;
    solve_rest_ = last_rest_;
    last_best_ = other.id;
    const auto saves = [&](const Proposal& p) { return now.seconds - p.seconds; };
    const auto numbers = [&](const Proposal& p) {
      // No less than what follows the last gradient.
      const double step = std::max(window_.seconds - saves(p), p.seconds);
      return ": predicted " + milliseconds(step) + " a step, now " + milliseconds(window_.seconds) +
             "; loses " + formatted("%.3g", search_.budget() > 0 ? p.error / search_.budget() : 0) +
             " of the budget, now " +
             formatted("%.3g", search_.budget() > 0 ? now.error / search_.budget() : 0);
    };
    if (over && other.feasible && other.id != now.id) {
      judge_.adopt(other.id);
      log("goes on with " + search_.describe(other.id) + numbers(other));
      return;
    }
    const bool thick = other.sent > kUnknownBytes * now.sent;
    if (thick && other.id != now.id && link_windows_ > kLinkWindows && saves(other) > 0) {
      wants_link_ = true;
      return;
    }
    if (judge_.consider(other.id, saves(other), Reason::kFaster) ||
        (!thick && other.error < kLessError * now.error &&
         judge_.consider(other.id, saves(other), Reason::kBetter))) {
      log("tries " + search_.describe(other.id) + numbers(other));
      return;
    }
    const Proposal plain = search_.evaluate(search_.dense());
    if (-saves(plain) < (kProbeDense - 1) * window_.seconds &&
        judge_.consider(plain.id, saves(plain), Reason::kProbe)) {
      log("tries " + search_.describe(plain.id) + numbers(plain));
    }
  }

  void tell(Verdict verdict, const PlanId& tried) {
    const auto measured = [&](const PlanId& id) {
      const auto seconds = judge_.seconds(id);
      return seconds ? milliseconds(*seconds) + " a step" : std::string("not measured");
    };
    const PlanId& now = judge_.current();
    switch (verdict) {
      case Verdict::kNone:
        break;
      case Verdict::kKept:
        log("keeps " + search_.describe(tried) + ", " + measured(tried));
        break;
      case Verdict::kTakenBack:
        log("takes back " + search_.describe(tried) + ", " + measured(tried) + ": goes on with " +
            search_.describe(now) + ", " + measured(now));
        break;
      case Verdict::kTriedAgain:
        log("tries again " + search_.describe(now) + ", " + measured(now) + " before; " +
            search_.describe(tried) + ", " + measured(tried));
        break;
    }
  }

  bool finish(const PlanId& before) {
    const double window = kWindow * window_.seconds;
    if (!wanted_.empty()) sample_cost_ = window_.sampling / static_cast<double>(wanted_.size());
    const double report = now_.link[Verb::kAllgather].per_byte *
                          sent_payload(Verb::kAllgather, 4 * ErrorCurves::kValues, ranks_);
    const bool known = next_sampled_ >= kFirstRounds * search_.judged().size();
    const double share = known ? kSampleShare : kFirstShare;
    const double count = std::min(sample_cost_ > 0 ? share * window / sample_cost_ : kMostSampled,
                                  report > 0 ? kReportShare * window / report : kMostSampled);
    sampling_credit_ = std::min(sampling_credit_ + count, static_cast<double>(kMostSampled));
    steps_.clear();
    choose_wanted(static_cast<std::size_t>(sampling_credit_));
    sampling_credit_ -= std::floor(sampling_credit_);
    const bool changed = judge_.current() != before;
    fresh_ = fresh_ || changed;
    return changed;
  }

  void log(std::string line) { log_.push_back("auto: " + std::move(line)); }

  const std::vector<Layer>& layers_;
  const Plan base_;
  const int ranks_;
  PlanSearch search_;
  Circumstances now_;
  PlanJudge judge_;
  std::vector<std::uint64_t> key_hashes_;

  // The window on its way.
  std::uint32_t structure_ = 0;
  bool fresh_ = true;
  std::vector<StepTimes> steps_;
  std::vector<std::size_t> wanted_;
  std::vector<std::size_t> wanted_now_;
  std::vector<Sampled> samples_;
  std::map<std::size_t, ErrorCurves> curves_;
  double sampling_seconds_ = 0;

  WindowDigest window_;  // the last one
  std::uint64_t windows_ = 0;
  std::uint64_t link_windows_ = 0;
  bool bytes_doubted_ = false;  // since the network was measured
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
                     const LinkModel& link, const std::vector<CodecSpeed>& speeds)
    : impl_(std::make_unique<Impl>(layers, plan, ranks, link, speeds)) {}

AutoTuner::~AutoTuner() = default;

Plan AutoTuner::plan() const { return impl_->plan(); }
void AutoTuner::go_on_with(const std::vector<std::string>& codecs) { impl_->go_on_with(codecs); }
std::span<const std::size_t> AutoTuner::wanted() const { return impl_->wanted(); }
void AutoTuner::sample(std::size_t layer, TensorView gradient, TensorView residual) {
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
