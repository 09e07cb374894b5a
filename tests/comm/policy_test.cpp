#include "comm/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>

#include "comm/glob.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

const std::vector<Layer> kModel = {{"embedding.weight", {1000, 64}, DType::kF32},
                                   {"lstm.weight_ih", {256, 64}, DType::kF32},
                                   {"lstm.bias_ih", {256}, DType::kF32},
                                   {"head.weight", {10, 64}, DType::kF32},
                                   {"steps", {1}, DType::kOther},
                                   {"double.weight", {100, 100}, DType::kF64}};

template <typename E>
std::string message_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const E& error) {
    return error.what();
  }
  return "(nothing was thrown)";
}

TEST(Glob, MatchesAsAShellDoes) {
  EXPECT_TRUE(glob_match("*.weight", "a.b.weight"));
  EXPECT_TRUE(glob_match("*", ""));
  EXPECT_TRUE(glob_match("l?yer[0-9].[!b]*", "layer7.weight"));
  EXPECT_TRUE(glob_match("*a*b*c", "xxaxxbxxbc"));
  EXPECT_TRUE(glob_match("a[", "a["));
  EXPECT_TRUE(glob_match("[]]", "]"));
  EXPECT_FALSE(glob_match("l?yer[0-9].[!b]*", "layer7.bias"));
  EXPECT_FALSE(glob_match("*.weight", "weight"));
  EXPECT_FALSE(glob_match("weight", "weights"));
  EXPECT_FALSE(glob_match("", "a"));
  EXPECT_FALSE(glob_match("*a*a*a*a*a*a*a*b", std::string(2000, 'a')));
}

TEST(Policy, MomentumCorrectionIsForDGCSGDAlone) {
  for (const char* text : {"topk:0.01,momentum=0.9", "policy = \"topk:0.01,momentum=0.9\"",
                           "policy = \"none\"\n[[rule]]\nname = \"*\"\n"
                           "policy = \"topk:0.01,momentum=0.9,nesterov\""}) {
    EXPECT_THAT(message_of<PolicyError>([&] { Policy::parse(text); }),
                AllOf(HasSubstr("momentum correction belongs to the optimizer DGCSGD"),
                      HasSubstr("hint: ")))
        << text;
  }
}

TEST(Policy, OneLineIsTheDefaultOfEveryEligibleLayer) {
  const Policy policy = Policy::parse("  topk:0.01,values=q8\n");
  EXPECT_EQ(policy.text(), "topk:0.01,values=q8");
  EXPECT_EQ(policy.choose(kModel[0]).codec.spec, "topk:0.01,values=q8");
  EXPECT_EQ(policy.choose(kModel[0]).reason, "default");
  EXPECT_EQ(policy.choose(kModel[2]).reason, "dense: 1 dimension");
  EXPECT_EQ(policy.choose(kModel[3]).reason, "dense: 640 < 1024 elements");
  EXPECT_EQ(policy.choose(kModel[4]).reason, "untouched: no floating-point gradient");
  EXPECT_EQ(policy.choose(kModel[5]).reason, "dense: fp64");
  EXPECT_TRUE(policy.choose(kModel[3]).codec.is_none());
}

TEST(Policy, DenseLayersObeyThePolicyOnNaN) {
  const Policy policy = Policy::parse("topk:0.01,nonfinite=skip-step");
  EXPECT_EQ(policy.choose(kModel[2]).codec.options.nonfinite, NonFinite::kSkipStep);
}

TEST(Policy, LayersThatALinearCodecWouldNotMakeSmallerGoDense) {
  const Policy policy = Policy::parse(
      "min_elements=1\npolicy='powersgd:8'\n[[rule]]\nname='*bias*'\n"
      "policy='galore:2'");
  EXPECT_EQ(policy.choose(kModel[0]).codec.spec, "powersgd:8");
  EXPECT_EQ(policy.choose(kModel[3]).reason, "dense: too small for powersgd:8");
  EXPECT_EQ(policy.choose(kModel[2]).reason, "dense: too small for galore:2");
  EXPECT_EQ(policy.choose(kModel[2]).rule, std::optional<std::size_t>(0));
}

