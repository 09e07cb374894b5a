// Bytes at the same total error: a codec for each layer, as the planner chooses them, beside the
// best one for all layers, on one recording of a model's v = gradient + residual. layerwise.py
// makes recordings and calls this.
//
//   layerwise_bench LAYERS VALUES REFERENCE SET...
//
// LAYERS: a text file, a line a layer: its name, then its extents. VALUES: all layers' values in
// that order, fp32. SET: powersgd, topk (values as fp32), topk-q (as q4; grid fine: or q8), all. To
// stdout, in JSON Lines, a row for each set, grid and measure:
//
//   grid      auto: the parameters that the policy auto knows. fine: many between and beyond.
//   measure   norms: the total error is the sum of the layers' ||v - C(v)||, as in L-GreCo and in
//             comm/plan_search. floor: the same, and like auto no layer converges slower than 0.7
//             times as fast as under the uniform setting. squares: it is the sum of ||v - C(v)||^2.
//   uniform   of the set's codecs the one that sends the fewest bytes as everyone's, losing no more
//             than REFERENCE as everyone's. Layers that it would not make smaller go dense.
//   layers    what the planner gives each of them: the fewest bytes within the error that `uniform`
//             makes. Layers that a policy leaves dense are in dense_bytes only.
//
// Errors are those of the codecs themselves, bytes those of their messages.

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "comm/policy.h"
#include "compressors/adaptive/candidates.h"
#include "compressors/adaptive/planner.h"
#include "compressors/core/error.h"
#include "compressors/core/spec.h"
#include "tests/compressors/adaptive/codec_error.h"

namespace thinwire {
namespace {

constexpr double kLeastContraction = 0.7;  // as in comm/plan_search.cpp
constexpr double kRounding = 1e-9;         // of sums in another order

struct Recorded {
  Layer layer;
  std::vector<float> v;
  double norm = 0;
  std::map<std::string, double> relative;  // by spec: ||v - C(v)|| / ||v||
};

struct Recording {
  std::vector<Recorded> layers;  // that a policy compresses
  std::size_t dense_bytes = 0;   // of the others
};

// One codec for one layer; `spec` is "none" where the codec would not make it smaller.
struct Option {
  std::string spec = "none";
  double bytes = 0;
  double relative = 0;
  double norm = 0;  // of v

