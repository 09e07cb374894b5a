// Speed of the codecs on one core, each beside the probe `r = g + r` (two reads and a write) over
// the gradient's bytes as fp32, measured in turns so that a busy machine slows both.
//
//   codecs_bench [--elements N] [--layer N] [--dtype T] [--rounds R] [--json FILE] [SPEC...]
//
// Two rows a codec: one tensor of --elements (default 250 million of --dtype, fp32); and layers of
// --layer (default 4,194,304) elements from a set larger than the caches, as a training step meets
// them. sum: four bodies into one tensor; decode: one into a tensor of the gradient's dtype.
// Medians, [least, most] over the rounds.
//
// A linear codec's rows are matrices, from such a set too; "encode" is all that one rank computes
// in a step: projections and absorbs, of the wire's mean its own projection.

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "compressors/core/codec_support.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec.h"

namespace thinwire {
namespace {

constexpr double kNanoseconds = 1e9;
constexpr float kWeight = 0.25F;
constexpr std::size_t kSenders = 4;
// Sets of layers that are cycled through hold at least this much in all: more than any cache.
constexpr std::size_t kColdBytes = std::size_t{512} << 20;
constexpr std::array<std::array<std::int64_t, 2>, 2> kMatrices = {{{4096, 4096}, {4096, 1024}}};

struct Arguments {
  std::int64_t elements = 250'000'000;
  std::int64_t layer = 4'194'304;
  DType dtype = DType::kF32;
  int rounds = 7;
  std::string json;
  std::vector<std::string> specs;
};

// Zeroed floats or bytes on huge pages where the system gives them, as Memory has them.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) {
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    const std::size_t padded = (bytes + kHugePage) / kHugePage * kHugePage;
    data_.reset(static_cast<std::byte*>(std::aligned_alloc(kHugePage, padded)));
    if (!data_) throw std::bad_alloc();
    (void)madvise(data_.get(), padded, MADV_HUGEPAGE);
    std::memset(data_.get(), 0, padded);
    bytes_ = bytes;
  }
  std::span<std::byte> bytes() { return {data_.get(), bytes_}; }
  std::span<float> floats() {
    return {reinterpret_cast<float*>(data_.get()), bytes_ / sizeof(float)};
  }

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  std::unique_ptr<std::byte[], Free> data_;
  std::size_t bytes_ = 0;
};

// Near-normal: the sum of four bytes of a 64-bit mixer (splitmix64), spread by its low bits.
void fill_noise(std::span<float> values, std::uint64_t seed) {
  for (float& value : values) {
    seed += 0x9E3779B97F4A7C15;
    std::uint64_t z = seed;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    std::uint64_t sum = 0;
    for (int byte = 0; byte < 4; ++byte) sum += z >> (8 * byte + 32) & 255;
    const double fine = static_cast<double>(z & 0xFFFF) / 65536.0;
    value = static_cast<float>((static_cast<double>(sum) + fine - 510.5) / 147.8);
  }
}

__attribute__((noinline)) void probe(std::span<const float> grad, std::span<float> residual) {
  const float* g = grad.data();
  float* r = residual.data();
  for (std::size_t i = 0; i < grad.size(); ++i) r[i] = g[i] + r[i];
}

