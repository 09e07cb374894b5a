#include "compressors/core/spec.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <optional>
#include <system_error>
#include <utility>

#include "compressors/cast/cast.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/spelling.h"
#include "compressors/quantize/quantize.h"
#include "compressors/randmask/randmask.h"
#include "compressors/topk/topk.h"

namespace thinwire {
namespace {

using Words = std::span<const std::string_view>;

// PayloadHeader::codec_id, FORMAT.md.
enum FamilyId : std::uint8_t {
  kNone = 0,
  kBF16 = 1,
  kFP16 = 2,
  kTopK = 3,
  kQuantize = 4,
  kRandmask = 5
};

// Known to the design, not in this version.
struct Later {
  std::string_view word;
  std::string_view there_is;
};

constexpr std::array<std::string_view, 13> kFamilies = {
    "none", "bf16", "fp16", "topk", "q1", "q2", "q3", "q4", "q5", "q6", "q7", "q8", "randmask"};
constexpr std::array kLaterFamilies = {
    Later{"onebit", "q1 sends one bit an element with error feedback"},
    Later{"powersgd", "topk:0.001,values=q8 sends about as few bytes"},
    Later{"galore", "topk:0.001,values=q8 sends about as few bytes"},
    Later{"dctcols", "topk:0.001,values=q8 sends about as few bytes"},
    Later{"dct", "topk:0.01 keeps the largest entries without a transform"},
    Later{"fedzip", "topk:0.01,values=q8 is the nearest in bytes"},
    Later{"lossless", "none sends every bit; bf16 halves the bytes"},
    Later{"auto", "topk:0.01,values=q8 suits most models; q4 where nothing may be left out"},
};

constexpr std::array<std::string_view, 6> kCommonOptions = {"ef",    "transactional", "decay",
                                                            "start", "nonfinite",     "memory"};
constexpr std::array kLaterOptions = {
    Later{"warmup", "start=STEP sends dense gradients before that step"},
    Later{"clip", "clip gradients in the training loop"},
    Later{"kind", "q1 to q8 scale each block by its largest magnitude; leave kind out"},
    Later{"rotate", "a smaller block=N adapts to uneven values"},
    Later{"chunk", "topk selects over the whole tensor; leave chunk out"},
};
constexpr std::array<std::string_view, 2> kSwitch = {"off", "on"};

class Reader {
 public:
  Reader(const SpecTokens& tokens, Words family_options) : tokens_(tokens) {
    std::vector<std::string_view> known(family_options.begin(), family_options.end());
    known.insert(known.end(), kCommonOptions.begin(), kCommonOptions.end());
    for (const SpecOption& option : tokens.options) check_name(option, known);
  }

  const std::optional<SpecToken>& main() const { return tokens_.main; }

  void no_main() const {
    if (!tokens_.main) return;
    const std::size_t end = tokens_.main->at + tokens_.main->text.size();
    const std::size_t begin = tokens_.family.at + tokens_.family.text.size();
    const SpecToken place{tokens_.text.substr(begin, end - begin), begin};
    std::string without(tokens_.text);
    without.erase(begin, end - begin);
    fail_spec(tokens_.text, place, "\"" + word(tokens_.family) + "\" takes nothing after :", {},
              "did you mean \"" + without + "\"?");
  }

  // Index of the option's value in `words`; `otherwise` when the option is not given.
  std::size_t choice(std::string_view name, Words words, std::size_t otherwise,
                     std::span<const Later> later = {}) const {
    const SpecOption* option = find(name);
    if (option == nullptr) return otherwise;
    const SpecToken value = value_of(*option, words[otherwise]);
    const auto found = std::find(words.begin(), words.end(), value.text);
    if (found != words.end()) return static_cast<std::size_t>(found - words.begin());
    for (const Later& known : later) {
      if (value.text == known.word) {
        unavailable_spec(tokens_.text, value, std::string(name) + "=" + word(value),
                         std::string(known.there_is));
      }
    }
    fail_spec(tokens_.text, value, "\"" + word(value) + "\" is no value of " + std::string(name),
              nearest_spelling(value.text, words),
              std::string(name) + " is one of: " + join(words));
  }

  // A switch: NAME, NAME=on or NAME=off.
  bool flag(std::string_view name, bool otherwise) const {
    const SpecOption* option = find(name);
    if (option != nullptr && !option->value) return true;
    return choice(name, kSwitch, otherwise ? 1 : 0) == 1;
  }

  std::int64_t integer(std::string_view name, std::int64_t otherwise, std::int64_t least,
                       std::int64_t most) const {
    const SpecOption* option = find(name);
    if (option == nullptr) return otherwise;
    return integer(name, value_of(*option, std::to_string(otherwise)), least, most);
  }

