// The tuner in a made-up job: every rank has a tuner, steps take what the true network and the true
// codecs take, and what the tuners decide is what the next step goes by.
#include "comm/auto_tuner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "comm/exchange.h"
#include "comm/plan_search.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

using testing::AllOf;
using testing::Contains;
using testing::HasSubstr;
using testing::Not;

constexpr int kRanks = 4;

LinkModel link_of(double bits_a_second, double latency = 2e-4) {
  LinkModel link;
  for (VerbCost& verb : link.verbs) {
    verb = {.fixed = latency, .per_byte = 8 / bits_a_second};
  }
  link[Verb::kAllreduce].fixed = 2 * latency;
  return link;
}

// A codec's share of a core: what is heavier takes longer.
CodecSpeed speed_of(const Codec& codec) {
  if (codec.is_none()) return {.encode = 1e-10, .decode = 1e-10};
  if (codec.linear) return {.encode = 1e-9, .decode = 1e-9};
  return {.encode = 4e-10, .decode = 2e-10, .decode_more = 5e-11};
}

class Job {
 public:
  Job(const std::string& policy, std::vector<Layer> layers, LinkModel link, double compute = 0.06)
      : layers_(std::move(layers)), link_(link), compute_(compute) {
    plan_ = Plan::make(Policy::parse(policy), layers_);
    const std::vector<Codec> codecs = PlanSearch::codecs(layers_, plan_);
    std::vector<CodecSpeed> speeds;
    for (const Codec& codec : codecs) speeds.push_back(speed_of(codec));
    for (int rank = 0; rank < kRanks; ++rank) {
      tuners_.push_back(std::make_unique<AutoTuner>(layers_, plan_, kRanks, link, speeds));
    }
    adopt();
    std::normal_distribution<float> normal;
    for (const Layer& layer : layers_) {
      std::vector<float>& gradient = gradients_.emplace_back();
      gradient.resize(static_cast<std::size_t>(layer.elements()));
      for (float& value : gradient) value = std::pow(normal(random_), 3.0F);
    }
  }

  // Of the last step.
  double seconds() const { return seconds_; }
  double sent() const { return sent_; }
  const Plan& plan() const { return plan_; }
  const std::vector<std::string>& log() const { return log_; }
  int changes() const { return changes_; }
  void set_link(const LinkModel& link) { link_ = link; }
  void set_noise(double noise) { noise_ = noise; }
  void set_slow_codecs(double times) { slow_ = times; }
  // How long ranks wait for a core in each step, and others for their part of its last transfer.
  void set_busy(double seconds) { busy_ = seconds; }
  // What a byte takes of the job, though no transfer shows it.
  void set_hidden_cost(double seconds_a_byte) { hidden_ = seconds_a_byte; }
  std::vector<std::vector<float>>& gradients() { return gradients_; }

  void run(int steps) {
    for (int step = 0; step < steps; ++step) run_step();
  }

  double time_of(const Plan& plan) const {
    const StepCost cost = cost_of(plan);
    return compute_ + cost.exposed + hidden_ * cost.sent;
  }

 private:
  std::vector<BucketReady> buckets() const {
    std::vector<BucketReady> buckets;
    for (std::size_t i = layers_.size(); i-- > 0;) {
      buckets.push_back({.layers = {i}, .ready = -1e-3 * static_cast<double>(i)});
    }
    return buckets;
  }

  // Without split-reduce, which plans are reckoned without.
  Plan routed(Plan plan) const {
    plan.choose_routes(layers_, kRanks, {}, kRanks + 1);
    return plan;
  }

