#include <array>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "compressors/core/family.h"
#include "compressors/topk/topk.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"topk"};
constexpr std::array kOptions = {
    FamilyOption{"values", "fp32 | bf16 | q8 | q4 | q2 | ternary", "fp32",
                 "how the entries' values are sent; ternary: signs and one magnitude"},
    FamilyOption{"select", "exact | sampled", "exact",
                 "sampled: 0.8 k to k entries, by a threshold estimated from a sample"},
    FamilyOption{"chunk", "64 to 65536", "the whole tensor",
                 "elements that are selected from together; k=COUNT counts in each chunk"},
    FamilyOption{"warmup", "a number of steps", "0",
                 "from start on, as long as the density falls: 0.25, 0.0625, ... in equal stages"},
};

constexpr double kFirstWarmupDensity = 0.25;
constexpr double kWarmupFactor = 0.25;

// Deep Gradient Compression's schedule (section 3.3): densities 0.25^i above the last one, each for
// an equal share of `steps`.
std::vector<WarmupStage> warmup_stages(TopKOptions options, std::uint64_t steps) {
  std::vector<WarmupStage> stages;
  const double last = options.density;
  for (double density = kFirstWarmupDensity; density > last; density *= kWarmupFactor) {
    options.density = density;
    stages.push_back({.end = 0, .payload = make_topk_codec(options)});
  }
  for (std::size_t i = 0; i < stages.size(); ++i) {
    stages[i].end =
        steps / stages.size() * (i + 1) + steps % stages.size() * (i + 1) / stages.size();
  }
  return stages;
}

void make(const SpecReader& reader, Codec& codec) {
  constexpr std::array<std::string_view, 2> kSelect = {"exact", "sampled"};
  constexpr std::array kLaterSelect = {
      LaterWord{"carried", "select=sampled estimates the threshold anew each step"}};
  const SpecToken& main =
      reader.needed_main("a density or a count: topk:0.01 or topk:k=1000", "topk:0.01");
  TopKOptions options;
  if (main.text.starts_with("k=")) {
    options.k = reader.integer("k", {main.text.substr(2), main.at + 2}, 1, std::int64_t{1} << 40);
  } else {
    options.density = reader.share("density", main, true, "0.01");
  }
  options.values = static_cast<TopKValues>(reader.choice("values", kTopKValuesWords, 0));
  options.select = static_cast<TopKSelect>(reader.choice("select", kSelect, 0, kLaterSelect));
  options.chunk = reader.integer("chunk", 0, kMinTopKChunk, kMaxTopKChunk);
  if (options.chunk > 0 && options.select == TopKSelect::kSampled) {
    reader.refuse_value("select", "a chunk's selection is exact", "exact");
  }
  codec.payload = make_topk_codec(options);
  const std::int64_t warmup =
      reader.integer("warmup", 0, 0, std::numeric_limits<std::int64_t>::max());
  if (warmup == 0) return;
  if (options.k > 0 || options.density >= kFirstWarmupDensity) {
    reader.refuse_value("warmup", "it falls from density 0.25 to a lower one", "0");
  }
  codec.options.warmup_steps = static_cast<std::uint64_t>(warmup);
  codec.warmup = warmup_stages(options, codec.options.warmup_steps);
}

}  // namespace

extern constexpr Family kTopKFamily = {
    .name = "topk",
    .words = kWords,
    .id = 3,
    .main = "the density in (0, 1], or k=COUNT",
    .sample = "topk:0.01",
    .options = kOptions,
    .paper = "Lin et al., Deep Gradient Compression, ICLR 2018, arXiv 1712.01887",
    .use = "slow links: the fewest bytes at the least work",
    .make = make,
};

}  // namespace thinwire
