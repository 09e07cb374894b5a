#include "compressors/lossless/lossless_code.h"

#include <algorithm>

namespace thinwire::lossless {
namespace {

constexpr std::uint32_t kWindows = std::uint32_t{1} << kMaxLength;

using PerLength = std::array<std::uint32_t, kMaxLength + 1>;

// Codes of a length, for the lengths of a tree over weights in ascending order. Leaves and the
// nodes made of them are two queues of ascending weights; the two lightest heads become a node.
PerLength tree_lengths(const std::array<std::uint32_t, kSymbols>& weights, std::size_t leaves) {
  std::array<std::uint32_t, 2 * kSymbols> weight{};
  std::array<std::uint16_t, 2 * kSymbols> parent{};
  std::copy_n(weights.begin(), leaves, weight.begin());
  std::size_t leaf = 0;
  std::size_t node = leaves;
  const std::size_t root = 2 * leaves - 2;
  for (std::size_t made = leaves; made <= root; ++made) {
    for (int child = 0; child < 2; ++child) {
      const bool takes_leaf = leaf < leaves && (node == made || weight[leaf] <= weight[node]);
      const std::size_t lightest = takes_leaf ? leaf++ : node++;
      weight[made] += weight[lightest];
      parent[lightest] = static_cast<std::uint16_t>(made);
    }
  }
  PerLength per_length{};
  std::array<std::uint8_t, 2 * kSymbols> depth{};  // at most 255
  for (std::size_t i = root; i-- > 0;) {
    depth[i] = static_cast<std::uint8_t>(depth[parent[i]] + 1);
    if (i < leaves) ++per_length[static_cast<std::size_t>(std::min<int>(depth[i], kMaxLength))];
  }
  return per_length;
}

// Cutting codes off at kMaxLength lets them overlap. Each turn takes one of the longest codes away
// and puts it beside the longest of the shorter ones, both one bit longer than that was: one window
// less is used, until each belongs to one code.
void make_room(PerLength& per_length) {
  std::uint32_t used = 0;
  for (std::size_t l = 1; l <= kMaxLength; ++l) used += per_length[l] << (kMaxLength - l);
  for (; used > kWindows; --used) {
    std::size_t l = kMaxLength - 1;
    while (per_length[l] == 0) --l;
    --per_length[l];
    per_length[l + 1] += 2;
    --per_length[kMaxLength];
  }
}

std::uint32_t reversed(std::uint32_t bits, std::uint32_t length) {
  std::uint32_t result = 0;
  for (std::uint32_t i = 0; i < length; ++i) result |= (bits >> i & 1U) << (length - 1 - i);
  return result;
}

}  // namespace

Lengths code_lengths(const Counts& counts) {
  // The symbol breaks ties, so that the order is one everywhere.
  std::array<std::uint64_t, kSymbols> order{};
  std::size_t occurring = 0;
  for (std::size_t s = 0; s < kSymbols; ++s) {
    if (counts[s] != 0) order[occurring++] = std::uint64_t{counts[s]} << 8 | s;
  }
  std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(occurring));
  std::array<std::uint32_t, kSymbols> weights{};
  for (std::size_t i = 0; i < occurring; ++i) {
    weights[i] = static_cast<std::uint32_t>(order[i] >> 8);
  }
  PerLength per_length = tree_lengths(weights, occurring);
  make_room(per_length);
  Lengths lengths{};
  std::size_t length = kMaxLength;
  for (std::size_t i = 0; i < occurring; ++i) {
    while (per_length[length] == 0) --length;
    --per_length[length];
    lengths[order[i] & 0xFF] = static_cast<std::uint8_t>(length);
  }
  return lengths;
}

bool is_complete(const Lengths& lengths) {
  std::uint32_t used = 0;
  for (const std::uint8_t length : lengths) {
    if (length > kMaxLength) return false;
    if (length != 0) used += kWindows >> length;
  }
  return used == kWindows;
}

Codes make_codes(const Lengths& lengths) {
  PerLength per_length{};
  for (const std::uint8_t length : lengths) ++per_length[length];
  per_length[0] = 0;
  PerLength next{};
  for (std::size_t l = 1; l <= kMaxLength; ++l) next[l] = (next[l - 1] + per_length[l - 1]) << 1;
  Codes codes{};
  for (std::size_t s = 0; s < kSymbols; ++s) {
    const std::uint8_t length = lengths[s];
    if (length == 0) continue;
    codes[s] = {static_cast<std::uint16_t>(reversed(next[length]++, length)), length};
  }
  return codes;
}

void fill_decode_table(const Lengths& lengths, DecodeTable& table) {
  const Codes codes = make_codes(lengths);
  for (std::size_t s = 0; s < kSymbols; ++s) {
    const auto [bits, length] = codes[s];
    if (length == 0) continue;
    const Decoded::Run run = Decoded::run(1, length);
    const Decoded one{.all = run, .first = run, .symbols = static_cast<std::uint32_t>(s)};
    for (std::uint32_t w = bits; w < kWindows; w += 1U << length) table[w] = one;
  }
}

}  // namespace thinwire::lossless
