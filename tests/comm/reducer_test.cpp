// GradientReducer over loopback: results, replicas, memory over bucket rebuilds, misuse.
#include "comm/reducer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <map>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Case {
  const char* policy;
  int ranks;
};
void PrintTo(const Case& c, std::ostream* out) { *out << c.policy << " on " << c.ranks; }

class ReducerPolicies : public ::testing::TestWithParam<Case> {};

using Hashes = std::vector<std::vector<std::uint64_t>>;  // [step][rank]

void expect_identical_replicas(const Hashes& hashes) {
  for (std::size_t step = 0; step < hashes.size(); ++step) {
    for (std::size_t rank = 1; rank < hashes[step].size(); ++rank) {
      EXPECT_EQ(hashes[step][rank], hashes[step][0]) << "step " << step << ", rank " << rank;
    }
  }
}

TEST_P(ReducerPolicies, ReplicasAreIdenticalAtEveryStepAndOverBucketRebuilds) {
  constexpr std::size_t kSteps = 6;
  const int ranks = GetParam().ranks;
  Hashes hashes(kSteps, std::vector<std::uint64_t>(static_cast<std::size_t>(ranks)));
  run_reducers(ranks, GetParam().policy, [&](int rank, auto& reducer, auto& gradients) {
    const std::vector<std::vector<std::vector<std::size_t>>> layouts = {
        {{0, 1}, {2, 3}, {4}, {5, 6}}, {{6, 5}, {4, 3, 2}, {1, 0}}, {{6, 5, 4, 3, 2, 1, 0}}};
    for (std::size_t step = 0; step < kSteps; ++step) {
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, layouts[std::min<std::size_t>(step / 2, 2)]);
      hashes[step][static_cast<std::size_t>(rank)] = gradients.hash();
    }
    EXPECT_EQ(reducer.stats().steps, kSteps);
    EXPECT_EQ(reducer.stats().skipped_steps, 0u);
  });
  expect_identical_replicas(hashes);
}

