#include <array>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
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
    FamilyOption{"select", "exact | sampled | carried", "exact",
                 "0.8 k to k entries, sampled: by a threshold estimated from a sample; carried: by "
                 "the last step's, corrected, in one pass"},
    FamilyOption{"chunk", "64 to 65536", "the whole tensor",
                 "elements that are selected from together; k=COUNT counts in each chunk"},
    FamilyOption{"scope", "layer | bucket", "layer",
                 "bucket: the largest of all layers with this same policy that travel together; "
                 "k=COUNT counts in all of them"},
    FamilyOption{"momentum", "0 to 1, below 1", "none",
                 "momentum correction: a local velocity, cleared where an entry is sent; for "
                 "optimizers without momentum of their own"},
    FamilyOption{"nesterov", "on | off", "off", "Nesterov's momentum, with momentum=M"},
    FamilyOption{"clip", "a number above 0", "none",
                 "with momentum=M: the gradient's L2 norm is kept below clip / sqrt(ranks)"},
    FamilyOption{"clip_norm", "tensor | last", "tensor",
                 "last: clip by the last step's norm, without another pass"},
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

std::optional<TopKMomentum> read_momentum(const SpecReader& reader) {
  if (!reader.has("momentum")) {
    for (const std::string_view name : {"nesterov", "clip", "clip_norm"}) {
      if (reader.has(name)) {
        reader.refuse_option(name, std::string(name) + " without momentum",
                             "it is a part of momentum correction: add momentum=0.9");
      }
    }
    return {};
  }
  TopKMomentum momentum;
  momentum.factor = reader.share("momentum", 0, false, "0.9");
  if (momentum.factor >= 1) reader.refuse_value("momentum", "expected less than 1", "0.9");
  momentum.nesterov = reader.flag("nesterov", false);
  momentum.clip = reader.positive("clip", 0, "1");
  momentum.clip_norm = static_cast<TopKClipNorm>(reader.choice("clip_norm", kTopKClipNormWords, 0));
  if (momentum.clip == 0 && reader.has("clip_norm")) {
    reader.refuse_option("clip_norm", "clip_norm without clip", "add clip=NORM, or leave it out");
  }
  return momentum;
}

TopKScope read_scope(const SpecReader& reader, const TopKOptions& options) {
  const auto scope = static_cast<TopKScope>(reader.choice("scope", kTopKScopeWords, 0));
  if (scope == TopKScope::kLayer) return scope;
  if (options.select != TopKSelect::kExact) {
    reader.refuse_value("select", "a bucket's selection is exact", "exact");
  }
  for (const std::string_view name : {"chunk", "momentum"}) {
    if (reader.has(name)) {
      reader.refuse_option(name, std::string(name) + " with scope=bucket",
                           "it belongs to a layer's own selection: leave it or scope=bucket out");
    }
  }
  return scope;
}

void make(const SpecReader& reader, Codec& codec) {
  const SpecToken& main =
      reader.needed_main("a density or a count: topk:0.01 or topk:k=1000", "topk:0.01");
  TopKOptions options;
  if (main.text.starts_with("k=")) {
    options.k = reader.integer("k", {main.text.substr(2), main.at + 2}, 1, std::int64_t{1} << 40);
  } else {
    options.density = reader.share("density", main, true, "0.01");
  }
  options.values = static_cast<TopKValues>(reader.choice("values", kTopKValuesWords, 0));
  options.select = static_cast<TopKSelect>(reader.choice("select", kTopKSelectWords, 0));
  options.chunk = reader.integer("chunk", 0, kMinTopKChunk, kMaxTopKChunk);
  if (options.chunk > 0 && options.select != TopKSelect::kExact) {
    reader.refuse_value("select", "a chunk's selection is exact", "exact");
  }
  options.scope = read_scope(reader, options);
  options.momentum = read_momentum(reader);
  if (options.momentum && !codec.options.error_feedback) {
    reader.refuse_value("ef", "momentum correction keeps what is not sent", "on");
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