  std::int64_t integer(std::string_view name, SpecToken token, std::int64_t least,
                       std::int64_t most) const {
    std::int64_t value = 0;
    const char* end = token.text.data() + token.text.size();
    const auto [rest, error] = std::from_chars(token.text.data(), end, value);
    const std::string range =
        "a whole number in [" + std::to_string(least) + ", " + std::to_string(most) + "]";
    if (rest != end || error == std::errc::invalid_argument) {
      fail_spec(tokens_.text, token, word(token) + " is not " + range, whole_number(token, least),
                std::string(name) + " is " + range);
    }
    if (error == std::errc::result_out_of_range) {
      value = token.text.starts_with('-') ? std::numeric_limits<std::int64_t>::min()
                                          : std::numeric_limits<std::int64_t>::max();
    }
    if (value < least || value > most || error == std::errc::result_out_of_range) {
      fail_spec(tokens_.text, token, std::string(name) + " is out of range",
                std::to_string(std::clamp(value, least, most)), std::string(name) + " is " + range);
    }
    return value;
  }

  // In (0, 1] when `open`, else in [0, 1]. `example` stands in for what cannot be read.
  double share(std::string_view name, SpecToken token, bool open, std::string_view example) const {
    double value = 0;
    const char* end = token.text.data() + token.text.size();
    const auto [rest, error] = std::from_chars(token.text.data(), end, value);
    const std::string range = std::string(name) + " is a number in " + (open ? "(0, 1]" : "[0, 1]");
    if (rest == token.text.data() || rest != end) {
      std::string instead(example);
      if (rest != token.text.data() && token.text.substr(token.text.size() - 1) == "%" &&
          rest + 1 == end && value > 0 && value <= 100) {
        instead = number_text(value / 100);
      }
      fail_spec(tokens_.text, token, word(token) + " is not a number", instead, range);
    }
    const bool fits = error == std::errc() && value <= 1 && (open ? value > 0 : value >= 0);
    if (!fits) {
      fail_spec(tokens_.text, token, std::string(name) + " is out of range",
                value > 1 ? "1" : (open ? example : "0"), range);
    }
    return value;
  }

  const SpecOption* find(std::string_view name) const {
    for (const SpecOption& option : tokens_.options) {
      if (option.name.text == name) return &option;
    }
    return nullptr;
  }

  SpecToken value_of(const SpecOption& option, std::string_view example) const {
    if (option.value) return *option.value;
    fail_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\" has no value",
              word(option.name) + "=" + std::string(example));
  }

  const SpecTokens& tokens() const { return tokens_; }

 private:
  static std::string word(SpecToken token) { return std::string(token.text); }

  static std::string whole_number(SpecToken token, std::int64_t least) {
    std::string digits;
    for (const char c : token.text) {
      if (c >= '0' && c <= '9' && digits.size() < 15)
        digits += c;
      else if (!digits.empty())
        break;
    }
    return digits.empty() ? std::to_string(least) : digits;
  }

  void check_name(const SpecOption& option, Words known) const {
    const std::string_view name = option.name.text;
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      for (const Later& later : kLaterOptions) {
        if (name == later.word) {
          unavailable_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\"",
                           std::string(later.there_is));
        }
      }
      fail_spec(tokens_.text, option.name,
                "\"" + word(option.name) + "\" is no option of " + word(tokens_.family),
                nearest_spelling(name, known),
                "options of " + word(tokens_.family) + ": " + join(known));
    }
    for (const SpecOption& other : tokens_.options) {
      if (&other == &option) break;
      if (other.name.text == name) {
        fail_spec(tokens_.text, option.name, "option \"" + word(option.name) + "\" given twice", {},
                  "leave one out");
      }
    }
  }

  const SpecTokens& tokens_;
};

constexpr std::array<std::string_view, 3> kNonFinite = {"propagate", "skip-step", "error"};

CommonOptions read_common(const Reader& reader) {
  constexpr std::array<std::string_view, 1> kMemory = {"fp32"};
  constexpr std::array kLaterMemory = {
      Later{"bf16", "residuals are kept in fp32; transactional=off halves them"},
      Later{"q8", "residuals are kept in fp32; transactional=off halves them"}};
  CommonOptions options;
  options.error_feedback = reader.flag("ef", true);
  options.transactional = reader.flag("transactional", true);
  if (const SpecOption* decay = reader.find("decay")) {
    options.decay =
        static_cast<float>(reader.share("decay", reader.value_of(*decay, "0.9"), false, "0.9"));
  }
  options.start_step = static_cast<std::uint64_t>(
      reader.integer("start", 0, 0, std::numeric_limits<std::int64_t>::max()));
  options.nonfinite = static_cast<NonFinite>(reader.choice("nonfinite", kNonFinite, 0));
  (void)reader.choice("memory", kMemory, 0, kLaterMemory);
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
  if (options.nonfinite != NonFinite::kPropagate) {
    text += ",nonfinite=";
    text += kNonFinite[static_cast<std::size_t>(options.nonfinite)];
  }
  return text;
}

[[noreturn]] void missing_main(const SpecTokens& tokens, std::string_view what) {
  const std::string family(tokens.family.text);
  fail_spec(tokens.text, tokens.family, family + " needs " + std::string(what), family + ":0.01");
}

Codec make_cast(const SpecTokens& tokens, DType dtype) {
  const Reader reader(tokens, {});
  reader.no_main();
  Codec codec;
  codec.family_id = dtype == DType::kBF16 ? kBF16 : kFP16;
  codec.payload = make_cast_codec(dtype);
  codec.options = read_common(reader);
  return codec;
}

