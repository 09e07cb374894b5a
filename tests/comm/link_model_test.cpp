// The network as it is measured, and how steps move it.
#include "comm/link_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "comm/metered_communicator.h"
#include "tests/comm/reducer_fixture.h"
#include "tests/comm/slow_communicator.h"

namespace thinwire::testing {
namespace {

constexpr Verb kAll[] = {Verb::kAllreduce, Verb::kAllgather, Verb::kAlltoall};

TEST(LinkModel, ALinkAndItsModelAreTheSame) {
  const Link link{.latency_seconds = 1e-4, .bytes_per_second = 1.25e8};
  for (const int ranks : {2, 4, 64}) {
    const LinkModel model = link_model(link, ranks);
    const Link again = link_of(model, ranks);
    EXPECT_NEAR(again.latency_seconds, link.latency_seconds, 1e-12);
    EXPECT_NEAR(again.bytes_per_second, link.bytes_per_second, 1);
    // An allreduce of so many bytes, by both.
    const double bytes = 4e6;
    const double sent = sent_payload(Verb::kAllreduce, 4'000'000, ranks);
    EXPECT_NEAR(model[Verb::kAllreduce].fixed + model[Verb::kAllreduce].per_byte * sent,
                ring_allreduce_seconds(link, ranks, bytes), 1e-9);
  }
}

TEST(LinkModel, ComesNearWhatIsObserved) {
  LinkModel model = link_model({.latency_seconds = 1e-4, .bytes_per_second = 1e9}, 4);
  const double sent = 1e7;
  for (int i = 0; i < 40; ++i) model.observe(Verb::kAllgather, sent, 0.1);
  EXPECT_NEAR(model[Verb::kAllgather].fixed + model[Verb::kAllgather].per_byte * sent, 0.1, 1e-3);
  for (int i = 0; i < 40; ++i) model.observe(Verb::kAllgather, sent, 1e-3);
  EXPECT_NEAR(model[Verb::kAllgather].fixed + model[Verb::kAllgather].per_byte * sent, 1e-3, 1e-4);
}

TEST(LinkModel, StaysPositiveWhateverIsObserved) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  LinkModel model = link_model({}, 4);
  for (const double seconds : {0.0, -1.0, kInf, -kInf, std::nan(""), 1e-30, 1e30}) {
    for (const double sent : {0.0, 1.0, 1e12}) {
      for (const Verb verb : kAll) {
        model.observe(verb, sent, seconds);
        EXPECT_GT(model[verb].fixed, 0);
        EXPECT_GT(model[verb].per_byte, 0);
        EXPECT_TRUE(std::isfinite(model[verb].fixed));
        EXPECT_TRUE(std::isfinite(model[verb].per_byte));
      }
    }
  }
}

TEST(LinkModel, ProbesTellASlowNetworkFromAFastOneAndAllRanksAlike) {
  double per_byte[2] = {};
  for (const double rate : {1e6, 1e8}) {
    const std::atomic<double> bytes_a_second = rate;
    LinkModel models[3];
    run_ranks(3, [&](int rank, std::unique_ptr<Communicator> comm) {
      SlowCommunicator slow(std::move(comm), bytes_a_second);
      models[rank] = probe_link(slow, Clock::now() + std::chrono::seconds(60));
    });
    for (const Verb verb : kAll) {
      EXPECT_EQ(models[1][verb].per_byte, models[0][verb].per_byte);
      EXPECT_EQ(models[2][verb].fixed, models[0][verb].fixed);
    }
    per_byte[rate == 1e6 ? 0 : 1] = models[0][Verb::kAllgather].per_byte;
  }
  // Of an allgather the made-up network counts what arrives: 3 blocks for 2 that are sent.
  EXPECT_GT(per_byte[0], 1e-6);
  EXPECT_LT(per_byte[0], 4e-6);
  EXPECT_LT(per_byte[1], per_byte[0] / 10);
}

TEST(MeteredCommunicator, TimesEachTransferOnce) {
  const std::atomic<double> rate = 1e6;
  run_ranks(2, [&](int, std::unique_ptr<Communicator> comm) {
    MeteredCommunicator metered(std::make_unique<SlowCommunicator>(std::move(comm), rate));
    std::vector<float> values(2500);
    std::vector<std::byte> in(4000);
    std::vector<std::byte> out(8000);
    const auto deadline = Clock::now() + std::chrono::seconds(60);
    metered.allreduce_sum(view(values))->wait(deadline);
    metered.allgather(in, out)->wait(deadline);
    const auto transfer = metered.alltoall(std::span(out), std::span(out));
    transfer->wait(deadline);
    transfer->wait(deadline);
    const std::vector<TransferTime> times = metered.take();
    ASSERT_EQ(times.size(), 3U);
    EXPECT_EQ(times[0].verb, Verb::kAllreduce);
    EXPECT_EQ(times[0].sent, 10'000);
    EXPECT_EQ(times[1].sent, 4'000);
    EXPECT_EQ(times[2].sent, 4'000);
    for (const TransferTime& time : times) {
      EXPECT_TRUE(time.awaited);
      EXPECT_GE(time.finished - time.issued, std::chrono::milliseconds(7));
    }
    EXPECT_TRUE(metered.take().empty());
  });
}

}  // namespace
}  // namespace thinwire::testing
