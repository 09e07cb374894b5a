// Internal: select=carried. The threshold is known before the pass, from the step before, so that
// entries are rounded, and what is lost of them written, while their cache lines are still there.
// Thread-safe on disjoint memory; nothing is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/topk/topk_selection.h"
#include "compressors/topk/topk_values.h"

namespace thinwire::topk {

// What a step hands to the next one, in the Memory's state; all zero before the first.
struct Carried {
  float threshold = 0;  // for the next step
  float ideal = 0;      // what would have been best at the last one
  float trend = 0;      // by what share it grows a step, smoothed
};

// Entries that the carried threshold is meant to let pass: between 0.8 keep and keep, so much
// nearer to keep as the count is uncertain, since too few cost another pass.
double carried_aim(std::int64_t n, std::int64_t keep);

// `entries` (values as they were) are those of magnitude bits `least` and more.
Carried carry(const Carried& before, const Candidates& entries, std::uint32_t least, double aim);

// The threshold's bits, checked against a sample; 1 where there is none to go by.
std::uint32_t carried_threshold(const Context& ctx, const Carried& carried, double aim,
                                const Selection& selection);

struct CarriedPass {
  // The entries are all of magnitude bits `least` and more, 0.8 keep to keep of them.
  bool settled = false;
  std::uint32_t least = 1;
  // So many of the first entries are rounded: `next` holds what is missing of them.
  std::size_t rounded = 0;
};

// One pass with the threshold `least`. Not settled: entries are selected and `next` holds v, as
// after select() of a sampled choice.
CarriedPass select_carried(const Context& ctx, std::uint32_t least, TopKValues kind,
                           Selection& selection);

// `next` holds v again: nothing is settled.
void restore_rounded(CarriedPass& pass, const Selection& selection);

}  // namespace thinwire::topk