// Per element: mean gradient + old pending update == result + new pending update, where the pending
// update is the mean of the workers' residuals plus the owner's.
TEST_P(ReducerPolicies, NothingIsLost) {
  constexpr int kSteps = 4;
  const int ranks = GetParam().ranks;
  const std::vector<Layer> layers = small_model();
  std::vector<std::vector<double>> given;    // sum over steps of the mean gradient
  std::vector<std::vector<double>> results;  // sum over steps, rank 0
  std::vector<std::vector<double>> pending;  // after the last step
  for (const Layer& layer : layers) {
    const std::vector<double> zeros(static_cast<std::size_t>(layer.elements()));
    given.push_back(zeros);
    results.push_back(zeros);
    pending.push_back(zeros);
  }
  std::mutex mutex;
  run_ranks(ranks, [&](int rank, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), layers, Policy::parse(GetParam().policy));
    Gradients gradients(layers);
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      gradients.fill(step, rank);
      {
        const std::lock_guard lock(mutex);
        for (std::size_t layer = 0; layer < layers.size(); ++layer) {
          for (std::size_t i = 0; i < given[layer].size(); ++i) {
            given[layer][i] +=
                gradients.get(layer, static_cast<std::int64_t>(i)) / double{1} / ranks;
          }
        }
      }
      reduce_step(reducer, gradients, kTwoBuckets);
      for (std::size_t layer = 0; rank == 0 && layer < layers.size(); ++layer) {
        for (std::size_t i = 0; i < results[layer].size(); ++i) {
          results[layer][i] += gradients.get(layer, static_cast<std::int64_t>(i));
        }
      }
    }
    const std::lock_guard lock(mutex);
    for (const StateEntry& entry : reducer.state().entries) {
      if (entry.key.starts_with("worker.state/")) continue;  // no part of what is pending
      const std::size_t slash = entry.key.rfind('/');
      const std::size_t first = entry.key.find('/') + 1;
      const std::string name = entry.key.substr(first, slash - first);
      const auto begin = static_cast<std::size_t>(std::stoll(entry.key.substr(slash + 1)));
      const double share = entry.key.starts_with("worker/") ? 1.0 / ranks : 1.0;
      for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        for (std::size_t i = 0; layers[layer].name == name && i < entry.values.size(); ++i) {
          pending[layer][begin + i] += share * entry.values[i];
        }
      }
    }
  });
  for (std::size_t layer = 0; layer < layers.size(); ++layer) {
    // fp32 sums of values of about 1; results of the bf16 layer are rounded to 8 bits.
    // A residual kept as q8 moves by up to a 64th of its block's largest value, of about 4.
    double bound = layers[layer].dtype == DType::kBF16 ? kSteps * 0x1p-8 : kSteps * 0x1p-20;
    if (std::string_view(GetParam().policy).find("memory=") != std::string_view::npos)
      bound += kSteps * 4.0 / 64;
    for (std::size_t i = 0; i < given[layer].size(); ++i) {
      ASSERT_NEAR(given[layer][i], results[layer][i] + pending[layer][i], bound)
          << layers[layer].name << "[" << i << "]";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Reducer, ReducerPolicies,
    ::testing::Values(Case{"topk:0.05,scope=bucket", 3},
                      Case{"topk:0.05,scope=bucket,memory=bf16", 4},
                      Case{"policy = \"topk:0.05,scope=bucket,memory=bf16\"\n[[rule]]\nname = "
                           "\"fc2.weight\"\npolicy = "
                           "\"topk:0.05,scope=bucket,transactional=off\"\n",
                           3},
                      Case{"topk:k=40,scope=bucket,memory=q8,transactional=off", 2},
                      Case{"topk:0.05,memory=bf16", 3}, Case{"q4,memory=q8", 2},
                      Case{"topk:0.05,memory=q8,transactional=off", 2}, Case{"none", 2},
                      Case{"none", 3}, Case{"topk:0.05", 2}, Case{"topk:0.05", 7},
                      Case{"topk:0.02,values=q8", 3}, Case{"topk:0.02,values=q8", 4}, Case{"q4", 2},
                      Case{"q4", 3}, Case{"q8,stochastic", 4}, Case{"q2", 7}, Case{"bf16", 4},
                      Case{"randmask:0.1", 2}, Case{"randmask:0.1", 4}, Case{"powersgd:2", 4},
                      Case{"powersgd:2,rounds=1", 3}, Case{"galore:2,refresh=3", 2},
                      Case{"dctcols:2,refresh=3", 3},
                      Case{"policy = \"topk:0.05\"\n[[rule]]\nname = \"fc2.weight\"\npolicy = "
                           "\"q8\"\n[[rule]]\nname = \"half.weight\"\npolicy = \"randmask:0.2\"",
                           4}));

TEST(Reducer, WorldOfOneLeavesGradientsUntouched) {
  run_reducers(1, "topk:0.01", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    gradients.set(0, 0, std::nanf(""));
    const std::uint64_t before = gradients.hash();
    reduce_step(reducer, gradients, kTwoBuckets);
    EXPECT_EQ(gradients.hash(), before);
    EXPECT_EQ(reducer.stats().steps, 1u);
    EXPECT_EQ(reducer.stats().wire_bytes, 0u);
    EXPECT_EQ(reducer.stats().memory_bytes, 0u);
    EXPECT_EQ(reducer.stats().ratio, 1);
    EXPECT_TRUE(reducer.state().entries.empty());
    EXPECT_FALSE(reducer.last_step_skipped());
  });
}

TEST(Reducer, SumIsTheMeanTimesTheRanks) {
  for (const char* policy : {"none", "topk:0.1", "q8"}) {
    std::vector<float> of_op[2];
    for (const ReduceOp op : {ReduceOp::kMean, ReduceOp::kSum}) {
      ReducerOptions options;
      options.op = op;
      const auto test = [&](int rank, GradientReducer& reducer, Gradients& gradients) {
        gradients.fill(0, rank);
        reduce_step(reducer, gradients, kTwoBuckets);
        if (rank == 0) {
          of_op[op == ReduceOp::kSum] = gradients.values(0);
        }
      };
      run_reducers(4, policy, test, options);
    }
    ASSERT_EQ(of_op[0].size(), of_op[1].size());
    for (std::size_t i = 0; i < of_op[0].size(); ++i) {  // 4 is a power of two: exact
      ASSERT_EQ(of_op[0][i] * 4, of_op[1][i]) << policy << " " << i;
    }
  }
}

