#include "compressors/families.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <limits>
#include <string>
#include <vector>

#include "compressors/cast/cast.h"
#include "compressors/core/simd.h"
#include "compressors/core/spelling.h"
#include "compressors/dct/dct.h"
#include "compressors/dct/dctcols.h"
#include "compressors/fedzip/fedzip.h"
#include "compressors/lossless/lossless.h"
#include "compressors/lowrank/lowrank.h"
#include "compressors/onebit/onebit.h"
#include "compressors/quantize/quantize.h"
#include "compressors/randmask/randmask.h"
#include "compressors/topk/topk.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kNoneWords = {"none"};
constexpr Family kNoneFamily = {
    .name = "none",
    .words = kNoneWords,
    .id = 0,
    .main = {},
    .sample = "none",
    .options = {},
    .paper = {},
    .use = "uncompressed: the transport's own allreduce",
    .make = [](const SpecReader& reader, Codec& /*codec*/) { reader.no_main(); },
};

constexpr std::array kFamilies = {
    &kNoneFamily,   &kBF16Family,     &kFP16Family,     &kTopKFamily,     &kQuantizeFamily,
    &kOneBitFamily, &kRandmaskFamily, &kPowerSgdFamily, &kGaloreFamily,   &kLowRankFamily,
    &kDctFamily,    &kDctColsFamily,  &kFedzipFamily,   &kLosslessFamily,
};

constexpr std::array kLaterFamilies = {
    LaterWord{"auto",
              "as a policy of a reducer, auto chooses codecs; here name one: topk:0.01,values=q8"},
};
constexpr std::array kLaterOptions = {
    LaterWord{"warmup",
              "topk lowers its density step by step; start=STEP sends dense gradients "
              "before that step"},
};

// Options of topk that other families are often expected to have.
constexpr std::array<std::string_view, 4> kMomentumOptions = {"momentum", "nesterov", "clip",
                                                              "clip_norm"};

constexpr std::array kCommonOptions = {
    FamilyOption{"ef", "on | off", "on",
                 "error feedback: what is not sent is added to the next gradient"},
    FamilyOption{"decay", "0 to 1", "1", "what is left of a residual from step to step"},
    FamilyOption{"start", "a step", "0", "dense gradients before it"},
    FamilyOption{
        "nonfinite", "propagate | skip-step | error", "propagate",
        "what a step with NaN or Inf does, on every rank alike; its memory is rolled back"},
    FamilyOption{"memory", "fp32 | bf16 | q8", "fp32",
                 "how residuals are kept; fewer bits are rounded at random, unbiased"},
    FamilyOption{"transactional", "on | off", "on",
                 "off: one generation of residuals, which no step can take back"},
};

constexpr std::array<std::string_view, 3> kStorage = {"fp32", "bf16", "q8"};
constexpr std::array<std::string_view, 3> kNonFinite = {"propagate", "skip-step", "error"};

std::vector<std::string_view> family_words() {
  std::vector<std::string_view> words;
  for (const Family* family : kFamilies) {
    words.insert(words.end(), family->words.begin(), family->words.end());
  }
  return words;
}

[[noreturn]] void unknown_family(const SpecTokens& tokens) {
  const std::string_view family = tokens.family.text;
  for (const LaterWord& later : kLaterFamilies) {
    if (family == later.word) {
      unavailable_spec(tokens.text, tokens.family, "family \"" + std::string(family) + "\"",
                       std::string(later.there_is));
    }
  }
  const std::vector<std::string_view> words = family_words();
  std::string_view instead = nearest_spelling(family, words);
  const bool is_bits = family.size() > 1 && family[0] == 'q' &&
                       family.find_first_not_of("0123456789", 1) == std::string_view::npos;
  if (is_bits) instead = family.find_first_not_of('0', 1) == std::string_view::npos ? "q1" : "q8";
  fail_spec(tokens.text, tokens.family, "unknown family \"" + std::string(family) + "\"", instead,
            "families: " + join(words));
}

const Family& family_of(const SpecTokens& tokens) {
  for (const Family* family : kFamilies) {
    if (std::find(family->words.begin(), family->words.end(), tokens.family.text) !=
        family->words.end()) {
      return *family;
    }
  }
  unknown_family(tokens);
}

void refuse_momentum(const SpecTokens& tokens, Words known) {
  for (const SpecOption& option : tokens.options) {
    const std::string_view name = option.name.text;
    if (std::find(known.begin(), known.end(), name) != known.end() ||
        std::find(kMomentumOptions.begin(), kMomentumOptions.end(), name) ==
            kMomentumOptions.end()) {
      continue;
    }
    const std::string family(tokens.family.text);
    fail_spec(tokens.text, option.name, "\"" + std::string(name) + "\" is no option of " + family,
              {},
              "momentum correction is topk's alone: topk:0.001,momentum=0.9; with " + family +
                  " momentum and clipping stay with the optimizer");
  }
}

}  // namespace

CommonOptions read_common(const SpecReader& reader) {
  CommonOptions options;
  options.error_feedback = reader.flag("ef", true);
  options.transactional = reader.flag("transactional", true);
  options.decay = static_cast<float>(reader.share("decay", 1, false, "0.9"));
  options.start_step = static_cast<std::uint64_t>(
      reader.integer("start", 0, 0, std::numeric_limits<std::int64_t>::max()));
  options.nonfinite = static_cast<NonFinite>(reader.choice("nonfinite", kNonFinite, 0));
  options.storage = static_cast<ResidualStorage>(reader.choice("memory", kStorage, 0));
  return options;
}

std::string common_text(const CommonOptions& options) {
  std::string text;
  if (!options.error_feedback) text += ",ef=off";
  if (!options.transactional) text += ",transactional=off";
  if (options.decay != 1.0F) {
    std::array<char, 32> buffer{};
    const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), options.decay);
    text += ",decay=" + std::string(buffer.data(), end.ptr);
  }
  if (options.start_step != 0) text += ",start=" + std::to_string(options.start_step);
  if (options.warmup_steps != 0) text += ",warmup=" + std::to_string(options.warmup_steps);
  if (options.nonfinite != NonFinite::kPropagate) {
    text += ",nonfinite=";
    text += kNonFinite[static_cast<std::size_t>(options.nonfinite)];
  }
  if (options.storage != ResidualStorage::kFP32) {
    text += ",memory=";
    text += kStorage[static_cast<std::size_t>(options.storage)];
  }
  return text;
}

Codec make_codec(std::string_view spec) {
  apply_environment_simd();
  const SpecTokens tokens = split_spec(spec);
  const Family& family = family_of(tokens);
  std::vector<std::string_view> known;
  for (const std::span<const FamilyOption> options : {family.options, common_options()}) {
    for (const FamilyOption& option : options) known.push_back(option.name);
  }
  refuse_momentum(tokens, known);
  const SpecReader reader(tokens, known, kLaterOptions);
  Codec codec;
  codec.family_id = family.id;
  codec.options = read_common(reader);
  family.make(reader, codec);
  if (codec.linear && codec.options.storage != ResidualStorage::kFP32) {
    reader.refuse_value("memory", "a linear codec's residual is fp32", "fp32");
  }
  codec.spec = codec.payload  ? codec.payload->name()
               : codec.linear ? codec.linear->name()
                              : std::string("none");
  codec.spec += common_text(codec.options);
  return codec;
}

std::span<const Family* const> families() { return kFamilies; }

std::span<const FamilyOption> common_options() { return kCommonOptions; }

}  // namespace thinwire
