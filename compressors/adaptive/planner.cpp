#include "compressors/adaptive/planner.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "compressors/adaptive/planner_frontier.h"
#include "compressors/adaptive/planner_grid.h"
#include "compressors/core/error.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec_text.h"

namespace thinwire {
namespace {

// Times that a search makes its grid four times as fine, and grids that it fills at most. Measured
// on 264 problems of 30 to 3000 layers in 1 to 3000 buckets: within 0.02 % of what 16 times as many
// cells find, but for four, the worst of which is 0.11 % off.
constexpr int kRefinements = 7;
constexpr int kErrorRefinements =
    4;  // for the least error within the slack, where less is at stake
constexpr int kGrids = 32;
constexpr double kFiner = 0.25;
// Plans of a grid that are weighed, for what the rounding of their costs hides.
constexpr std::size_t kTries = 4;
// Plans of a bucket that are weighed at a time for a first plan of all, and what of the budget it
// may take: its errors are summed in another order.
constexpr std::size_t kPoints = 64;
constexpr double kRoughly = 1 - 0x1p-30;

bool is_amount(double value) { return value >= 0 && std::isfinite(value); }

[[noreturn]] void fail(const std::string& where, const std::string& got,
                       const std::string& expected) {
  throw InvalidArgument("planner: " + where + " " + got + ", expected " + expected);
}

void check_amount(const std::string& where, double value) {
  if (!is_amount(value)) fail(where, number_text(value), "a finite number, 0 or more");
}

std::string place(std::size_t layer, std::size_t candidate) {
  return "layer " + std::to_string(layer) + ", candidate " + std::to_string(candidate) + ":";
}

void check_layers(const PlanProblem& problem) {
  double cost = 0;
  double error = 0;
  for (std::size_t l = 0; l < problem.layers.size(); ++l) {
    const auto& layer = problem.layers[l];
    if (layer.empty()) fail("layer " + std::to_string(l) + ":", "no candidates", "one or more");
    double most_cost = 0;
    double most_error = 0;
    for (std::size_t i = 0; i < layer.size(); ++i) {
      if (!is_amount(layer[i].cost)) check_amount(place(l, i) + " cost", layer[i].cost);
      if (!is_amount(layer[i].error)) check_amount(place(l, i) + " error", layer[i].error);
      most_cost = std::max(most_cost, layer[i].cost);
      most_error = std::max(most_error, layer[i].error);
    }
    cost += most_cost;
    error += most_error;
    if (!is_amount(cost)) check_amount("costs up to layer " + std::to_string(l) + ", sum", cost);
    if (!is_amount(error)) check_amount("errors up to layer " + std::to_string(l) + ", sum", error);
  }
  for (const PlanBucket& bucket : problem.buckets) cost += bucket.ready + bucket.fixed;
  check_amount("costs and buckets, sum", cost);
}

void check_choice(const PlanProblem& problem, const std::string& what,
                  const std::vector<std::size_t>& choice) {
  if (choice.size() != problem.layers.size()) {
    fail(what, "of " + std::to_string(choice.size()) + " layers",
         std::to_string(problem.layers.size()) + ", one a layer");
  }
  for (std::size_t l = 0; l < choice.size(); ++l) {
    if (choice[l] >= problem.layers[l].size()) {
      fail(what + ", layer " + std::to_string(l) + ":", "candidate " + std::to_string(choice[l]),
           "less than " + std::to_string(problem.layers[l].size()));
    }
  }
}

void check_buckets(const PlanProblem& problem) {
  PlanBucket last;
  for (std::size_t b = 0; b < problem.buckets.size(); ++b) {
    const PlanBucket& bucket = problem.buckets[b];
    const std::string where = "bucket " + std::to_string(b) + ":";
    check_amount(where + " ready", bucket.ready);
    check_amount(where + " fixed", bucket.fixed);
    if (bucket.end < last.end) {
      fail(where + " end", std::to_string(bucket.end), "no less than the bucket before");
    }
    if (bucket.ready < last.ready) {
      fail(where + " ready", number_text(bucket.ready), "no less than the bucket before");
    }
    last = bucket;
  }
  if (last.end != problem.layers.size()) {
    fail("last bucket's end", std::to_string(last.end),
         std::to_string(problem.layers.size()) + ", the number of layers");
  }
}

void check(const PlanProblem& problem) {
  check_buckets(problem);
  check_layers(problem);
  if (!(problem.budget >= 0)) fail("budget", number_text(problem.budget), "0 or more");
  if (!(problem.slack >= 0)) fail("slack", number_text(problem.slack), "0 or more");
  if (!problem.reference.empty()) check_choice(problem, "reference", problem.reference);
}

// candidate(l) is what layer l is sent by.
template <typename F>
std::pair<double, double> finish_and_error(std::span<const PlanBucket> buckets, F&& candidate) {
  double finish = 0;
  double error = 0;
  std::size_t layer = 0;
  for (const PlanBucket& bucket : buckets) {
    finish = std::max(finish, bucket.ready) + bucket.fixed;
    for (; layer < bucket.end; ++layer) {
      finish += candidate(layer).cost;
      error += candidate(layer).error;
    }
  }
  return {finish, error};
}

struct Plan {
  Options options;
  double finish = 0;
  double error = 0;
};

bool sooner(const Plan& a, const Plan& b) {
  return a.finish != b.finish ? a.finish < b.finish : a.error < b.error;
}

class Planner {
 public:
  explicit Planner(const PlanProblem& problem)
      : problem_(problem), menu_(problem.layers), grid_(menu_, problem.buckets) {}