TEST(Reducer, AnUnusedLayerKeepsItsResidual) {
  run_reducers(3, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const auto residual = [&] {
      for (const StateEntry& entry : reducer.state().entries) {
        if (entry.key.starts_with("worker/fc2.weight/")) {
          return entry.values;
        }
      }
      return std::vector<float>();
    };
    const std::vector<float> before = residual();
    ASSERT_EQ(before.size(), 2120u);
    gradients.fill(1, rank);
    gradients.zero(2);
    reduce_step(reducer, gradients, kTwoBuckets);
    EXPECT_EQ(residual(), before);
    EXPECT_EQ(gradients.values(2), std::vector<float>(2120, 0.0F));
  });
}

TEST(Reducer, CallbacksComeOnceABucketWithTheResultInPlace) {
  run_reducers(2, "none", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    const float mine = gradients.get(0, 0);
    std::atomic<int> calls{0};
    std::atomic<bool> changed{false};
    const auto first = reducer.reduce(gradients.bucket({0}, false), [&](std::exception_ptr error) {
      EXPECT_FALSE(error);
      changed = gradients.get(0, 0) != mine;
      ++calls;
    });
    const auto rest =
        reducer.reduce(gradients.bucket({1, 2, 3, 4, 5, 6}, true), [&](std::exception_ptr error) {
          EXPECT_FALSE(error);
          ++calls;
        });
    first->wait();
    rest->wait();
    reducer.stats();
    reducer.state();  // idle: callbacks are through
    EXPECT_EQ(calls, 2);
    EXPECT_TRUE(changed);
  });
}

// A bucket that is done must not wait for the step's other buckets.
TEST(Reducer, FinishesABucketBeforeTheNextComes) {
  run_reducers(2, "topk:0.05", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reducer.reduce(gradients.bucket({0, 1}, false))->wait();
    reducer.reduce(gradients.bucket({2, 3, 4, 5, 6}, true))->wait();
    EXPECT_EQ(reducer.stats().steps, 1u);
  });
}

// Done when it is looked at for the second time: between two looks of the reducer's thread.
class LateTransfer final : public Transfer {
 public:
  explicit LateTransfer(std::unique_ptr<Transfer> inner) : inner_(std::move(inner)) {}

  bool done() override {
    if (!std::exchange(looked_at_, true)) return false;
    inner_->wait(Clock::now() + std::chrono::minutes(1));
    return true;
  }
  void wait(Deadline deadline) override { inner_->wait(deadline); }

 private:
  std::unique_ptr<Transfer> inner_;
  bool looked_at_ = false;
};

