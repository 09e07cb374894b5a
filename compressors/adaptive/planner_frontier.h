// Internal: where the planner begins. Thread-compatible; owns its memory, the menu must outlive it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "compressors/adaptive/planner.h"
#include "compressors/adaptive/planner_grid.h"

namespace thinwire {

// Plans for the layers of a bucket that trade cost for error at one rate in all of them, from the
// cheapest to the one of the least error, each of which changes one layer of the one before: the
// lower convex hull of all the bucket's plans.
class PlanFrontier {
 public:
  // Of layers [begin, end).
  PlanFrontier(const PlanMenu& menu, std::size_t begin, std::size_t end);

  std::size_t size() const { return sums_.size(); }
  // What plan i costs and errs in all, but for rounding.
  const Candidate& operator[](std::size_t i) const { return sums_[i]; }
  // Sets the bucket's layers to plan i.
  void choose(std::size_t i, Options& options) const;

 private:
  struct Step {
    double rate;  // error saved for a unit of cost
    std::size_t layer;
    std::uint32_t from;
    std::uint32_t to;
  };
  void add_layer(const PlanMenu& menu, std::size_t layer);

  std::size_t begin_;
  std::size_t end_;
  std::vector<Step> steps_;
  std::vector<Candidate> sums_;
};

}  // namespace thinwire
