// Internal: the planner's dynamic programme over rounded costs. Thread-compatible; the menu must
// outlive a grid.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compressors/adaptive/planner.h"
#include "compressors/adaptive/planner_kernels.h"

namespace thinwire {

// Of each layer the candidates that no other of its candidates beats: each costs more and errs less
// than the one before it.
class PlanMenu {
 public:
  struct Option {
    double cost;
    double error;
    std::size_t candidate;
  };

  explicit PlanMenu(std::span<const std::vector<Candidate>> layers);
  std::size_t layers() const { return begins_.size() - 1; }
  std::span<const Option> operator[](std::size_t layer) const {
    return {options_.data() + begins_[layer], begins_[layer + 1] - begins_[layer]};
  }

 private:
  std::vector<Option> options_;
  std::vector<std::size_t> begins_ = {0};
};

using Options = std::vector<std::uint32_t>;  // an option of each layer

// The least sums of errors, by how much later than a given plan, the centre, one may finish. Costs
// relative to the centre's are rounded up to cells, so a plan finishes no later than its cell says,
// the centre is never worse off for the rounding, and a fine grid around a good plan finds what
// improves it. Errors are summed as they are, in the order of the layers.
class PlanGrid {
 public:
  static constexpr std::size_t kCells = 1024;

  PlanGrid(const PlanMenu& menu, std::span<const PlanBucket> buckets);

  // Cell c stands for finishing (c - zero) * unit after the centre, here and after every layer. A
  // plan that leaves the grid on its way is not seen.
  void fill(const Options& centre, double unit, std::size_t zero);
  // By cell, infinite where no plan ends.
  std::span<const double> errors() const { return errors_; }
  // A plan that ends in each of the cells, of finite errors, with that sum of errors.
  std::vector<Options> trace(std::span<const std::size_t> cells);

 private:
  // From one row of sums to the next: a bucket's begin, or a layer.
  struct Step {
    // Of a bucket, no moves: the centre waits so many cells for the gradients, and nothing can go
    // on before the cell `floor`.
    std::size_t wait = 0;
    std::size_t floor = 0;
    // Of a layer: moves [begin, end).
    std::size_t layer = 0;
    std::size_t begin = 0;
    std::size_t end = 0;
  };

  void add_layer(std::size_t layer, double centre_cost, double unit);
  // Computes the rows of a segment from its first one.
  void load(std::size_t segment);
  void run(const Step& step, const double* from, double* to);
  // The cell before the step of what stands in `cell` after it; notes the option of a layer.
  std::size_t step_back(const Step& step, const double* from, const double* to, std::size_t cell,
                        Options& options) const;
  std::span<const PlanMove> moves(const Step& step) const {
    return std::span(moves_).subspan(step.begin, step.end - step.begin);
  }
  std::size_t segments() const { return (steps_.size() + kSegment - 1) / kSegment; }
  std::size_t steps_in(std::size_t segment) const {
    return std::min(kSegment, steps_.size() - segment * kSegment);
  }
  double* row(std::size_t i) { return rows_.data() + i * kCells; }

  // Steps whose rows are kept, 4 MiB: of more steps, every so many rows are kept, and what lies
  // between is computed once more on the way back.
  static constexpr std::size_t kSegment = 512;

  const PlanMenu& menu_;
  std::span<const PlanBucket> buckets_;
  std::vector<Step> steps_;
  std::vector<PlanMove> moves_;
  std::vector<double> firsts_;  // of each segment its first row
  std::vector<double> rows_;    // of the segment that is loaded
  std::size_t loaded_ = 0;
  std::vector<double> errors_;
  std::vector<double> padded_;  // a row between unreachable ones
};

}  // namespace thinwire