class LateCommunicator final : public Communicator {
 public:
  explicit LateCommunicator(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string name() const override { return inner_->name(); }
  CommunicatorTraits traits() const override { return inner_->traits(); }
  std::unique_ptr<Transfer> allreduce_sum(TensorView data) override {
    return std::make_unique<LateTransfer>(inner_->allreduce_sum(data));
  }
  std::unique_ptr<Transfer> allgather(std::span<const std::byte> in,
                                      std::span<std::byte> out) override {
    return std::make_unique<LateTransfer>(inner_->allgather(in, out));
  }
  std::unique_ptr<Transfer> alltoall(std::span<const std::byte> in,
                                     std::span<std::byte> out) override {
    return std::make_unique<LateTransfer>(inner_->alltoall(in, out));
  }
  std::vector<int> roll_call(std::chrono::milliseconds grace) override {
    return inner_->roll_call(grace);
  }
  void abort() noexcept override { inner_->abort(); }
  std::uint64_t sent_bytes() const override { return inner_->sent_bytes(); }

 private:
  std::unique_ptr<Communicator> inner_;
};

TEST(Reducer, FinishesABucketWhoseTransferEndsBetweenTwoLooks) {
  for (const char* policy : {"topk:0.05", "q4", "none"}) {
    run_ranks(2, [&](int rank, std::unique_ptr<Communicator> comm) {
      const std::vector<Layer> layers = small_model();
      GradientReducer reducer(std::make_unique<LateCommunicator>(std::move(comm)), layers,
                              Policy::parse(policy));
      Gradients gradients(layers);
      gradients.fill(0, rank);
      const auto first = reducer.reduce(gradients.bucket({0, 1}, false));
      if (std::string_view(policy) != "q4")
        first->wait();  // two transfers: a bucket may come first
      reducer.reduce(gradients.bucket({2, 3, 4, 5, 6}, true))->wait();
      first->wait();
      EXPECT_EQ(reducer.stats().steps, 1u);
    });
  }
}

TEST(Reducer, StepsMayBeQueuedWithoutWaiting) {
  run_ranks(3, [](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(std::move(comm), layers, Policy::parse("q4"));
    std::vector<Gradients> gradients(5, Gradients(layers));
    std::vector<std::shared_ptr<Reduction>> reductions;
    for (std::size_t step = 0; step < gradients.size(); ++step) {
      gradients[step].fill(step, rank);
      for (std::size_t layer = 0; layer < layers.size(); ++layer) {
        reductions.push_back(
            reducer.reduce(gradients[step].bucket({layer}, layer + 1 == layers.size())));
      }
    }
    for (const auto& reduction : reductions) {
      reduction->wait();
    }
    EXPECT_EQ(reducer.stats().steps, gradients.size());
  });
}

TEST(Reducer, StartDelaysCompression) {
  run_reducers(2, "topk:0.01,start=2", [](int rank, auto& reducer, auto& gradients) {
    std::uint64_t sent[3] = {};
    for (std::uint64_t step = 0; step < 3; ++step) {
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      sent[step] = reducer.stats().wire_bytes;
      EXPECT_EQ(reducer.state().entries.empty(), step < 2);
    }
    EXPECT_EQ(sent[1], 2 * sent[0]);
    EXPECT_LT(sent[2] - sent[1], sent[0] / 3);
  });
}

TEST(Reducer, WarmupLowersTheDensity) {
  run_reducers(2, "topk:0.01,start=1,warmup=3", [](int rank, auto& reducer, auto& gradients) {
    std::vector<std::uint64_t> sent;
    for (std::uint64_t step = 0; step < 6; ++step) {
      const std::uint64_t before = reducer.stats().wire_bytes;
      gradients.fill(step, rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      sent.push_back(reducer.stats().wire_bytes - before);
    }
    for (const std::size_t step : {1, 2, 3, 4}) EXPECT_LT(sent[step], sent[step - 1]) << step;
    EXPECT_EQ(sent[5], sent[4]);
    EXPECT_FALSE(reducer.state().entries.empty());
  });
}

// The bucket with its gradients elsewhere, in memory that is the reducer's to keep.
Bucket given(Gradients& gradients, const std::vector<std::size_t>& indices, bool last) {
  Bucket bucket = gradients.bucket(indices, last);
  for (BucketLayer& entry : bucket.layers) {
    const auto* bytes = static_cast<const std::byte*>(entry.grad.data);
    const auto copy = std::make_shared<std::vector<std::byte>>(bytes, bytes + entry.grad.bytes());
    entry.source = {copy->data(), entry.grad.elements, entry.grad.dtype};
    entry.owner = copy;
    std::memset(entry.grad.data, 0xFF, entry.grad.bytes());
  }
  return bucket;
}

TEST(Reducer, KeepsTheMemoryOfGivenGradientsAsTheResidual) {
  for (const char* policy : {"topk:0.05", "q4", "topk:0.05,transactional=off", "randmask:0.2"}) {
    SCOPED_TRACE(policy);
    std::vector<std::uint64_t> expected(3);
    std::vector<std::vector<StateEntry>> residuals(3);
    std::vector<std::size_t> memory_bytes(3);
    run_reducers(3, policy, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto r = static_cast<std::size_t>(rank);
      for (std::uint64_t step = 0; step < 5; ++step) {
        gradients.fill(step, rank);
        reduce_step(reducer, gradients, kTwoBuckets);
        expected[r] = expected[r] * 31 + gradients.hash();
      }
      residuals[r] = reducer.state().entries;
      memory_bytes[r] = reducer.stats().memory_bytes;
    });
    run_reducers(3, policy, [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      const auto r = static_cast<std::size_t>(rank);
      std::uint64_t hashes = 0;
      for (std::uint64_t step = 0; step < 5; ++step) {
        gradients.fill(step, rank);
        if (step == 2) {
          reduce_step(reducer, gradients, kTwoBuckets);
        } else {
          const auto first = reducer.reduce(given(gradients, kTwoBuckets[0], false));
          const auto second = reducer.reduce(given(gradients, kTwoBuckets[1], true));
          first->wait();
          second->wait();
        }
        hashes = hashes * 31 + gradients.hash();
      }
      EXPECT_EQ(hashes, expected[r]);
      const std::vector<StateEntry> state = reducer.state().entries;
      ASSERT_EQ(state.size(), residuals[r].size());
      for (std::size_t i = 0; i < state.size(); ++i) {
        EXPECT_EQ(state[i].key, residuals[r][i].key);
        EXPECT_EQ(state[i].values, residuals[r][i].values);
      }
      if (std::string_view(policy) == "topk:0.05") {
        // The bf16 layer's residual is fp32 and keeps both buffers of its own.
        EXPECT_EQ(reducer.stats().memory_bytes, sizeof(float) * (1320 + 2120 + 2 * 1147));
        EXPECT_EQ(memory_bytes[r], 2 * sizeof(float) * (1320 + 2120 + 1147));
      }
    });
  }
}

TEST(Reducer, StatsTellBytesAndLayers) {
  run_reducers(4, "topk:0.01", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerStats stats = reducer.stats();
    EXPECT_GT(stats.wire_bytes, 0u);
    EXPECT_GT(stats.ratio, 2);
    EXPECT_EQ(stats.ratio_bf16, stats.ratio / 2);
    EXPECT_EQ(stats.ratio,
              static_cast<double>(stats.dense_wire_bytes) / static_cast<double>(stats.wire_bytes));
    EXPECT_EQ(stats.memory_bytes, 2 * sizeof(float) * (1320 + 2120 + 1147));
    EXPECT_GT(stats.buffer_bytes, 0u);
    ASSERT_EQ(stats.layers.size(), reducer.layers().size());
    EXPECT_EQ(stats.layers[0].codec, "topk:0.01");
    EXPECT_EQ(stats.layers[1].codec, "none");
    EXPECT_EQ(stats.layers[1].reason, "dense: 1 dimension");
    EXPECT_GT(stats.layers[0].ratio, 10);
    EXPECT_THAT(reducer.summary(),
                AllOf(HasSubstr("topk:0.01: 3 layers"), HasSubstr("memory to be taken")));
  });
}

