#include "compressors/fedzip/fedzip_labels.h"

#include <algorithm>
#include <bit>
#include <string>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::size_t kLengthBytes = 4;  // of a Huffman or rANS stream, before its table
constexpr std::uint32_t kStateLow = std::uint32_t{1} << 16;  // rANS: states are [2^16, 2^32)
constexpr int kWordBits = 16;
constexpr std::uint32_t kTableMask = kLabelTable - 1;
// Bits of log2(symbols) behind the point that a plan counts with.
constexpr int kPlanBits = 6;

[[noreturn]] void corrupt(const std::string& what) {
  throw CorruptPayload("fedzip body: " + what +
                       "\nhint: sender and receiver must use the same codec, version and tensor");
}

int plain_bits(std::size_t symbols) { return static_cast<int>(std::bit_width(symbols - 1)); }

std::size_t plain_bytes(std::size_t count, std::size_t symbols) {
  return (count * static_cast<std::size_t>(plain_bits(symbols)) + 7) / 8;
}

std::size_t huffman_table_bytes(std::size_t symbols) { return (symbols + 1) / 2; }
// The last frequency is what the others leave.
std::size_t rans_table_bytes(std::size_t symbols) { return 2 * (symbols - 1); }

// Depths of the leaves of a Huffman tree. `order` has the symbols by ascending weight.
int tree_depths(std::span<const std::uint16_t> order, std::span<const std::uint32_t> weights,
                std::span<std::uint8_t> depths) {
  const std::size_t leaves = order.size();
  std::array<std::uint64_t, 2 * kFedzipMostClusters> weight;
  std::array<std::uint16_t, 2 * kFedzipMostClusters> parent;
  for (std::size_t i = 0; i < leaves; ++i) weight[i] = weights[order[i]];
  // Two queues, of leaves and of inner nodes, both ascending; leaves first at a tie.
  std::size_t leaf = 0;
  std::size_t inner = leaves;
  for (std::size_t node = leaves; node < 2 * leaves - 1; ++node) {
    weight[node] = 0;
    for (int child = 0; child < 2; ++child) {
      const bool take_leaf = leaf < leaves && (inner == node || weight[leaf] <= weight[inner]);
      const std::size_t taken = take_leaf ? leaf++ : inner++;
      weight[node] += weight[taken];
      parent[taken] = static_cast<std::uint16_t>(node);
    }
  }
  std::array<std::uint8_t, 2 * kFedzipMostClusters> depth;
  depth[2 * leaves - 2] = 0;
  for (std::size_t node = 2 * leaves - 2; node-- > 0;) {
    depth[node] = static_cast<std::uint8_t>(depth[parent[node]] + 1);
    if (node < leaves) depths[order[node]] = depth[node];
  }
  return *std::max_element(depths.begin(), depths.begin() + static_cast<std::ptrdiff_t>(leaves));
}

// Lengths of at most kLabelTableBits; where the tree is deeper, of flattened weights.
void huffman_lengths(std::span<const std::uint32_t> counts, std::span<std::uint8_t> lengths) {
  const std::size_t symbols = counts.size();
  std::array<std::uint32_t, kFedzipMostClusters> weights;
  std::array<std::uint16_t, kFedzipMostClusters> order;
  std::copy(counts.begin(), counts.end(), weights.begin());
  for (std::size_t i = 0; i < symbols; ++i) order[i] = static_cast<std::uint16_t>(i);
  std::sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(symbols),
            [&](std::uint16_t a, std::uint16_t b) {
              return weights[a] != weights[b] ? weights[a] < weights[b] : a < b;
            });
  while (tree_depths(std::span(order).first(symbols), std::span(weights).first(symbols), lengths) >
         kLabelTableBits) {
    for (std::uint32_t& weight : std::span(weights).first(symbols)) weight = weight / 2 + 1;
  }
}

// Canonical code words, shorter ones first and by symbol, as they lie in a stream: the first bit
// lowest.
void code_words(std::span<const std::uint8_t> lengths, std::span<std::uint16_t> words) {
  std::uint32_t code = 0;
  for (int length = 1; length <= kLabelTableBits; ++length) {
    code <<= 1;
    for (std::size_t s = 0; s < lengths.size(); ++s) {
      if (lengths[s] != length) continue;
      std::uint32_t reversed = 0;
      for (int bit = 0; bit < length; ++bit) reversed |= (code >> bit & 1) << (length - 1 - bit);
      words[s] = static_cast<std::uint16_t>(reversed);
      ++code;
    }
  }
}

