// The layerwise planner: which of its candidates each layer is sent by, so that the step's
// communication ends soonest, or sends the fewest bytes, within a budget on the sum of errors.
// A multiple-choice knapsack, solved by dynamic programming as in L-GreCo (Markov et al., MLSys
// 2024, arXiv 2210.17357), but over rounded costs: errors are summed as they are, so the budget
// holds to the last bit. Knows nothing of ranks. Pure functions, thread-safe, the same bits on
// every SIMD target and CPU.
#pragma once

#include <cstddef>
#include <vector>

namespace thinwire {

// One way to send one layer. Both finite and not negative.
struct Candidate {
  double cost = 0;  // what it adds to the finish: seconds, or bytes
  double error = 0;
};

// Layers [the previous bucket's end, end).
struct PlanBucket {
  std::size_t end = 0;
  double ready = 0;  // when its gradients are there; never before the previous bucket's
  double fixed = 0;  // added once
};

// The plan finishes at F_B, where F_0 = 0 and F_b = max(F_{b-1}, ready_b) + fixed_b + the chosen
// costs of b's layers: one thread communicates bucket by bucket, while later gradients are still
// being computed. For the fewest bytes: one bucket, ready at 0.
struct PlanProblem {
  std::vector<std::vector<Candidate>> layers = {};  // in the order in which they are reduced
  std::vector<PlanBucket> buckets = {};
  double budget = 0;                        // on the sum of the chosen errors; may be infinite
  std::vector<std::size_t> reference = {};  // a choice to be no worse than; none: empty
  double slack = 0;  // of plans that finish up to this much after the first, the least error wins
};

struct PlanSolution {
  std::vector<std::size_t> choice = {};  // a candidate of each layer
  double finish = 0;
  double error = 0;
  bool feasible = false;
};

// Feasible whenever some choice is within the budget, else the choice of the least error. A
// feasible `reference` finishes no sooner, or sooner by no more than the slack and errs no less.
// The finish is within about 0.1 % of the earliest one. Of equal candidates the first. Takes some 4
// MiB and 100 bytes a candidate. InvalidArgument, naming the layer and the candidate, for numbers
// that are negative or not finite, for sums of them that are not, and for sizes that do not fit.
PlanSolution solve(const PlanProblem& problem);

// Of any choice of one candidate a layer; feasible is whether the error is within the budget.
PlanSolution evaluate(const PlanProblem& problem, std::vector<std::size_t> choice);

}  // namespace thinwire