// k=COUNT is of a bucket's layers together; before the first step buckets are not known.
TEST(Reducer, StatsShareWhatJointLayersSendTogether) {
  run_reducers(2, "topk:k=100,scope=bucket",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 const auto slot = [&](std::int64_t n) {
                   return reducer.plan()->choices[0].codec.payload->slot_bytes(n);
                 };
                 EXPECT_EQ(reducer.stats().layers[2].slot_bytes, slot(2120));
                 EXPECT_THAT(reducer.summary(),
                             HasSubstr("3 layers, 4587 elements, " +
                                       std::to_string(slot(1320) + slot(2120) + slot(1147)) +
                                       " bytes a step if each layer were alone"));
                 gradients.fill(0, rank);
                 reduce_step(reducer, gradients, {{6, 5, 4, 3, 2, 1, 0}});
                 const double together = static_cast<double>(slot(4587));
                 const std::vector<LayerStats> layers = reducer.stats().layers;
                 for (const std::size_t i : {0U, 2U, 4U}) {
                   const double share = static_cast<double>(layers[i].elements) / 4587;
                   EXPECT_NEAR(static_cast<double>(layers[i].slot_bytes), together * share, 0.5);
                 }
                 gradients.fill(1, rank);
                 reduce_step(reducer, gradients, {{6, 5, 4, 3}, {2, 1, 0}});
                 EXPECT_EQ(reducer.stats().layers[4].slot_bytes, slot(1147));
               });
}

// All dense traffic of a bucket in one collective: bytes of the plain ring.
TEST(Reducer, UncompressedTrafficCostsWhatARingDoes) {
  run_reducers(4, "none", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    EXPECT_NEAR(reducer.stats().ratio, 1, 0.05);
  });
}

