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

// Windows under each plan until the trial is over; how many there were.
int finish_trial(PlanJudge& judge, double of_first, double of_other, Verdict& verdict) {
  int windows = 0;
  do {
    verdict = judge.measured(judge.current() == kFirst ? of_first : of_other);
    ++windows;
  } while (verdict == Verdict::kNone && windows < 100);
  EXPECT_FALSE(judge.on_trial());
  return windows;
}

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
  Verdict verdict{};
  EXPECT_EQ(finish_trial(judge, 0.10, 0.10, verdict), 7);  // and the window before
  EXPECT_EQ(verdict, Verdict::kTakenBack);
  EXPECT_EQ(judge.current(), kFirst);
}

// A first window that is faster by chance, and others that are slower.
TEST(PlanJudge, ComparesInTurnWhatNoiseHides) {
  PlanJudge judge(kFirst);
  for (int window = 0; window < 50; ++window) judge.measured(window % 2 == 0 ? 0.10 : 0.115);
  ASSERT_GT(judge.noise(), 0.1);
  ASSERT_TRUE(judge.consider(kOther, 0.05, Reason::kFaster));
  EXPECT_EQ(judge.measured(0.10), Verdict::kNone);
  EXPECT_EQ(judge.current(), kFirst);
  EXPECT_EQ(judge.tried(), kOther);
  Verdict verdict{};
  finish_trial(judge, 0.10, 0.11, verdict);
  EXPECT_EQ(verdict, Verdict::kTakenBack);
}

TEST(PlanJudge, WhatWasMeasuredCountsBeforeWhatIsPredicted) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.09, Reason::kFaster));
  judge.measured(0.12);
  for (int window = 0; window < 40; ++window) {
    judge.measured(0.10);
    EXPECT_FALSE(judge.consider(kOther, 0.09, Reason::kFaster)) << window;
  }
  EXPECT_DOUBLE_EQ(*judge.seconds(kOther), 0.12);
}

TEST(PlanJudge, WhatWasMeasuredLongAgoIsMeasuredAnewEverMoreRarely) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  int before = 0;
  for (int trial = 0; trial < 4; ++trial) {
    int windows = 0;
    while (!judge.consider(kOther, 0.09, Reason::kFaster)) {
      judge.measured(0.10);
      ++windows;
    }
    EXPECT_TRUE(trial < 2 || windows > 3 * before / 2) << windows;
    before = windows;
    ASSERT_EQ(judge.measured(0.12), Verdict::kTakenBack);
  }
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
  Verdict verdict{};
  ASSERT_TRUE(judge.consider(kOther, 0, Reason::kBetter));
  finish_trial(judge, 0.10, 0.1005, verdict);
  EXPECT_EQ(verdict, Verdict::kKept);
  ASSERT_TRUE(judge.consider(kFirst, 0, Reason::kBetter));
  finish_trial(judge, 0.13, 0.1005, verdict);
  EXPECT_EQ(verdict, Verdict::kTakenBack);
}

TEST(PlanJudge, ProbesOnceANetwork) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, -0.09, Reason::kProbe));
  EXPECT_EQ(judge.measured(0.20), Verdict::kTakenBack);
  for (int window = 0; window < 40; ++window) judge.measured(0.10);
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

TEST(PlanJudge, TriesAgainWhatWasFaster) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  ASSERT_TRUE(judge.consider(kOther, 0.02, Reason::kFaster));
  ASSERT_EQ(judge.measured(0.08), Verdict::kKept);
  Verdict verdict = Verdict::kNone;
  for (int window = 0; window < 10 && verdict == Verdict::kNone; ++window) {
    verdict = judge.measured(0.15);
  }
  EXPECT_EQ(verdict, Verdict::kTriedAgain);
  EXPECT_EQ(judge.current(), kFirst);
  EXPECT_EQ(judge.measured(0.10), Verdict::kKept);
}

TEST(PlanJudge, AForgottenPlanEndsItsTrial) {
  for (const bool tried : {false, true}) {
    PlanJudge judge(kFirst);
    judge.measured(0.10);
    ASSERT_TRUE(judge.consider(kOther, 0.02, Reason::kFaster));
    judge.forget(tried ? kOther : kFirst);
    EXPECT_FALSE(judge.on_trial());
    EXPECT_EQ(judge.current(), tried ? kFirst : kOther);
  }
}

TEST(PlanJudge, WrongPredictionsMakeTrialsRare) {
  PlanJudge judge(kFirst);
  judge.measured(0.10);
  int trials = 0;
  for (std::uint16_t window = 0; window < 500; ++window) {
    const PlanId plan = {7, window};  // another one each time
    if (judge.consider(plan, 0.05, Reason::kFaster)) {
      ++trials;
      ASSERT_EQ(judge.measured(0.15), Verdict::kTakenBack);
    } else {
      judge.measured(0.10);
    }
  }
  EXPECT_GE(trials, 8);
  EXPECT_LE(trials, 16);
  judge.network_changed();
  judge.measured(0.10);
  EXPECT_TRUE(judge.consider(kOther, 0.05, Reason::kFaster));
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
  int trial = 0;  // windows
  for (int window = 0; window < 10'000; ++window) {
    const bool before = judge.on_trial();
    const Verdict verdict = judge.measured(random() * (window % 97 == 0 ? 100 : 0.1) + 1e-9);
    const bool over = verdict == Verdict::kKept || verdict == Verdict::kTakenBack;
    EXPECT_TRUE(!over || before);
    EXPECT_EQ(judge.on_trial(), verdict == Verdict::kTriedAgain || (before && !over));
    trial = before && !over ? trial + 1 : 0;
    EXPECT_LT(trial, 8);
    EXPECT_TRUE(std::isfinite(judge.noise()));
    const auto pick = static_cast<std::uint16_t>(random() * 4);
    judge.consider({pick, 0}, random() * 0.1, static_cast<Reason>(window % 3));
  }
}

}  // namespace
}  // namespace thinwire
