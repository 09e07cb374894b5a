// Speed of the codecs on one core, each beside the probe `r = g + r` (two reads and a write) over
// the gradient's bytes as fp32, measured in turns so that a busy machine slows both.
//
//   codecs_bench [--elements N] [--layer N] [--dtype T] [--gradient FILE] [--rounds R] [--threads
//   N]
//                [--json FILE] [SPEC...]
//
// Gradients are near-normal noise, or the values of FILE (fp32, as `thinwire bench gradient` writes
// them), repeated; each step's begin elsewhere among them.
//
// A SPEC "kth-value:DENSITY" measures the selection alone: the magnitude that this share of the
// gradient reaches, beside std::nth_element over the magnitudes.
//
// Two rows a codec: one tensor of --elements (default 250 million of --dtype, fp32); and layers of
// --layer (default 4,194,304) elements from a set larger than the caches, as a training step meets
// them. sum: four bodies into one tensor; decode: one into a tensor of the gradient's dtype.
// Medians, [least, most] over the rounds. With memory=bf16 or q8 encode reads the residual from
// that and rounds it back.
//
// A linear codec's rows are matrices, from such a set too; "encode" is all that one rank computes
// in a step: projections and absorbs, of the wire's mean its own projection.
//
// --threads N: the same rows for one thread alone and for N at once, each bound to a core and with
// tensors of its own. "gain" is how much more N encode in a time than one does, and what that would
// be by the threads' processor time, which other programs take nothing of; the shares are encode's
// of the probe alone, and of N probes at once.

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "compressors/core/aligned_buffer.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/encode.h"
#include "compressors/core/random.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/workspace.h"
#include "compressors/topk/topk_selection.h"

namespace thinwire {
namespace {

constexpr double kNanoseconds = 1e9;
constexpr float kWeight = 0.25F;
constexpr std::size_t kSenders = 4;
// Every step's gradient begins so many elements behind the last one's: other values everywhere.
constexpr std::int64_t kStepElements = 16;
constexpr std::int64_t kSteps = 64;
// Steps before the first that counts, of codecs that carry something from step to step.
constexpr int kCarriedSteps = 12;
constexpr std::string_view kKthValue = "kth-value:";
// Sets of layers that are cycled through hold at least this much in all: more than any cache.
constexpr std::size_t kColdBytes = std::size_t{512} << 20;
constexpr std::array<std::array<std::int64_t, 2>, 2> kMatrices = {{{4096, 4096}, {4096, 1024}}};

struct Arguments {
  std::int64_t elements = 250'000'000;
  std::int64_t layer = 4'194'304;
  DType dtype = DType::kF32;
  int rounds = 7;
  int threads = 1;
  std::string gradient;
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

// What gradients and residuals are made of.
struct Gradients {
  DType dtype = DType::kF32;
  std::vector<float> recorded;  // none: noise

  void fill(std::span<float> values, std::uint64_t seed) const {
    if (recorded.empty()) return fill_noise(values, seed);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = recorded[(i + 7919 * seed) % recorded.size()];
    }
  }
  // The same in dtype; `values` is overwritten.
  void fill(TensorView grad, std::span<float> values, std::uint64_t seed) const {
    fill(values, seed);
    visit(grad, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(to)>;
      std::transform(values.begin(), values.end(), to, from_float<T>);
    });
  }
};

std::vector<float> read_values(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.empty() || bytes.size() % sizeof(float) != 0) {
    throw InvalidArgument("--gradient " + path + ": expected a file of fp32 values");
  }
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
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