// In proportion to the counts, at least 1, 4096 in all.
void rans_frequencies(std::span<const std::uint32_t> counts, std::span<std::uint16_t> frequencies) {
  std::uint64_t total = 0;
  for (const std::uint32_t count : counts) total += count;
  std::uint64_t seen = 0;
  std::uint64_t before = 0;
  for (std::size_t s = 0; s < counts.size(); ++s) {
    seen += counts[s];
    const std::uint64_t upto = seen * (kLabelTable - counts.size()) / total + s + 1;
    frequencies[s] = static_cast<std::uint16_t>(upto - before);
    before = upto;
  }
}

// Encodes from the last label to the first, and fills `room` from its end; what is written.
std::span<const std::byte> rans_encode(std::span<const std::uint8_t> labels,
                                       std::span<const std::uint16_t> frequencies,
                                       std::span<std::byte> room) {
  std::array<std::uint32_t, kFedzipMostClusters> start;
  std::uint32_t sum = 0;
  for (std::size_t s = 0; s < frequencies.size(); ++s) {
    start[s] = sum;
    sum += frequencies[s];
  }
  std::byte* to = room.data() + room.size();
  std::uint32_t state = kStateLow;
  for (std::size_t i = labels.size(); i-- > 0;) {
    const std::uint32_t frequency = frequencies[labels[i]];
    // With two symbols and more, no frequency is 4096, and this fits 32 bits.
    if (state >= frequency << (2 * kWordBits - kLabelTableBits)) {
      const auto word = static_cast<std::uint16_t>(state);
      to -= sizeof word;
      std::memcpy(to, &word, sizeof word);
      state >>= kWordBits;
    }
    state = (state / frequency << kLabelTableBits) + state % frequency + start[labels[i]];
  }
  to -= sizeof state;
  std::memcpy(to, &state, sizeof state);
  return {to, room.data() + room.size()};
}

// Words of at most kLabelTableBits, as many as fit put together.
void write_words(std::span<const std::uint8_t> labels, std::span<const std::uint16_t> words,
                 std::span<const std::uint8_t> lengths, std::byte* out) {
  BitWriter writer(out);
  std::uint64_t bits = 0;
  int filled = 0;
  for (const std::uint8_t label : labels) {
    bits |= std::uint64_t{words[label]} << filled;
    filled += lengths[label];
    if (filled > BitWriter::kEarlyBits - kLabelTableBits) {
      writer.put(bits, filled);
      bits = 0;
      filled = 0;
    }
  }
  writer.put(bits, filled);
  writer.finish();
}

}  // namespace

std::size_t label_slot_bytes(std::size_t count, std::size_t symbols) {
  // log2 bit by bit, from products that IEEE 754 rounds alike everywhere, then rounded up.
  double rest = static_cast<double>(symbols) / static_cast<double>(std::bit_floor(symbols));
  auto log2 = static_cast<std::size_t>(std::bit_width(symbols)) - 1;
  for (int bit = 0; bit < kPlanBits; ++bit) {
    rest *= rest;
    log2 = 2 * log2 + (rest >= 2 ? 1 : 0);
    if (rest >= 2) rest /= 2;
  }
  const std::size_t stream = (count * (log2 + 1) >> kPlanBits) / 8 + 1;
  const std::size_t coded =
      kLengthBytes + rans_table_bytes(symbols) + sizeof(std::uint32_t) + stream;
  return std::min(plain_bytes(count, symbols), coded);
}

std::size_t label_scratch_bytes(std::size_t count) {
  return sizeof(std::uint16_t) * count + sizeof(std::uint32_t);
}

