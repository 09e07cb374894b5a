#include "compressors/adaptive/codec_speeds.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <system_error>
#include <vector>

#include "compressors/core/aligned_buffer.h"
#include "compressors/core/encode.h"
#include "compressors/core/environment.h"
#include "compressors/core/error.h"
#include "compressors/core/memory.h"
#include "compressors/core/random.h"
#include "compressors/core/simd.h"
#include "compressors/core/version.h"

namespace thinwire {
namespace {

constexpr std::int64_t kRows = 512;
constexpr std::int64_t kElements = kRows * kRows;
constexpr std::array<std::int64_t, 2> kShape = {kRows, kRows};
constexpr int kRepeats = 4;  // the first warms up
constexpr std::size_t kBodies = 4;

std::vector<float> noise() {
  std::vector<float> values(kElements);
  const RandomStream stream = random_stream(0, 0, 0);
  for (std::size_t i = 0; i < values.size(); ++i) {
    // A sum of uniform numbers is near enough to a gradient for a clock.
    for (const std::uint32_t word : random_block(stream, i)) {
      values[i] += static_cast<float>(static_cast<std::int32_t>(word)) * 0x1p-31F;
    }
  }
  return values;
}

template <typename Call>
double least_seconds(Call&& call) {
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kRepeats; ++i) {
    const auto began = std::chrono::steady_clock::now();
    call(i);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    least = std::min(least, took.count());
  }
  return least / static_cast<double>(kElements);
}

Context context(std::span<std::byte> workspace, int step) {
  Context ctx;
  ctx.workspace = workspace;
  ctx.step = static_cast<std::uint64_t>(step);
  ctx.world_size = kBodies;
  ctx.shape = kShape;
  return ctx;
}

CodecSpeed measure_copies(std::vector<float>& gradient) {
  std::vector<float> other(gradient.size());
  CodecSpeed speed;
  speed.encode = least_seconds(
      [&](int) { std::memcpy(other.data(), gradient.data(), gradient.size() * sizeof(float)); });
  speed.decode = least_seconds(
      [&](int) { std::memcpy(gradient.data(), other.data(), gradient.size() * sizeof(float)); });
  return speed;
}

CodecSpeed measure_payload(const PayloadCodec& codec, const CommonOptions& options,
                           std::vector<float>& gradient) {
  const AlignedBuffer workspace(codec.workspace_bytes(kElements));
  Memory memory(kElements, {.transactional = options.transactional,
                            .storage = options.storage,
                            .needs = codec.memory_needs(kElements)});
  const AlignedBuffer unpacked(residual_scratch_bytes(codec, &memory));
  std::vector<std::byte> body(codec.slot_bytes(kElements));
  std::vector<float> mean(gradient.size());
  CodecSpeed speed;
  speed.encode = least_seconds([&](int step) {
    encode(codec, context(workspace.bytes(), step), view(gradient),
           options.error_feedback ? &memory : nullptr,
           make_dither(0, static_cast<std::uint64_t>(step), 0), unpacked.bytes(), body);
    memory.commit();
  });
  const std::vector<std::span<const std::byte>> bodies(kBodies, body);
  const auto sum = [&](std::size_t count) {
    return least_seconds([&](int step) {
      codec.sum(context(workspace.bytes(), step), std::span(bodies).first(count), 0.25F, mean);
    });
  };
  speed.decode = sum(1);
  speed.decode_more = std::max(0.0, sum(kBodies) - speed.decode) / (kBodies - 1);
  return speed;
}

CodecSpeed measure_linear(const LinearCodec& codec, std::vector<float>& gradient) {
  Memory memory(kElements, {.needs = codec.memory_needs(kShape)});
  const AlignedBuffer state(codec.round_state_bytes(kShape));
  const LinearCodec::Tensor tensor{
      .grad = view(gradient),
      .shape = kShape,
      .memory = &memory,
      .round_state = state.bytes().first(codec.round_state_bytes(kShape))};
  std::vector<float> wire;
  double projections = 0;
  double absorbs = 0;
  const auto seconds = [](auto&& call) {
    const auto began = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  };
  CodecSpeed speed{.encode = std::numeric_limits<double>::infinity(),
                   .decode = std::numeric_limits<double>::infinity()};
  for (int step = 0; step < kRepeats; ++step) {
    const Context ctx = context({}, step);
    projections = absorbs = 0;
    for (int round = 0; round < codec.rounds(ctx.step); ++round) {
      wire.resize(static_cast<std::size_t>(codec.round_elements(kShape, round, ctx.step)));
      projections += seconds([&] { codec.project(ctx, round, tensor, wire); });
      absorbs += seconds([&] { codec.absorb(ctx, round, wire, tensor); });
    }
    memory.commit();
    speed.encode = std::min(speed.encode, projections / kElements);
    speed.decode = std::min(speed.decode, absorbs / kElements);
  }
  return speed;
}

// Other processors and other kernels have other speeds.
std::string machine() {
  std::string model = "?";
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) == 0) {
      model = line.substr(std::min(line.size(), line.find(':') + 2));
      break;
    }
  }