  Layer(const Codec& codec, std::int64_t n, const Gradients& gradients, std::uint64_t seed)
      : grad_bytes(static_cast<std::size_t>(n + kSteps * kStepElements) *
                   size_bytes(gradients.dtype)),
        grad{grad_bytes.bytes().data(), n, gradients.dtype},
        probed(static_cast<std::size_t>(n + kSteps * kStepElements) * sizeof(float)),
        sum(static_cast<std::size_t>(n) * sizeof(float)),
        body(codec.payload->slot_bytes(n)) {
    gradients.fill({grad.data, n + kSteps * kStepElements, grad.dtype}, probed.floats(), seed);
    gradients.fill(probed.floats(), seed + 1);
    if (codec.options.error_feedback && !codec.payload->traits().lossless) {
      memory = std::make_unique<Memory>(n, MemoryOptions{.storage = codec.options.storage,
                                                         .decay = codec.options.decay,
                                                         .needs = codec.payload->memory_needs(n)});
      memory->restore(probed.floats().first(static_cast<std::size_t>(n)));
    }
  }
  TensorView grad_of(int step) const {
    const std::int64_t begin = (step % kSteps + kSteps) % kSteps * kStepElements;
    return TensorView{grad.data, begin + grad.elements, grad.dtype}.slice(begin,
                                                                          begin + grad.elements);
  }
};

// One matrix with all that a linear codec's step and the probe beside it touch.
struct LinearLayer {
  Buffer grad_bytes;
  TensorView grad;
  Buffer probed;
  Memory memory;

