#include "compressors/adaptive/planner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "compressors/adaptive/planner_kernels.h"
#include "compressors/adaptive/planner_reference.h"
#include "compressors/core/error.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// What solve() promises of the finish.
constexpr double kGap = 1e-3;

class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }
  double uniform(double least, double most) { return least + (most - least) * uniform(); }
  double log_uniform(double least, double most) {
    return least * std::pow(most / least, uniform());
  }
  std::size_t below(std::size_t n) { return static_cast<std::size_t>(engine_() % n); }
  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (std::size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  std::mt19937_64 engine_;
};

PlanProblem in_one_bucket(std::vector<std::vector<Candidate>> layers, double budget) {
  const std::size_t end = layers.size();
  return {.layers = std::move(layers), .buckets = {{.end = end}}, .budget = budget};
}

double least_error(const PlanProblem& problem) {
  double sum = 0;
  for (const auto& layer : problem.layers) {
    sum += std::min_element(layer.begin(), layer.end(), [](const auto& a, const auto& b) {
             return a.error < b.error;
           })->error;
  }
  return sum;
}

// The definition: every choice there is.
PlanSolution brute_force(const PlanProblem& problem) {
  std::vector<PlanSolution> plans;
  std::vector<std::size_t> choice(problem.layers.size());
  for (bool more = true; more;) {
    PlanSolution plan = evaluate(problem, choice);
    if (plan.feasible) plans.push_back(std::move(plan));
    more = false;
    for (std::size_t i = 0; i < choice.size() && !more; ++i) {
      more = ++choice[i] < problem.layers[i].size();
      if (!more) choice[i] = 0;
    }
  }
  if (plans.empty()) return {};
  double earliest = kInfinity;
  for (const PlanSolution& plan : plans) earliest = std::min(earliest, plan.finish);
  const double limit = earliest + problem.slack;
  return *std::min_element(plans.begin(), plans.end(), [&](const auto& a, const auto& b) {
    if ((a.finish <= limit) != (b.finish <= limit)) return a.finish <= limit;
    return a.error != b.error ? a.error < b.error : a.finish < b.finish;
  });
}

// Sizes over four orders of magnitude, errors that fall with the bytes, more or less.
PlanProblem small_problem(Random& random) {
  PlanProblem problem;
  const std::size_t layers = 1 + random.below(6);
  for (std::size_t i = 0; i < layers; ++i) {
    const double bytes = random.log_uniform(2e3, 23e6);
    std::vector<Candidate> candidates(1 + random.below(5));
    for (Candidate& candidate : candidates) {
      const double share = random.uniform();
      candidate.cost = std::floor(bytes * share);
      candidate.error = (1 - share) * random.uniform(0.5, 1.5);
    }
    problem.layers.push_back(std::move(candidates));
  }
  double ready = 0;
  for (std::size_t end = 0; end < layers;) {
    end += 1 + random.below(layers - end);
    problem.buckets.push_back({.end = end, .ready = ready, .fixed = random.uniform(0, 1e4)});
    ready += random.uniform() < 0.3 ? 0 : random.log_uniform(1e3, 2e7);
  }
  problem.budget = least_error(problem) + random.uniform(0, 0.5) * static_cast<double>(layers);
  return problem;
}

// A lower bound of the finish by Lagrange multipliers, the dual of the linear relaxation. Each
// F >= ready_b + what buckets b and later add, so F is no less than the average of these bounds by
// any weights of the buckets; to its least over all choices, any price of the error gives a bound.
class DualBound {
 public:
  explicit DualBound(const PlanProblem& problem)
      : problem_(problem), weights_(problem.buckets.size()), later_(problem.buckets.size()) {}

  double solve(int steps) {
    const std::size_t n = weights_.size();
    std::vector<double> logs(n);
    double best = 0;
    for (int step = 0; step < steps; ++step) {
      double sum = 0;
      for (const double log : logs) sum += std::exp(log);
      for (std::size_t b = 0; b < n; ++b) weights_[b] = std::exp(logs[b]) / sum;
      best = std::max(best, by_weights());
      // Towards the buckets that bound the plan of these multipliers most.
      const double most = *std::max_element(later_.begin(), later_.end());
      for (std::size_t b = 0; b < n; ++b) {
        logs[b] += 32 / std::sqrt(step + 1.0) * (later_[b] / most - 1);
      }
      const double top = *std::max_element(logs.begin(), logs.end());
      for (double& log : logs) log -= top;
    }
    return best;
  }

