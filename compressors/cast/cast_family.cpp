#include <array>
#include <string_view>

#include "compressors/cast/cast.h"
#include "compressors/core/family.h"

namespace thinwire {
namespace {

constexpr std::array<std::string_view, 1> kBF16Words = {"bf16"};
constexpr std::array<std::string_view, 1> kFP16Words = {"fp16"};
constexpr std::string_view kPaper =
    "error feedback: Seide et al., 1-Bit Stochastic Gradient Descent, Interspeech 2014";

template <DType kDtype>
void make(const SpecReader& reader, Codec& codec) {
  reader.no_main();
  codec.payload = make_cast_codec(kDtype);
}

}  // namespace

extern constexpr Family kBF16Family = {
    .name = "bf16",
    .words = kBF16Words,
    .id = 1,
    .main = {},
    .sample = "bf16",
    .options = {},
    .paper = kPaper,
    .use = "half the bytes for next to no work; the reference to beat",
    .make = make<DType::kBF16>,
};

extern constexpr Family kFP16Family = {
    .name = "fp16",
    .words = kFP16Words,
    .id = 2,
    .main = {},
    .sample = "fp16",
    .options = {},
    .paper = kPaper,
    .use = "half the bytes, three more bits than bf16, for gradients below 65504",
    .make = make<DType::kF16>,
};

}  // namespace thinwire