// The mean of 16-bit gradients in half the bytes, and the same bits: owners sum in fp32.
TEST(Reducer, UncompressedHalvesTravelInTheirOwnBytes) {
  constexpr int kRanks = 4;
  constexpr std::int64_t kElements = 50'021;
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const std::vector<Layer> layers = {{"weight", {kElements}, dtype}, {"bias", {7}, dtype}};
    std::uint64_t bytes[2];
    std::vector<std::vector<float>> results(2);
    for (const bool narrow : {false, true}) {
      const ReducerOptions options{.ride_along_bytes = narrow ? 65'536U : 10'000'000U};
      run_ranks(kRanks, [&](int rank, std::unique_ptr<Communicator> comm) {
        GradientReducer reducer(std::move(comm), layers, Policy::parse("none"), options);
        std::vector<std::vector<std::byte>> memory(2);
        Bucket bucket;
        for (std::size_t layer = 0; layer < 2; ++layer) {
          const auto n = static_cast<std::size_t>(layers[layer].elements());
          memory[layer].resize(2 * n);
          bucket.layers.push_back({layer, {memory[layer].data(), layers[layer].elements(), dtype}});
          visit(bucket.layers.back().grad, [&](auto* values) {
            using T = std::remove_pointer_t<decltype(values)>;
            for (std::size_t i = 0; i < n; ++i) {
              values[i] = from_float<T>(std::sin(static_cast<float>(i * 7 + layer)) *
                                        static_cast<float>(1 + rank));
            }
          });
        }
        reducer.reduce(bucket)->wait();
        if (rank != 0) return;
        bytes[narrow ? 1 : 0] = reducer.stats().wire_bytes;
        for (const BucketLayer& entry : bucket.layers) {
          visit(entry.grad, [&](const auto* values) {
            for (std::int64_t i = 0; i < entry.grad.elements; ++i) {
              results[narrow ? 1 : 0].push_back(to_float(values[i]));
            }
          });
        }
      });
    }
    EXPECT_NEAR(static_cast<double>(bytes[0]) / static_cast<double>(bytes[1]), 2, 0.03);
    ASSERT_EQ(results[0].size(), results[1].size());
    EXPECT_EQ(results[1], results[0]);  // sums of four such values are exact in fp32
  }
}