 private:
  // The best bound over all prices: concave, so halving finds it.
  double by_weights() {
    double low = 1e-12;
    double high = 1e12;
    for (int i = 0; i < 50; ++i) {
      const double price = std::sqrt(low * high);
      double error = 0;
      (void)by_price(price, error);
      (error > problem_.budget ? low : high) = price;
    }
    double error = 0;
    const double bound = by_price(low, error);
    return std::max(bound, by_price(high, error));
  }
  double by_price(double price, double& error) {
    double bound = -price * problem_.budget;
    double weight = 0;
    std::size_t layer = 0;
    error = 0;
    for (std::size_t b = 0; b < weights_.size(); ++b) {
      const PlanBucket& bucket = problem_.buckets[b];
      weight += weights_[b];
      bound += weights_[b] * bucket.ready + weight * bucket.fixed;
      later_[b] = bucket.fixed;
      for (; layer < bucket.end; ++layer) {
        const Candidate* taken = nullptr;
        double least = kInfinity;
        for (const Candidate& candidate : problem_.layers[layer]) {
          const double value = weight * candidate.cost + price * candidate.error;
          if (value < least) taken = &candidate;
          least = std::min(least, value);
        }
        bound += least;
        error += taken->error;
        later_[b] += taken->cost;
      }
    }
    double sum = 0;
    for (std::size_t b = later_.size(); b-- > 0;) {
      sum += later_[b];
      later_[b] = problem_.buckets[b].ready + sum;
    }
    return bound;
  }

  const PlanProblem& problem_;
  std::vector<double> weights_;
  std::vector<double> later_;
};

// Candidates as layers of a model have them: 32 shares from a thousandth to all, errors falling
// with them in each layer's own way.
PlanProblem large_problem(std::size_t layers, std::uint64_t seed) {
  Random random(seed);
  PlanProblem problem;
  double most_error = 0;
  for (std::size_t i = 0; i < layers; ++i) {
    const double size = std::floor(random.log_uniform(2e3, 23e6));
    const double norm = random.log_uniform(0.1, 10);
    const double power = random.uniform(0.3, 2.3);
    std::vector<Candidate> candidates = {{.cost = size, .error = 0}};
    while (candidates.size() < 32) {
      const double share = random.log_uniform(1e-3, 1);
      const double error = norm * std::pow(1 - share, power) * random.uniform(0.8, 1.2);
      candidates.push_back({.cost = std::floor(size * share) + 20, .error = error});
    }
    most_error += norm;
    problem.layers.push_back(std::move(candidates));
  }
  problem.buckets = {{.end = layers}};
  problem.budget = random.uniform(0.1, 0.4) * most_error;
  return problem;
}

// The same in buckets whose gradients take about as long as sending them does.
PlanProblem large_overlapped_problem(std::size_t layers, std::size_t buckets, std::uint64_t seed) {
  PlanProblem problem = large_problem(layers, seed);
  const double bytes = DualBound(problem).solve(1);
  Random random(seed);
  problem.buckets.clear();
  double ready = 0;
  for (std::size_t b = 0; b < buckets; ++b) {
    problem.buckets.push_back({.end = layers * (b + 1) / buckets, .ready = ready, .fixed = 1e4});
    ready += random.uniform(0.6, 1.4) * bytes / static_cast<double>(buckets);
  }
  return problem;
}

void expect_consistent(const PlanProblem& problem, const PlanSolution& solution) {
  const PlanSolution again = evaluate(problem, solution.choice);
  EXPECT_EQ(solution.finish, again.finish);
  EXPECT_EQ(solution.error, again.error);
  EXPECT_EQ(solution.feasible, again.feasible);
}

