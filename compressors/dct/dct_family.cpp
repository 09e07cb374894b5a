#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <string>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/dct/dct.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"dct"};
constexpr std::array kOptions = {
    FamilyOption{"tile", "8 to 4096, a power of two", "64", "elements that are transformed as one"},
    FamilyOption{"values", "fp32 | bf16 | q8", "bf16", "how the coefficients are sent"},
};

void make(const SpecReader& reader, Codec& codec) {
  constexpr std::array<std::string_view, 3> kValues = {"fp32", "bf16", "q8"};
  const SpecToken& main = reader.needed_main("coefficients a tile: dct:32", "dct:32");
  DctOptions options;
  options.tile = reader.integer("tile", options.tile, kMinDctTile, kMaxDctTile);
  const auto tile = static_cast<std::uint64_t>(options.tile);
  if (!std::has_single_bit(tile)) {
    reader.refuse_value("tile", "tile is not a power of two", std::to_string(std::bit_ceil(tile)));
  }
  options.keep = reader.integer("coefficients a tile", main, 1, options.tile);
  options.values = static_cast<DctValues>(
      reader.choice("values", kValues, static_cast<std::size_t>(options.values)));
  codec.payload = make_dct_codec(options);
}

}  // namespace

extern constexpr Family kDctFamily = {
    .name = "dct",
    .words = kWords,
    .id = 8,
    .main = "coefficients sent of each tile, 1 to tile",
    .sample = "dct:32",
    .options = kOptions,
    .paper = "Peng, Quesnelle, Kingma, DeMo: Decoupled Momentum Optimization, arXiv 2411.19870",
    .use = "momentum instead of gradients (decay=0.999), as DeMo sends it; smooth values",
    .make = make,
};

}  // namespace thinwire
