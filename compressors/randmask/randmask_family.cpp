#include <array>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/randmask/randmask.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"randmask"};

void make(const SpecReader& reader, Codec& codec) {
  const SpecToken& main = reader.needed_main("a density: randmask:0.01", "randmask:0.01");
  codec.linear = make_randmask_codec(reader.share("density", main, true, "0.01"));
}

}  // namespace

extern constexpr Family kRandmaskFamily = {
    .name = "randmask",
    .words = kWords,
    .id = 5,
    .main = "the density in (0, 1]",
    .sample = "randmask:0.01",
    .options = {},
    .paper = "Wang et al., CocktailSGD, ICML 2023",
    .use = "many ranks: rides on the transport's own allreduce, whose bytes do not grow with them",
    .make = make,
};

}  // namespace thinwire
