// The exchanges between processes whose kernels use different instruction sets: rank r is held to
// the r-th SIMD target of this machine, as if the hosts had different CPUs.
#include <gtest/gtest.h>

#include "compressors/core/simd.h"
#include "tests/comm/exchange_contract.h"
#include "tests/support/mpi_ranks.h"

namespace thinwire::testing {

namespace {

// Every codec where each rank has a target of its own; elsewhere it is the transport that is
// tested.
Selection selection() {
  return world_size() == 4 ? Selection::kEveryCodec : Selection::kOneACollective;
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Mpi, ExchangeContract,
                         ::testing::ValuesIn(exchange_cases(mpi_ranks(), selection())),
                         exchange_name);

namespace {

TEST(MpiExchange, RanksUseDifferentInstructionSets) {
  if (world_size() == 1 || simd_targets().size() == 1) {
    return;  // nothing that could differ
  }
  mpi_ranks()[0].run([](Communicator& comm) {
    std::string target = simd_target();
    target.resize(16);
    EXPECT_FALSE(same_on_all_ranks(comm, std::as_bytes(std::span<const char>(target))))
        << "all use " << target;
  });
}

}  // namespace

}  // namespace thinwire::testing