// Sums of fp16 beyond its largest number are Inf, in 16 bits no more than in 32.
TEST(Reducer, SumsOfFp16AreNotCutOff) {
  const std::vector<Layer> layers = {{"weight", {40'000}, DType::kF16}};
  run_ranks(4, [&](int, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm), layers, Policy::parse("none,nonfinite=skip-step"),
                            {.op = ReduceOp::kSum});
    std::vector<FP16> values(40'000, from_float<FP16>(30'000.0F));
    reducer.reduce({.layers = {{0, {values.data(), 40'000, DType::kF16}}}, .last = true})->wait();
    EXPECT_TRUE(reducer.last_step_skipped());
  });
}

TEST(Reducer, UncompressedHalvesAreFlagged) {
  run_reducers(3, "none,nonfinite=skip-step",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 gradients.fill(0, rank);
                 if (rank == 2) gradients.set(4, 11, std::numeric_limits<float>::infinity());
                 reduce_step(reducer, gradients, kTwoBuckets);
                 EXPECT_TRUE(reducer.last_step_skipped());
                 EXPECT_EQ(reducer.stats().layers[4].nonfinite_steps, 1U);
                 EXPECT_EQ(reducer.stats().memory_bytes, 0U);
                 gradients.fill(1, rank);
                 reduce_step(reducer, gradients, kTwoBuckets);
                 EXPECT_FALSE(reducer.last_step_skipped());
               },
               {.ride_along_bytes = 0});
}

TEST(Reducer, LossScaleRescalesResiduals) {
  run_reducers(2, "topk:0.01", [](int rank, GradientReducer& reducer, Gradients& gradients) {
    gradients.fill(0, rank);
    reduce_step(reducer, gradients, kTwoBuckets);
    const ReducerState before = reducer.state();
    reducer.set_loss_scale(8);
    reducer.set_loss_scale(8);
    const ReducerState after = reducer.state();
    EXPECT_EQ(after.loss_scale, 8);
    ASSERT_EQ(after.entries.size(), before.entries.size());
    for (std::size_t e = 0; e < after.entries.size(); ++e) {
      for (std::size_t i = 0; i < after.entries[e].values.size(); ++i) {
        ASSERT_EQ(after.entries[e].values[i], before.entries[e].values[i] * 8);
      }
    }
    EXPECT_THROW(reducer.set_loss_scale(0), InvalidArgument);
    EXPECT_THROW(reducer.set_loss_scale(std::nan("")), InvalidArgument);
  });
}

struct Misuse {
  const char* what;
  std::function<Bucket(Gradients&)> bucket;
  const char* says;
};

TEST(Reducer, MisuseIsRefusedWithRankAndLayerAndTheStepGoesOn) {
  static std::vector<float> other(2120);
  static double doubles[40];
  const std::vector<Misuse> cases = {
      {"index",
       [](Gradients&) {
         return Bucket{{{99, view(other)}}, true};
       },
       "layer index 99"},
      {"shape",
       [](Gradients&) {
         return Bucket{{{0, view(other)}}, true};
       },
       "'fc1.weight': expected 1320 elements (shape [40, 33]), got 2120"},
      {"null",
       [](Gradients&) {
         return Bucket{{{1, {nullptr, 40, DType::kF32}}}, true};
       },
       "'fc1.bias': expected 40 elements"},
      {"dtype",
       [](Gradients&) {
         return Bucket{{{1, {doubles, 40, DType::kF64}}}, true};
       },
       "expected fp32, got fp64"},
      {"twice in a bucket",
       [](Gradients& g) {
         return g.bucket({1, 1}, true);
       },
       "'fc1.bias': given twice"},
      {"twice in a step", [](Gradients& g) { return g.bucket({0}, true); },
       "'fc1.weight': given twice"}};
  for (const int size : {1, 2}) {
    run_reducers(size, "none", [&](int rank, GradientReducer& reducer, Gradients& gradients) {
      gradients.fill(0, rank);
      const auto first = reducer.reduce(gradients.bucket({0}, false));
      for (const Misuse& misuse : cases) {
        try {
          reducer.reduce(misuse.bucket(gradients));
          ADD_FAILURE() << misuse.what << " was accepted";
        } catch (const InvalidArgument& error) {
          EXPECT_THAT(error.what(), HasSubstr(misuse.says)) << misuse.what;
          EXPECT_THAT(error.what(), HasSubstr(std::string("rank ") + std::to_string(rank)));
        }
      }
      reducer.reduce(gradients.bucket({1, 2, 3, 4, 5, 6}, true))->wait();
      first->wait();
      EXPECT_EQ(reducer.stats().steps, 1u);
    });
  }
}

TEST(Reducer, IntegerLayersAreRefused) {
  run_ranks(2, [](int, std::unique_ptr<Communicator> comm) {
    GradientReducer reducer(std::move(comm),
                            {{"w", {64, 64}, DType::kF32}, {"counter", {4}, DType::kOther}},
                            Policy::parse("q8"));
    std::int8_t counter[4] = {1, 2, 3, 4};
    try {
      reducer.reduce({{{1, {counter, 4, DType::kOther}}}, true});
      ADD_FAILURE() << "accepted";
    } catch (const InvalidArgument& error) {
      EXPECT_THAT(error.what(),
                  AllOf(HasSubstr("'counter'"), HasSubstr("integers"), HasSubstr("hint: ")));
    }
  });
}

TEST(Reducer, DoublesAreReducedAsDoubles) {
  run_ranks(3, [](int rank, std::unique_ptr<Communicator> comm) {
    ReducerOptions options;
    options.op = ReduceOp::kSum;
    GradientReducer reducer(std::move(comm),
                            {{"a", {64, 64}, DType::kF32}, {"d", {64, 64}, DType::kF64}},
                            Policy::parse("topk:0.5"), options);
    std::vector<float> a(4096, 1.0F);
    std::vector<double> d(4096, 1e-12 + rank);
    reducer.reduce({{{0, view(a)}, {1, {d.data(), 4096, DType::kF64}}}, true})->wait();
    EXPECT_DOUBLE_EQ(d[0], 3e-12 + 3);
    EXPECT_NE(static_cast<float>(d[0]), d[0]);
  });
}

TEST(Reducer, DuplicateNamesAreRefused) {
  run_ranks(1, [](int, std::unique_ptr<Communicator> comm) {
    EXPECT_THROW(GradientReducer(std::move(comm),
                                 {{"w", {64, 64}, DType::kF32}, {"w", {64, 64}, DType::kF32}},
                                 Policy::parse("none")),
                 InvalidArgument);
  });
}

}  // namespace
}  // namespace thinwire::testing