template <typename F>
double seconds(F&& f) {
  const auto start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Spread {
  double median = 0;
  double least = 0;
  double most = 0;
};

Spread spread(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return {.median = values[values.size() / 2], .least = values.front(), .most = values.back()};
}

// One tensor with all that its encode and the probe beside it touch.
struct Layer {
  Buffer grad_bytes;
  TensorView grad;
  Buffer probed;
  Buffer sum;
  std::unique_ptr<Memory> memory;
  std::vector<std::byte> body;
  std::size_t bytes = 0;  // of the body that the last encode wrote

  Layer(const Codec& codec, std::int64_t n, DType dtype, std::uint64_t seed)
      : grad_bytes(static_cast<std::size_t>(n) * size_bytes(dtype)),
        grad{grad_bytes.bytes().data(), n, dtype},
        probed(static_cast<std::size_t>(n) * sizeof(float)),
        sum(static_cast<std::size_t>(n) * sizeof(float)),
        body(codec.payload->slot_bytes(n)) {
    fill_noise(probed.floats(), seed);
    visit(grad, [&](auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      std::transform(probed.floats().begin(), probed.floats().end(), values, from_float<T>);
    });
    fill_noise(probed.floats(), seed + 1);
    if (codec.options.error_feedback && !codec.payload->traits().lossless) {
      memory = std::make_unique<Memory>(n, MemoryOptions{.decay = codec.options.decay});
      memory->restore(probed.floats());
    }
  }
};

// One matrix with all that a linear codec's step and the probe beside it touch.
struct LinearLayer {
  Buffer grad_bytes;
  TensorView grad;
  Buffer probed;
  Memory memory;

  LinearLayer(const Codec& codec, std::span<const std::int64_t> shape, DType dtype,
              std::uint64_t seed)
      : grad_bytes(static_cast<std::size_t>(shape[0] * shape[1]) * size_bytes(dtype)),
        grad{grad_bytes.bytes().data(), shape[0] * shape[1], dtype},
        probed(static_cast<std::size_t>(shape[0] * shape[1]) * sizeof(float)),
        memory(shape[0] * shape[1],
               {.decay = codec.options.decay, .needs = codec.linear->memory_needs(shape)}) {
    fill_noise(probed.floats(), seed);
    visit(grad, [&](auto* values) {
      using T = std::remove_pointer_t<decltype(values)>;
      std::transform(probed.floats().begin(), probed.floats().end(), values, from_float<T>);
    });
    fill_noise(probed.floats(), seed + 1);
    memory.restore(probed.floats());
  }
};

struct Row {
  std::string spec;
  std::int64_t elements = 0;
  std::size_t gradient_bytes = 0;
  std::size_t bytes = 0;
  double kept = 0;
  Spread probe_s = {};
  Spread encode_s = {};
  Spread share = {};
  Spread sum_s = {};
  Spread decode_s = {};
};

double count_kept(const PayloadCodec& codec, std::span<const std::byte> body, std::int64_t n) {
  if (!codec.traits().sparse) return static_cast<double>(n);
  Buffer decoded(static_cast<std::size_t>(n) * sizeof(float));
  codec.decode({}, body, view(decoded.floats()));
  const auto values = decoded.floats();
  return static_cast<double>(values.size()) -
         static_cast<double>(std::count(values.begin(), values.end(), 0.0F));
}

Row measure(const Codec& codec, std::int64_t n, DType dtype, std::size_t layers, int rounds) {
  std::vector<Layer> set;
  for (std::size_t i = 0; i < layers; ++i) set.emplace_back(codec, n, dtype, 2 * i + 1);
  Buffer workspace(codec.payload->workspace_bytes(n));

  Row row{.spec = codec.spec, .elements = n, .gradient_bytes = set.back().grad.bytes()};
  std::vector<double> probes;
  std::vector<double> encodes;
  std::vector<double> shares;
  std::vector<double> sums;
  std::vector<double> decodes;
  const auto encode = [&](int round) {
    double total = 0;
    for (Layer& layer : set) {
      const Context ctx{.workspace = workspace.bytes(), .step = static_cast<std::uint64_t>(round)};
      total += seconds([&] {
        layer.bytes = codec.payload->encode(ctx, layer.grad, layer.memory.get(), layer.body).bytes;
      });
      if (layer.memory) layer.memory->commit();
    }
    return total;
  };
  const auto run_probe = [&] {
    double total = 0;
    for (Layer& layer : set) {
      total += seconds([&] { probe(layer.grad_bytes.floats(), layer.probed.floats()); });
    }
    return total;
  };
  // The first round warms up pages, clocks and branch predictors and is not counted.
  for (int round = -1; round < rounds; ++round) {
    double probe_s = 0;
    double encode_s = 0;
    if (round % 2 == 0) {
      probe_s = run_probe();
      encode_s = encode(round);
    } else {
      encode_s = encode(round);
      probe_s = run_probe();
    }
    double sum_s = 0;
    for (Layer& layer : set) {
      std::array<std::span<const std::byte>, kSenders> bodies;
      bodies.fill(std::span<const std::byte>(layer.body).first(layer.bytes));
      sum_s += seconds([&] {
        codec.payload->sum({.workspace = workspace.bytes()}, bodies, kWeight, layer.sum.floats());
      });
    }
    double decode_s = 0;
    for (Layer& layer : set) {
      const auto body = std::span<const std::byte>(layer.body).first(layer.bytes);
      const TensorView out{layer.sum.bytes().data(), n, dtype};
      decode_s +=
          seconds([&] { codec.payload->decode({.workspace = workspace.bytes()}, body, out); });
    }
    if (round < 0) {
      row.bytes = set.back().bytes;
      row.kept = count_kept(*codec.payload, std::span(set.back().body).first(row.bytes), n);
      continue;
    }
    const auto count = static_cast<double>(layers);
    probes.push_back(probe_s / count);
    encodes.push_back(encode_s / count);
    shares.push_back(probe_s / encode_s);
    sums.push_back(sum_s / count);
    decodes.push_back(decode_s / count);
  }
  row.probe_s = spread(probes);
  row.encode_s = spread(encodes);
  row.share = spread(shares);
  row.sum_s = spread(sums);
  row.decode_s = spread(decodes);
  return row;
}

// Floats that one step put on the wire.
std::int64_t run_linear_step(const LinearCodec& codec, std::span<const std::int64_t> shape,
                             std::uint64_t step, LinearLayer& layer, Buffer& state, Buffer& wire) {
  const Context ctx{.step = step};
  const LinearCodec::Tensor tensor{
      .grad = layer.grad, .shape = shape, .memory = &layer.memory, .round_state = state.bytes()};
  std::int64_t floats = 0;
  for (int round = 0; round < codec.rounds(step); ++round) {
    const std::int64_t n = codec.round_elements(shape, round, step);
    const auto values = wire.floats().first(static_cast<std::size_t>(n));
    codec.project(ctx, round, tensor, values);
    codec.absorb(ctx, round, values, tensor);
    floats += n;
  }
  return floats;
}

Row measure_linear(const Codec& codec, std::span<const std::int64_t> shape, DType dtype,
                   int rounds) {
  const std::int64_t n = shape[0] * shape[1];
  std::vector<LinearLayer> set;
  const std::size_t layers =
      std::min<std::size_t>(kColdBytes / (static_cast<std::size_t>(n) * size_bytes(dtype)) + 1, 64);
  set.reserve(layers);
  for (std::size_t i = 0; i < layers; ++i) set.emplace_back(codec, shape, dtype, 2 * i + 1);
  Buffer state(codec.linear->round_state_bytes(shape));
  Buffer wire(static_cast<std::size_t>(n) * sizeof(float));
  Row row{.spec = codec.spec + " " + std::to_string(shape[0]) + "x" + std::to_string(shape[1]),
          .elements = n,
          .gradient_bytes = set.back().grad.bytes(),
          .kept = static_cast<double>(n)};
  std::vector<double> probes;
  std::vector<double> steps;
  std::vector<double> shares;
  for (int round = -1; round < rounds; ++round) {
    double step_s = 0;
    double probe_s = 0;
    for (LinearLayer& layer : set) {
      step_s += seconds([&] {
        row.bytes = sizeof(float) * static_cast<std::size_t>(run_linear_step(
                                        *codec.linear, shape, static_cast<std::uint64_t>(round + 1),
                                        layer, state, wire));
      });
      layer.memory.commit();
    }
    for (LinearLayer& layer : set) {
      probe_s += seconds([&] { probe(layer.grad_bytes.floats(), layer.probed.floats()); });
    }
    if (round < 0) continue;
    probes.push_back(probe_s / static_cast<double>(layers));
    steps.push_back(step_s / static_cast<double>(layers));
    shares.push_back(probe_s / step_s);
  }
  row.probe_s = spread(probes);
  row.encode_s = spread(steps);
  row.share = spread(shares);
  return row;
}

double gigabytes_per_s(const Row& row, double s) {
  return static_cast<double>(row.gradient_bytes) / 1e9 / s;
}

double bits_per_kept(const Row& row) { return static_cast<double>(row.bytes) * 8 / row.kept; }

void print(const Row& row) {
  if (row.sum_s.median == 0) {  // of a linear codec
    std::printf("%-24s %10lld  %7.2f %7.2f  %5.2f [%.2f, %.2f]  %8s %8s %8s  %11zu %7.2f\n",
                row.spec.c_str(), static_cast<long long>(row.elements),
                gigabytes_per_s(row, row.probe_s.median), gigabytes_per_s(row, row.encode_s.median),
                row.share.median, row.share.least, row.share.most, "-", "-", "-", row.bytes,
                bits_per_kept(row));
    std::fflush(stdout);
    return;
  }
  std::printf("%-24s %10lld  %7.2f %7.2f  %5.2f [%.2f, %.2f]  %8.2f %8.2f %8.2f  %11zu %7.2f\n",
              row.spec.c_str(), static_cast<long long>(row.elements),
              gigabytes_per_s(row, row.probe_s.median), gigabytes_per_s(row, row.encode_s.median),
              row.share.median, row.share.least, row.share.most,
              gigabytes_per_s(row, row.sum_s.median),
              row.sum_s.median * kNanoseconds / row.kept / kSenders,
              gigabytes_per_s(row, row.decode_s.median), row.bytes, bits_per_kept(row));
  std::fflush(stdout);
}

std::string json(const Row& row) {
  const auto field = [](const char* key, const Spread& s) {
    return std::string(",\"") + key + "\":[" + std::to_string(s.median * 1e6) + "," +
           std::to_string(s.least * 1e6) + "," + std::to_string(s.most * 1e6) + "]";
  };
  return "{\"spec\":\"" + row.spec + "\",\"elements\":" + std::to_string(row.elements) +
         ",\"bytes\":" + std::to_string(row.bytes) +
         ",\"bits_per_kept\":" + std::to_string(bits_per_kept(row)) +
         field("probe_us", row.probe_s) + field("encode_us", row.encode_s) +
         field("sum_us", row.sum_s) + field("decode_us", row.decode_s) + ",\"share\":[" +
         std::to_string(row.share.median) + "," + std::to_string(row.share.least) + "," +
         std::to_string(row.share.most) + "]}";
}

std::string machine() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

std::int64_t number(std::string_view name, std::string_view text) {
  std::int64_t value = 0;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end.ptr != text.data() + text.size() || value <= 0) {
    throw InvalidArgument(std::string(name) + " " + std::string(text) +
                          ": expected a whole number above 0");
  }
  return value;
}

