#include "compressors/topk/topk_sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "compressors/core/convert.h"

namespace thinwire::topk {
namespace {

// A pair of cache lines of fp32, which the adjacent-line prefetcher fetches together.
constexpr std::int64_t kLineElements = 32;
// Of the sample, so many are expected among the k largest. An exact choice only needs candidates to
// spare: their number deviates by half, and four deviations make 3 k of them, which are fewer than
// the elements that a closer sample would take.
constexpr std::int64_t kExactHits = 4;
constexpr double kExactDeviations = 4;
// A threshold that decides what is sent must be closer: 18 %.
constexpr std::int64_t kSampledHits = 32;
constexpr double kSampledDeviations = 1;
constexpr std::int64_t kLeastSample = 4096;
constexpr std::int64_t kMostSample = 65536;
// One element of so many costs next to nothing, and saves candidates where k is large.
constexpr std::int64_t kSparsestSample = 256;
// A sample of more than an eighth costs more than it saves: the pass alone raises its threshold.
constexpr std::int64_t kLeastStride = 8;
// Scattered entries whose lines are fetched ahead together: more than a core has misses in flight,
// and few enough to stay in its L1 cache.
constexpr std::size_t kPrefetchEntries = 64;
// Elements of the sample that are brought together before they are scanned.
constexpr std::int64_t kGatherElements = 1024;

struct SamplePlan {
  std::int64_t lines = 0;   // 0: no sample
  std::int64_t stride = 0;  // lines of a stratum, of which one is taken
};

SamplePlan plan_sample(std::int64_t n, std::int64_t k, std::int64_t hits) {
  const std::int64_t least = std::max(kLeastSample, n / kSparsestSample);
  const std::int64_t wanted = std::min(std::max(hits * ((n + k - 1) / k), least), kMostSample);
  if (wanted * kLeastStride > n) return {};
  const std::int64_t lines = wanted / kLineElements;
  return {.lines = lines, .stride = n / kLineElements / lines};
}

std::size_t sample_keep(std::int64_t n, std::int64_t k, const SamplePlan& plan, double deviations) {
  const double hits = static_cast<double>(plan.lines * kLineElements) * static_cast<double>(k) /
                      static_cast<double>(n);
  return static_cast<std::size_t>(std::ceil(hits + deviations * std::sqrt(hits))) + 1;
}

constexpr std::int64_t kLinesOfChunk = kGatherElements / kLineElements;

// Numbers of the chunk's lines, one of each stratum. Every stratum draws its own place: a fixed
// stride could keep step with a matrix's rows.
struct ChunkLines {
  std::array<std::int64_t, kLinesOfChunk> line;
  std::int64_t count = 0;
};

// From stratum `first` on; lines before `end`.
ChunkLines draw_lines(const SamplePlan& plan, std::int64_t first, std::int64_t end,
                      const RandomStream& stream) {
  ChunkLines lines;
  const std::int64_t most = std::min(kLinesOfChunk, plan.lines - first);
  std::array<std::uint32_t, 4> words{};
  for (; lines.count < most; ++lines.count) {
    const std::int64_t stratum = first + lines.count;
    if (lines.count == 0 || stratum % 4 == 0) {
      words = random_block(stream, static_cast<std::uint64_t>(stratum) / 4);
    }
    const std::uint64_t place = (std::uint64_t{words[static_cast<std::size_t>(stratum % 4)]} *
                                 static_cast<std::uint64_t>(plan.stride)) >>
                                32;
    const std::int64_t line = stratum * plan.stride + static_cast<std::int64_t>(place);
    if (line >= end) break;
    lines.line[static_cast<std::size_t>(lines.count)] = line;
  }
  return lines;
}

// The lines drawn of a part whose first is number `begin` of all; moves `stratum` on.
void sample_part(const Scan& scan, std::int64_t begin, const SamplePlan& plan,
                 const RandomStream& stream, std::int64_t& stratum, Candidates& sample) {
  const std::int64_t end = begin + scan.count / kLineElements;
  alignas(64) std::array<float, kGatherElements> grad;
  alignas(64) std::array<float, kGatherElements> residual;
  alignas(64) std::array<float, kGatherElements> velocity;
  const auto element_bytes = static_cast<std::int64_t>(size_bytes(scan.dtype));
  const std::int64_t line_bytes = kLineElements * element_bytes;
  const auto line_of = [&](std::int64_t line) {
    return static_cast<const char*>(scan.grad) + (line - begin) * line_bytes;
  };
  const std::array<std::pair<const float*, float*>, 2> parts = {
      {{scan.residual, residual.data()}, {scan.momentum.velocity, velocity.data()}}};
  const BF16* opened = scan.opened.current;
  const auto fetch = [&](const ChunkLines& lines) {
    for (std::int64_t i = 0; i < lines.count; ++i) {
      const std::int64_t line = lines.line[static_cast<std::size_t>(i)];
      __builtin_prefetch(line_of(line));
      for (const auto& [from, to] : parts) {
        if (from != nullptr) __builtin_prefetch(from + (line - begin) * kLineElements);
      }
      if (opened != nullptr) __builtin_prefetch(opened + (line - begin) * kLineElements);
    }
  };
  Scan gathered = scan;
  gathered.grad = grad.data();
  gathered.residual = scan.residual == nullptr && opened == nullptr ? nullptr : residual.data();
  gathered.opened = {};
  gathered.momentum.velocity = scan.momentum.velocity == nullptr ? nullptr : velocity.data();
  gathered.next = nullptr;
  gathered.streaming = false;
  gathered.momentum.next = nullptr;
  gathered.momentum.streaming = false;
  gathered.squares = nullptr;
  ChunkLines lines = draw_lines(plan, stratum, end, stream);
  fetch(lines);
  while (lines.count > 0) {
    const ChunkLines now = lines;
    stratum += now.count;
    lines = draw_lines(plan, stratum, end, stream);
    fetch(lines);
    for (std::int64_t i = 0; i < now.count; ++i) {
      const std::int64_t line = now.line[static_cast<std::size_t>(i)];
      std::memcpy(reinterpret_cast<char*>(grad.data()) + i * line_bytes, line_of(line),
                  static_cast<std::size_t>(line_bytes));
      for (const auto& [from, to] : parts) {
        if (from == nullptr) continue;
        std::memcpy(to + i * kLineElements, from + (line - begin) * kLineElements,
                    kLineElements * sizeof(float));
      }
      if (opened == nullptr) continue;
      const BF16* from = opened + (line - begin) * kLineElements;
      std::transform(from, from + kLineElements, residual.data() + i * kLineElements,
                     [](BF16 x) { return to_float(x); });
    }
    gathered.count = now.count * kLineElements;
    topk::scan(gathered, sample);
  }
}

// The sample.keep largest of the sample, fewer where fewer are not zero. Strata go on from part to
// part.
void take_sample(std::span<const Scan> parts, const SamplePlan& plan, const RandomStream& stream,
                 Candidates& sample) {
  sample.count = 0;
  sample.threshold = 1;
  sample.capacity = sample.keep + 2 * kChunkElements;
  std::int64_t begin = 0;
  std::int64_t stratum = 0;
  for (const Scan& part : parts) {
    sample_part(part, begin, plan, stream, stratum, sample);
    begin += part.count / kLineElements;
  }
  if (sample.count > sample.keep) keep_largest(sample);
}

// Calls visit(i) for every entry, the lines of `out` it will touch fetched before.
template <typename T, typename Visit>
void visit_scattered(std::span<const std::uint32_t> indices, std::uint32_t first, const T* out,
                     Visit visit) {
  const std::size_t count = indices.size();
  const auto fetch = [&](std::size_t begin) {
    const std::size_t end = std::min(begin + kPrefetchEntries, count);
    for (std::size_t i = begin; i < end; ++i) __builtin_prefetch(out + (indices[i] - first), 1);
  };
  fetch(0);
  for (std::size_t begin = 0; begin < count; begin += kPrefetchEntries) {
    fetch(begin + kPrefetchEntries);
    const std::size_t end = std::min(begin + kPrefetchEntries, count);
    for (std::size_t i = begin; i < end; ++i) visit(i);
  }
}

}  // namespace

std::size_t sample_capacity(std::int64_t n, std::int64_t k) {
  std::size_t entries = 0;
  for (const std::int64_t hits : {kExactHits, kSampledHits}) {
    const SamplePlan plan = plan_sample(n, k, hits);
    if (plan.lines > 0) entries = std::max(entries, sample_keep(n, k, plan, 4.0));
  }
  return entries == 0 ? 0 : entries + 2 * kChunkElements;
}

double expected_hits(std::int64_t n, std::int64_t k) {
  const SamplePlan plan = plan_sample(n, k, kSampledHits);
  return static_cast<double>(plan.lines * kLineElements) * static_cast<double>(k) /
         static_cast<double>(n);
}

std::uint32_t estimate_threshold(std::span<const Scan> parts, std::int64_t n,
                                 const Candidates& candidates, bool sampled,
                                 const RandomStream& stream) {
  const auto k = static_cast<std::int64_t>(candidates.keep);
  const SamplePlan plan = plan_sample(n, k, sampled ? kSampledHits : kExactHits);
  if (plan.lines == 0) return 1;
  Candidates sample = candidates;
  sample.keep = sample_keep(n, k, plan, sampled ? kSampledDeviations : kExactDeviations);
  take_sample(parts, plan, stream, sample);
  if (sample.count < sample.keep) return 1;
  return std::min(part_of_least(sample, 1.0F), kInfinityBits - 1);
}

std::uint32_t check_threshold(const Scan& scan, const Candidates& candidates,
                              std::uint32_t threshold, double wanted, const RandomStream& stream) {
  const auto k = static_cast<std::int64_t>(candidates.keep);
  const SamplePlan plan = plan_sample(scan.count, k, kSampledHits);
  if (plan.lines == 0) return threshold;
  const double hits = expected_hits(scan.count, k) * wanted / static_cast<double>(k);
  Candidates sample = candidates;
  sample.keep = static_cast<std::size_t>(std::ceil(hits + std::sqrt(hits)));
  take_sample({&scan, 1}, plan, stream, sample);
  if (sample.count < sample.keep) return 1;
  const std::uint32_t least = part_of_least(sample, 1.0F);
  if (threshold <= least) return least;
  sample.keep = std::max<std::size_t>(static_cast<std::size_t>(hits - std::sqrt(hits)), 1);
  keep_largest(sample);
  return std::min({threshold, part_of_least(sample, 1.0F), kInfinityBits - 1});
}

void scatter(std::span<const std::uint32_t> indices, std::span<const float> values,
             std::uint32_t first, float* out) {
  visit_scattered(indices, first, out, [&](std::size_t i) { out[indices[i] - first] = values[i]; });
}

void scatter(std::span<const std::uint32_t> indices, std::span<const float> values,
             std::uint32_t first, const OpenedResidual& out) {
  visit_scattered(indices, first, out.next, [&](std::size_t i) {
    const std::uint32_t at = indices[i] - first;
    out.next[at] = dithered_bf16(values[i], dither_bits(out.dither, out.element + at));
  });
}

void scatter(std::span<const std::uint32_t> indices, std::span<const float> values,
             TensorView out) {
  if (out.dtype == DType::kF32) return scatter(indices, values, 0, static_cast<float*>(out.data));
  auto* to = static_cast<std::uint16_t*>(out.data);
  for (std::size_t i = 0; i < indices.size(); ++i) {
    to[indices[i]] = out.dtype == DType::kBF16 ? to_bf16(values[i]).bits : to_fp16(values[i]).bits;
  }
}

void scatter_add(std::span<const std::uint32_t> indices, std::span<const float> values,
                 float weight, float* out) {
  visit_scattered(indices, 0, out, [&](std::size_t i) {
    const float scaled = weight * values[i];
    out[indices[i]] += scaled;
  });
}

}  // namespace thinwire::topk
