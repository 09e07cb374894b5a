#include "comm/gloo/gloo_communicator.h"

#include <gtest/gtest.h>

#include "tests/comm/communicator_contract.h"
#include "tests/support/gloo_ranks.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(Threads, CommunicatorContract, ::testing::ValuesIn(gloo_thread_ranks()),
                         ranks_name);

namespace {

TEST(Gloo, PeersThatDoNotComeAreAnError) {
  auto store = std::make_shared<gloo::rendezvous::HashStore>();
  EXPECT_THROW(make_gloo_communicator(
                   0, 2, store,
                   {.hostname = "127.0.0.1", .connect_timeout = std::chrono::milliseconds(200)}),
               TransportError);
}

TEST(Gloo, RefusesImpossibleRanks) {
  auto store = std::make_shared<gloo::rendezvous::HashStore>();
  EXPECT_THROW(make_gloo_communicator(2, 2, store), InvalidArgument);
  EXPECT_THROW(make_gloo_communicator(-1, 2, store), InvalidArgument);
  EXPECT_THROW(make_gloo_communicator(0, 0, store), InvalidArgument);
  EXPECT_THROW(make_gloo_communicator(0, 1, nullptr), InvalidArgument);
}

// A rank may leave right after its last collective although peers have not read its bytes yet.
TEST(Gloo, LeavingLosesNothing) {
  for (int round = 0; round < 5; ++round) {
    gloo_thread_ranks().back().run([](Communicator& comm) {
      std::vector<float> data(200000, 1.0F);
      comm.allreduce_sum(view(data))->wait(soon());
      EXPECT_EQ(data.back(), static_cast<float>(comm.size()));
    });
  }
}

}  // namespace

}  // namespace thinwire::testing