  LinearLayer(const Codec& codec, std::span<const std::int64_t> shape, const Gradients& gradients,
              std::uint64_t seed)
      : grad_bytes(static_cast<std::size_t>(shape[0] * shape[1]) * size_bytes(gradients.dtype)),
        grad{grad_bytes.bytes().data(), shape[0] * shape[1], gradients.dtype},
        probed(static_cast<std::size_t>(shape[0] * shape[1]) * sizeof(float)),
        memory(shape[0] * shape[1],
               {.decay = codec.options.decay, .needs = codec.linear->memory_needs(shape)}) {
    gradients.fill(grad, probed.floats(), seed);
    gradients.fill(probed.floats(), seed + 1);
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

// The layers of a payload codec that one thread goes through. All times are sums over them.
class PayloadSet {
 public:
  PayloadSet(const Codec& codec, std::int64_t n, const Gradients& gradients, std::size_t layers,
             std::uint64_t seed = 0)
      : codec_(*codec.payload), workspace_(codec_.workspace_bytes(n)) {
    for (std::size_t i = 0; i < layers; ++i)
      layers_.emplace_back(codec, n, gradients, seed + 2 * i + 1);
    scratch_ = AlignedBuffer(residual_scratch_bytes(codec_, last().memory.get()));
    if (codec_.memory_needs(n).state == 0) return;
    for (int step = -kCarriedSteps; step < -1; ++step) encode(step);
  }
  const Layer& last() const { return layers_.back(); }
  std::size_t layers() const { return layers_.size(); }

  double encode(int round) {
    const Context ctx{.workspace = workspace_.bytes(), .step = static_cast<std::uint64_t>(round)};
    return over_all([&](Layer& layer) {
      const double s = seconds([&] {
        layer.bytes = thinwire::encode(codec_, ctx, layer.grad_of(round), layer.memory.get(),
                                       make_dither(0, ctx.step, 0), scratch_.bytes(), layer.body)
                          .bytes;
      });
      if (layer.memory) layer.memory->commit();
      return s;
    });
  }
  double probe() {
    return over_all([&](Layer& layer) {
      const auto grad = layer.grad_bytes.floats().first(layer.grad.bytes() / sizeof(float));
      return seconds([&] { thinwire::probe(grad, layer.probed.floats()); });
    });
  }
  double sum() {
    return over_all([&](Layer& layer) {
      std::array<std::span<const std::byte>, kSenders> bodies;
      bodies.fill(std::span<const std::byte>(layer.body).first(layer.bytes));
      return seconds([&] {
        codec_.sum({.workspace = workspace_.bytes()}, bodies, kWeight, layer.sum.floats());
      });
    });
  }
  double decode() {
    return over_all([&](Layer& layer) {
      const auto body = std::span<const std::byte>(layer.body).first(layer.bytes);
      const TensorView out{layer.sum.bytes().data(), layer.grad.elements, layer.grad.dtype};
      return seconds([&] { codec_.decode({.workspace = workspace_.bytes()}, body, out); });
    });
  }

 private:
  template <typename F>
  double over_all(F&& f) {
    double total = 0;
    for (Layer& layer : layers_) total += f(layer);
    return total;
  }

  const PayloadCodec& codec_;
  Buffer workspace_;
  AlignedBuffer scratch_;
  std::vector<Layer> layers_;
};

// The same for a linear codec and matrices; encode is a whole step of one rank.
class LinearSet {
 public:
  LinearSet(const Codec& codec, std::span<const std::int64_t> shape, const Gradients& gradients,
            std::uint64_t seed = 0)
      : codec_(*codec.linear),
        shape_(shape),
        state_(codec_.round_state_bytes(shape)),
        wire_(static_cast<std::size_t>(shape[0] * shape[1]) * sizeof(float)) {
    const auto bytes = static_cast<std::size_t>(shape[0] * shape[1]) * size_bytes(gradients.dtype);
    const std::size_t layers = std::min<std::size_t>(kColdBytes / bytes + 1, 64);
    layers_.reserve(layers);
    for (std::size_t i = 0; i < layers; ++i) {
      layers_.emplace_back(codec, shape, gradients, seed + 2 * i + 1);
    }
  }
  const LinearLayer& last() const { return layers_.back(); }
  std::size_t layers() const { return layers_.size(); }
  // That the last step of a layer put on the wire.
  std::size_t sent_bytes() const { return sent_bytes_; }

  double encode(int round) {
    double total = 0;
    for (LinearLayer& layer : layers_) {
      total += seconds([&] { step(static_cast<std::uint64_t>(round + 1), layer); });
      layer.memory.commit();
    }
    return total;
  }
  double probe() {
    double total = 0;
    for (LinearLayer& layer : layers_) {
      total += seconds([&] { thinwire::probe(layer.grad_bytes.floats(), layer.probed.floats()); });
    }
    return total;
  }

 private:
  void step(std::uint64_t step, LinearLayer& layer) {
    const Context ctx{.step = step};
    const LinearCodec::Tensor tensor{.grad = layer.grad,
                                     .shape = shape_,
                                     .memory = &layer.memory,
                                     .round_state = state_.bytes()};
    sent_bytes_ = 0;
    for (int round = 0; round < codec_.rounds(step); ++round) {
      const auto n = static_cast<std::size_t>(codec_.round_elements(shape_, round, step));
      const auto values = wire_.floats().first(n);
      codec_.project(ctx, round, tensor, values);
      codec_.absorb(ctx, round, values, tensor);
      sent_bytes_ += n * sizeof(float);
    }
  }

  const LinearCodec& codec_;
  std::span<const std::int64_t> shape_;
  Buffer state_;
  Buffer wire_;
  std::vector<LinearLayer> layers_;
  std::size_t sent_bytes_ = 0;
};

std::string label(const Codec& codec, std::span<const std::int64_t> shape) {
  return codec.spec + " " + std::to_string(shape[0]) + "x" + std::to_string(shape[1]);
}

Row measure(const Codec& codec, std::int64_t n, const Gradients& gradients, std::size_t layers,
            int rounds) {
  PayloadSet set(codec, n, gradients, layers);
  Row row{.spec = codec.spec, .elements = n, .gradient_bytes = set.last().grad.bytes()};
  std::vector<double> probes;
  std::vector<double> encodes;
  std::vector<double> shares;
  std::vector<double> sums;
  std::vector<double> decodes;
  // The first round warms up pages, clocks and branch predictors and is not counted.
  for (int round = -1; round < rounds; ++round) {
    double probe_s = 0;
    double encode_s = 0;
    if (round % 2 == 0) {
      probe_s = set.probe();
      encode_s = set.encode(round);
    } else {
      encode_s = set.encode(round);
      probe_s = set.probe();
    }
    const double sum_s = set.sum();
    const double decode_s = set.decode();
    if (round < 0) {
      row.bytes = set.last().bytes;
      row.kept = count_kept(*codec.payload, std::span(set.last().body).first(row.bytes), n);
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

// The k-th largest magnitude alone, and the standard library's.
std::array<Row, 2> measure_kth(double density, std::int64_t n, int rounds) {
  Buffer grad(static_cast<std::size_t>(n) * sizeof(float));
  Buffer other(static_cast<std::size_t>(n) * sizeof(float));
  fill_noise(grad.floats(), 1);
  const std::int64_t keep = topk::keep_count("topk", n, density * static_cast<double>(n));
  Buffer workspace(topk::selection_bytes(n, keep));
  Row row{.spec = std::string(kKthValue) + number_text(density),
          .elements = n,
          .gradient_bytes = static_cast<std::size_t>(n) * sizeof(float),
          .kept = static_cast<double>(keep)};
  std::vector<double> probes;
  std::vector<double> ours;
  std::vector<double> shares;
  std::vector<double> theirs;
  std::vector<double> their_shares;
  for (int round = -1; round < rounds; ++round) {
    const double probe_s = seconds([&] { probe(grad.floats(), other.floats()); });
    float found = 0;
    const double ours_s = seconds([&] {
      Workspace scratch(workspace.bytes());
      const Context ctx{.step = static_cast<std::uint64_t>(round)};
      const JointCodec::Part tensor{view(grad.floats())};
      const topk::Selection selection =
          topk::select_largest(ctx, {&tensor, 1}, {.keep = keep}, scratch);
      found = std::bit_cast<float>(topk::part_of_least(selection.entries, 1.0F));
    });
    std::transform(grad.floats().begin(), grad.floats().end(), other.floats().begin(),
                   [](float x) { return std::fabs(x); });
    const auto kth = other.floats().begin() + static_cast<std::ptrdiff_t>(keep - 1);
    const double theirs_s = seconds([&] {
      std::nth_element(other.floats().begin(), kth, other.floats().end(), std::greater<>());
    });
    if (found != *kth) throw std::runtime_error("the k-th value is not std::nth_element's");
    if (round < 0) continue;
    probes.push_back(probe_s);
    ours.push_back(ours_s);
    shares.push_back(probe_s / ours_s);
    theirs.push_back(theirs_s);
    their_shares.push_back(probe_s / theirs_s);
  }
  row.probe_s = spread(probes);
  row.encode_s = spread(ours);
  row.share = spread(shares);
  Row library = row;
  library.spec = "std::nth_element:" + number_text(density);
  library.encode_s = spread(theirs);
  library.share = spread(their_shares);
  return {row, library};
}

Row measure_linear(const Codec& codec, std::span<const std::int64_t> shape,
                   const Gradients& gradients, int rounds) {
  LinearSet set(codec, shape, gradients);
  const auto layers = static_cast<double>(set.layers());
  Row row{.spec = label(codec, shape),
          .elements = set.last().grad.elements,
          .gradient_bytes = set.last().grad.bytes(),
          .kept = static_cast<double>(set.last().grad.elements)};
  std::vector<double> probes;
  std::vector<double> steps;
  std::vector<double> shares;
  for (int round = -1; round < rounds; ++round) {
    const double step_s = set.encode(round);
    const double probe_s = set.probe();
    row.bytes = set.sent_bytes();
    if (round < 0) continue;
    probes.push_back(probe_s / layers);
    steps.push_back(step_s / layers);
    shares.push_back(probe_s / step_s);
  }
  row.probe_s = spread(probes);
  row.encode_s = spread(steps);
  row.share = spread(shares);
  return row;
}

// ---- Several threads at once.

// The cores that this process may use.
std::vector<int> cores() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return {};
  std::vector<int> all;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &allowed)) all.push_back(i);
  }
  return all;
}

double thread_cpu_s() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) / kNanoseconds;
}

