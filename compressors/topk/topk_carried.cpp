#include "compressors/topk/topk_carried.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#include "compressors/core/random.h"
#include "compressors/topk/topk_sample.h"

namespace thinwire::topk {
namespace {

// Elements between two looks at the entries found: their lines are still in the L2 cache then.
constexpr std::int64_t kRangeElements = 4 * static_cast<std::int64_t>(kChunkElements);
// The steepness of the tail is taken between the threshold and this much above it.
constexpr double kAbove = 1.0 / 16;
// A tail that nothing is left of that far above is taken to be this steep, at most.
constexpr double kLeastDrop = 1.0 / 64;
constexpr double kTrendShare = 0.5;
constexpr double kMostChange = 0.25;
// Of the standard deviation of the sample's count: how far above 0.9 keep the aim is.
constexpr double kAimDeviations = 0.5;

// ln(a / b) / 2 for a and b not far apart, by products that round alike on every host.
double half_log_ratio(double a, double b) { return (a - b) / (a + b); }

// Rounds and patches entries up to `end`.
void round_entries(const Selection& selection, TopKValues kind, std::size_t end,
                   CarriedPass& pass) {
  const Candidates& c = selection.entries;
  std::array<float, kTopKBlock> missing;
  while (pass.rounded < end) {
    const std::size_t count = std::min(kTopKBlock, end - pass.rounded);
    const auto block = std::span(missing).first(count);
    std::copy_n(c.value + pass.rounded, count, block.begin());
    round_topk_block(kind, pass.least, block);
    const Scan& whole = selection.whole();
    if (whole.opened.next != nullptr) {
      scatter({c.index + pass.rounded, count}, block, whole.first, whole.opened);
    } else {
      patch(whole, {c.index, pass.rounded + count}, pass.rounded, block.data());
    }
    pass.rounded += count;
  }
}

}  // namespace

double carried_aim(std::int64_t n, std::int64_t keep) {
  const double hits = expected_hits(n, keep);
  const double count = hits > 0 ? hits : static_cast<double>(keep);
  return static_cast<double>(keep) * (0.9 + kAimDeviations / std::sqrt(count));
}

Carried carry(const Carried& before, const Candidates& entries, std::uint32_t least, double aim) {
  if (entries.count == 0) return {};
  const double threshold = std::bit_cast<float>(least);
  const auto higher = std::bit_cast<std::uint32_t>(static_cast<float>(threshold * (1 + kAbove)));
  const auto count = static_cast<double>(entries.count);
  const auto above = static_cast<double>(count_from(entries, higher));
  const double drop = std::max(half_log_ratio(count, above), kLeastDrop);
  const double steps = half_log_ratio(count, aim) / drop;
  Carried next;
  next.ideal = static_cast<float>(threshold * (1 + steps * 2 * kAbove / (2 + kAbove)));
  if (before.ideal > 0) {
    const double change = next.ideal / static_cast<double>(before.ideal) - 1;
    next.trend = static_cast<float>(
        before.trend +
        kTrendShare * (std::clamp(change, -kMostChange, kMostChange) - before.trend));
  }
  next.threshold = next.ideal * (1 + next.trend);
  return next;
}

std::uint32_t carried_threshold(const Context& ctx, const Carried& carried, double aim,
                                const Selection& selection) {
  // Not so for NaN, either.
  if (!(carried.threshold > 0 && std::isfinite(carried.threshold))) return 1;
  return check_threshold(selection.whole(), selection.entries,
                         std::bit_cast<std::uint32_t>(carried.threshold), aim,
                         random_stream(ctx.key_hash, ctx.step, ctx.sender));
}

void restore_rounded(CarriedPass& pass, const Selection& selection) {
  scatter_to_memories(selection, {selection.entries.value, pass.rounded});
  pass.rounded = 0;
  pass.settled = false;
}

CarriedPass select_carried(const Context& ctx, std::uint32_t least, TopKValues kind,
                           Selection& selection) {
  const Scan& whole = selection.whole();
  Candidates& c = selection.entries;
  CarriedPass pass{.least = least};
  c.threshold = least;
  const bool early = kind != TopKValues::kTernary;
  // Beyond it 8 bits do not span all that passes; a NaN is, too.
  constexpr std::uint32_t kSpan = std::uint32_t{kTopKQ8Octaves} << 23;
  const std::uint32_t most =
      kind == TopKValues::kQ8 ? std::min(least + kSpan, kInfinityBits - 1) : kInfinityBits - 1;
  ScanSummary& summary = selection.summary;
  std::int64_t done = 0;
  while (done < whole.count && c.count <= c.keep && summary.magnitude <= most) {
    // As many whole chunks as there is room for: one at least.
    const std::size_t room = (c.capacity - c.count) / kChunkElements * kChunkElements;
    const std::int64_t end =
        std::min({whole.count, done + kRangeElements, done + static_cast<std::int64_t>(room)});
    summary.add(scan(part_of(whole, done, end), c));
    done = end;
    if (early && c.count <= c.keep && summary.magnitude <= most) {
      round_entries(selection, kind, c.count / kTopKBlock * kTopKBlock, pass);
    }
  }
  pass.settled =
      c.count <= c.keep && c.count >= enough_entries(c.keep) && summary.magnitude <= most;
  if (pass.settled) {
    if (early) round_entries(selection, kind, c.count, pass);
    return pass;
  }
  restore_rounded(pass, selection);
  if (done < whole.count) summary.add(scan(part_of(whole, done, whole.count), c));
  if (summary.magnitude >= kInfinityBits) return pass;
  if (c.count > c.keep) {
    keep_largest(c);
  } else if (c.count < enough_entries(c.keep) && !c.was_cut) {
    select_again(ctx, selection);
  }
  return pass;
}

}  // namespace thinwire::topk
