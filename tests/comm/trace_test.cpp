// A trace is one JSON array, whoever writes to it; its events nest, and tell of every step, rank
// and layer.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <tuple>

#include "comm/reducer.h"
#include "comm/trace.h"
#include "compressors/core/error.h"
#include "tests/comm/reducer_fixture.h"

namespace thinwire::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Json = nlohmann::json;

constexpr int kSize = 3;
constexpr int kSteps = 12;

class TraceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    file_ = ::testing::TempDir() + "thinwire_trace_" +
            ::testing::UnitTest::GetInstance()->current_test_info()->name() + "_" +
            std::to_string(::getpid()) + ".json";
    std::filesystem::remove(file_);
  }
  void TearDown() override { std::filesystem::remove(file_); }

  std::string text() const {
    std::ostringstream all;
    all << std::ifstream(file_).rdbuf();
    return all.str();
  }
  // As viewers do: without the last comma, with the bracket.
  Json parsed() const {
    std::string all = text();
    EXPECT_TRUE(all.ends_with(",\n"));
    all.resize(all.size() - 2);
    return Json::parse(all + "]");
  }

  std::string file_;
};

struct Event {
  std::int64_t begin = 0;  // ns
  std::int64_t end = 0;
  Json json;
};

// By process and row; in each, those that begin first, of these those that end last.
using Rows = std::map<std::pair<int, int>, std::vector<Event>>;

Rows rows_of(const Json& trace) {
  Rows rows;
  for (const Json& event : trace) {
    if (event.at("ph") != "X") continue;
    const auto ns = [&](const char* field) {
      return std::llround(event.at(field).get<double>() * 1000);
    };
    rows[{event.at("pid"), event.at("tid")}].push_back({ns("ts"), ns("ts") + ns("dur"), event});
  }
  for (auto& [row, events] : rows) {
    std::sort(events.begin(), events.end(), [](const Event& a, const Event& b) {
      return std::tuple(a.begin, -a.end) < std::tuple(b.begin, -b.end);
    });
  }
  return rows;
}

// Row numbers -> what viewers call them.
std::map<std::pair<int, int>, std::string> names_of(const Json& trace) {
  std::map<std::pair<int, int>, std::string> names;
  for (const Json& event : trace) {
    if (event.at("name") == "thread_name") {
      names[{event.at("pid"), event.at("tid")}] = event.at("args").at("name");
    }
  }
  return names;
}

// Each ends within the one it began in, and within what holds nothing, nothing begins.
void expect_nested(const std::vector<Event>& events) {
  std::vector<const Event*> open;
  for (const Event& event : events) {
    ASSERT_LE(event.begin, event.end) << event.json;
    while (!open.empty() && open.back()->end <= event.begin) open.pop_back();
    if (!open.empty()) {
      EXPECT_LE(event.end, open.back()->end) << event.json << open.back()->json;
    }
    open.push_back(&event);
  }
}

void expect_one_after_another(const std::vector<Event>& events) {
  for (std::size_t i = 1; i < events.size(); ++i) {
    EXPECT_GE(events[i].begin, events[i - 1].end) << events[i].json << events[i - 1].json;
  }
}

void train(int rank, GradientReducer& reducer, Gradients& gradients, int steps = kSteps) {
  for (int step = 0; step < steps; ++step) {
    gradients.fill(static_cast<std::uint64_t>(step), rank);
    reduce_step(reducer, gradients, kTwoBuckets);
  }
  reducer.state();  // when all is written
}

TEST_F(TraceTest, TellsEveryStepRankAndLayer) {
  for (const char* policy : {"topk:0.05", "q8,start=3", "powersgd:2,rounds=2", "none", "auto"}) {
    std::filesystem::remove(file_);
    run_reducers(kSize, policy,
                 [](int rank, GradientReducer& reducer, Gradients& gradients) {
                   train(rank, reducer, gradients);
                   EXPECT_THAT(reducer.take_warnings(), IsEmpty());
                 },
                 {.trace = {.file = file_}});
    const Json trace = parsed();
    const auto names = names_of(trace);
    std::set<int> ranks;
    for (const auto& [row, events] : rows_of(trace)) {
      SCOPED_TRACE(std::string(policy) + ", rank " + std::to_string(row.first) + ", " +
                   names.at(row));
      ranks.insert(row.first);
      if (names.at(row) == "communication thread") {
        expect_nested(events);
      } else {
        expect_one_after_another(events);
      }
    }
    EXPECT_EQ(ranks, (std::set<int>{0, 1, 2})) << policy;
  }
}

