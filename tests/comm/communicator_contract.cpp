#include "tests/comm/communicator_contract.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "compressors/core/error.h"
#include "compressors/core/random.h"

namespace thinwire::testing {

namespace {

// Around the rank count, around the cuts of the transports' algorithms, and past their eager sizes.
std::vector<std::size_t> awkward_sizes(int ranks) {
  const auto p = static_cast<std::size_t>(ranks);
  return {0, 1, p - 1, p, p + 1, 2 * p + 1, 1000, 16384, 16385, 65537, 300007};
}

// Byte i of what `from` sends to `to`.
std::byte pattern(int from, int to, std::size_t i) {
  return static_cast<std::byte>(
      (static_cast<std::size_t>(from) * 131 + static_cast<std::size_t>(to) * 31 + i * 7 + i / 251) &
      0xFFU);
}

template <typename T>
void expect_exact_sum(Communicator& comm, DType dtype, std::size_t n) {
  // Small integers: exact in any order of summation.
  std::vector<T> data(n + 2, T{-1});
  for (std::size_t i = 0; i < n; ++i) {
    data[i + 1] = static_cast<T>(static_cast<std::size_t>(comm.rank() + 1) * (i % 101));
  }
  comm.allreduce_sum({data.data() + 1, static_cast<std::int64_t>(n), dtype})->wait(soon());
  const int p = comm.size();
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < n; ++i) {
    wrong += data[i + 1] != static_cast<T>(static_cast<std::size_t>(p * (p + 1) / 2) * (i % 101));
  }
  EXPECT_EQ(wrong, 0U) << n << " elements at rank " << comm.rank();
  EXPECT_EQ(data.front(), T{-1}) << "written before the data";
  EXPECT_EQ(data.back(), T{-1}) << "written behind the data";
}

}  // namespace

TEST_P(CommunicatorContract, KnowsItsPlace) {
  std::atomic<int> seen{0};
  GetParam().run([&](Communicator& comm) {
    EXPECT_EQ(comm.size(), GetParam().size);
    EXPECT_GE(comm.rank(), 0);
    EXPECT_LT(comm.rank(), comm.size());
    EXPECT_FALSE(comm.name().empty());
    seen |= 1 << comm.rank();
    const auto mine = static_cast<std::byte>(comm.rank());
    const std::vector<std::byte> all = gather_bytes(comm, {&mine, 1});
    for (int rank = 0; rank < comm.size(); ++rank) {
      EXPECT_EQ(all[static_cast<std::size_t>(rank)], static_cast<std::byte>(rank));
    }
  });
  EXPECT_NE(seen, 0);
}

TEST_P(CommunicatorContract, AllreduceIsExactOnIntegers) {
  GetParam().run([](Communicator& comm) {
    for (const std::size_t n : awkward_sizes(comm.size())) {
      expect_exact_sum<float>(comm, DType::kF32, n);
      expect_exact_sum<double>(comm, DType::kF64, n);
    }
  });
}

// Sums whose last bits depend on the order: all ranks must have added in the same one.
TEST_P(CommunicatorContract, AllreduceGivesTheSameBitsEverywhere) {
  GetParam().run([](Communicator& comm) {
    if (!comm.traits().identical_allreduce) {
      return;
    }
    for (const std::size_t n : awkward_sizes(comm.size())) {
      for (std::uint64_t step = 0; step < 3; ++step) {
        const RandomStream stream = random_stream(n, step, comm.rank());
        std::vector<float> data(n);
        for (std::size_t i = 0; i < n; ++i) {
          const auto words = random_block(stream, i);
          const int exponent = static_cast<int>(words[1] % 40) - 20;
          data[i] = std::ldexp(static_cast<float>(static_cast<std::int32_t>(words[0])), exponent);
        }
        comm.allreduce_sum(view(data))->wait(soon());
        EXPECT_TRUE(same_on_all_ranks(comm, std::as_bytes(std::span<const float>(data))))
            << n << " elements";
      }
    }
  });
}

