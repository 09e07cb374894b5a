#include "compressors/adaptive/candidates.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <functional>
#include <numeric>

#include "compressors/core/error.h"
#include "compressors/core/spec.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/spelling.h"

namespace thinwire {
namespace {

struct Kind {
  std::string_view spec;
  Curve curve = Curve::kNone;
  double parameter = 0;
  TopKValues values = TopKValues::kF32;

  std::string_view family() const { return spec.substr(0, spec.find_first_of(":,")); }
  // What several families are called together.
  std::string_view group() const {
    if (curve == Curve::kLowRank) return "lowrank";
    return curve == Curve::kQuantize ? "quantize" : family();
  }
};

constexpr Kind topk(std::string_view spec, double density) {
  return {.spec = spec, .curve = Curve::kTopK, .parameter = density, .values = TopKValues::kQ4};
}

// Values of 4 bits lose little beside what is not sent at all: those of 8 are worth their bytes
// nowhere, and densities a third apart save more (docs/layerwise.md). One bit with a mean magnitude
// a block loses less than ||v|| of any v; with one scale for all it may lose more.
constexpr std::array kKinds = {
    Kind{.spec = "bf16", .curve = Curve::kBF16},
    Kind{.spec = "q8", .curve = Curve::kQuantize, .parameter = 8},
    Kind{.spec = "q4", .curve = Curve::kQuantize, .parameter = 4},
    Kind{.spec = "q2", .curve = Curve::kQuantize, .parameter = 2},
    Kind{.spec = "onebit,block=256,scale=l1", .curve = Curve::kOneBit},
    topk("topk:0.1,values=q4", 0.1),
    topk("topk:0.05,values=q4", 0.05),
    topk("topk:0.03,values=q4", 0.03),
    topk("topk:0.02,values=q4", 0.02),
    topk("topk:0.014,values=q4", 0.014),
    topk("topk:0.01,values=q4", 0.01),
    topk("topk:0.007,values=q4", 0.007),
    topk("topk:0.005,values=q4", 0.005),
    topk("topk:0.003,values=q4", 0.003),
    topk("topk:0.002,values=q4", 0.002),
    topk("topk:0.0014,values=q4", 0.0014),
    topk("topk:0.001,values=q4", 0.001),
    topk("topk:0.0007,values=q4", 0.0007),
    topk("topk:0.0005,values=q4", 0.0005),
    topk("topk:0.0003,values=q4", 0.0003),
    topk("topk:0.0002,values=q4", 0.0002),
    topk("topk:0.0001,values=q4", 0.0001),
    Kind{.spec = "powersgd:16", .curve = Curve::kLowRank, .parameter = 16},
    Kind{.spec = "powersgd:8", .curve = Curve::kLowRank, .parameter = 8},
    Kind{.spec = "powersgd:4", .curve = Curve::kLowRank, .parameter = 4},
    Kind{.spec = "powersgd:2", .curve = Curve::kLowRank, .parameter = 2},
    Kind{.spec = "powersgd:1", .curve = Curve::kLowRank, .parameter = 1},
};

bool is_gradient(DType dtype) { return dtype == DType::kF32 || is_16_bit(dtype); }

// Whether it is sent as another one is.
bool same(const CandidateCodec& a, const CandidateCodec& b) {
  return a.curve == b.curve && a.parameter == b.parameter && a.values == b.values;
}

}  // namespace

std::vector<std::string_view> split_families(std::string_view text) {
  std::vector<std::string_view> known = {"none", "lowrank", "quantize"};
  for (const Kind& kind : kKinds) {
    if (std::find(known.begin(), known.end(), kind.family()) == known.end()) {
      known.push_back(kind.family());
    }
  }
  std::vector<std::string_view> families;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('|', at), text.size());
    const SpecToken word{text.substr(at, end - at), at};
    if (std::find(known.begin(), known.end(), word.text) == known.end()) {
      fail_spec(text, word, "\"" + std::string(word.text) + "\" names no candidates of auto",
                nearest_spelling(word.text, known), "families: " + join(known));
    }
    families.push_back(word.text);
    at = end + 1;
  }
  return families;
}