DType dtype_of(std::string_view text) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (text == name(dtype)) return dtype;
  }
  throw InvalidArgument("--dtype " + std::string(text) + ": expected fp32, bf16 or fp16");
}

Arguments parse(std::span<char*> words) {
  Arguments arguments;
  for (std::size_t i = 1; i < words.size(); ++i) {
    const std::string_view word = words[i];
    if (!word.starts_with("--")) {
      arguments.specs.emplace_back(word);
      continue;
    }
    if (i + 1 == words.size()) throw InvalidArgument(std::string(word) + ": expected a value");
    const std::string_view value = words[++i];
    if (word == "--elements") {
      arguments.elements = number(word, value);
    } else if (word == "--layer") {
      arguments.layer = number(word, value);
    } else if (word == "--dtype") {
      arguments.dtype = dtype_of(value);
    } else if (word == "--rounds") {
      arguments.rounds = static_cast<int>(number(word, value));
    } else if (word == "--json") {
      arguments.json = value;
    } else {
      throw InvalidArgument(std::string(word) +
                            ": expected --elements, --layer, --dtype, --rounds, --json or a "
                            "codec's spec");
    }
  }
  if (arguments.specs.empty()) {
    arguments.specs = {"topk:0.001",
                       "topk:0.001,values=q8",
                       "topk:0.01,values=q8",
                       "q4",
                       "q8",
                       "q4,rotate",
                       "q8,kind=mx",
                       "onebit",
                       "onebit,block=1024",
                       "bf16",
                       "fedzip:0.01",
                       "lossless",
                       "dct:32",
                       "powersgd:4",
                       "powersgd:4,rounds=1",
                       "galore:4",
                       "dctcols:32"};
  }
  return arguments;
}

