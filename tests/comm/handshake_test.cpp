#include "comm/handshake.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <mutex>

#include "comm/reducer.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Deadline soon() { return Clock::now() + std::chrono::seconds(60); }

TEST(Handshake, EqualFieldsPass) {
  for (const int ranks : {1, 2, 7}) {
    run_ranks(ranks, [](int, std::unique_ptr<Communicator> comm) {
      EXPECT_NO_THROW(shake_hands(*comm, {{"a", "1"}, {"b", ""}}, soon()));
    });
  }
}

TEST(Handshake, EveryRankGetsTheSameTextWithEveryRanksValue) {
  LoopbackGroup group(4);
  const auto errors = run_group(group, 4, [](int rank, std::unique_ptr<Communicator> comm) {
    shake_hands(*comm,
                {{"library version", rank == 3 ? "9.9.9" : "0.1.0"},
                 {"same", "x"},
                 {"policy", rank % 2 == 0 ? "p0" : "p1"}},
                soon());
  });
  for (const auto& error : errors) {
    ASSERT_TRUE(error);
    EXPECT_THROW(std::rethrow_exception(error), MismatchError);
    EXPECT_EQ(message(error), message(errors[0]));
  }
  EXPECT_THAT(message(errors[0]),
              AllOf(HasSubstr("library version:\n    ranks 0, 1, 2: 0.1.0\n    rank 3: 9.9.9"),
                    HasSubstr("policy:\n    ranks 0, 2: p0\n    ranks 1, 3: p1"),
                    HasSubstr("hint: "), ::testing::Not(HasSubstr("same:"))));
}

TEST(Handshake, FieldsThatOnlySomeRanksHaveAreShownAsNone) {
  LoopbackGroup group(2);
  const auto errors = run_group(group, 2, [](int rank, std::unique_ptr<Communicator> comm) {
    std::vector<HandshakeField> fields;
    for (int i = 0; i < 20 * rank; ++i) {
      fields.push_back({std::string("layer ") + std::to_string(i), "w"});
    }
    shake_hands(*comm, fields, soon());
  });
  EXPECT_THAT(message(errors[0]), AllOf(HasSubstr("layer 0:\n    rank 0: (none)\n    rank 1: w"),
                                        HasSubstr("\n  ...")));
  EXPECT_EQ(message(errors[0]), message(errors[1]));
}

struct Difference {
  const char* name;
  std::function<void(std::vector<Layer>&, std::string&, ReducerOptions&)> make;
  const char* says;
};

class ReducerHandshake : public ::testing::TestWithParam<Difference> {};

TEST_P(ReducerHandshake, NamesTheRankAndTheField) {
  constexpr int kOdd = 2;
  LoopbackGroup group(3);
  const auto errors = run_group(group, 3, [](int rank, std::unique_ptr<Communicator> comm) {
    std::vector<Layer> layers = small_model();
    std::string policy = "topk:0.01";
    ReducerOptions options;
    if (rank == kOdd) {
      GetParam().make(layers, policy, options);
    }
    GradientReducer reducer(std::move(comm), layers, Policy::parse(policy), options);
  });
  for (const auto& error : errors) {
    ASSERT_TRUE(error);
    EXPECT_THROW(std::rethrow_exception(error), MismatchError) << message(error);
    EXPECT_THAT(message(error), AllOf(HasSubstr(GetParam().says), HasSubstr("rank 2: "),
                                      HasSubstr("ranks 0, 1: ")));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Fields, ReducerHandshake,
    ::testing::Values(
        Difference{"policy", [](auto&, auto& policy, auto&) { policy = "topk:0.02"; },
                   "policy:\n    ranks 0, 1: topk:0.01\n    rank 2: topk:0.02"},
        Difference{"policy_that_fits_no_layer_there",
                   [](auto&, auto& policy, auto&) {
                     policy = "policy='none'\n[[rule]]\nname='nothing'\npolicy='bf16'";
                   },
                   "policy:"},
        Difference{"operation", [](auto&, auto&, auto& options) { options.op = ReduceOp::kSum; },
                   "operation:\n    ranks 0, 1: mean\n    rank 2: sum"},
        Difference{"stream", [](auto&, auto&, auto& options) { options.stream = "outer"; },
                   "stream:\n    ranks 0, 1: grad\n    rank 2: outer"},
        Difference{"riding", [](auto&, auto&, auto& options) { options.ride_along_bytes = 1; },
                   "ride_along_bytes:"},
        Difference{
            "link", [](auto&, auto&, auto& options) { options.link.latency_seconds = 1e-6; },
            "link:\n    ranks 0, 1: 25.000000 us, 1250000000.000000 bytes/s\n    rank 2: 1."},
        Difference{"split", [](auto&, auto&, auto& options) { options.split_from_ranks = 1; },
                   "split_from_ranks:"},
        Difference{"count", [](auto& layers, auto&, auto&) { layers.pop_back(); },
                   "number of layers:\n    ranks 0, 1: 7\n    rank 2: 6"},
        Difference{"layer_name", [](auto& layers, auto&, auto&) { layers[3].name = "other"; },
                   "layer 3:\n    ranks 0, 1: 'fc2.bias' fp32 [53]\n    rank 2: 'other' fp32 [53]"},
        Difference{"shape",
                   [](auto& layers, auto&, auto&) {
                     layers[2].shape = {40, 53};
                   },
                   "layer 2:"},
        Difference{"dtype", [](auto& layers, auto&, auto&) { layers[4].dtype = DType::kF16; },
                   "'half.weight' fp16"}),
    [](const auto& info) { return info.param.name; });

TEST(ReducerHandshake, ARankThatNeverComesIsNamed) {
  LoopbackGroup group(3);
  const auto errors = run_group(group, 3, [](int rank, std::unique_ptr<Communicator> comm) {
    if (rank == 1) {
      return;
    }
    ReducerOptions options;
    options.deadline = std::chrono::milliseconds(1000);
    options.roll_call_grace = std::chrono::milliseconds(1000);
    GradientReducer reducer(std::move(comm), small_model(), Policy::parse("topk:0.01"), options);
  });
  for (const int rank : {0, 2}) {
    try {
      std::rethrow_exception(errors[static_cast<std::size_t>(rank)]);
    } catch (const PeerLost& lost) {
      EXPECT_THAT(lost.ranks, ::testing::ElementsAre(1));
      EXPECT_THAT(lost.what(), HasSubstr("in the handshake"));
    }
  }
}

}  // namespace
}  // namespace thinwire::testing