TEST(Policy, AutoMayQuantiseSmallLayersAndNothingElse) {
  const Policy policy = Policy::parse("auto");
  const auto choose = [&](std::vector<std::int64_t> shape, DType dtype = DType::kF32) {
    return policy.choose({"layer", std::move(shape), dtype});
  };
  EXPECT_EQ(choose({100, 100}).small, "");
  for (const Policy::Choice& choice :
       {choose({4000}), choose({4, 4}), choose({}), choose({4000}, DType::kBF16)}) {
    EXPECT_TRUE(choice.automatic && choice.codec.is_none()) << choice.reason;
    EXPECT_NE(choice.small, "");
    EXPECT_EQ(choice.reason, "dense: " + choice.small);
  }
  EXPECT_FALSE(choose({4000}, DType::kF64).automatic);
  EXPECT_FALSE(choose({0}).automatic);
  EXPECT_EQ(Policy::parse("topk:0.01").choose({"layer", {4000}, DType::kF32}).small, "");
}

TEST(Policy, FirstRuleThatMatchesDecides) {
  const Policy policy = Policy::parse(R"(
    policy = "topk:0.01"
    min_elements = 100
    [[rule]]
    name = "embedding.*"
    policy = "q8"
    [[rule]]
    name = "*.weight*"
    max_elements = 700
    policy = "bf16"
    [[rule]]
    dims = 1
    policy = "q4"
    [[rule]]
    name = "*.bias_??"
    policy = "q4"
  )");
  EXPECT_EQ(policy.choose(kModel[0]).codec.spec, "q8");
  EXPECT_EQ(policy.choose(kModel[0]).reason, "rule 1: embedding.*");
  EXPECT_EQ(policy.choose(kModel[1]).codec.spec, "topk:0.01");
  EXPECT_EQ(policy.choose(kModel[3]).codec.spec, "bf16");
  // Rule 3 names no layer, so it does not lift a bias; rule 4 does.
  EXPECT_EQ(policy.choose(kModel[2]).reason, "rule 4: *.bias_??");
  EXPECT_EQ(policy.choose(kModel[2]).codec.spec, "q4");
}

TEST(Policy, CanonicalTextIsEqualForEqualPolicies) {
  EXPECT_EQ(Policy::parse("policy = \"q8\"").text(), Policy::parse("q8").text());
  const Policy a = Policy::parse("min_elements=5\npolicy='q8'\n[[rule]]\npolicy='none'\nname='a'");
  const Policy b = Policy::parse(
      "policy = \"q8\" # a comment\nmin_elements = 5\n[[rule]]\n"
      "name = \"a\"\npolicy = \"none\"\n");
  EXPECT_EQ(a.text(), b.text());
  EXPECT_EQ(Policy::parse(a.text()).text(), a.text());
  EXPECT_NE(a.text(), Policy::parse("q8").text());
}

TEST(Policy, ReadsAFile) {
  const std::string path = ::testing::TempDir() + "/thinwire_policy_test.toml";
  std::ofstream(path) << "policy = \"topk:0.5\"\n";
  EXPECT_EQ(Policy::parse("@" + path).text(), "topk:0.5");
  std::remove(path.c_str());
  EXPECT_THAT(message_of<PolicyError>([&] { Policy::parse("@" + path); }),
              AllOf(HasSubstr("cannot read the policy file"), HasSubstr(path)));
}

struct BadPolicy {
  const char* text;
  const char* says;
  const char* hints;
};

class PolicyRefuses : public ::testing::TestWithParam<BadPolicy> {};

TEST_P(PolicyRefuses, WithPlaceAndHint) {
  const std::string message = message_of<PolicyError>([] { Policy::parse(GetParam().text); });
  EXPECT_THAT(message, HasSubstr(GetParam().says));
  EXPECT_THAT(message, HasSubstr("hint: "));
  EXPECT_THAT(message, HasSubstr(GetParam().hints));
}

