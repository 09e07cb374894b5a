// The codecs that auto chooses from.
#include "compressors/adaptive/candidates.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "compressors/core/error.h"
#include "compressors/core/spec.h"

namespace thinwire {
namespace {

using Shape = std::vector<std::int64_t>;
using testing::ElementsAre;

std::vector<std::string> specs(const Shape& shape, std::string_view families = {},
                               DType dtype = DType::kF32) {
  std::vector<std::string_view> words;
  if (!families.empty()) words = split_families(families);
  std::vector<std::string> specs;
  for (const CandidateCodec& candidate : make_candidates(shape, dtype, words)) {
    specs.push_back(candidate.spec);
  }
  return specs;
}

TEST(Candidates, AreCanonicalAndSendWhatTheySay) {
  const Shape shape = {1000, 500};
  const std::vector<CandidateCodec> candidates = make_candidates(shape, DType::kF32);
  EXPECT_EQ(candidates.front().spec, "none");
  EXPECT_EQ(candidates.front().bytes, 4U * 500'000);
  EXPECT_EQ(candidates.size(), 28U);
  for (const CandidateCodec& candidate : candidates) {
    const Codec codec = make_codec(candidate.spec);
    EXPECT_EQ(codec.spec, candidate.spec);
    if (codec.payload) {
      EXPECT_EQ(candidate.bytes, codec.payload->slot_bytes(500'000));
    }
    if (codec.linear) {
      EXPECT_EQ(candidate.bytes, 4 * 1500 * static_cast<std::size_t>(candidate.parameter));
    }
  }
}

TEST(Candidates, AreOfTheFamiliesAskedFor) {
  const Shape shape = {1000, 500};
  EXPECT_THAT(specs(shape, "none"), ElementsAre("none"));
  EXPECT_THAT(specs(shape, "lowrank"), ElementsAre("none", "powersgd:16", "powersgd:8",
                                                   "powersgd:4", "powersgd:2", "powersgd:1"));
  EXPECT_EQ(specs(shape, "powersgd"), specs(shape, "lowrank"));
  EXPECT_THAT(specs(shape, "q4|bf16"), ElementsAre("none", "bf16", "q4"));
  EXPECT_THAT(specs(shape, "quantize|onebit"),
              ElementsAre("none", "q8", "q4", "q2", "onebit,block=256,scale=l1"));
  EXPECT_EQ(specs(shape, "topk").size(), 18U);
  EXPECT_EQ(specs(shape, "topk|lowrank").size(), 23U);
}

TEST(Candidates, OtherFamiliesAreRefused) {
  for (const std::string_view text : {"", "topk|", "|topk", "tok", "q5", "topk|galore", "auto"}) {
    EXPECT_THROW((void)split_families(text), PolicyError) << text;
  }
  try {
    (void)split_families("topk|lowrnk");
    FAIL() << "lowrnk is no family";
  } catch (const PolicyError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("did you mean \"topk|lowrank\"?"));
  }
}

TEST(Candidates, SendLessThanTheValuesThemselves) {
  for (const Shape& shape : {Shape{}, Shape{1}, Shape{3}, Shape{17}, Shape{64}, Shape{40, 3},
                             Shape{1, 5000}, Shape{64, 64}}) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const std::vector<CandidateCodec> candidates = make_candidates(shape, dtype);
      for (std::size_t i = 1; i < candidates.size(); ++i) {
        EXPECT_LT(candidates[i].bytes, candidates[0].bytes) << candidates[i].spec;
      }
    }
  }
  // Of few elements the lower densities all send the same single one.
  EXPECT_THAT(specs({100}, "topk"),
              ElementsAre("none", "topk:0.1,values=q4", "topk:0.05,values=q4",
                          "topk:0.03,values=q4", "topk:0.02,values=q4", "topk:0.014,values=q4"));
  // A vector has no rank, and bf16 sends 16-bit values as they are.
  EXPECT_THAT(specs({1, 5000}, "lowrank"), ElementsAre("none"));
  EXPECT_THAT(specs({1000, 500}, "bf16", DType::kBF16), ElementsAre("none"));
}

TEST(Candidates, OfNoGradientAreNone) {
  EXPECT_THAT(specs({1000, 500}, {}, DType::kOther), ElementsAre("none"));
  EXPECT_THAT(specs({1000, 500}, {}, DType::kF64), ElementsAre("none"));
  EXPECT_THAT(specs({0, 500}), ElementsAre("none"));
}

TEST(Candidates, CountEntriesAsTopKDoes) {
  const std::vector<std::string_view> topk = {"topk"};
  for (const std::int64_t n : {100, 1234, 99'999}) {
    for (const CandidateCodec& candidate : make_candidates(Shape{n}, DType::kF32, topk)) {
      if (candidate.curve != Curve::kTopK) continue;
      const std::string count =
          "topk:k=" + std::to_string(std::lround(candidate.parameter * static_cast<double>(n))) +
          ",values=q4";
      EXPECT_EQ(make_codec(count).payload->slot_bytes(n), candidate.bytes) << candidate.spec;
    }
  }
}

}  // namespace
}  // namespace thinwire
