// GradientReducer over loopback when a peer dies, hangs or sends damaged bytes, or the caller gives
// up: every survivor gets an error that names the peer, and memory is at a committed step.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "comm/reducer.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using std::chrono::milliseconds;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr std::uint64_t kSteps = 4;
constexpr const char* kPolicy = R"(
  policy = "topk:0.05,values=q8"
  [[rule]]
  name = "fc2.weight"
  policy = "q4"
)";
const std::vector<std::vector<std::size_t>> kBuckets = {{6, 5}, {4, 3}, {2}, {1, 0}};

ReducerOptions with_deadline(milliseconds deadline) {
  ReducerOptions options;
  options.deadline = deadline;
  options.roll_call_grace = milliseconds(1500);
  return options;
}

// states[rank][s]: what rank's memory holds after s undisturbed steps.
const std::vector<std::vector<ReducerState>>& undisturbed() {
  static const std::vector<std::vector<ReducerState>> states = [] {
    std::vector<std::vector<ReducerState>> result(kRanks);
    run_reducers(kRanks, kPolicy, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      auto& mine = result[static_cast<std::size_t>(rank)];
      mine.push_back(reducer.state());
      for (std::uint64_t step = 0; step < kSteps; ++step) {
        gradients.fill(step, rank);
        reduce_step(reducer, gradients, kBuckets);
        mine.push_back(reducer.state());
      }
    });
    return result;
  }();
  return states;
}

void expect_committed(const ReducerState& state) {
  ASSERT_LE(state.step, kSteps);
  const ReducerState& expected =
      undisturbed()[static_cast<std::size_t>(state.rank)][static_cast<std::size_t>(state.step)];
  for (const StateEntry& entry : state.entries) {
    std::vector<float> wanted(entry.values.size());  // a memory made in the undone first step
    for (const StateEntry& candidate : expected.entries) {
      if (candidate.key == entry.key) {
        wanted = candidate.values;
      }
    }
    ASSERT_EQ(wanted.size(), entry.values.size());
    EXPECT_EQ(0, std::memcmp(wanted.data(), entry.values.data(), wanted.size() * sizeof(float)))
        << entry.key << " at step " << state.step << " of rank " << state.rank;
  }
}

// Trains until something is thrown; calls `before(step, bucket)` before each reduce() and
// `after(step, bucket)` when it has returned. Then checks that the failure is final and that memory
// is at a committed step.
using Point = std::function<void(std::uint64_t step, std::size_t bucket)>;
std::exception_ptr train(GradientReducer& reducer, int rank, const Point& before = {},
                         const Point& after = {}) {
  Gradients gradients(reducer.layers());
  std::exception_ptr failure;
  try {
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      gradients.fill(step, rank);
      std::vector<std::shared_ptr<Reduction>> reductions;
      for (std::size_t bucket = 0; bucket < kBuckets.size(); ++bucket) {
        if (before) {
          before(step, bucket);
        }
        reductions.push_back(
            reducer.reduce(gradients.bucket(kBuckets[bucket], bucket + 1 == kBuckets.size())));
        if (after) {
          after(step, bucket);
        }
      }
      for (const auto& reduction : reductions) {
        reduction->wait();
      }
    }
  } catch (...) {
    failure = std::current_exception();
  }
  if (failure) {
    try {
      reducer.reduce(gradients.bucket({0}, true));
      ADD_FAILURE() << "rank " << rank << ": reduce() after a failure was accepted";
    } catch (const Error& again) {
      EXPECT_EQ(again.what(), message(failure));
    }
    expect_committed(reducer.state());
  }
  return failure;
}

void expect_peer_lost(const std::exception_ptr& failure, int rank, int victim) {
  ASSERT_TRUE(failure) << "rank " << rank << " noticed nothing";
  try {
    std::rethrow_exception(failure);
  } catch (const PeerLost& lost) {
    EXPECT_THAT(lost.ranks, ElementsAre(victim)) << lost.what();
    EXPECT_LT(lost.step, kSteps);
    EXPECT_THAT(lost.what(),
                AllOf(HasSubstr(std::string("no answer from rank ") + std::to_string(victim) +
                                " at step " + std::to_string(lost.step)),
                      HasSubstr(std::string("this rank (") + std::to_string(rank) + " of 4)"),
                      HasSubstr("deadline"), HasSubstr("hint: ")));
  } catch (const std::exception& other) {
    ADD_FAILURE() << "rank " << rank << " got " << other.what();
  }
}

class ReducerDeadRank : public ::testing::TestWithParam<unsigned> {};