TEST_F(TraceTest, TimesOfAStepAreWithinIt) {
  run_reducers(kSize, "q8",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 train(rank, reducer, gradients);
               },
               {.trace = {.file = file_}});
  const Json trace = parsed();
  const Rows rows = rows_of(trace);
  const auto names = names_of(trace);
  for (int rank = 0; rank < kSize; ++rank) {
    std::map<std::uint64_t, Event> steps;
    for (const auto& [row, events] : rows) {
      if (row.first != rank || names.at(row) != "steps") continue;
      for (const Event& event : events) steps[event.json.at("args").at("step")] = event;
    }
    ASSERT_EQ(steps.size(), kSteps);
    std::map<std::uint64_t, std::int64_t> busy;
    std::map<std::uint64_t, std::multiset<std::string>> encoded, decoded, queued;
    for (const auto& [row, events] : rows) {
      if (row.first != rank) continue;
      for (const Event& event : events) {
        const Json& arguments = event.json.at("args");
        if (!arguments.contains("step")) continue;
        const std::uint64_t number = arguments.at("step");
        const Event& step = steps.at(number);
        const std::string name = event.json.at("name");
        const std::string category = event.json.at("cat");
        if (name.starts_with("hand out")) continue;  // when the step is over
        EXPECT_GE(event.begin, step.begin) << event.json;
        EXPECT_LE(event.end, step.end) << event.json;
        if (category == "wire") {
          EXPECT_GT(arguments.at("payload_bytes"), 0);
        }
        if (name.starts_with("begin") || name.starts_with("wait") || name.starts_with("decode") ||
            name.starts_with("encode on")) {
          busy[number] += event.end - event.begin;  // none of them is within another
        }
        for (const auto& [prefix, layers] : {std::pair{"encode q8", &encoded},
                                             {"encode none", &encoded},
                                             {"decode", &decoded},
                                             {"bucket", &queued}}) {
          if (!name.starts_with(prefix)) continue;
          for (const Json& layer : arguments.at("layers")) (*layers)[number].insert(layer);
        }
      }
    }
    std::multiset<std::string> all;
    for (const Layer& layer : small_model()) all.insert(layer.name);
    for (const auto& [number, step] : steps) {
      EXPECT_LE(busy.at(number), step.end - step.begin);
      EXPECT_EQ(encoded[number], all);
      EXPECT_EQ(decoded[number], all);
      EXPECT_EQ(queued[number], all);
    }
  }
}