Codec make_topk(const SpecTokens& tokens) {
  constexpr std::array<std::string_view, 2> kOptions = {"values", "select"};
  constexpr std::array<std::string_view, 3> kValues = {"fp32", "bf16", "q8"};
  constexpr std::array kLaterValues = {Later{"q4", "values=q8 is the narrowest"},
                                       Later{"q2", "values=q8 is the narrowest"},
                                       Later{"ternary", "values=q8 is the narrowest"}};
  constexpr std::array<std::string_view, 2> kSelect = {"exact", "sampled"};
  constexpr std::array kLaterSelect = {
      Later{"carried", "select=sampled estimates the threshold anew each step"}};
  const Reader reader(tokens, kOptions);
  if (!reader.main()) missing_main(tokens, "a density or a count: topk:0.01 or topk:k=1000");
  TopKOptions options;
  if (reader.main()->text.starts_with("k=")) {
    options.k = reader.integer("k", {reader.main()->text.substr(2), reader.main()->at + 2}, 1,
                               std::int64_t{1} << 40);
  } else {
    options.density = reader.share("density", *reader.main(), true, "0.01");
  }
  options.values = static_cast<TopKValues>(reader.choice("values", kValues, 0, kLaterValues));
  options.select = static_cast<TopKSelect>(reader.choice("select", kSelect, 0, kLaterSelect));
  Codec codec;
  codec.family_id = kTopK;
  codec.payload = make_topk_codec(options);
  codec.options = read_common(reader);
  return codec;
}

Codec make_quantize(const SpecTokens& tokens, int bits) {
  constexpr std::array<std::string_view, 2> kOptions = {"block", "stochastic"};
  const Reader reader(tokens, kOptions);
  reader.no_main();
  QuantizeOptions options{.bits = bits};
  const std::int64_t block =
      reader.integer("block", options.block, kMinQuantizeBlock, kMaxQuantizeBlock);
  if (block % kQuantizeBlockStep != 0) {
    const SpecToken place = *reader.find("block")->value;
    const std::int64_t rounded =
        std::max(kMinQuantizeBlock,
                 (block + kQuantizeBlockStep / 2) / kQuantizeBlockStep * kQuantizeBlockStep);
    fail_spec(tokens.text, place,
              "block is not a multiple of " + std::to_string(kQuantizeBlockStep),
              std::to_string(rounded));
  }
  options.block = block;
  options.stochastic = reader.flag("stochastic", false);
  Codec codec;
  codec.family_id = kQuantize;
  codec.payload = make_quantize_codec(options);
  codec.options = read_common(reader);
  return codec;
}

Codec make_randmask(const SpecTokens& tokens) {
  const Reader reader(tokens, {});
  if (!reader.main()) missing_main(tokens, "a density: randmask:0.01");
  Codec codec;
  codec.family_id = kRandmask;
  codec.linear = make_randmask_codec(reader.share("density", *reader.main(), true, "0.01"));
  codec.options = read_common(reader);
  return codec;
}

Codec make_none(const SpecTokens& tokens) {
  const Reader reader(tokens, {});
  reader.no_main();
  Codec codec;
  codec.options = read_common(reader);
  return codec;
}

[[noreturn]] void unknown_family(const SpecTokens& tokens) {
  const std::string_view family = tokens.family.text;
  for (const Later& later : kLaterFamilies) {
    if (family == later.word) {
      unavailable_spec(tokens.text, tokens.family, "family \"" + std::string(family) + "\"",
                       std::string(later.there_is));
    }
  }
  std::string_view instead = nearest_spelling(family, kFamilies);
  const bool is_bits = family.size() > 1 && family[0] == 'q' &&
                       family.find_first_not_of("0123456789", 1) == std::string_view::npos;
  if (is_bits) instead = family.find_first_not_of('0', 1) == std::string_view::npos ? "q1" : "q8";
  fail_spec(tokens.text, tokens.family, "unknown family \"" + std::string(family) + "\"", instead,
            "families: " + join(kFamilies));
}

Codec build(const SpecTokens& tokens) {
  const std::string_view family = tokens.family.text;
  if (family == "none") return make_none(tokens);
  if (family == "bf16") return make_cast(tokens, DType::kBF16);
  if (family == "fp16") return make_cast(tokens, DType::kF16);
  if (family == "topk") return make_topk(tokens);
  if (family == "randmask") return make_randmask(tokens);
  if (family.size() == 2 && family[0] == 'q' && family[1] >= '1' && family[1] <= '8') {
    return make_quantize(tokens, family[1] - '0');
  }
  unknown_family(tokens);
}

}  // namespace

Codec make_codec(std::string_view spec) {
  apply_environment_simd();
  const SpecTokens tokens = split_spec(spec);
  Codec codec = build(tokens);
  codec.spec = codec.payload  ? codec.payload->name()
               : codec.linear ? codec.linear->name()
                              : std::string("none");
  codec.spec += common_text(codec.options);
  return codec;
}

std::vector<std::string> codec_families() { return {kFamilies.begin(), kFamilies.end()}; }

}  // namespace thinwire
