// A job under mpirun in which one rank dies (kill) or hangs (stop) at a chosen point.
//   mpi_failing_job kill|stop|none RANK STEP BUCKET before|after DELAY_US
#include <mpi.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <string>
#include <thread>

#include "comm/mpi/mpi_communicator.h"
#include "comm/reducer.h"
#include "tests/comm/reducer_fixture.h"

namespace {

using thinwire::testing::Gradients;
using thinwire::testing::small_model;

struct Point {
  int signal = 0;
  int rank = 0;
  int step = 0;
  int bucket = 0;
  bool after = false;
  int delay_us = 0;
};

void run(const Point& point, int rank) {
  const std::vector<std::vector<std::size_t>> buckets = {{6, 5}, {4, 3}, {2}, {1, 0}};
  thinwire::ReducerOptions options;
  options.deadline = std::chrono::milliseconds(3000);
  options.roll_call_grace = std::chrono::milliseconds(500);
  options.report = [](const std::string& text) { std::cerr << "REPORT " << text << std::endl; };
  options.end_program = [] { MPI_Abort(MPI_COMM_WORLD, 3); };
  thinwire::GradientReducer reducer(
      thinwire::make_mpi_communicator(MPI_COMM_WORLD), small_model(),
      thinwire::Policy::parse("policy = \"topk:0.05\"\n[[rule]]\nname = \"fc2.weight\"\n"
                              "policy = \"q4\""),
      options);
  Gradients gradients(reducer.layers());
  for (int step = 0; step < 4; ++step) {
    gradients.fill(static_cast<std::uint64_t>(step), rank);
    std::vector<std::shared_ptr<thinwire::Reduction>> reductions;
    for (int bucket = 0; bucket < 4; ++bucket) {
      const auto fall = [&](bool after) {
        if (point.signal != 0 && rank == point.rank && step == point.step &&
            bucket == point.bucket && after == point.after) {
          std::this_thread::sleep_for(std::chrono::microseconds(point.delay_us));
          std::raise(point.signal);
        }
      };
      fall(false);
      reductions.push_back(
          reducer.reduce(gradients.bucket(buckets[static_cast<std::size_t>(bucket)], bucket == 3)));
      fall(true);
    }
    for (const auto& reduction : reductions) {
      reduction->wait();
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 7) {
    std::cerr << "usage: mpi_failing_job kill|stop|none RANK STEP BUCKET before|after DELAY_US\n";
    return 2;
  }
  const std::string how = argv[1];
  const Point point{.signal = how == "kill"   ? SIGKILL
                              : how == "stop" ? SIGSTOP
                                              : 0,
                    .rank = std::atoi(argv[2]),
                    .step = std::atoi(argv[3]),
                    .bucket = std::atoi(argv[4]),
                    .after = std::string(argv[5]) == "after",
                    .delay_us = std::atoi(argv[6])};
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  run(point, rank);
  MPI_Finalize();
  std::cout << "FINISHED" << std::endl;
  return 0;
}
