// AutoTuner: chooses the codecs of a policy's `auto` layers, and chooses anew as it learns how the
// job's steps, gradients and network are.
//
// It looks at windows of a few steps. What a rank saw in one, it writes as a report of floats; all
// ranks' reports together give the same decision on every rank. The rules, in order:
//
//   - A plan is the best that comm/plan_search.h finds by what is known.
//   - Another plan than the present one is tried where it is predicted to save more than noise, or
//     to lose a tenth less in the same time; both take turns until it is clear whether it stays
//     (comm/plan_judge.h). A plan that exceeds the budget by now is left at once.
//   - Uncompressed gradients are a plan as any other: tried where they are predicted within twice
//     the present plan's step.
//   - What a trial takes more than predicted is booked on its bytes.
//   - What transfers take now is what the network is taken for; one that has changed is measured
//     anew, and what was learnt about plans on the old one is forgotten.
//
// Computes alone; the caller exchanges the reports. One thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/link_model.h"
#include "comm/policy.h"
#include "comm/window_report.h"
#include "compressors/adaptive/codec_speeds.h"

namespace thinwire {

class AutoTuner {
 public:
  // `plan`: as Plan::make() gives it, for `layers`, which outlive the tuner. `speeds[i]`: of
  // PlanSearch::codecs()[i]; they and the link are the same on all ranks.
  AutoTuner(const std::vector<Layer>& layers, const Plan& plan, int ranks, const LinkModel& link,
            const std::vector<CodecSpeed>& speeds);
  ~AutoTuner();
  AutoTuner(const AutoTuner&) = delete;
  AutoTuner& operator=(const AutoTuner&) = delete;

  // The plan to go by now. The first one knows nothing but the network and the speeds.
  Plan plan() const;

  // Goes by these codecs, a spec a layer, as if it had chosen them. InvalidArgument, naming the
  // layer, for one that it could not have chosen.
  void go_on_with(const std::vector<std::string>& codecs);

  // Layers whose gradients are to be sampled in the step that comes; ascending.
  std::span<const std::size_t> wanted() const;
  // v = gradient + decay * residual, before it is encoded; `residual` as long, or empty. Copies a
  // part of it.
  void sample(std::size_t layer, TensorView gradient, TensorView residual);

  // After each step: that it was committed and went by the plan, or not.
  void end_step(const StepTimes& step);
  void skip_step();
  // A window is over: exchange report() and give all ranks' to decide(), in their order. As many
  // floats on every rank.
  bool due() const;
  std::vector<float> report();
  // True: plan() has changed.
  bool decide(std::span<const float> reports);
  // The network is to be measured anew.
  bool wants_link() const;
  const LinkModel& link() const;
  // The same on all ranks. True: plan() has changed.
  bool set_link(const LinkModel& link);

  // What was decided since the last call, a line each.
  std::vector<std::string> take_log();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire
