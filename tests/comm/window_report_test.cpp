#include "comm/window_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

using std::chrono::milliseconds;

constexpr int kRanks = 3;

// A step with two transfers, of `first` and `second` ms, one after the other.
StepTimes step_of(double seconds, int first, int second) {
  StepTimes step;
  step.seconds = seconds;
  step.work = seconds / 10;
  step.waited = seconds / 5;
  step.buckets = {{.layers = {1}, .ready = -seconds / 2}, {.layers = {0}, .ready = 0}};
  auto clock = Clock::time_point{} + std::chrono::seconds(1);
  for (const int ms : {first, second}) {
    TransferTime transfer;
    transfer.verb = Verb::kAllgather;
    transfer.sent = 100;
    transfer.issued = clock;
    clock += milliseconds(ms);
    transfer.finished = clock;
    transfer.awaited = true;
    step.transfers.push_back(transfer);
  }
  return step;
}

// All ranks' reports, one behind the other.
std::vector<float> reports_of(const std::vector<std::vector<StepTimes>>& ranks,
                              const SampledCurves& curves = {}) {
  std::vector<float> all;
  for (const std::vector<StepTimes>& steps : ranks) {
    const std::vector<float> one = write_report(steps, 0.25, curves);
    all.insert(all.end(), one.begin(), one.end());
  }
  return all;
}

TEST(WindowReport, TheSlowestRanksMedianCounts) {
  const std::vector<StepTimes> fast = {step_of(1, 4, 4), step_of(2, 4, 4), step_of(9, 4, 4)};
  const std::vector<StepTimes> slow = {step_of(3, 4, 4), step_of(5, 4, 4), step_of(4, 4, 4)};
  const WindowDigest digest = read_reports(reports_of({fast, slow, fast}), kRanks, fast, 0);
  EXPECT_DOUBLE_EQ(digest.seconds, 4);
  EXPECT_NEAR(digest.work, 0.4, 1e-6);
  EXPECT_NEAR(digest.waited, 0.8, 1e-6);
  EXPECT_DOUBLE_EQ(digest.sampling, 0.25);
  ASSERT_EQ(digest.buckets.size(), 2U);
  EXPECT_EQ(digest.buckets[0].layers, std::vector<std::size_t>{1});
  EXPECT_DOUBLE_EQ(digest.buckets[0].ready, -1);  // of the rank that is ready last
  EXPECT_DOUBLE_EQ(digest.buckets[1].ready, 0);
}

TEST(WindowReport, TheRankThatCameLastTellsHowLongATransferTook) {
  const std::vector<StepTimes> early = {step_of(1, 9, 9), step_of(1, 7, 9)};
  const std::vector<StepTimes> late = {step_of(1, 5, 3), step_of(1, 6, 8)};
  const WindowDigest digest = read_reports(reports_of({early, late, early}), kRanks, early, 0);
  ASSERT_EQ(digest.transfers.size(), 2U);
  EXPECT_NEAR(digest.transfers[0], 5e-3, 1e-9);
  EXPECT_NEAR(digest.transfers[1], 3e-3, 1e-9);
  EXPECT_EQ(digest.kinds[1].sent, 100);
}

TEST(WindowReport, WhatNobodyAwaitedIsNotKnown) {
  std::vector<StepTimes> steps = {step_of(1, 5, 5)};
  steps[0].transfers[0].awaited = false;
  steps[0].transfers[1].issued -= milliseconds(1);  // before anybody knows the first one's end
  const WindowDigest digest = read_reports(reports_of({steps, steps, steps}), kRanks, steps, 0);
  EXPECT_TRUE(std::isnan(digest.transfers[0]));
  EXPECT_TRUE(std::isnan(digest.transfers[1]));
}

TEST(WindowReport, CurvesAreTheMeanOfThoseWhoHaveAny) {
  ErrorCurves ones;
  ErrorCurves threes;
  for (float& value : ones.values()) value = 1;
  for (float& value : threes.values()) value = 3;
  const std::vector<StepTimes> steps = {step_of(1, 5, 5)};
  std::vector<float> all = write_report(steps, 0, {ones, std::nullopt});
  for (const SampledCurves& curves :
       {SampledCurves{threes, std::nullopt}, SampledCurves{std::nullopt, std::nullopt}}) {
    const std::vector<float> one = write_report(steps, 0, curves);
    all.insert(all.end(), one.begin(), one.end());
  }
  const WindowDigest digest = read_reports(all, kRanks, steps, 2);
  ASSERT_EQ(digest.curves.size(), 2U);
  ASSERT_TRUE(digest.curves[0].has_value());
  EXPECT_THAT(digest.curves[0]->values(), testing::Each(2.0F));
  EXPECT_FALSE(digest.curves[1].has_value());
}

TEST(WindowReport, OtherBucketsAreAnError) {
  const std::vector<StepTimes> steps = {step_of(1, 5, 5)};
  std::vector<StepTimes> others = steps;
  others[0].buckets[0].layers = {7};
  const std::vector<float> all = reports_of({steps, steps, others});
  try {
    read_reports(all, kRanks, steps, 0);
    FAIL() << "accepted";
  } catch (const MismatchError& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("rank 2"));
  }
}

}  // namespace
}  // namespace thinwire
