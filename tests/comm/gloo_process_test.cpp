// Gloo between processes that meet in a folder: all live, or one kills itself in the middle of a
// collective. The program starts itself again for each rank: --rank RANK SIZE FOLDER VICTIM, VICTIM
// -1 for none.
#include <gloo/rendezvous/file_store.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "comm/gloo/gloo_communicator.h"
#include "tests/support/ranks.h"

namespace thinwire::testing {

namespace {

constexpr int kSteps = 20;
constexpr int kLastStepOfVictim = 7;

// Exit status of a rank: 0 when everything was as it must be.
int run_rank(int rank, int size, const std::string& folder, int victim) {
  const auto comm = make_gloo_communicator(
      rank, size, std::make_shared<gloo::rendezvous::FileStore>(folder), {.hostname = "127.0.0.1"});
  std::vector<float> data(50000);
  for (int step = 0; step < kSteps; ++step) {
    std::fill(data.begin(), data.end(), static_cast<float>(rank + step));
    try {
      const auto transfer = comm->allreduce_sum(view(data));
      if (rank == victim && step == kLastStepOfVictim) {
        std::raise(SIGKILL);
      }
      transfer->wait(soon());
    } catch (const TransportError& error) {
      if (victim < 0 || step < kLastStepOfVictim) {
        std::cerr << "rank " << rank << ", step " << step << ": " << error.what() << "\n";
        return 2;
      }
      comm->abort();
      const std::vector<int> missing = comm->roll_call(std::chrono::seconds(5));
      return missing == std::vector<int>{victim} ? 0 : 3;
    }
    if (data.back() != static_cast<float>(size * (size - 1) / 2 + size * step)) {
      return 4;
    }
  }
  return victim < 0 ? 0 : 5;
}

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "thinwire-gloo-XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// What waitpid says of each rank.
std::vector<int> run_processes(int size, int victim) {
  const Folder folder;
  std::vector<pid_t> children;
  for (int rank = 0; rank < size; ++rank) {
    const std::string texts[] = {std::to_string(rank), std::to_string(size), folder.path(),
                                 std::to_string(victim)};
    const pid_t child = fork();
    if (child == 0) {
      execl("/proc/self/exe", "gloo_rank", "--rank", texts[0].c_str(), texts[1].c_str(),
            texts[2].c_str(), texts[3].c_str(), static_cast<char*>(nullptr));
      _exit(127);
    }
    children.push_back(child);
  }
  std::vector<int> statuses;
  for (const pid_t child : children) {
    statuses.push_back(-1);
    waitpid(child, &statuses.back(), 0);
  }
  return statuses;
}

TEST(GlooProcesses, SumTogether) {
  for (const int size : {2, 3, 4, 7}) {
    EXPECT_EQ(run_processes(size, -1), std::vector<int>(static_cast<std::size_t>(size), 0));
  }
}

TEST(GlooProcesses, SurvivorsNameTheDead) {
  for (const int size : {2, 4}) {
    for (const int victim : {0, size - 1}) {
      const std::vector<int> statuses = run_processes(size, victim);
      for (int rank = 0; rank < size; ++rank) {
        const int status = statuses[static_cast<std::size_t>(rank)];
        if (rank == victim) {
          EXPECT_TRUE(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) << status;
        } else {
          EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0)
              << "rank " << rank << " of " << size << ", victim " << victim << ": exit "
              << WEXITSTATUS(status) << ", signal " << WTERMSIG(status);
        }
      }
    }
  }
}

}  // namespace

}  // namespace thinwire::testing

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "--rank") {
    return thinwire::testing::run_rank(std::atoi(argv[2]), std::atoi(argv[3]), argv[4],
                                       std::atoi(argv[5]));
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
