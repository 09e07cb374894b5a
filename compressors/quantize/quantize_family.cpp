#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/quantize/quantize.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 8> kWords = {"q1", "q2", "q3", "q4", "q5", "q6", "q7", "q8"};
constexpr std::array kOptions = {
    FamilyOption{"block", "64 to 4096, a multiple of 64", "256", "elements that share a scale"},
    FamilyOption{"stochastic", "on | off", "off", "rounds at random, without bias"},
};

void make(const SpecReader& reader, Codec& codec) {
  reader.no_main();
  QuantizeOptions options{.bits = reader.family()[1] - '0'};
  options.block = reader.integer("block", options.block, kMinQuantizeBlock, kMaxQuantizeBlock);
  if (options.block % kQuantizeBlockStep != 0) {
    const std::int64_t rounded =
        (options.block + kQuantizeBlockStep / 2) / kQuantizeBlockStep * kQuantizeBlockStep;
    reader.refuse_value("block", "block is not a multiple of " + std::to_string(kQuantizeBlockStep),
                        std::to_string(std::max(kMinQuantizeBlock, rounded)));
  }
  options.stochastic = reader.flag("stochastic", false);
  codec.payload = make_quantize_codec(options);
}

}  // namespace

extern constexpr Family kQuantizeFamily = {
    .name = "q1 to q8",
    .words = kWords,
    .id = 4,
    .main = {},
    .sample = "q4",
    .options = kOptions,
    .paper =
        "Seide et al., Interspeech 2014; Alistarh et al., QSGD, NeurIPS 2017, arXiv "
        "1610.02132; Markov et al., CGX, Middleware 2022, arXiv 2111.08617",
    .use = "every element arrives, in 1 to 8 bits: models that top-k hurts, fast links",
    .make = make,
};

}  // namespace thinwire