  double error() const { return norm * relative; }
};

using Options = std::vector<std::vector<Option>>;  // by layer, then by spec

enum class Measure : std::uint8_t { kNorms, kFloor, kSquares };
constexpr std::array<std::string_view, 3> kMeasures = {"norms", "floor", "squares"};

double error_of(const Option& option, Measure measure) {
  return measure == Measure::kSquares ? option.error() * option.error() : option.error();
}

Recording read(const std::string& layers_file, const std::string& values_file) {
  std::ifstream layers(layers_file);
  std::ifstream values(values_file, std::ios::binary);
  if (!layers || !values) {
    throw InvalidArgument("cannot read " + (layers ? values_file : layers_file));
  }
  const Policy policy = Policy::parse("auto");
  Recording recording;
  for (std::string line; std::getline(layers, line);) {
    std::istringstream words(line);
    Recorded one;
    words >> one.layer.name;
    for (std::int64_t extent = 0; words >> extent;) one.layer.shape.push_back(extent);
    one.v.resize(static_cast<std::size_t>(one.layer.elements()));
    const std::size_t bytes = one.v.size() * sizeof(float);
    values.read(reinterpret_cast<char*>(one.v.data()), static_cast<std::streamsize>(bytes));
    if (!values) throw InvalidArgument(values_file + ": ends before " + one.layer.name);
    const Policy::Choice choice = policy.choose(one.layer);
    if (!choice.automatic || !choice.small.empty()) {
      recording.dense_bytes += bytes;
      continue;
    }
    one.norm = norm_of(one.v);
    if (!std::isfinite(one.norm)) throw InvalidArgument(one.layer.name + ": not finite");
    recording.layers.push_back(std::move(one));
  }
  if (values.peek() != std::ifstream::traits_type::eof()) {
    throw InvalidArgument(values_file + ": holds more than the layers of " + layers_file);
  }
  return recording;
}

std::vector<std::string> fine_densities() {
  std::vector<std::string> densities;  // eight a decade, 0.0001 to 0.56
  for (int i = -32; i <= -2; ++i) {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "%.3g", std::pow(10.0, i / 8.0));  // NOLINT(*-vararg)
    densities.emplace_back(text.data());
  }
  return densities;
}

// The specs of a set; "none" first.
std::vector<std::string> specs_of(std::string_view set, bool fine) {
  static constexpr std::array<std::int64_t, 2> kLarge = {4096, 4096};  // takes every candidate
  const bool all = set == "all";
  std::vector<std::string> specs = {"none"};
  if (set == "topk") {
    if (fine) {
      for (const std::string& density : fine_densities()) specs.push_back("topk:" + density);
      return specs;
    }
    for (const std::string& spec : specs_of("topk-q", false)) {
      if (spec != "none") specs.push_back(spec.substr(0, spec.find(',')));
    }
    return specs;
  }
  if (!all && set != "powersgd" && set != "topk-q") {
    throw InvalidArgument("set " + std::string(set) + ": expected powersgd, topk, topk-q or all");
  }
  if (!fine) {
    std::vector<std::string_view> families;
    if (!all) families.push_back(set == "topk-q" ? "topk" : set);
    for (const CandidateCodec& candidate : make_candidates(kLarge, DType::kF32, families)) {
      if (candidate.curve != Curve::kNone) specs.push_back(candidate.spec);
    }
    return specs;
  }
  if (all) {
    specs.insert(specs.end(), {"bf16", "q8", "q6", "q5", "q4", "q3", "q2"});
    specs.emplace_back("onebit,block=256,scale=l1");
  }
  if (all || set == "powersgd") {
    for (const int rank : {1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 32}) {
      specs.push_back("powersgd:" + std::to_string(rank));
    }
  }
  if (all || set == "topk-q") {
    for (const std::string& density : fine_densities()) {
      specs.push_back("topk:" + density + ",values=q8");
      specs.push_back("topk:" + density + ",values=q4");
    }
  }
  return specs;
}

Option option_of(Recorded& recorded, const std::string& spec) {
  const Layer& layer = recorded.layer;
  const Codec codec = make_codec(spec);
  const std::size_t dense = message_bytes(Codec(), layer.shape, layer.dtype);
  const std::size_t bytes = message_bytes(codec, layer.shape, layer.dtype);
  Option option{.bytes = static_cast<double>(dense), .norm = recorded.norm};
  if (bytes >= dense || (codec.linear && !codec.linear->gains(layer.shape))) return option;
  const auto [at, added] = recorded.relative.try_emplace(codec.spec, 0.0);
  if (added && recorded.norm > 0) {
    at->second = codec_error(codec.spec, recorded.v, layer.shape);
  }
  option.spec = codec.spec;
  option.bytes = static_cast<double>(bytes);
  option.relative = at->second;
  return option;
}

Options options_of(Recording& recording, const std::vector<std::string>& specs) {
  Options options;
  for (Recorded& recorded : recording.layers) {
    auto& layer = options.emplace_back();
    for (const std::string& spec : specs) layer.push_back(option_of(recorded, spec));
  }
  return options;
}

// Bytes and error of one spec for all layers.
Candidate sum_of(const Options& options, std::size_t spec, Measure measure) {
  Candidate sum;
  for (const auto& layer : options) {
    sum.cost += layer[spec].bytes;
    sum.error += error_of(layer[spec], measure);
  }
  return sum;
}

std::size_t best_uniform(const Options& options, double most_error, Measure measure) {
  std::size_t best = 0;  // "none"
  for (std::size_t spec = 1; spec < options.front().size(); ++spec) {
    const Candidate sum = sum_of(options, spec, measure);
    if (sum.error > most_error * (1 + kRounding)) continue;
    const Candidate least = sum_of(options, best, measure);
    if (std::pair(sum.cost, sum.error) < std::pair(least.cost, least.error)) best = spec;
  }
  return best;
}

// The planner's choice for each layer, no worse than `uniform` for all.
std::vector<Option> layerwise(const Options& options, std::size_t uniform, Measure measure) {
  std::vector<std::vector<Option>> allowed;
  PlanProblem problem{.buckets = {{.end = options.size()}}};
  for (const auto& layer : options) {
    const double all_of_it = layer[uniform].relative;
    const double least =
        measure == Measure::kFloor ? kLeastContraction * (1 - all_of_it * all_of_it) : -1;
    auto& candidates = problem.layers.emplace_back();
    auto& kept = allowed.emplace_back();
    for (std::size_t i = 0; i < layer.size(); ++i) {
      const Option& option = layer[i];
      if (i == uniform) problem.reference.push_back(kept.size());
      if (i != uniform && 1 - option.relative * option.relative < least) continue;
      candidates.push_back({.cost = option.bytes, .error = error_of(option, measure)});
      kept.push_back(option);
    }
  }
  problem.budget = std::numeric_limits<double>::infinity();
  problem.budget = evaluate(problem, problem.reference).error;
  const PlanSolution solution = solve(problem);
  std::vector<Option> plan;
  for (std::size_t i = 0; i < allowed.size(); ++i) {
    plan.push_back(allowed[i][solution.choice[i]]);
  }
  return plan;
}

struct Row {
  std::string_view set;
  std::string_view grid;
  Measure measure = Measure::kNorms;
  std::string reference;
  std::string uniform;
};

std::string json(const Row& row, const Recording& recording, const Options& options,
                 std::size_t uniform, const std::vector<Option>& plan) {
  std::ostringstream text;
  text.precision(10);
  Candidate sum;
  std::ostringstream layers;
  layers.precision(10);
  for (std::size_t i = 0; i < plan.size(); ++i) {
    const Option& alike = options[i][uniform];
    sum.cost += plan[i].bytes;
    sum.error += error_of(plan[i], row.measure);
    layers << (i == 0 ? "" : ", ") << R"({"name": ")" << recording.layers[i].layer.name
           << R"(", "codec": ")" << plan[i].spec << R"(", "bytes": )" << plan[i].bytes
           << R"(, "error": )" << plan[i].error() << R"(, "norm": )" << plan[i].norm
           << R"(, "uniform_bytes": )" << alike.bytes << R"(, "uniform_error": )" << alike.error()
           << "}";
  }
  const Candidate all_alike = sum_of(options, uniform, row.measure);
  text << R"({"set": ")" << row.set << R"(", "grid": ")" << row.grid << R"(", "measure": ")"
       << kMeasures[static_cast<std::size_t>(row.measure)] << R"(", "reference": ")"
       << row.reference << R"(", "uniform": ")" << row.uniform << R"(", "uniform_bytes": )"
       << all_alike.cost << R"(, "uniform_error": )" << all_alike.error << R"(, "bytes": )"
       << sum.cost << R"(, "error": )" << sum.error << R"(, "dense_bytes": )"
       << recording.dense_bytes << R"(, "layers": [)" << layers.str() << "]}\n";
  return text.str();
}