struct Times {
  double wall_s = 0;  // from the common start to the end of the last
  double cpu_s = 0;   // of a thread, mean
};

// Calls f(i) for i < count on a thread each, bound to the i-th core, all at once.
template <typename F>
Times at_once(std::size_t count, F&& f) {
  const std::vector<int> all = cores();
  std::barrier start(static_cast<std::ptrdiff_t>(count));
  std::vector<double> begins(count);
  std::vector<double> ends(count);
  std::vector<double> cpus(count);
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
  };
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < count; ++i) {
    threads.emplace_back([&, i] {
      cpu_set_t core;
      CPU_ZERO(&core);
      CPU_SET(all[i], &core);
      (void)pthread_setaffinity_np(pthread_self(), sizeof core, &core);
      start.arrive_and_wait();
      begins[i] = now();
      const double cpu = thread_cpu_s();
      f(i);
      cpus[i] = thread_cpu_s() - cpu;
      ends[i] = now();
    });
  }
  for (std::thread& thread : threads) thread.join();
  Times times{.wall_s = *std::max_element(ends.begin(), ends.end()) -
                        *std::min_element(begins.begin(), begins.end())};
  for (const double cpu : cpus) times.cpu_s += cpu / static_cast<double>(count);
  return times;
}

struct ThreadsRow {
  std::string spec;
  std::int64_t elements = 0;
  int threads = 0;
  double gradient_bytes = 0;  // of a thread
  Spread probe_one_s = {};
  Spread probe_all_s = {};
  Spread encode_one_s = {};
  Spread encode_all_s = {};
  Spread gain = {};
  Spread cpu_gain = {};
  Spread share_one = {};
  Spread share_all = {};
};