TEST(Planner, SmallPlansAreAsGoodAsTheBestOfAllChoices) {
  Random random(1);
  constexpr int kProblems = 2000;
  int exact = 0;
  for (int i = 0; i < kProblems; ++i) {
    SCOPED_TRACE(testing::Message() << "problem " << i);
    PlanProblem problem = small_problem(random);
    const PlanSolution best = brute_force(problem);
    const PlanSolution solution = solve(problem);
    expect_consistent(problem, solution);
    ASSERT_TRUE(solution.feasible);
    EXPECT_GE(solution.finish, best.finish);
    EXPECT_LE(solution.finish, best.finish * (1 + kGap));
    if (solution.finish == best.finish) {
      EXPECT_LE(solution.error, best.error * (1 + kGap));
      ++exact;
    }
    problem.reference = best.choice;
    EXPECT_EQ(solve(problem).finish, best.finish);

    problem.reference = {};
    problem.slack = random.uniform(0, 0.2) * best.finish;
    const PlanSolution slow = solve(problem);
    expect_consistent(problem, slow);
    EXPECT_LE(slow.finish, solution.finish + problem.slack);
    EXPECT_LE(slow.error, brute_force(problem).error * (1 + kGap));
  }
  EXPECT_GE(exact, kProblems * 99 / 100);
}

// The relaxation may send a layer by parts of two candidates: its bound is below the least finish.
TEST(Planner, LargePlansAreNearTheBoundOfTheLinearRelaxation) {
  double bytes_gaps = 0;
  double time_gaps = 0;
  constexpr std::uint64_t kSeeds = 6;
  for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
    const PlanProblem bytes = large_problem(400, seed);
    const PlanProblem time = large_overlapped_problem(400, 12, seed);
    for (const PlanProblem* problem : {&bytes, &time}) {
      SCOPED_TRACE(testing::Message() << problem->buckets.size() << " buckets, seed " << seed);
      const double bound = DualBound(*problem).solve(problem == &bytes ? 1 : 300);
      const PlanSolution solution = solve(*problem);
      expect_consistent(*problem, solution);
      EXPECT_TRUE(solution.feasible);
      EXPECT_GE(solution.finish, bound * (1 - 1e-9));
      (problem == &bytes ? bytes_gaps : time_gaps) += solution.finish / bound - 1;
      // Or there was nothing to solve.
      PlanProblem free = *problem;
      free.budget = kInfinity;
      EXPECT_GT(solution.finish, 1.05 * solve(free).finish);
    }
  }
  EXPECT_LE(bytes_gaps / kSeeds, kGap);
  EXPECT_LE(time_gaps / kSeeds, kGap);
}

