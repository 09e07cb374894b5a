#include "compressors/adaptive/planner_frontier.h"

#include <algorithm>

namespace thinwire {

PlanFrontier::PlanFrontier(const PlanMenu& menu, std::size_t begin, std::size_t end)
    : begin_(begin), end_(end) {
  Candidate sum;
  for (std::size_t layer = begin; layer < end; ++layer) {
    sum.cost += menu[layer].front().cost;
    sum.error += menu[layer].front().error;
    add_layer(menu, layer);
  }
  std::stable_sort(steps_.begin(), steps_.end(),
                   [](const Step& a, const Step& b) { return a.rate > b.rate; });
  sums_.reserve(steps_.size() + 1);
  sums_.push_back(sum);
  for (const Step& step : steps_) {
    const auto& from = menu[step.layer][step.from];
    const auto& to = menu[step.layer][step.to];
    sum.cost += to.cost - from.cost;
    sum.error = std::max(sum.error - (from.error - to.error), 0.0);
    sums_.push_back(sum);
  }
}

// The layer's own hull: the rates of its steps fall.
void PlanFrontier::add_layer(const PlanMenu& menu, std::size_t layer) {
  const auto options = menu[layer];
  const std::size_t first = steps_.size();
  for (std::uint32_t to = 1; to < options.size(); ++to) {
    Step step{.rate = 0, .layer = layer, .from = to - 1, .to = to};
    for (;;) {
      const auto& a = options[step.from];
      step.rate = (a.error - options[to].error) / (options[to].cost - a.cost);
      if (steps_.size() == first || step.rate < steps_.back().rate) break;
      step.from = steps_.back().from;
      steps_.pop_back();
    }
    steps_.push_back(step);
  }
}

void PlanFrontier::choose(std::size_t i, Options& options) const {
  std::fill(options.begin() + static_cast<std::ptrdiff_t>(begin_),
            options.begin() + static_cast<std::ptrdiff_t>(end_), 0U);
  for (std::size_t s = 0; s < i; ++s) options[steps_[s].layer] = steps_[s].to;
}

}  // namespace thinwire
