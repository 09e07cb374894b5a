#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/onebit/onebit.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"onebit"};
constexpr std::array kOptions = {
    FamilyOption{"block", "64 to 65536, a multiple of 64", "one scale for all",
                 "elements that share a scale"},
    FamilyOption{"scale", "l1 | l2", "l2",
                 "mean magnitude, or root of the mean square as in 1-bit Adam"},
};

void make(const SpecReader& reader, Codec& codec) {
  constexpr std::array<std::string_view, 2> kScales = {"l2", "l1"};
  reader.no_main();
  OneBitOptions options;
  options.block = reader.integer("block", options.block, kMinOneBitBlock, kMaxOneBitBlock);
  if (options.block % kOneBitBlockStep != 0) {
    const std::int64_t rounded =
        (options.block + kOneBitBlockStep / 2) / kOneBitBlockStep * kOneBitBlockStep;
    reader.refuse_value("block", "block is not a multiple of " + std::to_string(kOneBitBlockStep),
                        std::to_string(std::max(kMinOneBitBlock, rounded)));
  }
  options.scale = static_cast<OneBitScale>(reader.choice("scale", kScales, 0));
  codec.payload = make_onebit_codec(options);
}

}  // namespace

extern constexpr Family kOneBitFamily = {
    .name = "onebit",
    .words = kWords,
    .id = 6,
    .main = {},
    .sample = "onebit",
    .options = kOptions,
    .paper =
        "Tang et al., 1-bit Adam, ICML 2021, arXiv 2102.02888; Karimireddy et al., EF-SignSGD, "
        "ICML 2019, arXiv 1901.09847",
    .use = "one bit an element: momenta of 1-bit Adam; scale=l1,block=N for plain gradients",
    .make = make,
};

}  // namespace thinwire
