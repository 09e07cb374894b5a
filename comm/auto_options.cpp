#include "comm/auto_options.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <optional>

#include "compressors/adaptive/candidates.h"
#include "compressors/core/error.h"
#include "compressors/core/spec_reader.h"
#include "compressors/core/spec_text.h"
#include "compressors/families.h"

namespace thinwire {
namespace {

constexpr std::string_view kAuto = "auto";
constexpr std::string_view kDefaultReference = "topk:0.001";
constexpr std::array<std::string_view, 3> kOwnOptions = {"error", "families", "at_least"};

std::optional<double> number(std::string_view text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !std::isfinite(value)) {
    return std::nullopt;
  }
  return value;
}

// A codec inside an option: no options of its own, and no auto.
std::string inner_codec(std::string_view text, const SpecReader& reader, std::string_view option) {
  try {
    return candidate_of(make_codec(text)).spec;
  } catch (const PolicyError&) {
  } catch (const NotAvailable&) {
  }
  reader.refuse_value(option, "\"" + std::string(text) + "\" is no codec whose error auto can tell",
                      option == "error" ? kDefaultReference : std::string_view("q8"));
}

void read_budget(const SpecReader& reader, AutoOptions& options) {
  options.reference = inner_codec(kDefaultReference, reader, "error");
  const std::optional<SpecToken> token = reader.text("error", kDefaultReference);
  if (!token) {
    return;
  }
  std::string_view text = token->text;
  const std::size_t times = text.find('*');
  const bool absolute = times == std::string_view::npos && number(text).has_value();
  if (absolute || times != std::string_view::npos) {
    const std::optional<double> factor = number(text.substr(0, times));
    if (!factor || *factor <= 0 || (absolute && *factor > 1)) {
      reader.refuse_value("error",
                          absolute ? "a share of the norm is above 0 and at most 1"
                                   : "the factor before * is a number above 0",
                          absolute ? "0.5" : "1.5*topk:0.001");
    }
    options.factor = *factor;
  }
  options.reference =
      absolute ? std::string()
               : inner_codec(text.substr(times == std::string_view::npos ? 0 : times + 1), reader,
                             "error");
}

void read_families(const SpecReader& reader, AutoOptions& options) {
  const std::optional<SpecToken> token = reader.text("families", "topk|lowrank");
  if (!token) {
    return;
  }
  for (const std::string_view word : split_families(token->text)) {
    options.families.emplace_back(word);
  }
  std::sort(options.families.begin(), options.families.end());
  options.families.erase(std::unique(options.families.begin(), options.families.end()),
                         options.families.end());
}

std::string canonical(const AutoOptions& options) {
  std::string text(kAuto);
  if (options.reference.empty()) {
    text += ",error=" + number_text(options.factor);
  } else if (options.factor != 1) {
    text += ",error=" + number_text(options.factor) + "*" + options.reference;
  } else if (options.reference != kDefaultReference) {
    text += ",error=" + options.reference;
  }
  for (std::size_t i = 0; i < options.families.size(); ++i) {
    text += (i == 0 ? ",families=" : "|") + options.families[i];
  }
  if (!options.at_least.empty()) text += ",at_least=" + options.at_least;
  const bool fp32 = options.memory_given && options.options.storage == ResidualStorage::kFP32;
  return text + options.common + (fp32 ? ",memory=fp32" : "");
}

}  // namespace

bool is_auto(std::string_view spec) {
  const std::size_t end = spec.find_first_of(":,=");
  return spec.substr(0, end) == kAuto;
}

CommonOptions AutoOptions::options_for(bool takes_bf16) const {
  CommonOptions chosen = options;
  if (!memory_given && takes_bf16 && options.error_feedback && options.transactional) {
    chosen.storage = ResidualStorage::kBF16;
  }
  return chosen;
}

AutoOptions parse_auto(std::string_view spec) {
  const SpecTokens tokens = split_spec(spec);
  std::vector<std::string_view> known(kOwnOptions.begin(), kOwnOptions.end());
  for (const FamilyOption& option : common_options()) known.push_back(option.name);
  const SpecReader reader(tokens, known);
  reader.no_main();
  AutoOptions options;
  options.options = read_common(reader);
  options.common = common_text(options.options);
  options.memory_given = reader.text("memory", "bf16").has_value();
  read_budget(reader, options);
  read_families(reader, options);
  if (const auto bound = reader.text("at_least", "q8")) {
    options.at_least = inner_codec(bound->text, reader, "at_least");
  }
  options.text = canonical(options);
  return options;
}

}  // namespace thinwire
