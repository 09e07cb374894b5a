#include "comm/auto_options.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "comm/policy.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

TEST(AutoOptions, DefaultsAreLeftOutOfTheText) {
  EXPECT_EQ(parse_auto("auto").text, "auto");
  EXPECT_EQ(parse_auto("auto,error=topk:0.001").text, "auto");
  EXPECT_EQ(parse_auto("auto,ef=on").text, "auto");
}

TEST(AutoOptions, ReadsBudgets) {
  const AutoOptions reference = parse_auto("auto,error=powersgd:4");
  EXPECT_EQ(reference.reference, "powersgd:4");
  EXPECT_EQ(reference.factor, 1);
  const AutoOptions multiple = parse_auto("auto,error=1.5*q4");
  EXPECT_EQ(multiple.reference, "q4");
  EXPECT_EQ(multiple.factor, 1.5);
  const AutoOptions share = parse_auto("auto,error=0.25");
  EXPECT_EQ(share.reference, "");
  EXPECT_EQ(share.factor, 0.25);
}

TEST(AutoOptions, TextReadsBackAsTheSame) {
  for (const char* text :
       {"auto", "auto,error=0.5", "auto,error=2*topk:0.01", "auto,error=powersgd:4",
        "auto,families=lowrank|topk", "auto,at_least=q8", "auto,memory=bf16", "auto,memory=fp32",
        "auto,error=0.25,families=topk,at_least=q4,nonfinite=skip-step"}) {
    EXPECT_EQ(parse_auto(text).text, text);
  }
  EXPECT_EQ(parse_auto("auto,families=topk|lowrank|topk").text, "auto,families=lowrank|topk");
}

TEST(AutoOptions, ReadsFamiliesAndCommonOptions) {
  const AutoOptions options = parse_auto("auto,families=topk|lowrank,memory=bf16,ef=off");
  EXPECT_THAT(options.families, ElementsAre("lowrank", "topk"));
  EXPECT_EQ(options.options.storage, ResidualStorage::kBF16);
  EXPECT_FALSE(options.options.error_feedback);
}

TEST(AutoOptions, ResidualsAreStoredAsIsSaidOrAsIsFastest) {
  const auto storage = [](const char* text, bool takes_bf16) {
    return parse_auto(text).options_for(takes_bf16).storage;
  };
  EXPECT_EQ(storage("auto", true), ResidualStorage::kBF16);
  EXPECT_EQ(storage("auto", false), ResidualStorage::kFP32);
  EXPECT_EQ(storage("auto,memory=fp32", true), ResidualStorage::kFP32);
  EXPECT_EQ(storage("auto,memory=q8", true), ResidualStorage::kQ8);
  EXPECT_EQ(storage("auto,memory=bf16", false), ResidualStorage::kBF16);
  EXPECT_EQ(storage("auto,transactional=off", true), ResidualStorage::kFP32);
  EXPECT_EQ(storage("auto,ef=off", true), ResidualStorage::kFP32);
}

TEST(AutoOptions, RefusesWithThePlaceAndASpelling) {
  const auto message = [](const char* text) -> std::string {
    try {
      parse_auto(text);
    } catch (const PolicyError& error) {
      return error.what();
    }
    return "accepted";
  };
  EXPECT_THAT(message("auto:3"), HasSubstr("takes nothing after :"));
  EXPECT_THAT(message("auto,eror=0.5"), HasSubstr("error"));
  EXPECT_THAT(message("auto,error=0"), HasSubstr("above 0"));
  EXPECT_THAT(message("auto,error=1.5"), HasSubstr("at most 1"));
  EXPECT_THAT(message("auto,error=-2*q4"), HasSubstr("above 0"));
  EXPECT_THAT(message("auto,error=nan"), HasSubstr("no codec"));
  EXPECT_THAT(message("auto,error=2*"), HasSubstr("no codec"));
  EXPECT_THAT(message("auto,error=auto"), HasSubstr("no codec"));
  EXPECT_THAT(message("auto,error=none"), HasSubstr("no codec"));
  EXPECT_THAT(message("auto,families=topk|lowrnk"), HasSubstr("lowrank"));
  EXPECT_THAT(message("auto,families=topk|"), HasSubstr("families"));
  EXPECT_THAT(message("auto,at_least=q9"), HasSubstr("q8"));
  EXPECT_THAT(message("auto,at_least=fedzip:0.01"), HasSubstr("auto can tell"));
  EXPECT_THAT(message("auto,error=topk:k=100"), HasSubstr("auto can tell"));
  EXPECT_THAT(message("auto,error=fp16"), HasSubstr("auto can tell"));
  EXPECT_THAT(message("auto,error=powersgd:64"), HasSubstr("auto can tell"));
  EXPECT_THAT(message("auto,error"), HasSubstr("error"));
}

TEST(AutoPolicy, GivesLayersToTheTuner) {
  const Policy policy = Policy::parse(
      "policy = \"auto\"\n"
      "[[rule]]\nname = \"head*\"\npolicy = \"auto,at_least=q8\"\n"
      "[[rule]]\nname = \"embedding\"\npolicy = \"q4\"\n");
  EXPECT_TRUE(policy.chooses());
  EXPECT_TRUE(policy.compresses());
  const Layer body{.name = "body", .shape = {64, 64}};
  const Layer head{.name = "head.weight", .shape = {64, 64}};
  const Layer embedding{.name = "embedding", .shape = {64, 64}};
  const Layer bias{.name = "bias", .shape = {64}};
  ASSERT_NE(policy.choose(body).automatic, nullptr);
  EXPECT_TRUE(policy.choose(body).codec.is_none());
  ASSERT_NE(policy.choose(head).automatic, nullptr);
  EXPECT_EQ(policy.choose(head).automatic->at_least, "q8");
  EXPECT_EQ(policy.choose(embedding).automatic, nullptr);
  EXPECT_EQ(policy.choose(embedding).codec.spec, "q4");
  EXPECT_EQ(policy.choose(bias).small, "1 dimension");
  EXPECT_EQ(Policy::parse(policy.text()).text(), policy.text());
}

TEST(AutoPolicy, NoOtherPolicyChooses) {
  EXPECT_FALSE(Policy::parse("topk:0.01").chooses());
  EXPECT_FALSE(Policy::parse("none").chooses());
}

}  // namespace
}  // namespace thinwire
