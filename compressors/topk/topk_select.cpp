#include <array>
#include <bit>

#include "compressors/topk/topk_kernels.h"

namespace thinwire::topk {
namespace {

std::uint32_t magnitude(float value) {
  return std::bit_cast<std::uint32_t>(value) & kMagnitudeMask;
}

// The rank-th largest magnitude (rank >= 1) by three passes of a radix histogram over the 31 bits:
// linear for any input. `above` becomes how many are larger.
std::uint32_t select_magnitude(std::span<const float> values, std::size_t rank,
                               std::size_t& above) {
  constexpr std::array<int, 3> kShift = {20, 10, 0};
  constexpr std::array<std::uint32_t, 3> kBins = {2048, 1024, 1024};
  std::uint32_t prefix = 0;  // the bits settled so far, in place
  above = 0;
  for (std::size_t level = 0; level < kShift.size(); ++level) {
    std::array<std::uint32_t, 2048 + 1> histogram = {};
    const int shift = kShift[level];
    const std::uint32_t settled = level == 0 ? 0 : ~((1U << kShift[level - 1]) - 1);
    const std::uint32_t bins = kBins[level];
    for (const float value : values) {
      const std::uint32_t bits = magnitude(value);
      const std::uint32_t bin = (bits >> shift) & (bins - 1);
      // Those outside the prefix are counted where nobody looks.
      ++histogram[(bits & settled) == prefix ? bin : bins];
    }
    std::uint32_t bin = bins - 1;
    while (above + histogram[bin] < rank) above += histogram[bin--];
    prefix |= bin << shift;
  }
  return prefix;
}

}  // namespace

void keep_largest(Candidates& c) {
  std::size_t above = 0;
  const std::uint32_t least =
      select_magnitude(std::span<const float>(c.value, c.count), c.keep, above);
  std::size_t ties = c.keep - above;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < c.count; ++i) {
    const std::uint32_t bits = magnitude(c.value[i]);
    const bool tie = bits == least && ties > 0;
    const bool stays = bits > least || tie;
    c.value[kept] = c.value[i];
    c.index[kept] = c.index[i];
    kept += stays ? 1 : 0;
    ties -= tie ? 1 : 0;
  }
  c.count = kept;
  c.threshold = least + 1;
  c.was_cut = true;
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