// More layers than the planner keeps rows of, and so alike that many have to change a little when
// half of them wait for gradients.
TEST(Planner, ManyLayersAreNearTheBoundToo) {
  PlanProblem problem = large_problem(10'000, 2);
  for (auto& layer : problem.layers) {
    layer.resize(8);
    const double scale = 1e6 / layer[0].cost;
    for (Candidate& candidate : layer) candidate.cost *= scale;
  }
  const double bytes = solve(problem).finish;
  for (const double wait : {0.0, 0.8, 1.2}) {
    SCOPED_TRACE(testing::Message() << "wait " << wait);
    problem.buckets = {{.end = 5000}, {.end = 10'000, .ready = wait * bytes}};
    const PlanSolution solution = solve(problem);
    expect_consistent(problem, solution);
    EXPECT_TRUE(solution.feasible);
    EXPECT_LE(solution.finish, DualBound(problem).solve(30) * (1 + kGap));
  }
}

TEST(Planner, BucketsThatNeverWaitAreAsOne) {
  PlanProblem problem = large_problem(3000, 3);
  const PlanSolution one = solve(problem);
  problem.buckets.clear();
  for (std::size_t l = 1; l <= problem.layers.size(); ++l) problem.buckets.push_back({.end = l});
  EXPECT_LE(solve(problem).finish, one.finish * (1 + kGap));
}

TEST(Planner, WhatWaitsForGradientsAnywayIsSentWell) {
  PlanProblem problem;
  problem.layers = {{{10, 1}, {90, 0.1}, {120, 0}}, {{10, 1}, {50, 0}}};
  problem.budget = 1.1;
  problem.buckets = {{.end = 1}, {.end = 2, .ready = 100}};
  const PlanSolution time = solve(problem);
  EXPECT_THAT(time.choice, testing::ElementsAre(1, 0));
  EXPECT_EQ(time.finish, 110);
  problem.buckets = {{.end = 2}};
  const PlanSolution bytes = solve(problem);
  EXPECT_THAT(bytes.choice, testing::ElementsAre(0, 1));
  EXPECT_EQ(bytes.finish, 60);
  // Without a budget to keep, the least error that the wait pays for.
  problem.budget = kInfinity;
  problem.buckets = {{.end = 1}, {.end = 2, .ready = 100}};
  EXPECT_THAT(solve(problem).choice, testing::ElementsAre(1, 0));
}

TEST(Planner, WithinTheSlackTheLeastErrorWins) {
  PlanProblem problem = in_one_bucket({{{100, 5}, {101, 1}, {102.5, 0.5}, {150, 0}}}, 10);
  EXPECT_THAT(solve(problem).choice, testing::ElementsAre(0));
  problem.slack = 2;
  EXPECT_THAT(solve(problem).choice, testing::ElementsAre(1));
  problem.slack = 2.5;
  EXPECT_THAT(solve(problem).choice, testing::ElementsAre(2));
  problem.slack = kInfinity;
  EXPECT_THAT(solve(problem).choice, testing::ElementsAre(3));
}

TEST(Planner, MoreBudgetCostsNoMore) {
  for (const std::size_t buckets : {1, 12}) {
    PlanProblem problem =
        buckets == 1 ? large_problem(100, 7) : large_overlapped_problem(100, buckets, 7);
    const double most = problem.budget;
    PlanSolution before;
    for (int i = 1; i <= 40; ++i) {
      problem.budget = most * i / 20;
      problem.reference = {};
      const PlanSolution alone = solve(problem);
      problem.reference = before.choice;
      const PlanSolution after = solve(problem);
      EXPECT_LE(after.error, problem.budget);
      if (before.feasible) {
        EXPECT_LE(after.finish, before.finish);
        EXPECT_LE(alone.finish, before.finish * (1 + kGap));
      }
      before = after;
    }
  }
}

// Choices around the best one, and the budget exactly what they need.
TEST(Planner, NeverWorseThanAFeasibleReference) {
  Random random(5);
  for (int i = 0; i < 60; ++i) {
    SCOPED_TRACE(testing::Message() << "problem " << i);
    PlanProblem problem =
        i % 2 == 0 ? large_problem(30, 100 + static_cast<std::uint64_t>(i))
                   : large_overlapped_problem(30, 4, 100 + static_cast<std::uint64_t>(i));
    std::vector<std::size_t> choice = solve(problem).choice;
    for (int changes = i % 5; changes > 0; --changes) {
      const std::size_t layer = random.below(choice.size());
      choice[layer] = random.below(problem.layers[layer].size());
    }
    problem.budget = evaluate(problem, choice).error;
    problem.reference = choice;
    const PlanSolution reference = evaluate(problem, choice);
    ASSERT_TRUE(reference.feasible);
    const PlanSolution solution = solve(problem);
    expect_consistent(problem, solution);
    EXPECT_TRUE(solution.feasible);
    EXPECT_LE(solution.finish, reference.finish);
    problem.slack = 0.01 * reference.finish;
    const PlanSolution slow = solve(problem);
    EXPECT_TRUE(slow.finish <= reference.finish || slow.error <= reference.error);
  }
}

TEST(Planner, TheBudgetHoldsToTheLastBit) {
  const double sum = 0.1 + 0.2 + 0.3;
  const std::vector<std::vector<Candidate>> layers = {
      {{1, 0.1}, {2, 0}}, {{1, 0.2}, {2, 0}}, {{1, 0.3}, {2, 0}}};
  const PlanSolution met = solve(in_one_bucket(layers, sum));
  EXPECT_EQ(met.finish, 3);
  EXPECT_EQ(met.error, sum);
  const PlanSolution missed = solve(in_one_bucket(layers, std::nextafter(sum, 0)));
  EXPECT_EQ(missed.finish, 4);
  EXPECT_TRUE(missed.feasible);
}

TEST(Planner, TheOrderOfCandidatesDoesNotMatter) {
  Random random(3);
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    PlanProblem problem = large_overlapped_problem(50, 5, seed);
    problem.slack = 1e5;
    const PlanSolution before = solve(problem);
    for (auto& layer : problem.layers) random.shuffle(layer);
    const PlanSolution after = solve(problem);
    EXPECT_EQ(after.finish, before.finish);
    EXPECT_EQ(after.error, before.error);
  }
}

// L-GreCo over low rank: elements of rank r are r (m + n), its error the singular values' tail.
// Against rank 4 everywhere, whose error is the budget.
TEST(Planner, RanksByLayerSendFewerElementsThanOneRankForAll) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    PlanProblem problem;
    for (int l = 0; l < 20; ++l) {
      const double m = std::floor(random.log_uniform(64, 2048));
      const double n = std::floor(random.log_uniform(64, 2048));
      const double scale = random.log_uniform(0.1, 10);
      const double decay = random.uniform(0.2, 2);
      auto& layer = problem.layers.emplace_back();
      for (int rank = 2; rank <= 8; ++rank) {
        double tail = 0;
        for (int k = rank + 1; k <= std::min(m, n); ++k) tail += std::pow(k, -2 * decay);
        layer.push_back({.cost = rank * (m + n), .error = scale * std::sqrt(tail)});
      }
    }
    problem.buckets = {{.end = problem.layers.size()}};
    problem.reference.assign(problem.layers.size(), 2);
    problem.budget = kInfinity;
    const PlanSolution uniform = evaluate(problem, problem.reference);
    problem.budget = uniform.error;
    const PlanSolution plan = solve(problem);
    EXPECT_TRUE(plan.feasible);
    EXPECT_GE(uniform.finish / plan.finish, 1.26);
    EXPECT_GE(plan.error / uniform.error, 0.989);
  }
}