TEST_P(CommunicatorContract, AllgatherDeliversInRankOrder) {
  GetParam().run([](Communicator& comm) {
    for (const std::size_t n : awkward_sizes(comm.size())) {
      std::vector<std::byte> in(n);
      for (std::size_t i = 0; i < n; ++i) {
        in[i] = pattern(comm.rank(), 0, i);
      }
      const std::vector<std::byte> before = in;
      const std::vector<std::byte> out = gather_bytes(comm, in);
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        wrong += out[i] != pattern(static_cast<int>(i / n), 0, i % n);
      }
      EXPECT_EQ(wrong, 0U) << n << " bytes a rank, at rank " << comm.rank();
      EXPECT_EQ(in, before);
    }
  });
}

TEST_P(CommunicatorContract, AlltoallDeliversBlocks) {
  GetParam().run([](Communicator& comm) {
    const auto p = static_cast<std::size_t>(comm.size());
    for (const std::size_t block : awkward_sizes(comm.size())) {
      std::vector<std::byte> in(block * p);
      std::vector<std::byte> out(block * p, std::byte{0xEE});
      for (std::size_t i = 0; i < in.size(); ++i) {
        in[i] = pattern(comm.rank(), static_cast<int>(i / block), i % block);
      }
      comm.alltoall(in, out)->wait(soon());
      std::size_t wrong = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        wrong += out[i] != pattern(static_cast<int>(i / block), comm.rank(), i % block);
      }
      EXPECT_EQ(wrong, 0U) << "blocks of " << block << " bytes at rank " << comm.rank();
    }
  });
}

TEST_P(CommunicatorContract, SeveralTransfersInFlight) {
  GetParam().run([](Communicator& comm) {
    const auto p = static_cast<std::size_t>(comm.size());
    std::vector<float> sums(5000, static_cast<float>(comm.rank()));
    std::vector<std::byte> mine(7000, static_cast<std::byte>(comm.rank() + 1));
    std::vector<std::byte> all(mine.size() * p);
    std::vector<std::byte> blocks(300 * p, static_cast<std::byte>(comm.rank() + 2));
    std::vector<std::byte> received(blocks.size());
    const auto first = comm.allreduce_sum(view(sums));
    const auto second = comm.allgather(mine, all);
    const auto third = comm.alltoall(blocks, received);
    third->wait(soon());
    first->wait(soon());
    second->wait(soon());
    EXPECT_TRUE(first->done() && second->done() && third->done());
    EXPECT_EQ(sums.back(), static_cast<float>(comm.size() * (comm.size() - 1) / 2));
    EXPECT_EQ(all.back(), static_cast<std::byte>(comm.size()));
    EXPECT_EQ(received.back(), static_cast<std::byte>(comm.size() + 1));
  });
}

TEST_P(CommunicatorContract, DoneAloneMakesProgress) {
  GetParam().run([](Communicator& comm) {
    std::vector<float> data(20000, 1.0F);
    const auto transfer = comm.allreduce_sum(view(data));
    const Deadline end = soon();
    while (!transfer->done() && Clock::now() < end) {
      std::this_thread::yield();
    }
    ASSERT_TRUE(transfer->done());
    transfer->wait(soon());
    EXPECT_EQ(data.back(), static_cast<float>(comm.size()));
  });
}

TEST_P(CommunicatorContract, CountsWhatItSends) {
  GetParam().run([](Communicator& comm) {
    const auto p = static_cast<std::uint64_t>(comm.size());
    std::vector<float> data(100003, 1.0F);
    std::vector<std::byte> mine(50000);
    std::vector<std::byte> all(mine.size() * p);
    const std::uint64_t start = comm.sent_bytes();
    comm.allreduce_sum(view(data))->wait(soon());
    const std::uint64_t reduced = comm.sent_bytes() - start;
    comm.allgather(mine, all)->wait(soon());
    const std::uint64_t gathered = comm.sent_bytes() - start - reduced;
    if (p == 1) {
      EXPECT_EQ(comm.sent_bytes(), 0U);
      return;
    }
    // All ranks together cannot do with less than 2 (P - 1) times the data, which every rank must
    // get but one; nothing here sends more than P times that.
    const std::uint64_t n = data.size() * sizeof(float);
    std::uint64_t total = reduced;
    const auto every = gather_bytes(comm, std::as_bytes(std::span(&reduced, 1)));
    total = 0;
    for (std::size_t r = 0; r < p; ++r) {
      std::uint64_t one = 0;
      std::memcpy(&one, every.data() + r * sizeof(one), sizeof(one));
      total += one;
    }
    EXPECT_GE(total, 2 * (p - 1) * n);
    EXPECT_LE(total, p * 2 * (p - 1) * n * 11 / 10);
    // An allgather sends (P - 1) messages; headers are under 8 % of messages of this size.
    EXPECT_GE(gathered, (p - 1) * mine.size());
    EXPECT_LE(gathered, (p - 1) * mine.size() * 108 / 100);
  });
}