INSTANTIATE_TEST_SUITE_P(
    Texts, PolicyRefuses,
    ::testing::Values(BadPolicy{"", "empty", "none"}, BadPolicy{"topkk:0.1", "topkk", "topk"},
                      BadPolicy{"polcy = \"q8\"", "policy:1:1: unknown key 'polcy'", "'policy'"},
                      BadPolicy{"policy = 8", "'policy' must be a string", "policy = \"...\""},
                      BadPolicy{"min_elements = -1", "at least 0", "1024"},
                      BadPolicy{"policy = \"q8\"\n[[rule]]\nnmae = \"a\"\npolicy = \"none\"",
                                "policy:3:1: unknown key 'nmae'", "'name'"},
                      BadPolicy{"policy = \"q8\"\n[[rule]]\nname = \"a\"", "no 'policy'", "none"},
                      BadPolicy{"policy = \"q8\"\n[[rule]]\nname = \"a\"\npolicy = \"q88\"",
                                "rule 1 (line 2): ", "q8"},
                      BadPolicy{"policy = \"q8\"\n[rule]\npolicy = \"none\"", "array of tables",
                                "[[rule]]"},
                      BadPolicy{"policy = \"q8\nmin_elements = 1", "policy:1:", "TOML"}));

TEST(Plan, HasAChoiceForEachLayer) {
  const Plan plan = Plan::make(Policy::parse("topk:0.01"), kModel);
  ASSERT_EQ(plan.choices.size(), kModel.size());
  EXPECT_EQ(plan.choices[1].codec.spec, "topk:0.01");
}

// Which layers go with the sparse ones though their codec is none of theirs.
std::vector<bool> gathered(const std::string& policy, const std::vector<Layer>& model, int ranks) {
  Plan plan = Plan::make(Policy::parse(policy), model);
  plan.choose_routes(model, ranks, {}, 16);
  std::vector<bool> result;
  for (const Policy::Choice& choice : plan.choices) result.push_back(choice.gathered);
  return result;
}

