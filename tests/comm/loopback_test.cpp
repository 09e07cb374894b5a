#include "comm/loopback/loopback_communicator.h"

#include <gtest/gtest.h>

#include <thread>

#include "tests/comm/communicator_contract.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(Threads, CommunicatorContract, ::testing::ValuesIn(loopback_ranks()),
                         ranks_name);

namespace {

TEST(Loopback, SilentDeathIsFoundByTheRollCall) {
  auto group = std::make_shared<LoopbackGroup>(3);
  const Ranks ranks = thread_ranks(
      "loopback", 3, [&] { return [&](int rank) { return group->communicator(rank); }; });
  ranks.run([&](Communicator& comm) {
    std::vector<float> data(10, 1.0F);
    comm.allreduce_sum(view(data))->wait(soon());
    if (comm.rank() == 1) {
      group->kill(1);
      EXPECT_THROW(comm.allreduce_sum(view(data)), TransportError);
      EXPECT_THROW(comm.roll_call(std::chrono::milliseconds(1)), TransportError);
      return;
    }
    EXPECT_THROW(comm.allreduce_sum(view(data))->wait(Clock::now() + std::chrono::seconds(1)),
                 TransportError);
    EXPECT_EQ(comm.roll_call(std::chrono::seconds(1)), std::vector<int>{1});
  });
}

TEST(Loopback, LostConnectionFailsAtOnce) {
  auto group = std::make_shared<LoopbackGroup>(2);
  const auto survivor = group->communicator(0);
  auto victim = group->communicator(1);
  std::vector<float> data(10, 1.0F);
  const auto transfer = survivor->allreduce_sum(view(data));
  EXPECT_FALSE(transfer->done());
  group->kill(1, LoopbackGroup::Death::kConnection);
  EXPECT_TRUE(transfer->done());
  EXPECT_THROW(transfer->wait(soon()), TransportError);
  EXPECT_EQ(survivor->roll_call(std::chrono::milliseconds(10)), std::vector<int>{1});
}

TEST(Loopback, LeavingTheGroupFailsThoseWhoWait) {
  auto group = std::make_shared<LoopbackGroup>(2);
  const auto stays = group->communicator(0);
  auto leaves = group->communicator(1);
  leaves.reset();
  std::vector<float> data(10, 1.0F);
  const auto transfer = stays->allreduce_sum(view(data));
  EXPECT_THROW(transfer->wait(soon()), TransportError);
}

TEST(Loopback, DifferentCallsAreNamed) {
  auto group = std::make_shared<LoopbackGroup>(2);
  const auto first = group->communicator(0);
  const auto second = group->communicator(1);
  std::vector<float> data(10, 1.0F);
  const auto transfer = first->allreduce_sum(view(data));
  try {
    second->allreduce_sum({data.data(), 9, DType::kF32});
    ADD_FAILURE() << "a sum of 10 elements was joined with one of 9";
  } catch (const TransportError& error) {
    EXPECT_NE(std::string(error.what()).find("36 bytes"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("40"), std::string::npos) << error.what();
  }
  EXPECT_THROW(transfer->wait(soon()), TransportError);
}

TEST(Loopback, ARankIsTakenOnce) {
  LoopbackGroup group(2);
  const auto first = group.communicator(0);
  EXPECT_THROW(group.communicator(0), InvalidArgument);
  EXPECT_THROW(group.communicator(2), InvalidArgument);
  EXPECT_THROW(group.communicator(-1), InvalidArgument);
  EXPECT_THROW(LoopbackGroup(0), InvalidArgument);
}

}  // namespace

}  // namespace thinwire::testing