TEST_P(ReducerDeadRank, EverySurvivorNamesItAndIsAtACommittedStep) {
  std::mt19937 random(GetParam());
  const int victim = static_cast<int>(random() % kRanks);
  const std::uint64_t at_step = random() % kSteps;
  // Every fifth time inside the last bucket.
  const std::size_t at_bucket =
      GetParam() % 5 == 0 ? kBuckets.size() - 1 : random() % kBuckets.size();
  const bool after_reduce = random() % 2 == 0 || GetParam() % 5 == 0;
  const auto delay = std::chrono::microseconds(random() % 300);
  const bool silent = GetParam() % 2 == 0;
  SCOPED_TRACE(std::string("rank ") + std::to_string(victim) + " dies at step " +
               std::to_string(at_step) + (after_reduce ? " after" : " before") + " bucket " +
               std::to_string(at_bucket));
  undisturbed();

  LoopbackGroup group(kRanks);
  std::atomic<bool> too_late{false};  // the step was through before death came
  const auto errors = run_group(group, kRanks, [&](int rank, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), small_model(), Policy::parse(kPolicy),
                            with_deadline(silent ? milliseconds(2000) : milliseconds(60'000)));
    const auto die = [&](std::uint64_t step, std::size_t bucket) {
      if (rank == victim && step == at_step && bucket == at_bucket) {
        std::this_thread::sleep_for(delay);
        group.kill(victim,
                   silent ? LoopbackGroup::Death::kSilent : LoopbackGroup::Death::kConnection);
      }
    };
    const std::exception_ptr failure =
        after_reduce ? train(reducer, rank, {}, die) : train(reducer, rank, die);
    if (rank != victim && failure) {
      expect_peer_lost(failure, rank, victim);
    } else if (rank != victim) {
      EXPECT_EQ(at_step, kSteps - 1) << "rank " << rank << " noticed nothing";
      EXPECT_EQ(at_bucket, kBuckets.size() - 1);
      too_late = true;
    }
  });
  for (const auto& error : errors) {
    EXPECT_EQ(message(error), "");
  }
  if (too_late) {  // possible only when death came after the last reduce() of all
    EXPECT_TRUE(after_reduce);
  }
}

INSTANTIATE_TEST_SUITE_P(Reducer, ReducerDeadRank, ::testing::Range(0U, 20U));

TEST(ReducerFailure, AHungRankIsNamedByAllOthers) {
  undisturbed();
  for (const int victim : {0, 3}) {
    LoopbackGroup group(kRanks);
    std::atomic<int> through{0};
    const auto errors = run_group(group, kRanks, [&](int rank, std::unique_ptr<Communicator> comm) {
      GradientReducer reducer(std::move(comm), small_model(), Policy::parse(kPolicy),
                              with_deadline(milliseconds(1500)));
      const std::exception_ptr failure =
          train(reducer, rank, [&](std::uint64_t step, std::size_t bucket) {
            while (rank == victim && step == 1 && bucket == 2 && through < kRanks - 1) {
              std::this_thread::sleep_for(milliseconds(5));
            }
          });
      if (rank != victim) {
        expect_peer_lost(failure, rank, victim);
        ++through;
      }
    });
    for (const auto& error : errors) {
      EXPECT_EQ(message(error), "");
    }
  }
}

TEST(ReducerFailure, DamagedBytesEndTheStepHereAndTheGroupElsewhere) {
  undisturbed();
  LoopbackGroup group(kRanks);
  std::atomic<int> messages{0};
  group.tamper([&](int sender, int receiver, std::span<std::byte> bytes) {
    if (sender == 1 && receiver == 2 && ++messages == 9 && !bytes.empty()) {
      bytes[bytes.size() / 2] ^= std::byte{4};
    }
  });
  const auto errors = run_group(group, kRanks, [&](int rank, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), small_model(), Policy::parse(kPolicy),
                            with_deadline(milliseconds(60'000)));
    const std::exception_ptr failure = train(reducer, rank);
    if (rank == 2) {
      ASSERT_TRUE(failure);
      EXPECT_THROW(std::rethrow_exception(failure), CorruptPayload) << message(failure);
      EXPECT_THAT(message(failure), HasSubstr("1"));
    } else {
      expect_peer_lost(failure, rank, 2);
    }
  });
  for (const auto& error : errors) {
    EXPECT_EQ(message(error), "");
  }
}

TEST(ReducerFailure, AbortFromAnotherThreadEndsWhatIsInFlight) {
  LoopbackGroup group(2);
  std::atomic<bool> aborted{false};
  const auto errors = run_group(group, 2, [&](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse("topk:0.05"),
                            with_deadline(milliseconds(60'000)));
    Gradients gradients(layers);
    gradients.fill(0, rank);
    if (rank == 0) {
      const auto reduction = reducer.reduce(gradients.bucket({0, 1, 2}, false));
      std::thread other([&] {
        reducer.abort();
        reducer.abort();
        aborted = true;
      });
      EXPECT_THROW(reduction->wait(), TransportError);
      other.join();
      EXPECT_THROW(reducer.reduce(gradients.bucket({3}, false)), TransportError);
      for (const StateEntry& entry : reducer.state().entries) {
        EXPECT_EQ(entry.values, std::vector<float>(entry.values.size())) << entry.key;
      }
    } else {
      while (!aborted) {
        std::this_thread::yield();
      }
      EXPECT_THROW(reducer.reduce(gradients.bucket({0, 1, 2}, true))->wait(), PeerLost);
    }
  });
  for (const auto& error : errors) {
    EXPECT_EQ(message(error), "");
  }
}

TEST(ReducerFailure, TheDestructorWaitsForWorkInFlight) {
  run_ranks(3, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    Gradients gradients(layers);
    gradients.fill(0, rank);
    const float mine = gradients.get(1, 0);
    std::vector<std::shared_ptr<Reduction>> reductions;
    {
      GradientReducer reducer(std::move(comm), layers, Policy::parse(kPolicy));
      for (std::size_t i = 0; i < kBuckets.size(); ++i) {
        reductions.push_back(
            reducer.reduce(gradients.bucket(kBuckets[i], i + 1 == kBuckets.size())));
      }
    }
    for (const auto& reduction : reductions) {
      reduction->wait();
    }
    EXPECT_NE(gradients.get(1, 0), mine);
  });
}

TEST(ReducerFailure, TheDestructorLeavesAnOpenStep) {
  run_ranks(3, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    Gradients gradients(layers);
    gradients.fill(0, rank);
    std::shared_ptr<Reduction> two_rounds;
    {
      GradientReducer reducer(std::move(comm), layers, Policy::parse("q4"));
      two_rounds = reducer.reduce(gradients.bucket({0, 2}, false));
    }
    // Its second transfer belongs to a tick that never came.
    EXPECT_THROW(two_rounds->wait(), InvalidArgument);
  });
}

}  // namespace
}  // namespace thinwire::testing
