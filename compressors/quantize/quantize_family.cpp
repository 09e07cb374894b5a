#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/quantize/quantize.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 8> kWords = {"q1", "q2", "q3", "q4", "q5", "q6", "q7", "q8"};
constexpr std::array kOptions = {
    FamilyOption{
        "kind", "maxabs | maxmin | qsgd | terngrad | natural | mx", "maxabs",
        "what scales and codes are: integers by the largest magnitude, steps from least to "
        "largest, integers by the norm, q2's clipped ternary, powers of two, small floats; "
        "qsgd, terngrad and natural round at random and are made for ef=off"},
    FamilyOption{"element", "e4m3 | e5m2 | e2m3 | e3m2 | e2m1", "e4m3, e2m3, e2m1 for q8, q6, q4",
                 "kind=mx: exponent and mantissa bits of the floats"},
    FamilyOption{"block", "64 to 4096, a multiple of 64; kind=mx: 32 to 256, a power of two",
                 "256; kind=mx: 32", "elements that share a scale"},
    FamilyOption{"stochastic", "on | off", "off", "rounds at random, without bias"},
    FamilyOption{"rotate", "on | off", "off",
                 "codes a random rotation of max(1024, block) elements, which spreads outliers"},
};

// Offers the nearest multiple or power of two where `block` is none.
void read_block(const SpecReader& reader, QuantizeOptions& options) {
  const bool is_mx = options.kind == QuantizeKind::kMx;
  const std::int64_t least = is_mx ? kMinMxBlock : kMinQuantizeBlock;
  options.block = reader.integer("block", default_quantize_block(options.kind), least,
                                 is_mx ? kMaxMxBlock : kMaxQuantizeBlock);
  if (is_mx || options.rotate) {
    const auto block = static_cast<std::uint64_t>(options.block);
    if (std::has_single_bit(block)) return;
    const std::uint64_t below = std::bit_floor(block);
    reader.refuse_value("block", "block is not a power of two",
                        std::to_string(block - below < below / 2 ? below : 2 * below));
  } else if (options.block % kQuantizeBlockStep != 0) {
    const std::int64_t rounded =
        (options.block + kQuantizeBlockStep / 2) / kQuantizeBlockStep * kQuantizeBlockStep;
    reader.refuse_value("block", "block is not a multiple of " + std::to_string(kQuantizeBlockStep),
                        std::to_string(std::max(least, rounded)));
  }
}

// Bits that each kind can have.
void check_bits(const SpecReader& reader, const QuantizeOptions& options) {
  switch (options.kind) {
    case QuantizeKind::kMaxAbs:
    case QuantizeKind::kMaxMin:
      return;
    case QuantizeKind::kQsgd:
    case QuantizeKind::kNatural:
      if (options.bits == 1) {
        reader.refuse_family("a sign and a zero need 2 bits: q2 to q8", "q2");
      }
      return;
    case QuantizeKind::kTernGrad:
      if (options.bits != 2) reader.refuse_family("kind=terngrad is ternary: q2", "q2");
      return;
    case QuantizeKind::kMx:
      if (options.bits != 4 && options.bits != 6 && options.bits != 8) {
        reader.refuse_family("kind=mx has floats of 4, 6 and 8 bits: q4, q6, q8",
                             options.bits < 5    ? "q4"
                             : options.bits == 5 ? "q6"
                                                 : "q8");
      }
      return;
  }
}

void read_element(const SpecReader& reader, QuantizeOptions& options) {
  const MxElement otherwise = default_mx_element(options.bits);
  options.element = static_cast<MxElement>(
      reader.choice("element", kMxElementWords, static_cast<std::size_t>(otherwise)));
  if (!reader.has("element")) return;
  if (options.kind != QuantizeKind::kMx) {
    reader.refuse_option("element", "only kind=mx has elements", "add kind=mx, or leave it out");
  }
  if (mx_bits(options.element) != options.bits) {
    reader.refuse_value("element", "q" + std::to_string(options.bits) + " has other elements",
                        kMxElementWords[static_cast<std::size_t>(otherwise)]);
  }
}

void make(const SpecReader& reader, Codec& codec) {
  reader.no_main();
  QuantizeOptions options{.bits = reader.family()[1] - '0'};
  options.kind = static_cast<QuantizeKind>(reader.choice("kind", kQuantizeKindWords, 0));
  check_bits(reader, options);
  read_element(reader, options);
  options.rotate = reader.flag("rotate", false);
  read_block(reader, options);
  const bool always = always_stochastic(options.kind);
  options.stochastic = reader.flag("stochastic", always);
  if (always && !options.stochastic) {
    reader.refuse_value("stochastic", "this kind always rounds at random", "on");
  }
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
        "Seide et al., Interspeech 2014; Markov et al., CGX, Middleware 2022, arXiv 2111.08617; "
        "Alistarh et al., QSGD, NeurIPS 2017, arXiv 1610.02132; Wen et al., TernGrad, NeurIPS "
        "2017, arXiv 1705.07878; Horvath et al., Natural Compression, MSML 2022, arXiv 1905.10988; "
        "OCP Microscaling Formats 1.0, 2023; rotation: Suresh et al., ICML 2017, arXiv 1611.00429",
    .use = "every element arrives, in 1 to 8 bits: models that top-k hurts, fast links",
    .make = make,
};

}  // namespace thinwire