// `sets`: one a thread, all alike.
template <typename Set>
ThreadsRow measure_threads(std::string spec, std::vector<std::unique_ptr<Set>> sets, int rounds) {
  const std::size_t threads = sets.size();
  const TensorView grad = sets[0]->last().grad;
  ThreadsRow row{
      .spec = std::move(spec),
      .elements = grad.elements,
      .threads = static_cast<int>(threads),
      .gradient_bytes = static_cast<double>(grad.bytes()) * static_cast<double>(sets[0]->layers())};
  std::array<std::vector<double>, 8> values;
  for (int round = -1; round < rounds; ++round) {
    const auto encode = [&](std::size_t i) { sets[i]->encode(round); };
    const auto probe = [&](std::size_t i) { sets[i]->probe(); };
    const Times probe_one = at_once(1, probe);
    const Times encode_one = at_once(1, encode);
    const Times encode_all = at_once(threads, encode);
    const Times probe_all = at_once(threads, probe);
    if (round < 0) continue;
    const auto count = static_cast<double>(threads);
    const double each[] = {probe_one.wall_s,
                           probe_all.wall_s,
                           encode_one.wall_s,
                           encode_all.wall_s,
                           count * encode_one.wall_s / encode_all.wall_s,
                           count * encode_one.cpu_s / encode_all.cpu_s,
                           probe_one.wall_s / encode_one.wall_s,
                           probe_all.wall_s / encode_all.wall_s};
    for (std::size_t i = 0; i < values.size(); ++i) values[i].push_back(each[i]);
  }
  Spread* const fields[] = {&row.probe_one_s,  &row.probe_all_s, &row.encode_one_s,
                            &row.encode_all_s, &row.gain,        &row.cpu_gain,
                            &row.share_one,    &row.share_all};
  for (std::size_t i = 0; i < values.size(); ++i) *fields[i] = spread(values[i]);
  return row;
}

double gigabytes_per_s(const Row& row, double s) {
  return static_cast<double>(row.gradient_bytes) / 1e9 / s;
}

double bits_per_kept(const Row& row) { return static_cast<double>(row.bytes) * 8 / row.kept; }

void print(const Row& row) {
  if (row.sum_s.median == 0) {  // of a linear codec
    std::printf("%-39s %10lld  %7.2f %7.2f  %5.2f [%.2f, %.2f]  %8s %8s %8s  %11zu %7.2f\n",
                row.spec.c_str(), static_cast<long long>(row.elements),
                gigabytes_per_s(row, row.probe_s.median), gigabytes_per_s(row, row.encode_s.median),
                row.share.median, row.share.least, row.share.most, "-", "-", "-", row.bytes,
                bits_per_kept(row));
    std::fflush(stdout);
    return;
  }
  std::printf("%-39s %10lld  %7.2f %7.2f  %5.2f [%.2f, %.2f]  %8.2f %8.2f %8.2f  %11zu %7.2f\n",
              row.spec.c_str(), static_cast<long long>(row.elements),
              gigabytes_per_s(row, row.probe_s.median), gigabytes_per_s(row, row.encode_s.median),
              row.share.median, row.share.least, row.share.most,
              gigabytes_per_s(row, row.sum_s.median),
              row.sum_s.median * kNanoseconds / row.kept / kSenders,
              gigabytes_per_s(row, row.decode_s.median), row.bytes, bits_per_kept(row));
  std::fflush(stdout);
}