  PlanSolution solve();

 private:
  Plan weigh(Options options) const;
  Plan cheapest() const { return weigh(Options(menu_.layers())); }
  Plan least_error() const;
  Plan reference() const;
  Plan by_rates(const Plan& best) const;
  double span(const Plan& cheapest, double finish) const;
  Plan earliest(Plan best);
  Plan least_error_by(double limit, Plan best);
  template <typename Pick, typename Better>
  Plan search(Plan best, double latest, int refinements, Pick&& pick, Better&& better);
  PlanSolution solution(const Plan& plan) const;
  bool affordable(const Plan& plan) const { return plan.error <= problem_.budget; }

  const PlanProblem& problem_;
  PlanMenu menu_;
  PlanGrid grid_;
};

Plan Planner::weigh(Options options) const {
  const auto [finish, error] = finish_and_error(
      problem_.buckets, [&](std::size_t layer) { return menu_[layer][options[layer]]; });
  return {std::move(options), finish, error};
}

Plan Planner::least_error() const {
  Options options(menu_.layers());
  for (std::size_t l = 0; l < options.size(); ++l) {
    options[l] = static_cast<std::uint32_t>(menu_[l].size() - 1);
  }
  return weigh(std::move(options));
}

// Of each layer the reference's candidate, or one that beats it.
Plan Planner::reference() const {
  Options options(menu_.layers());
  for (std::size_t l = 0; l < options.size(); ++l) {
    const double error = problem_.layers[l][problem_.reference[l]].error;
    while (menu_[l][options[l]].error > error) ++options[l];
  }
  return weigh(std::move(options));
}

// Up to kPoints of the plans [first, last] of a frontier, evenly.
struct FrontierRange {
  std::size_t first;
  std::size_t last;

