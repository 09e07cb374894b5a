// main() of test programs that run under mpirun: every rank runs every test; the program fails when
// any rank fails. Rank 0 prints as usual, the others print their failures only. With
// TW_TEST_SIMD_BY_RANK set, THINWIRE_SIMD of rank r is the r-th target that this machine can run.
#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "compressors/core/simd.h"

namespace {

class FailuresOnly : public ::testing::EmptyTestEventListener {
 public:
  explicit FailuresOnly(int rank) : rank_(rank) {}
  void OnTestStart(const ::testing::TestInfo& test) override {
    test_ = std::string(test.test_suite_name()) + "." + test.name();
  }
  // GoogleTest holds its lock here: nothing may be asked of it.
  void OnTestPartResult(const ::testing::TestPartResult& result) override {
    if (result.failed()) {
      std::fprintf(stderr, "rank %d: %s\n%s:%d\n%s\n", rank_, test_.c_str(),
                   result.file_name() != nullptr ? result.file_name() : "", result.line_number(),
                   result.message());
    }
  }

 private:
  int rank_;
  std::string test_;
};

}  // namespace

int main(int argc, char** argv) {
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (std::getenv("TW_TEST_SIMD_BY_RANK") != nullptr) {
    const auto targets = thinwire::simd_targets();
    const std::string& target = targets[static_cast<std::size_t>(rank) % targets.size()];
    setenv("THINWIRE_SIMD", target.c_str(), 1);
    thinwire::apply_environment_simd();
  }
  ::testing::InitGoogleTest(&argc, argv);
  if (rank != 0) {
    auto& listeners = ::testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailuresOnly(rank));
  }
  int failed = RUN_ALL_TESTS();
  MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);
  MPI_Finalize();
  return failed;
}
