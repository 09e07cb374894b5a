// This process as one rank of MPI_COMM_WORLD, for the contract suites under mpirun.
#pragma once

#include <mpi.h>

#include <vector>

#include "comm/mpi/mpi_communicator.h"
#include "tests/support/ranks.h"

namespace thinwire::testing {

inline int world_size() {
  int size = 1;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

inline std::vector<Ranks> mpi_ranks(MpiOptions options = {}) {
  Ranks ranks;
  ranks.label = "mpi";
  ranks.size = world_size();
  ranks.run = [options](const RankWork& work) {
    work(*make_mpi_communicator(MPI_COMM_WORLD, options));
  };
  return {ranks};
}

}  // namespace thinwire::testing
