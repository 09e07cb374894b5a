// Speed of the planner on one core.
//
//   planner_bench [--candidates N] [--rounds R] [--json FILE] [LAYERS...]
//
// A row for every number of layers (default 400 and 10,000) and objective: "bytes"; "time" in 12
// buckets, of which most wait for their gradients; "slack", the same with 1 % of it. Layers of 2 kB
// to 23 MB, each with 32 candidates that trade bytes for error in their own way. Medians, [least,
// most] over the rounds.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/adaptive/planner.h"
#include "compressors/core/simd.h"

namespace thinwire {
namespace {

struct Arguments {
  std::size_t candidates = 32;
  std::size_t rounds = 21;
  std::string json;
  std::vector<std::size_t> layers;
};

PlanProblem make_problem(std::size_t layers, std::size_t candidates, std::size_t buckets) {
  std::mt19937_64 engine(1);
  const auto uniform = [&](double least, double most) {
    return least + (most - least) * static_cast<double>(engine() >> 11) * 0x1p-53;
  };
  PlanProblem problem;
  double bytes = 0;
  double errors = 0;
  for (std::size_t l = 0; l < layers; ++l) {
    const double size = 2e3 * std::pow(23e6 / 2e3, uniform(0, 1));
    const double norm = std::sqrt(size) * uniform(0.2, 5);
    const double power = uniform(0.3, 2.3);
    auto& layer = problem.layers.emplace_back();
    for (std::size_t i = 0; i < candidates; ++i) {
      const double share = std::pow(1e-3, static_cast<double>(i) / static_cast<double>(candidates));
      layer.push_back({.cost = std::floor(size * share * uniform(0.95, 1)),
                       .error = norm * std::pow(1 - share, power)});
    }
    bytes += size;
    errors += norm;
  }
  for (std::size_t b = 0; b < buckets; ++b) {
    const double share = static_cast<double>(b) / static_cast<double>(buckets);
    problem.buckets.push_back({.end = layers * (b + 1) / buckets, .ready = 0.25 * share * bytes});
  }
  problem.budget = 0.3 * errors;
  return problem;
}

void report(const std::string& objective, const PlanProblem& problem, const Arguments& arguments,
            std::ofstream& json) {
  std::vector<double> times_ms;
  PlanSolution solution = solve(problem);  // warms up
  for (std::size_t round = 0; round < arguments.rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    solution = solve(problem);
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    times_ms.push_back(time.count());
  }
  std::sort(times_ms.begin(), times_ms.end());
  const double median_ms = times_ms[times_ms.size() / 2];
  const std::size_t layers = problem.layers.size();
  std::printf(
      "%-6s %6zu layers x %zu  %8.2f ms [%.2f, %.2f]  finish %.6g  error %.4f of the budget\n",
      objective.c_str(), layers, arguments.candidates, median_ms, times_ms.front(), times_ms.back(),
      solution.finish, solution.error / problem.budget);
  if (!json.is_open()) return;
  json << R"({"objective": ")" << objective << R"(", "layers": )" << layers << R"(, "candidates": )"
       << arguments.candidates << R"(, "simd": ")" << simd_target() << R"(", "median_ms": )"
       << median_ms << R"(, "least_ms": )" << times_ms.front() << R"(, "most_ms": )"
       << times_ms.back() << "}\n";
}

std::size_t count_of(std::string_view text) {
  std::size_t count = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), count);
  if (error != std::errc() || end != text.data() + text.size() || count == 0) {
    throw std::invalid_argument(std::string(text) + ": expected a count, 1 or more");
  }
  return count;
}

Arguments parse(std::span<char*> words) {
  Arguments arguments;
  for (std::size_t i = 1; i < words.size(); ++i) {
    const std::string_view word = words[i];
    if (!word.starts_with("--")) {
      arguments.layers.push_back(count_of(word));
      continue;
    }
    if (i + 1 == words.size()) throw std::invalid_argument(std::string(word) + " lacks a value");
    const std::string_view value = words[++i];
    if (word == "--candidates") {
      arguments.candidates = count_of(value);
    } else if (word == "--rounds") {
      arguments.rounds = count_of(value);
    } else if (word == "--json") {
      arguments.json = value;
    } else {
      throw std::invalid_argument("no option " + std::string(word));
    }
  }
  if (arguments.layers.empty()) arguments.layers = {400, 10'000};
  return arguments;
}

void run(std::span<char*> words) {
  const Arguments arguments = parse(words);
  std::ofstream json;
  if (!arguments.json.empty()) json.open(arguments.json);
  apply_environment_simd();
  std::printf("planner, SIMD target %s\n", simd_target().c_str());
  for (const std::size_t layers : arguments.layers) {
    report("bytes", make_problem(layers, arguments.candidates, 1), arguments, json);
    PlanProblem problem = make_problem(layers, arguments.candidates, 12);
    report("time", problem, arguments, json);
    problem.slack = 0.01 * solve(problem).finish;
    report("slack", problem, arguments, json);
  }
}

}  // namespace
}  // namespace thinwire

int main(int argc, char** argv) {
  try {
    thinwire::run({argv, static_cast<std::size_t>(argc)});
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "planner_bench: %s\n", error.what());
    return 2;
  }
}
