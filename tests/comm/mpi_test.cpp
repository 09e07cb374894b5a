#include "comm/mpi/mpi_communicator.h"

#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "comm/reducer.h"
#include "tests/comm/communicator_contract.h"
#include "tests/comm/reducer_fixture.h"
#include "tests/support/mpi_ranks.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(Processes, CommunicatorContract, ::testing::ValuesIn(mpi_ranks()),
                         ranks_name);

// Counts beyond an int, in small: transfers are cut at 4000 elements, blocks described by types.
INSTANTIATE_TEST_SUITE_P(CutTransfers, CommunicatorContract,
                         ::testing::ValuesIn(mpi_ranks({.max_count = 4000})), ranks_name);

namespace {

TEST(Mpi, TraitsSayThatAFailureEndsTheProgram) {
  const auto comm = make_mpi_communicator(MPI_COMM_WORLD);
  EXPECT_FALSE(comm->traits().survives_failure);
  EXPECT_TRUE(comm->roll_call(std::chrono::milliseconds(1)).empty());
}

// Its own duplicate: the program's messages on the parent never meet ours.
TEST(Mpi, LeavesTheParentAlone) {
  MPI_Comm parent = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &parent);
  const auto comm = make_mpi_communicator(parent);
  std::vector<float> ours(1000, 1.0F);
  const auto transfer = comm->allreduce_sum(view(ours));
  int theirs = 1;
  MPI_Allreduce(MPI_IN_PLACE, &theirs, 1, MPI_INT, MPI_SUM, parent);
  MPI_Comm_free(&parent);
  transfer->wait(soon());
  EXPECT_EQ(theirs, world_size());
  EXPECT_EQ(ours[999], static_cast<float>(world_size()));
}

TEST(Mpi, DeadlinePassesAndTheGroupRefusesToGoOn) {
  if (world_size() == 1) {
    return;  // no peer that could be late
  }
  // MPI cannot cancel: the late rank joins in the end, and the memory lives until then.
  std::vector<float> data(1000, 1.0F);
  auto comm = make_mpi_communicator(MPI_COMM_WORLD);
  std::unique_ptr<Transfer> transfer;
  if (comm->rank() != 0) {
    transfer = comm->allreduce_sum(view(data));
    const auto start = Clock::now();
    EXPECT_THROW(transfer->wait(start + std::chrono::milliseconds(100)), TransportError);
    EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
    EXPECT_THROW(comm->allreduce_sum(view(data)), TransportError);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (comm->rank() == 0) {
    transfer = comm->allreduce_sum(view(data));
  }
  while (!transfer->done()) {
    std::this_thread::yield();
  }
  EXPECT_EQ(data[0], static_cast<float>(world_size()));
  MPI_Barrier(MPI_COMM_WORLD);
}

TEST(Mpi, AbortEndsAWait) {
  if (world_size() == 1) {
    return;  // nothing to wait for
  }
  static std::vector<float> data(10, 1.0F);  // what was aborted may still be written to
  auto comm = make_mpi_communicator(MPI_COMM_WORLD);
  std::unique_ptr<Transfer> transfer;
  if (comm->rank() != 0) {
    transfer = comm->allreduce_sum(view(data));
    std::thread aborter([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      comm->abort();
    });
    EXPECT_THROW(transfer->wait(soon()), TransportError);
    aborter.join();
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (comm->rank() == 0) {
    comm->allreduce_sum(view(data))->wait(soon());
    comm->abort();  // as the others: the duplicate is left to MPI_Finalize
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

// A late rank's message is written to the receive buffer of a reducer that is gone by then.
TEST(Mpi, WhatALateRankSendsFindsMemoryAfterTheReducersEnd) {
  if (world_size() == 1) {
    return;  // nobody sends
  }
  static const std::vector<Layer> layers = {{"weight", {1000, 50}, DType::kF32}};
  static Gradients gradients(layers);
  auto comm = make_mpi_communicator(MPI_COMM_WORLD);
  const int rank = comm->rank();
  auto reducer =
      std::make_unique<GradientReducer>(std::move(comm), layers, Policy::parse("topk:0.5"));
  gradients.fill(0, rank);
  const auto reduce_and_abort = [&] {
    const auto reduction = reducer->reduce(gradients.bucket({0}, true));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    reducer->abort();
    if (rank != 0) {
      EXPECT_THROW(reduction->wait(), TransportError);
    }
    reducer.reset();
  };
  if (rank != 0) {
    reduce_and_abort();
  }
  MPI_Barrier(MPI_COMM_WORLD);
  if (rank == 0) {  // whether this finds all it waits for is up to MPI
    reduce_and_abort();
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace

}  // namespace thinwire::testing