  std::size_t points() const { return std::min(last - first + 1, kPoints); }
  std::size_t point(std::size_t i) const {
    return i == 0 ? first : first + (last - first) * i / (points() - 1);
  }
};

// The earliest of the plans that trade cost for error at one rate in all layers of a bucket, or
// `best`: a problem of its own, with buckets for layers and plans for candidates, at first a few of
// all of them, then those around the ones chosen. Close to the earliest plan of all where there are
// many layers, and a grid too coarse for each of them.
Plan Planner::by_rates(const Plan& best) const {
  PlanProblem rough{.buckets = problem_.buckets, .budget = problem_.budget * kRoughly};
  std::vector<PlanFrontier> frontiers;
  std::vector<FrontierRange> ranges;
  std::size_t begin = 0;
  for (PlanBucket& bucket : rough.buckets) {
    frontiers.emplace_back(menu_, begin, bucket.end);
    ranges.push_back({.first = 0, .last = frontiers.back().size() - 1});
    begin = std::exchange(bucket.end, frontiers.size());
  }
  rough.layers.resize(frontiers.size());
  Options options(menu_.layers());
  for (bool all = false; !all;) {
    for (std::size_t b = 0; b < frontiers.size(); ++b) {
      rough.layers[b].clear();
      for (std::size_t i = 0; i < ranges[b].points(); ++i) {
        rough.layers[b].push_back(frontiers[b][ranges[b].point(i)]);
      }
    }
    const std::vector<std::size_t> choice = Planner(rough).solve().choice;
    all = true;
    for (std::size_t b = 0; b < frontiers.size(); ++b) {
      const FrontierRange range = ranges[b];
      all = all && range.last - range.first < kPoints;
      frontiers[b].choose(range.point(choice[b]), options);
      ranges[b] = {.first = range.point(std::max<std::size_t>(choice[b], 1) - 1),
                   .last = range.point(std::min(choice[b] + 1, range.points() - 1))};
    }
  }
  Plan plan = weigh(std::move(options));
  return affordable(plan) && sooner(plan, best) ? plan : best;
}

// How much later than the cheapest plan one may be after a bucket and still finish no later than
// at `finish`.
double Planner::span(const Plan& cheapest, double finish) const {
  double rest = 0;  // fixed and least costs of the buckets that follow
  const auto cost = [&](std::size_t layer) { return menu_[layer][cheapest.options[layer]].cost; };
  for (const PlanBucket& bucket : problem_.buckets) rest += bucket.fixed;
  for (std::size_t l = 0; l < menu_.layers(); ++l) rest += cost(l);
  double most = 0;
  double at = 0;
  std::size_t layer = 0;
  for (const PlanBucket& bucket : problem_.buckets) {
    const double begin = std::max(at, bucket.ready);
    at = begin + bucket.fixed;
    for (; layer < bucket.end; ++layer) at += cost(layer);
    rest -= at - begin;
    most = std::max(most, finish - rest - at);
  }
  return most;
}

// `best`, or what is better and finishes by `latest`. The first grid holds every plan that does,
// the next ones those around the best one known. pick(finish, unit, zero) names cells of the grid
// whose centre finishes then.
template <typename Pick, typename Better>
Plan Planner::search(Plan best, double latest, int refinements, Pick&& pick, Better&& better) {
  Plan centre = cheapest();
  std::size_t zero = 0;
  double unit = span(centre, latest) / static_cast<double>(PlanGrid::kCells - 1);
  for (int i = 0, fine = 0; i < kGrids && fine <= refinements && unit > 0; ++i) {
    grid_.fill(centre.options, unit, zero);
    const std::vector<std::size_t> cells = pick(centre.finish, unit, zero);
    for (Options& options : grid_.trace(cells)) {
      Plan plan = weigh(std::move(options));
      if (better(plan, best)) best = std::move(plan);
    }
    // Where the best plan lies near the grid's edge, there are better ones beyond.
    const bool near_edge = zero > 0 && cells.front() < PlanGrid::kCells / 4;
    if (!near_edge) {
      unit *= kFiner;
      ++fine;
    }
    centre = best;
    zero = PlanGrid::kCells / 2;
  }
  return best;
}

// `best` is affordable.
Plan Planner::earliest(Plan best) {
  const double latest = best.finish;
  const auto pick = [&](double, double, std::size_t) {
    const auto errors = grid_.errors();
    std::vector<std::size_t> cells;
    for (std::size_t c = 0; c < errors.size() && cells.size() < kTries; ++c) {
      if (std::isfinite(errors[c]) && errors[c] <= problem_.budget) cells.push_back(c);
    }
    return cells;
  };
  return search(std::move(best), latest, kRefinements, pick, sooner);
}

// `best` finishes by the limit.
Plan Planner::least_error_by(double limit, Plan best) {
  const auto pick = [&](double finish, double unit, std::size_t zero) {
    const auto errors = grid_.errors();
    const double room =
        std::min((limit - finish) / unit, static_cast<double>(errors.size() - 1 - zero));
    const auto last =
        errors.begin() + static_cast<std::ptrdiff_t>(zero) + static_cast<std::ptrdiff_t>(room);
    const auto least = std::min_element(errors.begin(), last + 1);
    return std::vector{static_cast<std::size_t>(least - errors.begin())};
  };
  const auto better = [&](const Plan& a, const Plan& b) {
    return a.finish <= limit && a.error < b.error;
  };
  return search(std::move(best), limit, kErrorRefinements, pick, better);
}

PlanSolution Planner::solution(const Plan& plan) const {
  std::vector<std::size_t> choice(menu_.layers());
  for (std::size_t l = 0; l < choice.size(); ++l) {
    choice[l] = menu_[l][plan.options[l]].candidate;
  }
  return {std::move(choice), plan.finish, plan.error, affordable(plan)};
}

PlanSolution Planner::solve() {
  std::vector<Plan> plans = {least_error()};
  if (!affordable(plans.front())) return solution(plans.front());
  if (menu_.layers() > problem_.buckets.size()) plans.push_back(by_rates(plans.front()));
  if (!problem_.reference.empty()) {
    Plan plan = reference();
    if (affordable(plan)) plans.push_back(std::move(plan));
  }
  Plan best = earliest(*std::min_element(plans.begin(), plans.end(), sooner));
  const double limit = best.finish + problem_.slack;
  for (const Plan& plan : plans) {
    if (plan.finish <= limit && plan.error < best.error) best = plan;
  }
  if (problem_.slack > 0 && best.error > plans.front().error) {
    best = least_error_by(limit, std::move(best));
  }
  return solution(best);
}

}  // namespace

PlanSolution solve(const PlanProblem& problem) {
  check(problem);
  apply_environment_simd();
  return Planner(problem).solve();
}

PlanSolution evaluate(const PlanProblem& problem, std::vector<std::size_t> choice) {
  check(problem);
  check_choice(problem, "choice", choice);
  const auto [finish, error] = finish_and_error(
      problem.buckets, [&](std::size_t layer) { return problem.layers[layer][choice[layer]]; });
  return {std::move(choice), finish, error, error <= problem.budget};
}

}  // namespace thinwire