void run(std::span<char*> words) {
  if (words.size() < 5) {
    throw InvalidArgument(
        "expected LAYERS VALUES REFERENCE SET...\nhint: thinwire bench layerwise");
  }
  Recording recording = read(words[1], words[2]);
  const std::string reference = make_codec(words[3]).spec;
  if (recording.layers.empty()) throw InvalidArgument("no layer that a policy compresses");
  const Options of_reference = options_of(recording, {reference});
  for (const char* set : words.subspan(4)) {
    for (const std::string_view grid : {"auto", "fine"}) {
      const std::vector<std::string> specs = specs_of(set, grid == "fine");
      const Options options = options_of(recording, specs);
      for (const Measure measure : {Measure::kNorms, Measure::kFloor, Measure::kSquares}) {
        const double most = sum_of(of_reference, 0, measure).error;
        const std::size_t uniform = best_uniform(options, most, measure);
        const Row row{.set = set,
                      .grid = grid,
                      .measure = measure,
                      .reference = reference,
                      .uniform = specs[uniform]};
        const std::string line =
            json(row, recording, options, uniform, layerwise(options, uniform, measure));
        std::fputs(line.c_str(), stdout);
      }
    }
  }
}

}  // namespace
}  // namespace thinwire

int main(int argc, char** argv) {
  try {
    thinwire::run({argv, static_cast<std::size_t>(argc)});
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "layerwise_bench: %s\n", error.what());
    return 2;
  }
}