std::vector<CandidateCodec> make_candidates(std::span<const std::int64_t> shape, DType dtype,
                                            std::span<const std::string_view> families) {
  const std::int64_t n =
      std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  std::vector<CandidateCodec> candidates = {
      {.spec = "none", .bytes = message_bytes(Codec(), shape, dtype)}};
  if (!is_gradient(dtype) || n == 0) return candidates;
  const auto wanted = [&](std::string_view word) {
    return std::find(families.begin(), families.end(), word) != families.end();
  };
  for (const Kind& kind : kKinds) {
    if (!families.empty() && !wanted(kind.family()) && !wanted(kind.group())) continue;
    const Codec codec = make_codec(kind.spec);
    if (codec.linear && !codec.linear->gains(shape)) continue;
    CandidateCodec candidate{.spec = codec.spec,
                             .curve = kind.curve,
                             .parameter = kind.parameter,
                             .values = kind.values,
                             .bytes = message_bytes(codec, shape, dtype)};
    if (kind.curve == Curve::kTopK) {
      const auto elements = static_cast<double>(n);
      candidate.parameter = std::max(std::round(kind.parameter * elements), 1.0) / elements;
    }
    if (candidate.bytes >= candidates.front().bytes) continue;
    if (std::any_of(candidates.begin(), candidates.end(),
                    [&](const CandidateCodec& other) { return same(candidate, other); })) {
      continue;
    }
    candidates.push_back(std::move(candidate));
  }
  return candidates;
}

CandidateCodec candidate_of(const Codec& codec) {
  const SpecTokens tokens = split_spec(codec.spec);
  const std::string_view family = tokens.family.text;
  CandidateCodec candidate;
  candidate.spec = codec.spec;
  const auto main_number = [&] {
    double value = 0;
    const std::string_view text = tokens.main ? tokens.main->text : std::string_view();
    std::from_chars(text.data(), text.data() + text.size(), value);
    return value;
  };
  const auto is_bits = [&] { return family.size() == 2 && family[0] == 'q'; };
  bool plain = true;  // no option that changes what is lost
  for (const SpecOption& option : tokens.options) {
    const std::string_view name = option.name.text;
    if (family == "topk" && name == "values") {
      const auto found = std::find(kTopKValuesWords.begin(), kTopKValuesWords.end(),
                                   option.value ? option.value->text : std::string_view());
      candidate.values = static_cast<TopKValues>(found - kTopKValuesWords.begin());
    } else if (family == "topk" || family == "onebit") {
      continue;
    } else {
      plain = plain && (name == "memory" || name == "nonfinite" || name == "ef");
    }
  }
  if (family == "topk" && candidate.values != TopKValues::kTernary && main_number() > 0) {
    candidate.curve = Curve::kTopK;
    candidate.parameter = main_number();
  } else if (family == "onebit") {
    candidate.curve = Curve::kOneBit;
  } else if (family == "bf16") {
    candidate.curve = Curve::kBF16;
  } else if (is_bits() && plain) {
    candidate.curve = Curve::kQuantize;
    candidate.parameter = family[1] - '0';
  } else if (family == "powersgd" && main_number() <= kCurveRanks) {
    candidate.curve = Curve::kLowRank;
    candidate.parameter = main_number();
  } else {
    throw PolicyError("auto cannot tell what '" + codec.spec +
                      "' would lose of a gradient\nhint: name bf16, q2 to q8, onebit, topk:DENSITY "
                      "or powersgd:RANK");
  }
  return candidate;
}

double error(const CandidateCodec& candidate, const ErrorCurves& curves) {
  switch (candidate.curve) {
    case Curve::kNone:
      return 0;
    case Curve::kBF16:
      return curves.bf16();
    case Curve::kTopK:
      return curves.topk(candidate.parameter, candidate.values);
    case Curve::kQuantize:
      return curves.quantize(static_cast<int>(candidate.parameter));
    case Curve::kOneBit:
      return curves.onebit(OneBitScale::kL1, kCurveBlock);
    case Curve::kLowRank:
      return curves.lowrank(static_cast<int>(candidate.parameter));
  }
  return 0;
}

}  // namespace thinwire