LabelPlan plan_labels(std::span<const std::uint8_t> labels, std::span<const std::uint32_t> counts,
                      std::span<std::byte> scratch) {
  const std::size_t symbols = counts.size();
  LabelPlan plan;
  plan.bytes = plain_bytes(labels.size(), symbols);
  if (symbols == 1) return plan;
  huffman_lengths(counts, plan.lengths);
  std::uint64_t bits = 0;
  for (std::size_t s = 0; s < symbols; ++s) bits += std::uint64_t{counts[s]} * plan.lengths[s];
  const std::size_t huffman =
      kLengthBytes + huffman_table_bytes(symbols) + static_cast<std::size_t>((bits + 7) / 8);
  if (huffman < plan.bytes) {
    plan.code = LabelCode::kHuffman;
    plan.bytes = huffman;
  }
  rans_frequencies(counts, plan.frequencies);
  plan.stream =
      rans_encode(labels, std::span<const std::uint16_t>(plan.frequencies).first(symbols), scratch);
  const std::size_t rans = kLengthBytes + rans_table_bytes(symbols) + plan.stream.size();
  if (rans < plan.bytes) {
    plan.code = LabelCode::kRans;
    plan.bytes = rans;
  }
  return plan;
}

void write_labels(const LabelPlan& plan, std::span<const std::uint8_t> labels, std::size_t symbols,
                  std::byte* out) {
  if (plan.bytes == 0) return;
  std::array<std::uint16_t, kFedzipMostClusters> words;
  if (plan.code == LabelCode::kPlain) {
    std::array<std::uint8_t, kFedzipMostClusters> lengths;
    lengths.fill(static_cast<std::uint8_t>(plain_bits(symbols)));
    for (std::size_t s = 0; s < symbols; ++s) words[s] = static_cast<std::uint16_t>(s);
    write_words(labels, words, lengths, out);
    return;
  }
  const bool huffman = plan.code == LabelCode::kHuffman;
  const std::size_t table = huffman ? huffman_table_bytes(symbols) : rans_table_bytes(symbols);
  const auto length = static_cast<std::uint32_t>(plan.bytes - kLengthBytes - table);
  std::memcpy(out, &length, sizeof length);
  out += kLengthBytes;
  if (huffman) {
    const auto lengths = std::span<const std::uint8_t>(plan.lengths).first(symbols);
    for (std::size_t s = 0; s < symbols; s += 2) {
      const unsigned high = s + 1 < symbols ? lengths[s + 1] : 0U;
      *out++ = static_cast<std::byte>(lengths[s] | high << 4);
    }
    code_words(lengths, words);
    write_words(labels, words, lengths, out);
    return;
  }
  std::memcpy(out, plan.frequencies.data(), table);
  std::memcpy(out + table, plan.stream.data(), plan.stream.size());
}

LabelReader::LabelReader(LabelCode code, std::size_t symbols, std::size_t count,
                         std::span<const std::byte> bytes)
    : code_(code), symbols_(symbols), left_(count) {
  if (code == LabelCode::kPlain) {
    bytes_ = plain_bytes(count, symbols);
    if (bytes.size() < bytes_) corrupt("labels cut short");
    bits_ = {.data = bytes.data(), .end = bytes.data() + bytes_};
    return;
  }
  if (symbols < 2) corrupt("one cluster and a code for its labels");
  const bool huffman = code == LabelCode::kHuffman;
  const std::size_t table = huffman ? huffman_table_bytes(symbols) : rans_table_bytes(symbols);
  if (bytes.size() < kLengthBytes + table) corrupt("labels cut short");
  std::uint32_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  if (bytes.size() - kLengthBytes - table < length) corrupt("labels cut short");
  bytes_ = kLengthBytes + table + length;
  const std::byte* stream = bytes.data() + kLengthBytes + table;
  bits_ = {.data = stream, .end = stream + length};
  if (huffman) {
    read_huffman_table(bytes.subspan(kLengthBytes, table));
    return;
  }
  read_rans_table(bytes.subspan(kLengthBytes, table));
  if (length < sizeof state_ || (length - sizeof state_) % 2 != 0) corrupt("labels cut short");
  std::memcpy(&state_, stream, sizeof state_);
  bits_.data += sizeof state_;
  if (state_ < kStateLow) corrupt("labels begin with no state");
}