TEST(Planner, Corners) {
  // No layers, with and without buckets.
  EXPECT_TRUE(solve({}).feasible);
  PlanProblem empty;
  empty.buckets = {{.end = 0, .ready = 3, .fixed = 1}};
  EXPECT_EQ(solve(empty).finish, 4);

  // One candidate each; zero costs and errors.
  EXPECT_THAT(solve(in_one_bucket({{{3, 1}}, {{0, 0}}}, 1)).choice, testing::ElementsAre(0, 0));
  const PlanSolution zeros = solve(in_one_bucket({{{0, 0}, {0, 0}}, {{0, 2}, {0, 1}}}, 2));
  EXPECT_THAT(zeros.choice, testing::ElementsAre(0, 1));
  EXPECT_EQ(zeros.finish, 0);
  EXPECT_EQ(zeros.error, 1);

  // Equal candidates: the first; of one error the cheapest, of one cost the least error.
  EXPECT_THAT(solve(in_one_bucket({{{5, 1}, {5, 1}, {5, 1}}}, 1)).choice, testing::ElementsAre(0));
  EXPECT_THAT(solve(in_one_bucket({{{6, 1}, {5, 1}, {5, 2}}}, 9)).choice, testing::ElementsAre(1));

  // Budgets of 0 and without end.
  const std::vector<std::vector<Candidate>> layers = {{{1, 5}, {7, 0}, {9, 0}}, {{2, 1}, {3, 0}}};
  EXPECT_THAT(solve(in_one_bucket(layers, 0)).choice, testing::ElementsAre(1, 1));
  EXPECT_THAT(solve(in_one_bucket(layers, kInfinity)).choice, testing::ElementsAre(0, 0));

  // Costs of every order of magnitude a double has.
  const PlanSolution wide = solve(in_one_bucket(
      {{{1e-300, 1}, {1e300, 0}}, {{5e-324, 1}, {1e-310, 0.5}}, {{1, 1}, {2, 0}}}, 2.5));
  EXPECT_THAT(wide.choice, testing::ElementsAre(0, 1, 0));
  EXPECT_TRUE(wide.feasible);
}

TEST(Planner, WithoutAFeasibleChoiceTheLeastError) {
  PlanProblem problem = in_one_bucket({{{1, 5}, {7, 2}, {9, 2}}, {{2, 1}, {3, 0.5}}}, 2.4);
  problem.reference = {0, 0};
  const PlanSolution solution = solve(problem);
  EXPECT_FALSE(solution.feasible);
  EXPECT_THAT(solution.choice, testing::ElementsAre(1, 1));
  EXPECT_EQ(solution.error, 2.5);
  EXPECT_EQ(solution.finish, 10);
}

TEST(Planner, EverySimdTargetPlansAlike) {
  PlanProblem problem = large_overlapped_problem(600, 12, 9);
  problem.slack = 1e6;
  set_simd_limit("scalar");
  const PlanSolution scalar = solve(problem);
  for_each_simd_target([&] {
    const PlanSolution solution = solve(problem);
    EXPECT_EQ(solution.choice, scalar.choice);
    EXPECT_EQ(solution.finish, scalar.finish);
    EXPECT_EQ(solution.error, scalar.error);
  });
}

