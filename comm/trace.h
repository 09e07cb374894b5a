// Trace: where the time of a reducer's steps goes, as a file in the Chrome Trace Event Format that
// Perfetto and chrome://tracing open. docs/trace.md tells what its lanes mean.
//
// All ranks and models of a job append to one file, a step's lines in one write, so that lines do
// not mix on a local file system: a JSON array whose last comma and bracket are left out. Events
// stay in memory until write(), which the owner calls where nobody waits for it. Times are the
// steady clock's, which ranks on one host share. One thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "comm/communicator.h"
#include "comm/trace_options.h"

namespace thinwire {

// In the order in which viewers show them.
enum class TraceLane : std::uint8_t { kStep, kQueue, kThread, kWire };
inline constexpr std::size_t kTraceLanes = 4;

using TraceValue = std::variant<bool, std::uint64_t, double, std::string, std::vector<std::string>>;
using TraceArguments = std::vector<std::pair<const char*, TraceValue>>;

struct TraceEvent {
  const char* category = "";
  std::string name;
  Clock::time_point begin;
  Clock::time_point end;
  TraceArguments arguments = {};
};

class Trace {
 public:
  // InvalidArgument where the file cannot be appended to, or holds something else than a trace.
  Trace(TraceOptions options, int rank);
  ~Trace();
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  // Events of kThread nest. Those of another lane come in the order in which they begin; where they
  // overlap, the lane has several rows.
  void add(TraceLane lane, TraceEvent event);
  // Appends what was added since the last call. The text says why nothing can be written any more;
  // empty: all is well.
  [[nodiscard]] std::string write();

 private:
  struct Added {
    TraceLane lane;
    TraceEvent event;
  };

  std::string head() const;
  std::string lines(const Added& added);
  std::size_t row_of(const Added& added);
  int row_id(TraceLane lane, std::size_t row) const;
  void open();
  // Empty: all of it was written.
  std::string append(const std::string& text);

  const TraceOptions options_;
  const int process_;
  int file_ = -1;
  std::size_t written_bytes_ = 0;
  std::vector<Added> added_;
  std::array<std::vector<Clock::time_point>, kTraceLanes> row_ends_;
};

// Adds an event of the communication thread from its construction to its end.
class TraceSpan {
 public:
  // Nothing is traced.
  TraceSpan() = default;
  // Nothing where `trace` is null; else it outlives the span.
  TraceSpan(Trace* trace, const char* category, const char* name);
  TraceSpan(Trace& trace, const char* category, std::string name, TraceArguments arguments);
  ~TraceSpan();
  TraceSpan(const TraceSpan&) = delete;
  TraceSpan& operator=(const TraceSpan&) = delete;

 private:
  Trace* trace_ = nullptr;
  TraceEvent event_;
};

}  // namespace thinwire