  StepCost cost_of(const Plan& chosen) const {
    const Plan plan = routed(chosen);
    std::vector<LayerCost> costs;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      const Codec& codec = plan.choices[i].codec;
      CodecSpeed speed = speed_of(codec);
      if (!codec.is_none()) speed.encode *= slow_;
      costs.push_back(
          layer_cost(layers_[i], codec, plan.choices[i].gathered, speed, link_, kRanks));
    }
    return step_cost(buckets(), costs);
  }

  void run_step() {
    const StepCost cost = cost_of(plan_);
    const double jitter = 1 + noise_ * (std::uniform_real_distribution<>(-1, 1)(random_));
    seconds_ = (compute_ + busy_ + cost.exposed + hidden_ * cost.sent) * jitter;
    sent_ = cost.sent;
    for (int rank = 0; rank < kRanks; ++rank) {
      AutoTuner& tuner = *tuners_[static_cast<std::size_t>(rank)];
      const std::vector<std::size_t> wanted(tuner.wanted().begin(), tuner.wanted().end());
      for (const std::size_t layer : wanted) {
        std::vector<float>& gradient = gradients_[layer];
        tuner.sample(layer, view(std::span<float>(gradient)), {});
      }
      // The last rank's transfers say what the network is; the others wait for it.
      StepTimes step{.seconds = seconds_ * (1 + 1e-3 * rank),
                     .work = cost.work,
                     .sampling = 0,
                     .waited = busy_,
                     .contention = busy_ / (compute_ + busy_),
                     .buckets = buckets()};
      auto clock = Clock::time_point{} + std::chrono::seconds(1);
      for (const BucketReady& bucket : step.buckets) {
        for (const std::size_t layer : bucket.layers) {
          add_transfers(step, layer, clock, 1e-3 * (kRanks - 1 - rank));
        }
      }
      step.transfers.back().finished +=
          std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(busy_));
      tuner.end_step(step);
    }
    if (tuners_[0]->due()) tune();
  }

  void add_transfers(StepTimes& step, std::size_t layer, Clock::time_point& clock,
                     double wait) const {
    const Codec& codec = plan_.choices[layer].codec;
    const LayerCost cost = layer_cost(layers_[layer], codec, plan_.choices[layer].gathered,
                                      speed_of(codec), link_, kRanks);
    const auto add = [&](Verb verb, double sent) {
      const double seconds = link_[verb].seconds(sent) + wait;
      TransferTime transfer;
      transfer.verb = verb;
      transfer.sent = sent;
      transfer.issued = clock;
      clock += std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
      transfer.finished = clock;
      transfer.awaited = true;
      step.transfers.push_back(transfer);
    };
    switch (cost.route) {
      case Route::kDense:
      case Route::kLinear:
        add(Verb::kAllreduce, cost.sent);
        break;
      case Route::kSparse:
        add(Verb::kAllgather, cost.sent);
        break;
      case Route::kRequantising:
        add(Verb::kAlltoall, cost.sent / 2);
        add(Verb::kAllgather, cost.sent / 2);
        break;
    }
  }

  void tune() {
    std::vector<float> all;
    for (auto& tuner : tuners_) {
      const std::vector<float> report = tuner->report();
      all.insert(all.end(), report.begin(), report.end());
    }
    bool changed = false;
    for (auto& tuner : tuners_) {
      changed = tuner->decide(all);
      if (tuner->wants_link()) changed = tuner->set_link(link_) || changed;
    }
    adopt();
    changes_ += changed ? 1 : 0;
  }

  void adopt() {
    plan_ = routed(tuners_[0]->plan());
    for (auto& tuner : tuners_) {
      const Plan other = tuner->plan();
      for (std::size_t i = 0; i < layers_.size(); ++i) {
        ASSERT_EQ(other.choices[i].codec.spec, plan_.choices[i].codec.spec);
      }
      for (std::string& line : tuner->take_log()) {
        if (tuner == tuners_[0]) log_.push_back(std::move(line));
      }
    }
  }

  const std::vector<Layer> layers_;
  LinkModel link_;
  const double compute_;
  double noise_ = 0.01;
  double slow_ = 1;
  double busy_ = 0;
  double hidden_ = 0;
  Plan plan_;
  std::vector<std::unique_ptr<AutoTuner>> tuners_;
  std::vector<std::vector<float>> gradients_;
  std::vector<std::string> log_;
  std::mt19937 random_{1};
  double seconds_ = 0;
  double sent_ = 0;
  int changes_ = 0;
};

std::vector<Layer> mlp() {
  return {{.name = "0.weight", .shape = {512, 784}},
          {.name = "0.bias", .shape = {512}},
          {.name = "2.weight", .shape = {512, 512}},
          {.name = "2.bias", .shape = {512}},
          {.name = "4.weight", .shape = {10, 512}}};
}

bool all_dense(const Plan& plan) {
  return std::all_of(plan.choices.begin(), plan.choices.end(),
                     [](const Policy::Choice& choice) { return choice.codec.is_none(); });
}

TEST(AutoTuner, CompressesOnASlowNetworkFromTheFirstStep) {
  Job job("auto", mlp(), link_of(1e7));
  job.run(1);
  EXPECT_FALSE(all_dense(job.plan()));
  EXPECT_LT(job.seconds(), 0.3);  // uncompressed: 3 s
  job.run(100);
  EXPECT_LT(job.seconds(), 0.12);
}

TEST(AutoTuner, LeavesGradientsAloneWhereNothingIsGained) {
  Job job("auto", mlp(), link_of(1e12, 1e-6));
  job.run(100);
  EXPECT_TRUE(all_dense(job.plan())) << job.log().back();
}

TEST(AutoTuner, IsNeverMuchSlowerThanWithoutForLong) {
  for (const double speed : {1e7, 1e8, 1e9, 1e10, 1e11}) {
    Job job("auto", mlp(), link_of(speed));
    Plan plain = job.plan();
    for (Policy::Choice& choice : plain.choices) choice.codec = make_codec("none");
    const double without = job.time_of(plain);
    job.run(50);
    EXPECT_LE(job.time_of(job.plan()), 1.001 * without) << speed;
  }
}