void run(std::span<char*> words) {
  const Arguments arguments = parse(words);
  std::string command;
  for (const char* word : words) command += std::string(command.empty() ? "" : " ") + word;
  std::vector<Codec> codecs;
  for (const std::string& spec : arguments.specs) {
    codecs.push_back(make_codec(spec));
    if (codecs.back().is_none()) throw InvalidArgument(spec + ": expected a codec");
  }
  std::printf("# machine: %s, one core\n# compiler: %s\n# SIMD target: %s\n# command: %s\n",
              machine().c_str(), TW_COMPILER, simd_target().c_str(), command.c_str());
  std::printf(
      "# GB/s of %s gradient; share: probe time / encode time, pairs in turns, median "
      "[least, most] of %d\n",
      std::string(name(arguments.dtype)).c_str(), arguments.rounds);
  std::printf("# %-22s %10s  %7s %7s  %-18s  %8s %8s %8s  %11s %7s\n", "codec", "elements", "probe",
              "encode", "share", "sum GB/s", "ns/kept", "decode", "bytes", "bits");
  std::ofstream lines;
  if (!arguments.json.empty()) lines.open(arguments.json);
  const std::size_t layers =
      kColdBytes / (static_cast<std::size_t>(arguments.layer) * size_bytes(arguments.dtype)) + 1;
  const auto report = [&](const Row& row) {
    print(row);
    if (lines.is_open()) lines << json(row) << '\n';
  };
  for (const Codec& codec : codecs) {
    if (codec.linear) {
      for (const auto& shape : kMatrices) {
        report(measure_linear(codec, shape, arguments.dtype, arguments.rounds));
      }
      continue;
    }
    for (const bool layered : {false, true}) {
      const Row row =
          layered ? measure(codec, arguments.layer, arguments.dtype,
                            std::min<std::size_t>(layers, 64), arguments.rounds)
                  : measure(codec, arguments.elements, arguments.dtype, 1, arguments.rounds);
      report(row);
    }
  }
}

}  // namespace
}  // namespace thinwire

int main(int argc, char** argv) {
  try {
    thinwire::run({argv, static_cast<std::size_t>(argc)});
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "codecs_bench: %s\n", error.what());
    return 2;
  }
}