TEST(Planner, KernelMatchesTheReferenceBitForBit) {
  Random random(4);
  for (const std::size_t cells : {1, 2, 5, 32}) {
    const auto n = static_cast<std::int32_t>(cells * kPlanCellGroup);
    for (const std::size_t count : {1, 2, 7, 40}) {
      std::vector<double> from(3 * static_cast<std::size_t>(n), kInfinity);
      for (std::int32_t c = n; c < 2 * n; ++c) {
        if (random.uniform() < 0.8) from[static_cast<std::size_t>(c)] = random.log_uniform(1e-9, 1);
      }
      std::vector<PlanMove> moves(count);
      for (PlanMove& move : moves) {
        const auto shift = static_cast<std::int32_t>(random.below(2 * from.size() / 3 - 1)) - n + 1;
        move = {.shift = shift, .option = 0, .error = random.log_uniform(1e-9, 1)};
      }
      moves[0].shift = n - 1;
      if (count > 1) moves[1].shift = 1 - n;
      std::vector<double> expected(static_cast<std::size_t>(n));
      plan_relax_reference(from.data() + n, moves, expected);
      for_each_simd_target([&] {
        std::vector<double> to(expected.size(), -1);
        plan_relax(from.data() + n, moves, to);
        EXPECT_EQ(to, expected) << n << " cells, " << count << " moves";
      });
    }
  }
}

void expect_refused(const std::function<void(PlanProblem&)>& spoil, const std::string& message) {
  PlanProblem problem;
  problem.layers = {{{1, 1}, {2, 0}}, {{1, 1}, {2, 0}, {3, 0}}};
  problem.buckets = {{.end = 1}, {.end = 2, .ready = 1}};
  problem.budget = 1;
  EXPECT_NO_THROW(solve(problem));
  spoil(problem);
  try {
    solve(problem);
    ADD_FAILURE() << "not refused: " << message;
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr(message));
  }
}

TEST(Planner, RefusesWhatIsNoProblem) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  constexpr double kMost = std::numeric_limits<double>::max();
  for (const double bad : {kNaN, kInfinity, -kInfinity, -1.0, -5e-324}) {
    expect_refused([&](auto& p) { p.layers[1][2].cost = bad; }, "layer 1, candidate 2: cost");
    expect_refused([&](auto& p) { p.layers[0][1].error = bad; }, "layer 0, candidate 1: error");
    expect_refused([&](auto& p) { p.buckets[1].ready = bad; }, "bucket 1: ready");
    expect_refused([&](auto& p) { p.buckets[0].fixed = bad; }, "bucket 0: fixed");
    if (bad == kInfinity) continue;
    expect_refused([&](auto& p) { p.budget = bad; }, "budget");
    expect_refused([&](auto& p) { p.slack = bad; }, "slack");
  }
  expect_refused([](auto& p) { p.layers[1].clear(); }, "layer 1: no candidates");
  expect_refused([](auto& p) { p.layers.clear(); }, "last bucket's end 2, expected 0");
  expect_refused([](auto& p) { p.buckets.clear(); }, "last bucket's end 0, expected 2");
  expect_refused([](auto& p) { p.buckets[0].end = 3; }, "bucket 1: end 2");
  expect_refused([](auto& p) { p.buckets[1].end = 3; }, "last bucket's end 3, expected 2");
  expect_refused([](auto& p) { p.buckets[0].ready = 2; }, "bucket 1: ready 1");
  expect_refused([](auto& p) { p.reference = {0}; }, "reference of 1 layers, expected 2");
  expect_refused([](auto& p) { p.reference = {1, 3}; }, "reference, layer 1: candidate 3");
  for (auto& member : {&Candidate::cost, &Candidate::error}) {
    expect_refused([&](auto& p) { p.layers[0][0].*member = p.layers[1][1].*member = kMost; },
                   "up to layer 1");
  }
  expect_refused([](auto& p) { p.layers[0][0].cost = p.buckets[1].ready = kMost; }, "sum inf");
  PlanProblem problem = in_one_bucket({{{1, 1}}}, 1);
  EXPECT_THROW(evaluate(problem, {}), InvalidArgument);
  EXPECT_THROW(evaluate(problem, {1}), InvalidArgument);
}

}  // namespace
}  // namespace thinwire