TEST(AutoTuner, TakesBackWhatIsSlowerThanPredicted) {
  // The codecs are far slower in the job than where they were measured, and no work tells: only
  // the steps do.
  Job job("auto", mlp(), link_of(2e9));
  job.set_slow_codecs(200);
  job.run(200);
  EXPECT_TRUE(all_dense(job.plan())) << testing::PrintToString(job.log());
  EXPECT_THAT(job.log(), Contains(testing::AnyOf(HasSubstr("takes back"), HasSubstr("keeps"))));
}

TEST(AutoTuner, LearnsWhatBytesTakeOfTheJob) {
  Job job("auto", mlp(), link_of(2e10));
  job.set_hidden_cost(1e-8);  // uncompressed: 40 ms
  job.run(150);
  EXPECT_LT(job.sent(), 1e6) << testing::PrintToString(job.log());
  const int before = job.changes();
  job.run(500);
  EXPECT_LE(job.changes() - before, 12) << testing::PrintToString(job.log());
}

TEST(AutoTuner, FollowsANetworkThatChangesWithinTwentySteps) {
  Job job("auto", mlp(), link_of(1e8));
  job.run(60);
  const double slow = job.time_of(job.plan());
  const double slow_sent = job.sent();
  job.set_link(link_of(1e10));
  job.run(20);
  const double fast = job.time_of(job.plan());
  EXPECT_LE(fast, slow);
  Job fresh("auto", mlp(), link_of(1e10));
  fresh.run(60);
  EXPECT_LE(fast, 1.03 * fresh.time_of(fresh.plan())) << testing::PrintToString(job.log());
  job.set_link(link_of(1e8));
  job.run(20);
  EXPECT_LE(job.time_of(job.plan()), 1.05 * slow) << testing::PrintToString(job.log());
  EXPECT_LE(job.sent(), 2 * slow_sent);
}

TEST(AutoTuner, SeesASlowerNetworkThroughManyTransfers) {
  std::vector<Layer> layers;
  for (int i = 0; i < 20; ++i) {
    layers.push_back({.name = std::to_string(i), .shape = {256, 256}, .dtype = DType::kF32});
  }
  Job job("auto,error=0.001", layers, link_of(1e9));
  job.run(40);
  job.set_busy(0.02);
  job.run(10);
  EXPECT_THAT(job.log(), Not(Contains(HasSubstr("the network has changed"))));
  job.set_link(link_of(1e8));
  job.run(10);
  EXPECT_THAT(job.log(), Contains(HasSubstr("the network has changed")));
}

TEST(AutoTuner, RanksThatWaitForCoresAreNoOtherNetwork) {
  Job job("auto", mlp(), link_of(1e9));
  job.run(40);
  job.set_busy(0.2);
  job.run(100);
  EXPECT_THAT(job.log(), Not(Contains(HasSubstr("the network has changed"))));
  EXPECT_FALSE(all_dense(job.plan()));
}

// What the transfers take more is explained by the wait for cores, and yet it is the bytes.
TEST(AutoTuner, ANetworkTakenForTooFastIsFoundOutWhereCoresAreShort) {
  const LinkModel network = link_of(5e8);
  LinkModel measured = network;
  measured[Verb::kAllreduce].per_byte = 1e-12;
  Job job("auto", mlp(), measured);
  job.set_link(network);
  job.set_busy(0.1);
  job.run(1);
  ASSERT_TRUE(all_dense(job.plan()));
  job.run(60);
  EXPECT_FALSE(all_dense(job.plan())) << job.log().back();
  EXPECT_LT(job.seconds(), 0.2);  // uncompressed: 0.23 s
}

TEST(AutoTuner, SettlesDownInSpiteOfNoise) {
  Job job("auto", mlp(), link_of(1e8));
  job.set_noise(0.1);
  job.run(200);
  const int before = job.changes();
  job.run(400);
  EXPECT_LE(job.changes() - before, 12) << testing::PrintToString(job.log());
}

TEST(AutoTuner, KeepsToItsFamilies) {
  Job job("auto,families=lowrank", mlp(), link_of(1e8));
  job.run(100);
  for (const Policy::Choice& choice : job.plan().choices) {
    EXPECT_TRUE(choice.codec.is_none() || choice.codec.linear) << choice.codec.spec;
  }
  EXPECT_FALSE(all_dense(job.plan()));
}

