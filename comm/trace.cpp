#include "comm/trace.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "compressors/core/error.h"
#include "compressors/core/version.h"

namespace thinwire {
namespace {

using Json = nlohmann::ordered_json;

// What a trace begins with.
constexpr std::string_view kBegin = R"([
{"name":"process_name")";
// Rows of a lane, and lanes of a model, are numbered so far apart.
constexpr int kRows = 1000;
constexpr std::array<const char*, kTraceLanes> kLaneNames = {"steps", "queue",
                                                             "communication thread", "wire"};

double microseconds(Clock::duration time) {
  return static_cast<double>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count()) /
         1000;
}

std::string line(const Json& event) {
  // Names that are not UTF-8 are shown as far as they are.
  return event.dump(-1, ' ', false, Json::error_handler_t::replace) + ",\n";
}

std::string metadata(const char* name, int process, const Json& arguments) {
  return line({{"name", name}, {"ph", "M"}, {"pid", process}, {"args", arguments}});
}

std::string metadata(const char* name, int process, int row, const Json& arguments) {
  return line({{"name", name}, {"ph", "M"}, {"pid", process}, {"tid", row}, {"args", arguments}});
}

std::string host() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

std::string last_error() { return std::system_category().message(errno); }

[[noreturn]] void refuse(const std::string& what, const std::string& hint) {
  throw InvalidArgument("trace: " + what + "\nhint: " + hint);
}

}  // namespace

Trace::Trace(TraceOptions options, int rank)
    : options_(std::move(options)), process_(options_.process < 0 ? rank : options_.process) {
  open();
}

Trace::~Trace() {
  if (file_ >= 0) ::close(file_);
}

// The first who comes begins the array; the lock keeps the others from doing so, too.
void Trace::open() {
  const std::string hint = "name a file in a folder that exists and may be written to";
  file_ = ::open(options_.file.c_str(), O_RDWR | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (file_ < 0) refuse("cannot append to " + options_.file + ": " + last_error(), hint);
  try {
    if (::flock(file_, LOCK_EX) != 0) {
      refuse("cannot lock " + options_.file + ": " + last_error(),
             "name a file on a file system that has locks");
    }
    std::array<char, kBegin.size()> bytes{};
    const ssize_t count = ::pread(file_, bytes.data(), bytes.size(), 0);
    const std::string_view found(bytes.data(),
                                 static_cast<std::size_t>(std::max<ssize_t>(count, 0)));
    if (!kBegin.starts_with(found)) {
      refuse(options_.file + ": expected a new file or a trace, got something else",
             "name another file");
    }
    const std::string cause = append((found.empty() ? "[\n" : "") + head());
    if (!cause.empty()) refuse("cannot append to " + options_.file + ": " + cause, hint);
    ::flock(file_, LOCK_UN);
  } catch (...) {
    ::close(file_);
    throw;
  }
}

std::string Trace::head() const {
  const auto unix_time = std::chrono::system_clock::now().time_since_epoch();
  const auto time = Clock::now().time_since_epoch();
  const std::string here = host();
  return metadata("process_name", process_, {{"name", "rank " + std::to_string(process_)}}) +
         metadata("process_sort_index", process_, {{"sort_index", process_}}) +
         metadata("process_labels", process_, {{"labels", here}}) +
         metadata("thinwire", process_,
                  {{"version", version()},
                   {"host", here},
                   {"unix_time_of_ts_0_us", microseconds(unix_time) - microseconds(time)}});
}

void Trace::add(TraceLane lane, TraceEvent event) { added_.push_back({lane, std::move(event)}); }

std::string Trace::write() {
  std::string text;
  for (const Added& added : added_) text += lines(added);
  added_.clear();
  const std::string more = "; rank " + std::to_string(process_) + " traces no more steps";
  if (written_bytes_ + text.size() > options_.limit_bytes) {
    return "trace: " + options_.file + ": a rank may write " +
           std::to_string(options_.limit_bytes >> 20) + " MiB" + more;
  }
  const std::string cause = append(text);
  return cause.empty() ? "" : "trace: cannot write to " + options_.file + ": " + cause + more;
}

std::string Trace::append(const std::string& text) {
  const ssize_t count = ::write(file_, text.data(), text.size());
  if (count < 0) return last_error();
  written_bytes_ += text.size();
  return static_cast<std::size_t>(count) == text.size() ? "" : "a line was cut short";
}

// The event's, after those that name its row, where that is new.
std::string Trace::lines(const Added& added) {
  const auto& [lane, event] = added;
  const std::size_t rows_before = row_ends_[static_cast<std::size_t>(lane)].size();
  const std::size_t row = row_of(added);
  const int id = row_id(lane, row);
  std::string text;
  if (row == rows_before) {
    std::string name = kLaneNames[static_cast<std::size_t>(lane)];
    if (row > 0) name += " " + std::to_string(row + 1);
    if (options_.model > 0) name += ", model " + std::to_string(options_.model);
    text += metadata("thread_name", process_, id, {{"name", name}}) +
            metadata("thread_sort_index", process_, id, {{"sort_index", id}});
  }
  Json arguments = Json::object();
  for (const auto& [name, value] : event.arguments) {
    std::visit([&arguments, key = name](const auto& v) { arguments[key] = v; }, value);
  }
  return text + line({{"name", event.name},
                      {"cat", event.category},
                      {"ph", "X"},
                      {"pid", process_},
                      {"tid", id},
                      {"ts", microseconds(event.begin.time_since_epoch())},
                      {"dur", microseconds(event.end - event.begin)},
                      {"args", arguments}});
}

// The first that is free when the event begins.
std::size_t Trace::row_of(const Added& added) {
  std::vector<Clock::time_point>& ends = row_ends_[static_cast<std::size_t>(added.lane)];
  const auto free = added.lane == TraceLane::kThread
                        ? ends.begin()
                        : std::find_if(ends.begin(), ends.end(), [&](Clock::time_point end) {
                            return end <= added.event.begin;
                          });
  const auto row = static_cast<std::size_t>(free - ends.begin());
  if (row == ends.size()) ends.emplace_back();
  ends[row] = added.event.end;
  return row;
}

int Trace::row_id(TraceLane lane, std::size_t row) const {
  const int lanes = static_cast<int>(kTraceLanes) * options_.model + static_cast<int>(lane);
  return kRows * lanes + static_cast<int>(row);
}

TraceSpan::TraceSpan(Trace* trace, const char* category, const char* name) : trace_(trace) {
  if (trace_ == nullptr) return;
  event_.category = category;
  event_.name = name;
  event_.begin = Clock::now();
}

TraceSpan::TraceSpan(Trace& trace, const char* category, std::string name, TraceArguments arguments)
    : trace_(&trace),
      event_{.category = category,
             .name = std::move(name),
             .begin = Clock::now(),
             .end = {},
             .arguments = std::move(arguments)} {}

TraceSpan::~TraceSpan() {
  if (trace_ == nullptr) return;
  event_.end = Clock::now();
  try {
    trace_->add(TraceLane::kThread, std::move(event_));
  } catch (...) {  // no memory: an event less
  }
}

}  // namespace thinwire
