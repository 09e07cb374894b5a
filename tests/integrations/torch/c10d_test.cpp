#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

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
      EXPECT_EQ(gather_bytes(comm, std::vector(100, mine)).back(), std::byte{6});
    });
  }
}

// More blocks in flight than the connections beside Gloo have room for: the rest goes over Gloo.
TEST(C10d, ManySmallBlocksInFlight) {
  static constexpr std::size_t kTransfers = 50;
  static constexpr std::size_t kBytes = 60'000;
  c10d_gloo_ranks({3}).front().run([](Communicator& comm) {
    const auto byte = [](int rank, std::size_t transfer) {
      return static_cast<std::byte>(static_cast<std::size_t>(rank) * 64 + transfer);
    };
    std::vector<std::vector<std::byte>> in;
    std::vector<std::vector<std::byte>> out(kTransfers, std::vector<std::byte>(3 * kBytes));
    std::vector<std::unique_ptr<Transfer>> transfers;
    for (std::size_t i = 0; i < kTransfers; ++i) in.emplace_back(kBytes, byte(comm.rank(), i));
    for (std::size_t i = 0; i < kTransfers; ++i) transfers.push_back(comm.allgather(in[i], out[i]));
    for (const auto& transfer : transfers) transfer->wait(soon());
    for (std::size_t i = 0; i < kTransfers; ++i) {
      EXPECT_TRUE(transfers[i]->done());
      for (int rank = 0; rank < 3; ++rank) {
        const auto begin = out[i].begin() + static_cast<std::ptrdiff_t>(kBytes) * rank;
        EXPECT_EQ(std::count(begin, begin + kBytes, byte(rank, i)), kBytes) << i << " " << rank;
      }
    }
  });
}

// Nobody waits: that a transfer has failed shows in done(), too.
TEST(C10d, AFailedTransferIsDone) {
  c10d_gloo_ranks({3}).front().run([](Communicator& comm) {
    EXPECT_EQ(gather_bytes(comm, std::vector(1, std::byte{1})).size(), 3U);
    if (comm.rank() == 0) {
      comm.abort();
      return;
    }
    std::vector<std::byte> in(100);
    std::vector<std::byte> out(300);
    const auto transfer = comm.allgather(in, out);
    for (const Deadline end = soon(); !transfer->done() && Clock::now() < end;) {
      std::this_thread::yield();
    }
    EXPECT_TRUE(transfer->done());
    EXPECT_THROW(transfer->wait(soon()), TransportError);
  });
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