void print(const ThreadsRow& row) {
  const auto rate = [&](const Spread& s, int threads) {
    return row.gradient_bytes * threads / 1e9 / s.median;
  };
  std::printf(
      "%-39s %10lld  %7.2f %7.2f  %7.2f %7.2f  %5.2f [%.2f, %.2f] %5.2f [%.2f, %.2f]  %5.2f "
      "%5.2f\n",
      row.spec.c_str(), static_cast<long long>(row.elements), rate(row.probe_one_s, 1),
      rate(row.probe_all_s, row.threads), rate(row.encode_one_s, 1),
      rate(row.encode_all_s, row.threads), row.gain.median, row.gain.least, row.gain.most,
      row.cpu_gain.median, row.cpu_gain.least, row.cpu_gain.most, row.share_one.median,
      row.share_all.median);
  std::fflush(stdout);
}

std::string json_field(const char* key, const Spread& s, double factor) {
  return std::string(",\"") + key + "\":[" + std::to_string(s.median * factor) + "," +
         std::to_string(s.least * factor) + "," + std::to_string(s.most * factor) + "]";
}

std::string json(const ThreadsRow& row) {
  return "{\"spec\":\"" + row.spec + "\",\"elements\":" + std::to_string(row.elements) +
         ",\"threads\":" + std::to_string(row.threads) +
         ",\"gradient_bytes\":" + std::to_string(row.gradient_bytes) +
         json_field("probe_one_us", row.probe_one_s, 1e6) +
         json_field("probe_all_us", row.probe_all_s, 1e6) +
         json_field("encode_one_us", row.encode_one_s, 1e6) +
         json_field("encode_all_us", row.encode_all_s, 1e6) + json_field("gain", row.gain, 1) +
         json_field("cpu_gain", row.cpu_gain, 1) + json_field("share_one", row.share_one, 1) +
         json_field("share_all", row.share_all, 1) + "}";
}

