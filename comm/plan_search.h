// PlanSearch: the plans that a job with a policy of `auto` may go by: what each of its layers may
// be sent as, what that would cost and lose by what is known of the network, the codecs and the
// gradients, and which plan is the best: the least time from the last gradient to the last result
// within the budget of errors that the policy gives; of plans as fast, the one that loses least
// (compressors/adaptive/planner.h). Arithmetic alone: the same knowledge gives the same plan on
// every rank. One thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "comm/link_model.h"
#include "comm/plan_judge.h"
#include "comm/policy.h"
#include "comm/step_model.h"
#include "compressors/adaptive/candidates.h"
#include "compressors/adaptive/codec_speeds.h"
#include "compressors/adaptive/error_curves.h"
#include "compressors/core/spec.h"

namespace thinwire {

// What plans are judged under.
struct Circumstances {
  LinkModel link;
  std::vector<BucketReady> buckets;
  double speed_scale = 1;  // times the seconds that codecs were measured to take
  double contention = 0;   // how much of the work makes the backward pass longer
  // Seconds that a byte takes beyond what its transfer does: transports copy and sum on cores that
  // the job wants, too.
  double unforeseen_per_byte = 0;
};

struct Proposal {
  PlanId id;
  double seconds = 0;  // after the last gradient, what the work takes from others included
  double error = 0;
  double sent = 0;  // bytes
  bool feasible = false;
};

class PlanSearch {
 public:
  // `plan`: as Plan::make() gives it, for `layers`, which outlive this. `speeds[i]`: of
  // codecs()[i].
  PlanSearch(const std::vector<Layer>& layers, const Plan& plan, int ranks,
             const std::vector<CodecSpeed>& speeds);

  // What may be chosen for some layer of the plan, and what its other layers have; ascending by
  // spec.
  static std::vector<Codec> codecs(const std::vector<Layer>& layers, const Plan& plan);

  // Layers whose gradients tell which plan is best; ascending.
  const std::vector<std::size_t>& judged() const { return judged_; }
  bool wants_low_rank(std::size_t layer) const;
  // What a layer's gradients are now; newer ones count as much as all before.
  void see(std::size_t layer, const ErrorCurves& curves);
  // What follows goes by these, and by all that was seen.
  void update(const Circumstances& now);

  Proposal evaluate(PlanId id) const;
  // Nothing is compressed that the policy leaves to the search.
  PlanId dense() const;
  // slack: seconds by which one plan may be slower than another and count as fast.
  Proposal best(double slack) const;
  // On the sum of errors.
  double budget() const { return budget_; }
  // Seconds that a step's encoding and decoding take where codecs are as fast as measured times the
  // scale; 0 where most of it is not that of codecs.
  double codec_work(const PlanId& id) const;

  // The plan with the reasons of its choices.
  Plan plan(const PlanId& id) const;
  // InvalidArgument, naming the layer, for a spec that cannot be chosen for it.
  PlanId id_of(const std::vector<std::string>& specs) const;
  // "1 x none, 4 x topk:0.001 to 0.01,values=q4 (0.21 MB a step)": how many layers go by codecs
  // that differ in their main parameter alone; bytes are those that a rank sends.
  std::string describe(const PlanId& id) const;

 private:
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
    // One an option: where GatherChoice is for it, and where it is not.
    std::vector<LayerCost> costs;
    std::vector<LayerCost> costs_by_owners;
    std::vector<double> errors;
    std::vector<bool> allowed;
    double budget = 0;  // the layer's part
  };
  using Routes = std::array<bool, kRoutes>;

  static std::vector<Option> options_of(const Layer& layer, const Policy::Choice& choice);
  static std::string reason(const LayerState& state, std::size_t option);
  LayerState state_of(std::size_t layer) const;
  void update_errors();
  void update_costs();
  std::vector<std::size_t> options_by(const PlanId& id) const;
  std::vector<LayerCost> costs_by(const std::vector<std::size_t>& options) const;
  Proposal best_by(const Routes& routes, double slack) const;

  const std::vector<Layer>& layers_;
  const Plan base_;
  const int ranks_;
  std::unordered_map<std::string, CodecSpeed> speeds_;  // by spec
  std::vector<LayerState> states_;
  std::vector<std::size_t> automatic_;
  std::vector<std::size_t> judged_;
  Circumstances now_;
  double budget_ = 0;
};

}  // namespace thinwire