TEST_P(CommunicatorContract, RefusesWrongSizes) {
  GetParam().run([](Communicator& comm) {
    const auto p = static_cast<std::size_t>(comm.size());
    std::vector<std::byte> in(p * 3);
    std::vector<std::byte> out(p * p * 3 + 1);
    EXPECT_THROW(comm.allgather(in, out), InvalidArgument);
    EXPECT_THROW(comm.alltoall(in, out), InvalidArgument);
    EXPECT_THROW(comm.allreduce_sum({in.data(), 1, DType::kBF16}), InvalidArgument);
    // Nothing was started: the group still works.
    EXPECT_TRUE(same_on_all_ranks(comm, {in.data(), 1}));
  });
}

// What every rank must see when one of them never comes: an error by the deadline, and the group
// refuses to go on.
TEST_P(CommunicatorContract, AbsentPeerEndsInAnErrorByTheDeadline) {
  if (GetParam().size == 1) {
    return;  // no peer that could be absent
  }
  GetParam().run([](Communicator& comm) {
    if (!comm.traits().survives_failure) {
      return;
    }
    std::vector<float> data(1000, 1.0F);
    same_on_all_ranks(comm, {});
    if (comm.rank() == comm.size() - 1) {
      EXPECT_TRUE(comm.roll_call(std::chrono::seconds(60)).empty());
      return;
    }
    const auto start = Clock::now();
    std::unique_ptr<Transfer> transfer;
    EXPECT_THROW(
        {
          transfer = comm.allreduce_sum(view(data));
          transfer->wait(start + std::chrono::milliseconds(200));
        },
        TransportError);
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
    comm.abort();
    EXPECT_THROW(comm.allreduce_sum(view(data))->wait(soon()), TransportError);
    EXPECT_TRUE(comm.roll_call(std::chrono::seconds(60)).empty()) << "nobody died";
  });
}

TEST_P(CommunicatorContract, AbortEndsAWait) {
  if (GetParam().size == 1) {
    return;  // nothing to wait for
  }
  using Start = std::unique_ptr<Transfer> (*)(Communicator&, std::vector<float>&);
  const std::vector<Start> verbs = {
      [](Communicator& comm, std::vector<float>& data) { return comm.allreduce_sum(view(data)); },
      [](Communicator& comm, std::vector<float>& data) {
        const auto all = std::as_writable_bytes(std::span(data));
        return comm.allgather(all.first(all.size() / static_cast<std::size_t>(comm.size())), all);
      },
      [](Communicator& comm, std::vector<float>& data) {
        const auto half = data.size() / 2;
        return comm.alltoall(std::as_bytes(std::span(data).first(half)),
                             std::as_writable_bytes(std::span(data).last(half)));
      }};
  for (const Start start : verbs) {
    GetParam().run([start](Communicator& comm) {
      if (!comm.traits().survives_failure) {
        return;
      }
      std::vector<float> data(2000 * static_cast<std::size_t>(comm.size()), 1.0F);
      if (comm.rank() == 0) {
        comm.roll_call(std::chrono::seconds(60));
        return;
      }
      const auto transfer = start(comm, data);
      std::thread aborter([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
        comm.abort();
        comm.abort();
      });
      EXPECT_THROW(transfer->wait(soon()), TransportError);
      EXPECT_TRUE(transfer->done());
      EXPECT_THROW(transfer->wait(soon()), TransportError) << "a second time";
      aborter.join();
      comm.roll_call(std::chrono::seconds(60));
    });
  }
}

}  // namespace thinwire::testing
