// MPI: nonblocking collectives on a private duplicate of a communicator. Waiting polls with a
// growing back-off, so that more ranks than cores get on; MPI makes progress in these polls only.
//
// Obeys comm/communicator.h. The collectives may run on a thread of their own beside the program's
// MPI calls, hence MPI_THREAD_MULTIPLE is required. MPI cannot cancel a collective: after a failed
// wait MPI may still write into the transfer's memory, and the program should end
// (traits().survives_failure is false, roll_call() knows nothing).
#pragma once

#include <mpi.h>

#include <cstddef>
#include <limits>
#include <memory>

#include "comm/communicator.h"

namespace thinwire {

struct MpiOptions {
  // Most elements that are given to MPI as one count; larger transfers are cut (allreduce) or
  // described by a derived datatype (allgather, alltoall). Smaller in tests only.
  std::size_t max_count = static_cast<std::size_t>(std::numeric_limits<int>::max());
};

// Collective over `parent`, which is duplicated and may be freed afterwards. Error when MPI is not
// initialised, finalised, or offers less than MPI_THREAD_MULTIPLE. Destroy it, on all ranks,
// before MPI_Finalize.
std::unique_ptr<Communicator> make_mpi_communicator(MPI_Comm parent, MpiOptions options = {});

}  // namespace thinwire