TEST(Plan, GathersFewQuantisedValuesWithOthers) {
  const std::vector<Layer> model = {{"weight", {1000, 1000}, DType::kF32},
                                    {"bias", {1000}, DType::kF32},
                                    {"wide.bias", {20'000}, DType::kF32}};
  const auto with = [](const std::string& policy) {
    return "policy = \"" + policy + "\"\n[[rule]]\nname = \"*bias\"\npolicy = \"q8\"";
  };
  const std::vector<bool> none(3);
  const std::vector<Layer> narrow = {model[0], model[1]};
  EXPECT_EQ(gathered(with("topk:0.01"), narrow, 4), std::vector({false, true}));
  EXPECT_EQ(gathered(with("topk:0.01"), model, 4), none);  // the wide one goes to owners anyway
  const std::vector<Layer> tiny = {model[0], {"bias", {100}, DType::kF32}};
  EXPECT_EQ(gathered(with("topk:0.01"), tiny, 10), std::vector({false, true}));
  EXPECT_EQ(gathered(with("topk:0.01"), tiny, 64), std::vector<bool>(2));  // topk is split there
  EXPECT_EQ(gathered(with("q4"), model, 4), none);  // travels with the weights as it is
  EXPECT_EQ(gathered(with("none"), model, 4), none);
  EXPECT_EQ(gathered(with("powersgd:1"), narrow, 4), std::vector({false, true}));
  std::vector<Layer> many = {model[0]};
  while (many.size() < 100) {
    many.push_back({std::to_string(many.size()) + "bias", {1000}, DType::kF32});
  }
  EXPECT_EQ(gathered(with("topk:0.01"), many, 4), std::vector<bool>(100));  // together too much
}

TEST(Plan, SplitsWhereItIsFaster) {
  const std::vector<Layer> model = {{"a", {4'000'000}, DType::kF32}, {"b", {90, 100}, DType::kF32}};
  const Policy topk =
      Policy::parse("policy = \"topk:0.01\"\n[[rule]]\nname = \"?\"\npolicy = \"topk:0.01\"");
  const auto ranges = [&](const Policy& policy, int ranks, Link link, int least = 2) {
    Plan plan = Plan::make(policy, model);
    plan.choose_routes(model, ranks, link, least);
    std::vector<int> result;
    for (const Policy::Choice& choice : plan.choices) result.push_back(choice.split_ranges);
    return result;
  };
  const std::vector<int> none = {0, 0};
  EXPECT_EQ(ranges(topk, 1, {}), none);
  EXPECT_EQ(ranges(topk, 2, {}), none);  // as many bytes, and one transfer more
  EXPECT_EQ(ranges(topk, 16, {}, 17), none);
  EXPECT_EQ(ranges(topk, 16, {.latency_seconds = 1}), none);
  const std::vector<int> split = ranges(topk, 16, {}, 16);
  EXPECT_EQ(split[0], 16);
  EXPECT_GT(split[1], 0);  // all travel in one way
  EXPECT_LT(split[1], 16);
  Plan plan = Plan::make(topk, model);
  plan.choose_routes(model, 16, {}, 16);
  plan.choose_routes(model, 2, {}, 16);
  EXPECT_EQ(plan.choices[0].split_ranges, 0);
  EXPECT_EQ(
      ranges(Policy::parse("policy = \"none\"\n[[rule]]\nname = \"?\"\npolicy = \"q4\""), 16, {}),
      none);
}

TEST(Plan, RefusesAPolicyThatCompressesNothing) {
  const Policy policy = Policy::parse("topk:0.01");
  EXPECT_THAT(message_of<PolicyError>([&] {
                Plan::make(policy, {{"fc.bias", {3000}, DType::kF32},
                                    {"tiny.weight", {3, 4}, DType::kF32}});
              }),
              AllOf(HasSubstr("none of the 2 layers"), HasSubstr("dense: 1 dimension"),
                    HasSubstr("dense: 12 < 1024 elements"), HasSubstr("hint: ")));
  EXPECT_NO_THROW(Plan::make(Policy::parse("none"), {{"fc.bias", {3000}, DType::kF32}}));
}

TEST(Plan, RefusesARuleThatMatchesNothingAndNamesTheNearestLayers) {
  const Policy policy =
      Policy::parse("policy = \"q8\"\n[[rule]]\nname = \"lstn.weight_*\"\npolicy = \"none\"");
  EXPECT_THAT(message_of<PolicyError>([&] { Plan::make(policy, kModel); }),
              AllOf(HasSubstr("rule 1 (name = \"lstn.weight_*\")"),
                    HasSubstr("the nearest are lstm.weight_ih [256, 64]"), HasSubstr("hint: ")));
}

TEST(Plan, RefusesARuleThatAnEarlierOneLeavesNothing) {
  const Policy policy = Policy::parse(
      "policy = \"q8\"\n[[rule]]\nname = \"*.weight*\"\npolicy = \"q4\"\n"
      "[[rule]]\nname = \"lstm.w*\"\npolicy = \"none\"");
  EXPECT_THAT(
      message_of<PolicyError>([&] { Plan::make(policy, kModel); }),
      AllOf(HasSubstr("rule 2 (name = \"lstm.w*\") decides no layer"),
            HasSubstr("lstm.weight_ih [256, 64] (rule 1: *.weight*)"), HasSubstr("hint: ")));
}

TEST(Plan, RefusesARuleByShapeForLayersThatGoDense) {
  const Policy policy = Policy::parse("policy = \"q8\"\n[[rule]]\ndims = 1\npolicy = \"bf16\"");
  EXPECT_THAT(message_of<PolicyError>([&] { Plan::make(policy, kModel); }),
              AllOf(HasSubstr("rule 1 (dims = 1) decides no layer"),
                    HasSubstr("lstm.bias_ih [256] (dense: 1 dimension)"), HasSubstr("hint: ")));
}

}  // namespace
}  // namespace thinwire
