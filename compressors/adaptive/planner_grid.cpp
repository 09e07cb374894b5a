#include "compressors/adaptive/planner_grid.h"

#include <algorithm>
#include <limits>

namespace thinwire {
namespace {

constexpr double kUnreachable = std::numeric_limits<double>::infinity();
constexpr auto kWidth = static_cast<std::int32_t>(PlanGrid::kCells);

// Whole cells of a length in cells, not negative; kCells where there are more.
std::size_t whole_cells(double length) {
  return length < kWidth ? static_cast<std::size_t>(length) : PlanGrid::kCells;
}

// The least whole number that is not less; for lengths in (-kCells, kCells).
std::int32_t round_up(double length) {
  const auto whole = static_cast<std::int32_t>(length);
  return whole < length ? whole + 1 : whole;
}

}  // namespace

PlanMenu::PlanMenu(std::span<const std::vector<Candidate>> layers) {
  begins_.reserve(layers.size() + 1);
  std::vector<Option> sorted;
  for (const auto& layer : layers) {
    sorted.clear();
    for (std::size_t i = 0; i < layer.size(); ++i) {
      sorted.push_back({layer[i].cost, layer[i].error, i});
    }
    std::sort(sorted.begin(), sorted.end(), [](const Option& a, const Option& b) {
      if (a.cost != b.cost) return a.cost < b.cost;
      return a.error != b.error ? a.error < b.error : a.candidate < b.candidate;
    });
    for (const Option& option : sorted) {
      const bool first = options_.size() == begins_.back();
      if (first || option.error < options_.back().error) options_.push_back(option);
    }
    begins_.push_back(options_.size());
  }
}

PlanGrid::PlanGrid(const PlanMenu& menu, std::span<const PlanBucket> buckets)
    : menu_(menu),
      buckets_(buckets),
      rows_((std::min(kSegment, menu.layers() + buckets.size()) + 1) * kCells),
      errors_(kCells),
      padded_(3 * kCells, kUnreachable) {}

void PlanGrid::fill(const Options& centre, double unit, std::size_t zero) {
  steps_.clear();
  moves_.clear();
  double finish = 0;
  std::size_t layer = 0;
  for (const PlanBucket& bucket : buckets_) {
    const double begin = std::max(finish, bucket.ready);
    const std::size_t late = whole_cells((begin - bucket.ready) / unit);
    steps_.push_back(
        {.wait = whole_cells((begin - finish) / unit), .floor = late < zero ? zero - late : 0});
    finish = begin + bucket.fixed;
    for (; layer < bucket.end; ++layer) {
      const double cost = menu_[layer][centre[layer]].cost;
      add_layer(layer, cost, unit);
      finish += cost;
    }
  }
  firsts_.assign((segments() + 1) * kCells, kUnreachable);
  firsts_[zero] = 0;
  for (std::size_t segment = 0; segment < segments(); ++segment) {
    load(segment);
    std::copy_n(row(steps_in(segment)), kCells, firsts_.data() + (segment + 1) * kCells);
  }
  std::copy_n(firsts_.data() + segments() * kCells, kCells, errors_.data());
}

void PlanGrid::add_layer(std::size_t layer, double centre_cost, double unit) {
  Step step{.layer = layer, .begin = moves_.size()};
  const auto options = menu_[layer];
  for (std::uint32_t i = 0; i < options.size(); ++i) {
    const double length = (options[i].cost - centre_cost) / unit;
    if (!(length > -kWidth && length <= kWidth - 1)) continue;
    const PlanMove move{.shift = round_up(length), .option = i, .error = options[i].error};
    // Of those that move alike, the last has the least error.
    if (moves_.size() > step.begin && moves_.back().shift == move.shift) moves_.pop_back();
    moves_.push_back(move);
  }
  step.end = moves_.size();
  steps_.push_back(step);
}

void PlanGrid::load(std::size_t segment) {
  std::copy_n(firsts_.data() + segment * kCells, kCells, row(0));
  for (std::size_t i = 0; i < steps_in(segment); ++i) {
    run(steps_[segment * kSegment + i], row(i), row(i + 1));
  }
  loaded_ = segment;
}

void PlanGrid::run(const Step& step, const double* from, double* to) {
  if (step.begin < step.end) {
    std::copy_n(from, kCells, padded_.data() + kCells);
    plan_relax(padded_.data() + kCells, moves(step), {to, kCells});
    return;
  }
  std::fill_n(to, kCells, kUnreachable);
  const std::size_t waiting = std::min(step.floor + step.wait, kCells - 1);
  to[step.floor] = *std::min_element(from, from + waiting + 1);
  std::copy(from + waiting + 1, from + kCells, to + step.floor + 1);
}

std::vector<Options> PlanGrid::trace(std::span<const std::size_t> cells) {
  std::vector<Options> plans(cells.size(), Options(menu_.layers()));
  std::vector<std::size_t> at(cells.begin(), cells.end());
  for (std::size_t segment = segments(); segment-- > 0;) {
    if (loaded_ != segment) load(segment);
    for (std::size_t i = steps_in(segment); i-- > 0;) {
      const Step& step = steps_[segment * kSegment + i];
      for (std::size_t p = 0; p < plans.size(); ++p) {
        at[p] = step_back(step, row(i), row(i + 1), at[p], plans[p]);
      }
    }
  }
  return plans;
}

std::size_t PlanGrid::step_back(const Step& step, const double* from, const double* to,
                                std::size_t cell, Options& options) const {
  if (step.begin == step.end) {
    if (cell > step.floor) return cell + step.wait;
    return static_cast<std::size_t>(std::find(from, from + kCells, to[cell]) - from);
  }
  const auto now = static_cast<std::int32_t>(cell);
  const auto all = moves(step);
  const auto taken = std::find_if(all.begin(), all.end(), [&](const PlanMove& move) {
    const std::int32_t before = now - move.shift;
    return before >= 0 && before < kWidth && from[before] + move.error == to[cell];
  });
  options[step.layer] = taken->option;
  return static_cast<std::size_t>(now - taken->shift);
}

}  // namespace thinwire