#ifdef NDEBUG
  const char* build = "";
#else
  const char* build = ", checked";
#endif
  return "thinwire " + std::string(version()) + build + ", " + simd_target() + ", " + model;
}

}  // namespace

CodecSpeed measure_speed(const Codec& codec) {
  std::vector<float> gradient = noise();
  if (codec.is_none()) return measure_copies(gradient);
  return codec.linear ? measure_linear(*codec.linear, gradient)
                      : measure_payload(*codec.payload, codec.options, gradient);
}

CodecSpeeds::CodecSpeeds(std::string path) : path_(std::move(path)) { read(); }

std::string CodecSpeeds::user_cache() {
  const std::optional<std::string> folder = environment_cache_folder();
  return folder ? *folder + "/codec-speeds" : std::string();
}

void CodecSpeeds::measure(std::span<const Codec> codecs) {
  bool any = false;
  for (const Codec& codec : codecs) {
    if (speeds_.find(codec.spec) == speeds_.end()) {
      speeds_[codec.spec] = measure_speed(codec);
      any = true;
    }
  }
  if (any) write();
}

const CodecSpeed& CodecSpeeds::of(std::string_view spec) const {
  const auto found = speeds_.find(spec);
  if (found == speeds_.end()) {
    throw InvalidArgument("the speed of '" + std::string(spec) + "' was not measured");
  }
  return found->second;
}

// A line that names the machine, then "SPEC encode decode decode_more" a line.
void CodecSpeeds::read() {
  std::ifstream file(path_);
  std::string line;
  if (path_.empty() || !std::getline(file, line) || line != machine()) {
    return;
  }
  while (std::getline(file, line)) {
    std::istringstream fields(line);
    std::string spec;
    CodecSpeed speed;
    if (fields >> spec >> speed.encode >> speed.decode >> speed.decode_more && speed.encode >= 0 &&
        speed.decode >= 0 && speed.decode_more >= 0) {
      speeds_[spec] = speed;
    }
  }
}

void CodecSpeeds::write() const {
  if (path_.empty()) {
    return;
  }
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(path_).parent_path(), error);
  static std::atomic<int> writers = 0;
  const std::string part =
      path_ + "." + std::to_string(::getpid()) + "." + std::to_string(writers++);
  {
    std::ofstream file(part);
    file << machine() << '\n';
    for (const auto& [spec, speed] : speeds_) {
      file << spec << ' ' << speed.encode << ' ' << speed.decode << ' ' << speed.decode_more
           << '\n';
    }
    file.close();
    if (!file) {
      std::filesystem::remove(part, error);
      return;
    }
  }
  std::filesystem::rename(part, path_, error);
}

}  // namespace thinwire