TEST(AutoTuner, QuantisesBiasesWhereTheirBytesCount) {
  Job slow("auto", mlp(), link_of(1e6));
  slow.run(60);
  EXPECT_EQ(slow.plan().choices[1].codec.spec, "q4");
  EXPECT_EQ(slow.plan().choices[1].reason, "auto: 1 dimension");
  Job fast("auto", mlp(), link_of(1e12, 1e-6));
  fast.run(60);
  EXPECT_TRUE(fast.plan().choices[1].codec.is_none());
  Job without("auto,families=topk", mlp(), link_of(1e6));
  without.run(60);
  EXPECT_TRUE(without.plan().choices[1].codec.is_none());
  EXPECT_EQ(without.plan().choices[1].reason, "dense: 1 dimension");
}

TEST(AutoTuner, ABoundHoldsForItsLayer) {
  Job job("policy = \"auto\"\n[[rule]]\nname = \"2.weight\"\npolicy = \"auto,at_least=q8\"\n",
          mlp(), link_of(1e7));
  job.run(100);
  const std::string& spec = job.plan().choices[2].codec.spec;
  EXPECT_TRUE(spec == "q8" || spec == "none" || spec == "bf16") << spec;
  EXPECT_NE(job.plan().choices[0].codec.spec, spec);
}

TEST(AutoTuner, ASmallBudgetSendsMore) {
  Job thin("auto", mlp(), link_of(1e8));
  Job thick("auto,error=0.01", mlp(), link_of(1e8));
  thin.run(100);
  thick.run(100);
  EXPECT_GT(thick.sent(), 4 * thin.sent());
}

TEST(AutoTuner, ZeroGradientsForManyStepsAreNoTrouble) {
  Job job("auto", mlp(), link_of(1e8));
  for (std::vector<float>& gradient : job.gradients()) {
    std::fill(gradient.begin(), gradient.end(), 0.0F);
  }
  job.run(200);
  EXPECT_LT(job.seconds(), 0.2);
}

TEST(AutoTuner, NanInAGradientIsNoTrouble) {
  Job job("auto", mlp(), link_of(1e8));
  for (std::vector<float>& gradient : job.gradients()) {
    gradient[gradient.size() / 2] = std::nanf("");
  }
  job.run(100);
  EXPECT_LT(job.seconds(), 0.3);
}

TEST(AutoTuner, ModelsOfOneLayerAndOfThousands) {
  Job one("auto", {{.name = "only", .shape = {64, 64}}}, link_of(1e8));
  one.run(50);
  EXPECT_LT(one.seconds(), 0.1);
  std::vector<Layer> layers;
  for (int i = 0; i < 2000; ++i) {
    layers.push_back({.name = "layer." + std::to_string(i), .shape = {32, 64}});
  }
  Job many("auto", layers, link_of(1e8));
  many.run(20);
  EXPECT_FALSE(all_dense(many.plan()));
}

TEST(AutoTuner, WildlyVaryingNetworks) {
  Job job("auto", mlp(), link_of(1e8));
  for (int round = 0; round < 40; ++round) {
    job.set_link(link_of(round % 2 == 0 ? 1e6 : 1e11, round % 3 == 0 ? 1e-2 : 1e-6));
    job.run(7);
    ASSERT_TRUE(std::isfinite(job.seconds()));
  }
}

TEST(AutoTuner, SaysWhatItDecidesWithItsNumbers) {
  Job job("auto", mlp(), link_of(1e8));
  job.run(100);
  ASSERT_FALSE(job.log().empty());
  EXPECT_THAT(job.log()[0], AllOf(HasSubstr("auto: begins with"), HasSubstr("MB a step")));
}

TEST(AutoTuner, NamesCodecsThatDifferInTheirDensityTogether) {
  std::vector<Layer> layers;
  for (int i = 1; i <= 16; ++i) {
    layers.push_back({.name = std::to_string(i), .shape = {64 * i, 256}, .dtype = DType::kF32});
  }
  Job job("auto,families=topk", layers, link_of(1e8));
  job.run(10);
  EXPECT_THAT(job.log()[0], testing::ContainsRegex("1[0-6] x topk:[0-9.e-]+ to [0-9.]+,values=q4"));
}

TEST(AutoTuner, OtherBucketsOnAnotherRankAreAnError) {
  const std::vector<Layer> layers = mlp();
  const Plan plan = Plan::make(Policy::parse("auto"), layers);
  const std::vector<Codec> codecs = PlanSearch::codecs(layers, plan);
  AutoTuner tuner(layers, plan, 2, link_of(1e8), std::vector<CodecSpeed>(codecs.size()));
  StepTimes step;
  step.seconds = 0.1;
  step.buckets = {{.layers = {0, 1, 2, 3, 4}, .ready = 0}};
  while (!tuner.due()) tuner.end_step(step);
  std::vector<float> all = tuner.report();
  std::vector<float> other = all;
  other[0] += 1;
  all.insert(all.end(), other.begin(), other.end());
  EXPECT_THROW(tuner.decide(all), MismatchError);
}

}  // namespace
}  // namespace thinwire