void LabelReader::read_huffman_table(std::span<const std::byte> nibbles) {
  std::array<std::uint8_t, kFedzipMostClusters + 1> storage;
  std::size_t kraft = 0;  // in units of 2^-12
  for (std::size_t s = 0; s < 2 * nibbles.size(); ++s) {
    storage[s] =
        static_cast<std::uint8_t>(std::to_integer<unsigned>(nibbles[s / 2]) >> (s % 2 * 4) & 15);
    const bool used = s < symbols_;
    if (used != (storage[s] > 0) || storage[s] > kLabelTableBits) corrupt("length of a code word");
    if (used) kraft += kLabelTable >> storage[s];
  }
  if (kraft != kLabelTable) corrupt("code words that are no complete code");
  const auto lengths = std::span<const std::uint8_t>(storage).first(symbols_);
  std::array<std::uint16_t, kFedzipMostClusters> words;
  code_words(lengths, words);
  for (std::size_t s = 0; s < symbols_; ++s) {
    for (std::size_t i = words[s]; i < kLabelTable; i += std::size_t{1} << lengths[s]) {
      table_[i] = static_cast<std::uint32_t>(s | std::size_t{lengths[s]} << 8);
    }
  }
}

void LabelReader::read_rans_table(std::span<const std::byte> bytes) {
  std::size_t at = 0;
  for (std::size_t s = 0; s < symbols_; ++s) {
    std::size_t frequency = kLabelTable - at;
    if (s + 1 < symbols_) {
      std::uint16_t sent = 0;
      std::memcpy(&sent, bytes.data() + 2 * s, sizeof sent);
      if (sent == 0 || sent >= frequency) corrupt("frequencies that are no code");
      frequency = sent;
    }
    for (std::size_t i = 0; i < frequency; ++i) {
      table_[at++] = static_cast<std::uint32_t>(s | (frequency - 1) << 8 | i << 20);
    }
  }
}

void LabelReader::next(std::span<std::uint8_t> out) {
  left_ -= out.size();
  switch (code_) {
    case LabelCode::kPlain:
      next_plain(out);
      break;
    case LabelCode::kHuffman:
      next_huffman(out);
      break;
    case LabelCode::kRans:
      next_rans(out);
      break;
  }
  if (left_ > 0) return;
  const bool spent = code_ == LabelCode::kRans ? state_ == kStateLow
                                               : bits_.buffered < 8 && bits_.padded_with_zeros();
  if (!spent || bits_.data != bits_.end) corrupt("bytes after the last label");
}

void LabelReader::next_plain(std::span<std::uint8_t> out) {
  BitReader bits = bits_;
  const int width = plain_bits(symbols_);
  const std::uint64_t mask = (std::uint64_t{1} << width) - 1;
  std::uint64_t largest = 0;
  for (std::uint8_t& label : out) {
    if (bits.buffered < width) bits.refill();
    const std::uint64_t value = bits.buffer & mask;
    largest = std::max(largest, value);
    label = static_cast<std::uint8_t>(value);
    bits.skip(width);
  }
  if (largest >= symbols_) corrupt("label out of range");
  bits_ = bits;
}

void LabelReader::next_huffman(std::span<std::uint8_t> out) {
  BitReader bits = bits_;
  for (std::uint8_t& label : out) {
    if (bits.buffered < kLabelTableBits) bits.refill();
    const std::uint32_t entry = table_[bits.buffer & kTableMask];
    const auto length = static_cast<int>(entry >> 8);
    if (length > bits.buffered) corrupt("labels cut short");
    label = static_cast<std::uint8_t>(entry);
    bits.skip(length);
  }
  bits_ = bits;
}

void LabelReader::next_rans(std::span<std::uint8_t> out) {
  std::uint32_t state = state_;
  const std::byte* data = bits_.data;
  for (std::uint8_t& label : out) {
    const std::uint32_t entry = table_[state & kTableMask];
    label = static_cast<std::uint8_t>(entry);
    const std::uint32_t frequency = (entry >> 8 & kTableMask) + 1;
    state = frequency * (state >> kLabelTableBits) + (entry >> 20);
    if (state < kStateLow) {
      if (data == bits_.end) corrupt("labels cut short");
      std::uint16_t word = 0;
      std::memcpy(&word, data, sizeof word);
      data += sizeof word;
      state = state << kWordBits | word;
    }
  }
  bits_.data = data;
  state_ = state;
}

}  // namespace thinwire