TEST_F(TraceTest, TellsWhatTheTunerDoes) {
  run_reducers(kSize, "auto",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 train(rank, reducer, gradients);
               },
               {.trace = {.file = file_}});
  std::set<std::string> names;
  for (const Json& event : parsed()) {
    if (event.contains("cat") && event.at("cat") == "auto") names.insert(event.at("name"));
  }
  for (const char* name :
       {"start the tuner", "measure the network", "judge", "decide", "sample fc1.weight"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST_F(TraceTest, AStepThatFailsIsToldToo) {
  LoopbackGroup group(kSize);
  const auto errors = run_group(group, kSize, [&](int rank, std::unique_ptr<Communicator> comm) {
    const std::vector<Layer> layers = small_model();
    GradientReducer reducer(
        std::move(comm), layers, Policy::parse("q8"),
        {.roll_call_grace = std::chrono::milliseconds(50), .trace = {.file = file_}});
    Gradients gradients(layers);
    for (int step = 0; step < 4; ++step) {
      gradients.fill(static_cast<std::uint64_t>(step), rank);
      reduce_step(reducer, gradients, kTwoBuckets);
      if (rank == 1 && step == 1) {
        group.kill(1, LoopbackGroup::Death::kConnection);
        return;
      }
    }
  });
  EXPECT_THAT(message(errors[0]), HasSubstr("rank 1"));
  std::set<std::uint64_t> steps;
  for (const Json& event : parsed()) {
    if (event.at("pid") == 0 && event.at("args").contains("step")) {
      steps.insert(event.at("args").at("step").get<std::uint64_t>());
    }
  }
  EXPECT_THAT(steps, ElementsAre(0, 1, 2));
}

TEST_F(TraceTest, AnyNameIsJson) {
  const Clock::time_point now = Clock::now();
  Trace trace({.file = file_}, 0);
  for (const std::string name : {"a\"b\\c\n\x01", "\xff\xfe", "größe", ""}) {
    trace.add(TraceLane::kThread,
              {.category = "test",
               .name = name,
               .begin = now,
               .end = now,
               .arguments = {{"layers", std::vector<std::string>{name}}, {"bytes", 0.5}}});
  }
  EXPECT_EQ(trace.write(), "");
  const Json all = parsed();
  EXPECT_EQ(all.back().at("args").at("bytes"), 0.5);
  EXPECT_EQ(all[all.size() - 2].at("name"), "größe");
}

TEST_F(TraceTest, WhatOverlapsHasRowsOfItsOwn) {
  const Clock::time_point t0 = Clock::now();
  const auto at = [&](int us) { return t0 + std::chrono::microseconds(us); };
  Trace trace({.file = file_, .process = 7, .model = 1}, 0);
  for (const auto& [begin, end] : {std::pair{0, 10}, {5, 20}, {10, 12}, {12, 30}, {13, 15}}) {
    trace.add(TraceLane::kWire,
              {.category = "wire", .name = "x", .begin = at(begin), .end = at(end)});
  }
  EXPECT_EQ(trace.write(), "");
  const Json all = parsed();
  std::vector<std::string> names;
  for (const auto& [row, name] : names_of(all)) {
    EXPECT_EQ(row.first, 7);
    names.push_back(name);
  }
  EXPECT_THAT(names, ElementsAre("wire, model 1", "wire 2, model 1", "wire 3, model 1"));
  for (const auto& [row, events] : rows_of(all)) expect_one_after_another(events);
}

TEST_F(TraceTest, SeveralAppendToOneFile) {
  { Trace first({.file = file_}, 0); }
  Trace again({.file = file_}, 0);
  Trace other({.file = file_}, 1);
  std::set<int> processes;
  for (const Json& event : parsed()) processes.insert(event.at("pid").get<int>());
  EXPECT_EQ(processes, (std::set<int>{0, 1}));
}

TEST_F(TraceTest, OtherFilesAreRefusedAndKept) {
  for (const char* content : {"import torch\n", "[\n  1]\n", "{}", "[\n{\"name\":\"other\"},\n"}) {
    std::ofstream(file_, std::ios::trunc) << content;
    EXPECT_THAT(message([&] {
                  try {
                    Trace trace({.file = file_}, 0);
                    return std::exception_ptr();
                  } catch (...) {
                    return std::current_exception();
                  }
                }()),
                HasSubstr("expected a new file or a trace"));
    EXPECT_EQ(text(), content);
  }
  EXPECT_THROW(Trace({.file = file_ + "/missing/trace.json"}, 0), InvalidArgument);
  EXPECT_THROW(run_reducers(2, "q8", [](int, GradientReducer&, Gradients&) {},
                            {.trace = {.file = "/missing/trace.json"}}),
               InvalidArgument);
}

TEST_F(TraceTest, TheLimitEndsTheTraceAndNotTheTraining) {
  constexpr std::size_t kLimit = 16 << 10;
  run_reducers(2, "q8",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 train(rank, reducer, gradients, 40);
                 EXPECT_EQ(reducer.stats().steps, 40U);
                 const std::vector<std::string> warnings = reducer.take_warnings();
                 ASSERT_EQ(warnings.size(), 1U);
                 EXPECT_THAT(warnings[0],
                             HasSubstr("rank " + std::to_string(rank) + " traces no more steps"));
                 EXPECT_THAT(reducer.take_warnings(), IsEmpty());
               },
               {.trace = {.file = file_, .limit_bytes = kLimit}});
  EXPECT_GT(parsed().size(), 10U);
  EXPECT_LE(std::filesystem::file_size(file_), 2 * kLimit + 2);
}

// As a full disk does, a limit of the process lets a part of a write through, then nothing.
TEST_F(TraceTest, AFullDiskEndsTheTraceAndNotTheTraining) {
  struct rlimit before {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit tight = {.rlim_cur = 5000, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  run_reducers(2, "q8",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 train(rank, reducer, gradients);
                 const std::vector<std::string> warnings = reducer.take_warnings();
                 ASSERT_EQ(warnings.size(), 1U);
                 EXPECT_THAT(warnings[0], HasSubstr("cannot write to"));
               },
               {.trace = {.file = file_}});
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  EXPECT_LE(std::filesystem::file_size(file_), 5000U);
}

TEST_F(TraceTest, NothingIsWrittenWithoutOneOrByOneRank) {
  run_reducers(1, "q8",
               [](int rank, GradientReducer& reducer, Gradients& gradients) {
                 train(rank, reducer, gradients);
                 EXPECT_THAT(reducer.take_warnings(), IsEmpty());
               },
               {.trace = {.file = file_}});
  EXPECT_FALSE(std::filesystem::exists(file_));
}

}  // namespace
}  // namespace thinwire::testing
