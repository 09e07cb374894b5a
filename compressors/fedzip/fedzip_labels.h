// Internal: labels as bytes, by the smallest of three codes: plain bits, Huffman (Proc. IRE 1952;
// canonical, lengths up to 12), order-0 rANS (Duda, arXiv 1311.2540; 12-bit frequencies, a 32-bit
// state that takes and gives 16 bits). Layout in FORMAT.md, "fedzip". Plain values and pure
// functions, thread-safe; the caller owns all memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/bits.h"
#include "compressors/fedzip/fedzip_clusters.h"

namespace thinwire {

enum class LabelCode : std::uint8_t { kPlain = 0, kHuffman = 1, kRans = 2 };

// Code lengths and frequencies fit 12 bits, and so do the indices of a table to decode with.
inline constexpr int kLabelTableBits = 12;
inline constexpr std::size_t kLabelTable = std::size_t{1} << kLabelTableBits;

// What to plan for `count` labels of `symbols` kinds, 1 to kFedzipMostClusters: log2(symbols) and
// 1/64 of a bit each, or plain bits if that is less.
std::size_t label_slot_bytes(std::size_t count, std::size_t symbols);
// Scratch for plan_labels.
std::size_t label_scratch_bytes(std::size_t count);

struct LabelPlan {
  LabelCode code = LabelCode::kPlain;
  std::size_t bytes = 0;
  std::array<std::uint8_t, kFedzipMostClusters> lengths;       // kHuffman: of the code words
  std::array<std::uint16_t, kFedzipMostClusters> frequencies;  // kRans: at least 1, sum 4096
  std::span<const std::byte> stream;                           // kRans: in the scratch
};

// The smallest code of `labels`; counts[s] > 0 of them are s. All three are tried, for bytes that
// are counted and not estimated.
LabelPlan plan_labels(std::span<const std::uint8_t> labels, std::span<const std::uint32_t> counts,
                      std::span<std::byte> scratch);

// Writes plan.bytes bytes to `out`.
void write_labels(const LabelPlan& plan, std::span<const std::uint8_t> labels, std::size_t symbols,
                  std::byte* out);

// Reads `count` labels below `symbols` in batches. Any bytes are accepted: CorruptPayload as soon
// as they cannot have been written. O(count) time, no allocation.
class LabelReader {
 public:
  // bytes: begin with the labels; what lies behind them is not looked at.
  LabelReader(LabelCode code, std::size_t symbols, std::size_t count,
              std::span<const std::byte> bytes);

  // Bytes that the labels take.
  std::size_t bytes() const { return bytes_; }
  // The next out.size() labels, at most those left. After the last one, that nothing is left.
  void next(std::span<std::uint8_t> out);

 private:
  void read_huffman_table(std::span<const std::byte> lengths);
  void read_rans_table(std::span<const std::byte> frequencies);
  void next_plain(std::span<std::uint8_t> out);
  void next_huffman(std::span<std::uint8_t> out);
  void next_rans(std::span<std::uint8_t> out);

  LabelCode code_;
  std::size_t symbols_;
  std::size_t left_;
  std::size_t bytes_ = 0;
  BitReader bits_;           // kRans: words from data to end
  std::uint32_t state_ = 0;  // kRans
  // kHuffman, by the next 12 bits: symbol, length << 8. kRans, by the state's low 12 bits: symbol,
  // (frequency - 1) << 8, place within it << 20.
  std::array<std::uint32_t, kLabelTable> table_;
};

}  // namespace thinwire
