#include "comm/plan_search.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

namespace thinwire {
namespace {

constexpr int kRanks = 4;
constexpr CodecSpeed kSpeed = {.encode = 1e-9, .decode = 2e-9, .decode_more = 3e-10};

class PlanSearchTest : public testing::Test {
 protected:
  PlanSearchTest()
      : plan_(Plan::make(Policy::parse("auto"), layers_)),
        search_(layers_, plan_, kRanks,
                std::vector<CodecSpeed>(PlanSearch::codecs(layers_, plan_).size(), kSpeed)) {
    for (VerbCost& verb : now_.link.verbs) verb = {.fixed = 1e-4, .per_byte = 1e-8};
    now_.buckets = {{.layers = {1, 0}, .ready = 0}};
    search_.update(now_);
  }

  // As the job would have it.
  StepCost cost_of(const std::vector<std::string>& specs) const {
    Plan plan = plan_.with_codecs(specs);
    plan.choose_routes(layers_, kRanks, link_of(now_.link, kRanks),
                       std::numeric_limits<int>::max());
    std::vector<LayerCost> costs;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Policy::Choice& choice = plan.choices[i];
      costs.push_back(
          layer_cost(layers_[i], choice.codec, choice.gathered, kSpeed, now_.link, kRanks));
    }
    return step_cost(now_.buckets, costs);
  }

  const std::vector<Layer> layers_ = {{.name = "0.weight", .shape = {512, 784}},
                                      {.name = "0.bias", .shape = {2048}}};
  const Plan plan_;
  PlanSearch search_;
  Circumstances now_;
};

TEST_F(PlanSearchTest, EvaluatesTheRoutesThatThePlanWillTake) {
  for (const char* large :
       {"none", "bf16", "q4", "powersgd:4", "topk:0.001,values=q4,memory=bf16"}) {
    for (const char* small : {"none", "q8", "q4"}) {
      const std::vector<std::string> specs = {large, small};
      const Proposal found = search_.evaluate(search_.id_of(specs));
      const StepCost expected = cost_of(specs);
      EXPECT_DOUBLE_EQ(found.sent, expected.sent) << large << ", " << small;
      EXPECT_DOUBLE_EQ(found.seconds, expected.exposed) << large << ", " << small;
    }
  }
}

// Gathered, the bias would take longer than uncompressed.
TEST_F(PlanSearchTest, FindsASmallLayerThatGoesToOwnersWithALargeOne) {
  const Plan plan = Plan::make(Policy::parse("auto,families=quantize,at_least=q8"), layers_);
  PlanSearch search(layers_, plan, kRanks,
                    std::vector<CodecSpeed>(PlanSearch::codecs(layers_, plan).size()));
  now_.link[Verb::kAllreduce].per_byte = 1e-7;
  now_.link[Verb::kAllgather].per_byte = 2.5e-7;
  search.update(now_);
  const std::vector<std::string> expected = {"q8", "q8"};
  EXPECT_EQ(search.plan(search.best(0).id).specs(), expected);
}

}  // namespace
}  // namespace thinwire