std::string json(const Row& row) {
  return "{\"spec\":\"" + row.spec + "\",\"elements\":" + std::to_string(row.elements) +
         ",\"bytes\":" + std::to_string(row.bytes) +
         ",\"bits_per_kept\":" + std::to_string(bits_per_kept(row)) +
         json_field("probe_us", row.probe_s, 1e6) + json_field("encode_us", row.encode_s, 1e6) +
         json_field("sum_us", row.sum_s, 1e6) + json_field("decode_us", row.decode_s, 1e6) +
         json_field("share", row.share, 1) + "}";
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
    } else if (word == "--threads") {
      arguments.threads = static_cast<int>(number(word, value));
      if (static_cast<std::size_t>(arguments.threads) > cores().size()) {
        throw InvalidArgument("--threads " + std::string(value) + ": this process may use " +
                              std::to_string(cores().size()) + " cores");
      }
    } else if (word == "--gradient") {
      arguments.gradient = value;
    } else if (word == "--json") {
      arguments.json = value;
    } else {
      throw InvalidArgument(std::string(word) +
                            ": expected --elements, --layer, --dtype, --gradient, --rounds, "
                            "--threads, --json or a codec's spec");
    }
  }
  if (arguments.specs.empty()) {
    arguments.specs = {"topk:0.001",
                       "topk:0.001,values=q8",
                       "topk:0.01,values=q8",
                       "topk:0.001,select=carried",
                       "topk:0.001,values=q8,select=carried",
                       "topk:0.01,select=carried",
                       "topk:0.01,values=q8,select=carried",
                       "topk:0.001,select=carried,momentum=0.9",
                       "topk:0.01,select=carried,momentum=0.9",
                       "kth-value:0.001",
                       "kth-value:0.01",
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

void print_heading(const Arguments& arguments, const std::string& command) {
  const bool alone = arguments.threads == 1;
  std::printf(
      "# machine: %s, %s\n# compiler: %s\n# SIMD target: %s\n# command: %s\n", machine().c_str(),
      alone ? "one core" : ("1 and " + std::to_string(arguments.threads) + " cores").c_str(),
      TW_COMPILER, simd_target().c_str(), command.c_str());
  const std::string dtype(name(arguments.dtype));
  if (alone) {
    std::printf(
        "# GB/s of %s gradient; share: probe time / encode time, pairs in turns, median "
        "[least, most] of %d\n",
        dtype.c_str(), arguments.rounds);
    std::printf("# %-37s %10s  %7s %7s  %-18s  %8s %8s %8s  %11s %7s\n", "codec", "elements",
                "probe", "encode", "share", "sum GB/s", "ns/kept", "decode", "bytes", "bits");
    return;
  }
  std::printf(
      "# GB/s of %s gradient, of one thread alone and of %d at once in all; medians, [least, most] "
      "of %d\n",
      dtype.c_str(), arguments.threads, arguments.rounds);
  std::printf("# %-37s %10s  %15s  %15s  %-18s %-18s  %11s\n", "codec", "elements", "probe",
              "encode", "gain", "gain by cpu time", "share");
}

void run(std::span<char*> words) {
  const Arguments arguments = parse(words);
  std::string command;
  for (const char* word : words) command += std::string(command.empty() ? "" : " ") + word;
  std::vector<Codec> codecs;
  std::vector<double> kth_values;
  for (const std::string& spec : arguments.specs) {
    if (spec.starts_with(kKthValue)) {
      kth_values.push_back(std::stod(spec.substr(kKthValue.size())));
      continue;
    }
    codecs.push_back(make_codec(spec));
    if (codecs.back().is_none()) throw InvalidArgument(spec + ": expected a codec");
  }
  Gradients gradients{.dtype = arguments.dtype, .recorded = {}};
  if (!arguments.gradient.empty()) gradients.recorded = read_values(arguments.gradient);
  print_heading(arguments, command);
  std::ofstream lines;
  if (!arguments.json.empty()) lines.open(arguments.json);
  const auto report = [&](const auto& row) {
    print(row);
    if (lines.is_open()) lines << json(row) << '\n';
  };
  // Measures what make(seed) gives, or as many of them as there are threads.
  const auto measure_one = [&](const std::string& spec, auto&& make, auto&& alone) {
    if (arguments.threads == 1) return report(alone());
    std::vector<std::decay_t<decltype(make(0))>> sets;
    for (int i = 0; i < arguments.threads; ++i) {
      sets.push_back(make(1000 * static_cast<std::uint64_t>(i)));
    }
    report(measure_threads(spec, std::move(sets), arguments.rounds));
  };
  const std::size_t layer_bytes =
      static_cast<std::size_t>(arguments.layer) * size_bytes(arguments.dtype);
  const std::size_t layers = std::min<std::size_t>(kColdBytes / layer_bytes + 1, 64);
  for (const double density : kth_values) {
    for (const Row& row : measure_kth(density, arguments.elements, arguments.rounds)) report(row);
  }
  for (const Codec& codec : codecs) {
    if (codec.linear) {
      for (const auto& shape : kMatrices) {
        measure_one(
            label(codec, shape),
            [&](std::uint64_t seed) {
              return std::make_unique<LinearSet>(codec, shape, gradients, seed);
            },
            [&] { return measure_linear(codec, shape, gradients, arguments.rounds); });
      }
      continue;
    }
    for (const auto& [n, count] :
         {std::pair(arguments.elements, std::size_t{1}), std::pair(arguments.layer, layers)}) {
      measure_one(
          codec.spec,
          [&, n = n, count = count](std::uint64_t seed) {
            return std::make_unique<PayloadSet>(codec, n, gradients, count, seed);
          },
          [&, n = n, count = count] {
            return measure(codec, n, gradients, count, arguments.rounds);
          });
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
