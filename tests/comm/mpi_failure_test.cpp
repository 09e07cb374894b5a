// Starts jobs under mpirun in which one rank dies or hangs, and reads what the job says.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <memory>
#include <random>
#include <string>

namespace thinwire {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int kTimedOut = 124;

struct JobResult {
  int status = 0;
  std::string output;
};

JobResult run_job(int ranks, const std::string& arguments) {
  // timeout only ends a job that hangs, which fails the test.
  const std::string command =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 LSAN_OPTIONS=detect_leaks=0 "
      "timeout -k 5 90 " TW_MPIEXEC " --oversubscribe -np " +
      std::to_string(ranks) + " " TW_FAILING_JOB " " + arguments + " 2>&1";
  JobResult result;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) {
    ADD_FAILURE() << "cannot start " << command;
    return result;
  }
  char buffer[4096];
  for (std::size_t n = 0; (n = fread(buffer, 1, sizeof buffer, pipe)) > 0;) {
    result.output.append(buffer, n);
  }
  const int status = pclose(pipe);
  result.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  return result;
}

TEST(MpiFailure, AnUndisturbedJobFinishes) {
  const JobResult job = run_job(3, "none 0 0 0 before 0");
  EXPECT_EQ(job.status, 0) << job.output;
  EXPECT_THAT(job.output, HasSubstr("FINISHED"));
  EXPECT_THAT(job.output, Not(HasSubstr("REPORT")));
}

class MpiKilledRank : public ::testing::TestWithParam<unsigned> {};

TEST_P(MpiKilledRank, EndsTheJobWithAReport) {
  std::mt19937 random(GetParam());
  const auto ranks = static_cast<int>(2 + random() % 3);
  const bool last_bucket = GetParam() % 5 == 0;
  const std::string arguments =
      std::string("kill ") + std::to_string(random() % static_cast<unsigned>(ranks)) + " " +
      std::to_string(random() % 4) + " " + std::to_string(last_bucket ? 3 : random() % 4) +
      (random() % 2 == 0 ? " before " : " after ") + std::to_string(random() % 2000);
  const JobResult job = run_job(ranks, arguments);
  EXPECT_NE(job.status, 0) << arguments;
  EXPECT_NE(job.status, kTimedOut) << arguments << " hangs: " << job.output;
  EXPECT_THAT(job.output, AnyOf(HasSubstr("signal 9"), HasSubstr("REPORT lost a peer at step")))
      << arguments;
}

INSTANTIATE_TEST_SUITE_P(Points, MpiKilledRank, ::testing::Range(0U, 20U));

TEST(MpiFailure, AStoppedRankIsReportedWithTheStepAndTheJobEnds) {
  for (const char* arguments : {"stop 1 2 1 before 0", "stop 0 1 3 before 0"}) {
    const JobResult job = run_job(3, arguments);
    EXPECT_NE(job.status, 0) << arguments;
    EXPECT_NE(job.status, kTimedOut) << arguments << " hangs: " << job.output;
    const std::string step(1, arguments[7]);
    EXPECT_THAT(job.output, HasSubstr("REPORT lost a peer at step " + step)) << arguments;
    EXPECT_THAT(job.output, HasSubstr("(deadline 3.0 s)")) << arguments;
    EXPECT_THAT(job.output, HasSubstr("hint: ")) << arguments;
  }
}

}  // namespace
}  // namespace thinwire
