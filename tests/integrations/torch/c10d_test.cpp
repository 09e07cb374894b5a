#include <gtest/gtest.h>

#include "tests/comm/communicator_contract.h"
#include "tests/support/c10d_ranks.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(C10d, CommunicatorContract,
                         ::testing::ValuesIn(c10d_gloo_ranks({1, 2, 3, 4, 7})), ranks_name);
INSTANTIATE_TEST_SUITE_P(C10dOther, CommunicatorContract,
                         ::testing::ValuesIn(c10d_other_ranks({1, 2, 3})), ranks_name);

namespace {

// A rank may leave right after its last collective although peers have not read its bytes yet.
TEST(C10d, LeavingLosesNothing) {
  const Ranks ranks = c10d_gloo_ranks({7}).front();
  for (int round = 0; round < 5; ++round) {
    ranks.run([](Communicator& comm) {
      std::vector<float> data(200000, 1.0F);
      comm.allreduce_sum(view(data))->wait(soon());
      EXPECT_EQ(data.back(), static_cast<float>(comm.size()));
      const auto mine = static_cast<std::byte>(comm.rank());
      EXPECT_EQ(gather_bytes(comm, std::vector(100000, mine)).back(), std::byte{6});
    });
  }
}

TEST(C10d, TheRollCallNamesWhoDoesNotAnswer) {
  c10d_gloo_ranks({4}).front().run([](Communicator& comm) {
    if (comm.rank() % 2 == 0) {
      EXPECT_EQ(comm.roll_call(std::chrono::milliseconds(500)), (std::vector<int>{1, 3}));
    }
  });
}

TEST(C10d, NamesItsBackend) {
  c10d_gloo_ranks({1}).front().run([](Communicator& c) { EXPECT_EQ(c.name(), "c10d:gloo"); });
  c10d_other_ranks({1}).front().run([](Communicator& c) { EXPECT_EQ(c.name(), "c10d:other"); });
}

}  // namespace

}  // namespace thinwire::testing
