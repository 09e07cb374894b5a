#include "comm/plan_judge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>

namespace thinwire {
namespace {

using Verdict = PlanJudge::Verdict;
using Reason = PlanJudge::Reason;

const PlanId kFirst = {0, 0};
const PlanId kOther = {1, 2};

TEST(PlanJudge, KeepsAPlanThatIsFaster) {
  PlanJudge judge(kFirst);
  EXPECT_EQ(judge.measured(0.10), Verdict::kNone);
  EXPECT_TRUE(judge.consider(kOther, 0.02, Reason::kFaster));
  EXPECT_EQ(judge.current(), kOther);
  EXPECT_EQ(judge.measured(0.085), Verdict::kKept);
  EXPECT_EQ(judge.current(), kOther);
  EXPECT_FALSE(judge.on_trial());
}

TEST(PlanJudge, TakesBackAPlanThatIsNoFaster) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.02, Reason::kFaster));
  EXPECT_EQ(judge.measured(0.10), Verdict::kTakenBack);
  EXPECT_EQ(judge.current(), kFirst);
}

TEST(PlanJudge, WhatWasMeasuredCountsBeforeWhatIsPredicted) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.09, Reason::kFaster));
  judge.measured(0.12);
  for (int window = 0; window < 100; ++window) {
    judge.measured(0.10);
    EXPECT_FALSE(judge.consider(kOther, 0.09, Reason::kFaster)) << window;
  }
  EXPECT_DOUBLE_EQ(*judge.seconds(kOther), 0.12);
}

TEST(PlanJudge, AGainWithinTheNoiseIsNotTried) {
  PlanJudge judge(kFirst);
  for (int window = 0; window < 50; ++window) {
    judge.measured(window % 2 == 0 ? 0.10 : 0.12);
  }
  EXPECT_GT(judge.noise(), 0.05);
  EXPECT_FALSE(judge.consider(kOther, 0.002, Reason::kFaster));
  EXPECT_TRUE(judge.consider(kOther, 0.03, Reason::kFaster));
}

TEST(PlanJudge, ASteadyJobLetsSmallGainsBeTried) {
  PlanJudge judge(kFirst);
  for (int window = 0; window < 50; ++window) judge.measured(0.10);
  EXPECT_TRUE(judge.consider(kOther, 0.002, Reason::kFaster));
}

TEST(PlanJudge, APlanThatLosesLessMayBeAsSlowAsNoise) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0, Reason::kBetter));
  EXPECT_EQ(judge.measured(0.1005), Verdict::kKept);
  ASSERT_TRUE(judge.consider(kFirst, 0, Reason::kBetter));
  EXPECT_EQ(judge.measured(0.13), Verdict::kTakenBack);
}

TEST(PlanJudge, ProbesOnceANetwork) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, -0.09, Reason::kProbe));
  EXPECT_EQ(judge.measured(0.20), Verdict::kTakenBack);
  for (int window = 0; window < 100; ++window) judge.measured(0.10);
  EXPECT_FALSE(judge.consider(kOther, -0.09, Reason::kProbe));
  judge.network_changed();
  EXPECT_FALSE(judge.consider(kOther, -0.09, Reason::kProbe)) << "nothing to compare it with yet";
  judge.measured(0.10);
  EXPECT_TRUE(judge.consider(kOther, -0.09, Reason::kProbe));
}

TEST(PlanJudge, ANetworkThatChangesEndsATrialUndecided) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.05, Reason::kFaster));
  judge.network_changed();
  EXPECT_EQ(judge.current(), kFirst);
  EXPECT_FALSE(judge.on_trial());
  EXPECT_FALSE(judge.seconds(kFirst).has_value());
  EXPECT_FALSE(judge.seconds(kOther).has_value());
}

TEST(PlanJudge, GoesBackToWhatWasFaster) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.02, Reason::kFaster));
  ASSERT_EQ(judge.measured(0.099), Verdict::kKept);  // luck
  Verdict verdict = Verdict::kNone;
  for (int window = 0; window < 10 && verdict == Verdict::kNone; ++window) {
    verdict = judge.measured(0.15);
  }
  EXPECT_EQ(verdict, Verdict::kTakenBack);
  EXPECT_EQ(judge.current(), kFirst);
}

TEST(PlanJudge, NothingIsTriedBeforeTheFirstPlanWasMeasured) {
  PlanJudge judge(kFirst);
  EXPECT_FALSE(judge.consider(kOther, 0.09, Reason::kFaster));
  EXPECT_FALSE(judge.seconds(kFirst).has_value());
}

TEST(PlanJudge, WhateverIsMeasuredItStaysWithKnownPlansAndEndsItsTrials) {
  std::uint32_t state = 1;
  const auto random = [&state] {
    state = state * 1664525 + 1013904223;
    return static_cast<double>(state >> 8U) / (1 << 24);
  };
  PlanJudge judge(kFirst);
  for (int window = 0; window < 10'000; ++window) {
    const bool trial = judge.on_trial();
    const Verdict verdict = judge.measured(random() * (window % 97 == 0 ? 100 : 0.1) + 1e-9);
    EXPECT_EQ(trial, verdict == Verdict::kKept || (trial && verdict == Verdict::kTakenBack));
    EXPECT_FALSE(judge.on_trial());
    EXPECT_TRUE(std::isfinite(judge.noise()));
    const auto pick = static_cast<std::uint16_t>(random() * 4);
    judge.consider({pick, 0}, random() * 0.1, static_cast<Reason>(window % 3));
  }
}

}  // namespace
}  // namespace thinwire
