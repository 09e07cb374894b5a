#include "compressors/topk/topk_sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

namespace thinwire::topk {
namespace {

// One cache line of fp32.
constexpr std::int64_t kLineElements = 16;
// Of the sample, so many are expected among the k largest: their number then deviates by 1/8.
constexpr std::int64_t kExpectedHits = 64;
constexpr std::int64_t kLeastSample = 4096;
constexpr std::int64_t kMostSample = 65536;
// A sample of more than an eighth costs more than it saves: the pass alone raises its threshold.
constexpr std::int64_t kLeastStride = 8;
// Entries ahead of the one being scattered; covers a memory latency at a few ns an entry.
constexpr std::size_t kPrefetchEntries = 32;

struct SamplePlan {
  std::int64_t lines = 0;   // 0: no sample
  std::int64_t stride = 0;  // lines of a stratum, of which one is taken
};

SamplePlan plan_sample(std::int64_t n, std::int64_t k) {
  const std::int64_t wanted =
      std::clamp(kExpectedHits * ((n + k - 1) / k), kLeastSample, kMostSample);
  if (wanted * kLeastStride > n) return {};
  const std::int64_t lines = wanted / kLineElements;
  return {.lines = lines, .stride = n / kLineElements / lines};
}

std::size_t sample_keep(std::int64_t n, std::int64_t k, const SamplePlan& plan, double deviations) {
  const double hits = static_cast<double>(plan.lines * kLineElements) * static_cast<double>(k) /
                      static_cast<double>(n);
  return static_cast<std::size_t>(std::ceil(hits + deviations * std::sqrt(hits))) + 1;
}

}  // namespace

std::size_t sample_capacity(std::int64_t n, std::int64_t k) {
  const SamplePlan plan = plan_sample(n, k);
  if (plan.lines == 0) return 0;
  return sample_keep(n, k, plan, 4.0) + 2 * kChunkElements;
}

std::uint32_t estimate_threshold(const Scan& scan, const Candidates& candidates, double deviations,
                                 const RandomStream& stream) {
  const auto k = static_cast<std::int64_t>(candidates.keep);
  const SamplePlan plan = plan_sample(scan.count, k);
  if (plan.lines == 0) return 1;
  Candidates sample = candidates;
  sample.count = 0;
  sample.threshold = 1;
  sample.keep = sample_keep(scan.count, k, plan, deviations);
  sample.capacity = sample.keep + 2 * kChunkElements;

  alignas(64) std::array<float, kChunkElements> grad;
  alignas(64) std::array<float, kChunkElements> residual;
  const auto element_bytes = static_cast<std::int64_t>(size_bytes(scan.dtype));
  const std::int64_t line_bytes = kLineElements * element_bytes;
  constexpr std::int64_t kLinesOfChunk = kChunkElements / kLineElements;
  Scan lines = scan;
  lines.grad = grad.data();
  lines.residual = scan.residual == nullptr ? nullptr : residual.data();
  lines.next = nullptr;
  lines.zero = nullptr;
  lines.streaming = false;
  for (std::int64_t first = 0; first < plan.lines; first += kLinesOfChunk) {
    const std::int64_t count = std::min(kLinesOfChunk, plan.lines - first);
    std::array<std::uint32_t, 4> words{};
    for (std::int64_t i = 0; i < count; ++i) {
      if (i % 4 == 0) words = random_block(stream, static_cast<std::uint64_t>(first + i) / 4);
      // A place of its own in every stratum: a fixed stride could keep step with a matrix's rows.
      const std::uint64_t jitter = (std::uint64_t{words[static_cast<std::size_t>(i % 4)]} *
                                    static_cast<std::uint64_t>(plan.stride)) >>
                                   32;
      const std::int64_t line = (first + i) * plan.stride + static_cast<std::int64_t>(jitter);
      std::memcpy(reinterpret_cast<char*>(grad.data()) + i * line_bytes,
                  static_cast<const char*>(scan.grad) + line * line_bytes,
                  static_cast<std::size_t>(line_bytes));
      if (scan.residual != nullptr) {
        std::memcpy(residual.data() + i * kLineElements, scan.residual + line * kLineElements,
                    kLineElements * sizeof(float));
      }
    }
    lines.count = count * kLineElements;
    topk::scan(lines, sample);
  }
  if (sample.count < sample.keep) return 1;
  if (sample.count > sample.keep) keep_largest(sample);
  std::uint32_t least = kInfinityBits - 1;
  for (std::size_t i = 0; i < sample.count; ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, sample.value + i, sizeof bits);
    least = std::min(least, bits & kMagnitudeMask);
  }
  return least;
}

void scatter(std::span<const std::uint32_t> indices, std::span<const float> values, float* out) {
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (i + kPrefetchEntries < indices.size()) {
      __builtin_prefetch(out + indices[i + kPrefetchEntries], 1);
    }
    out[indices[i]] = values[i];
  }
}

void scatter_add(std::span<const std::uint32_t> indices, std::span<const float> values,
                 float weight, float* out) {
  for (std::size_t i = 0; i < indices.size(); ++i) {
    if (i + kPrefetchEntries < indices.size()) {
      __builtin_prefetch(out + indices[i + kPrefetchEntries], 1);
    }
    const float scaled = weight * values[i];
    out[indices[i]] += scaled;
  }
}

}  // namespace thinwire::topk
