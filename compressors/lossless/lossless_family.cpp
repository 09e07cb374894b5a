#include <array>
#include <string_view>

#include "compressors/core/family.h"
#include "compressors/lossless/lossless.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kWords = {"lossless"};

void make(const SpecReader& reader, Codec& codec) {
  reader.no_main();
  codec.payload = make_lossless_codec();
}

}  // namespace

extern constexpr Family kLosslessFamily = {
    .name = "lossless",
    .words = kWords,
    .id = 10,
    .main = {},
    .sample = "lossless",
    .options = {},
    .paper = "Huffman, Proc. IRE 1952; exponents apart from mantissas as in DietGPU, Johnson, 2022",
    .use = "every bit arrives: arrays and checkpoints in about two thirds of bf16's bytes",
    .make = make,
};

}  // namespace thinwire
