#include <algorithm>
#include <array>
#include <bit>

#include "compressors/topk/topk_kernels.h"

namespace thinwire::topk {
namespace {

std::uint32_t magnitude(float value) {
  return std::bit_cast<std::uint32_t>(value) & kMagnitudeMask;
}

// The rank-th largest magnitude (rank >= 1) by a histogram over the range the magnitudes span, then
// over the bin that holds it: at most 32 / kBinBits passes, rounded up, linear for any input.
// `above` becomes how many are larger.
template <int kBinBits>
std::uint32_t select_magnitude(std::span<const float> values, std::size_t rank,
                               std::size_t& above) {
  std::uint32_t low = kMagnitudeMask;
  std::uint32_t high = 0;
  for (const float value : values) {
    low = std::min(low, magnitude(value));
    high = std::max(high, magnitude(value));
  }
  above = 0;
  for (;;) {
    std::array<std::uint32_t, std::size_t{1} << kBinBits> histogram = {};
    const std::uint32_t range = high - low;
    const int shift = std::max(0, static_cast<int>(std::bit_width(range)) - kBinBits);
    for (const float value : values) {
      // Below low it wraps around, and is out of range like what lies above high.
      const std::uint32_t distance = magnitude(value) - low;
      if (distance <= range) ++histogram[distance >> shift];
    }
    std::uint32_t bin = range >> shift;
    while (above + histogram[bin] < rank) above += histogram[bin--];
    low += bin << shift;
    if (shift == 0) return low;
    high = std::min(high, low + ((1U << shift) - 1));
  }
}

}  // namespace

OpenedResidual part_of(OpenedResidual opened, std::size_t begin) {
  if (opened.current != nullptr) opened.current += begin;
  if (opened.next != nullptr) opened.next += begin;
  opened.element += static_cast<std::uint32_t>(begin);
  return opened;
}

Scan part_of(const Scan& scan, std::int64_t begin, std::int64_t end) {
  Scan part = scan;
  part.opened = part_of(scan.opened, static_cast<std::size_t>(begin));
  part.count = end - begin;
  part.first += static_cast<std::uint32_t>(begin);
  part.grad = static_cast<const char*>(scan.grad) +
              begin * static_cast<std::int64_t>(size_bytes(scan.dtype));
  for (const float** input : {&part.residual, &part.momentum.velocity}) {
    if (*input != nullptr) *input += begin;
  }
  for (float** output : {&part.next, &part.momentum.next}) {
    if (*output != nullptr) *output += begin;
  }
  return part;
}

std::size_t count_from(const Candidates& c, std::uint32_t least) {
  std::size_t count = 0;
  for (std::size_t i = 0; i < c.count; ++i) count += magnitude(c.value[i]) >= least ? 1 : 0;
  return count;
}

void keep_largest(Candidates& c) {
  std::size_t above = 0;
  const std::span<const float> values(c.value, c.count);
  // Few values: clearing the bins would cost more than another pass.
  const std::uint32_t least = c.count < 1024 ? select_magnitude<6>(values, c.keep, above)
                                             : select_magnitude<11>(values, c.keep, above);
  compact(c, least, c.keep - above);
  c.threshold = least + 1;
  c.was_cut = true;
}

std::uint32_t part_of_least(const Candidates& c, float share) {
  if (c.count == 0) return 1;
  std::uint32_t least = kInfinityBits;
  for (std::size_t i = 0; i < c.count; ++i) least = std::min(least, magnitude(c.value[i]));
  return std::max(std::bit_cast<std::uint32_t>(share * std::bit_cast<float>(least)), 1U);
}

void drop_below(Candidates& c, std::uint32_t least) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < c.count; ++i) {
    c.value[kept] = c.value[i];
    c.index[kept] = c.index[i];
    kept += magnitude(c.value[i]) >= least ? 1 : 0;
  }
  c.count = kept;
}

}  // namespace thinwire::topk
