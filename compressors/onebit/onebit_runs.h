// The masked runs of a body: runs of zeros whose sign bits say nothing, and so hold the mask. The
// first eight whole bytes of a run's sign bits are its link, two 32-bit numbers: the run's length,
// and the distance from its end to the next run's begin, or to the tensor's end (FORMAT.md). All
// positions are elements. Not thread-safe; the caller owns the sign bits.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace thinwire {

inline constexpr std::int64_t kOneBitGroup = 64;  // elements that are looked at together
inline constexpr std::int64_t kOneBitLinkBytes = 8;

// Whether the bits of [begin, end) hold a link: always from 71 elements on, never below 64.
constexpr bool onebit_holds_link(std::int64_t begin, std::int64_t end) {
  return end / 8 - (begin + 7) / 8 >= kOneBitLinkBytes;
}

// Finds the runs that are masked, group by group, and writes their links.
class OneBitRunWriter {
 public:
  // `first`: four bytes for the distance from 0 to the first run. signs: ceil(n / 8) bytes.
  OneBitRunWriter(std::byte* first, std::byte* signs, std::int64_t n);

  // A block begins: a run lies in one block.
  void begin_block(std::int64_t begin) {
    open_ = begin;
    block_first_ = n_;
    masked_ = 0;
  }
  // Bit i of `nonzero`: element base + i is not zero; 0 for those beyond the block.
  void see(std::int64_t base, std::uint64_t nonzero) {
    if (nonzero == 0) return;
    close(base + std::countr_zero(nonzero));
    open_ = base + kOneBitGroup - std::countl_zero(nonzero);
  }
  void end_block(std::int64_t end) { close(end); }

  // Of the block: where its first run begins (n when there is none), elements in runs.
  std::int64_t block_first() const { return block_first_; }
  std::int64_t masked() const { return masked_; }

 private:
  void close(std::int64_t end) {
    if (onebit_holds_link(open_, end)) add(open_, end);
  }
  void add(std::int64_t begin, std::int64_t end);

  std::byte* distance_;  // to the next run, from last_end_
  std::byte* signs_;
  std::int64_t n_;
  std::int64_t last_end_ = 0;
  std::int64_t open_ = 0;  // where the zeros before the next group begin
  std::int64_t block_first_ = 0;
  std::int64_t masked_ = 0;
};

// Whether the links of a body of n elements describe runs within it, one after the other.
bool onebit_runs_valid(const std::byte* signs, std::int64_t n, std::int64_t first);

// Reads the runs of a valid body in order.
class OneBitRunReader {
 public:
  OneBitRunReader() = default;
  // first: where the first run begins, or n.
  OneBitRunReader(const std::byte* signs, std::int64_t n, std::int64_t first)
      : signs_(signs), n_(n) {
    begin_at(first);
  }

  // Bit i: element base + i is in no run. Groups are asked for in order.
  std::uint64_t sent(std::int64_t base) {
    return base + kOneBitGroup <= begin_ ? ~std::uint64_t{0} : sent_beside_runs(base);
  }

 private:
  void begin_at(std::int64_t begin);
  std::uint64_t sent_beside_runs(std::int64_t base);

  const std::byte* signs_ = nullptr;
  std::int64_t n_ = 0;
  std::int64_t begin_ = 0;  // of the next run that ends beyond the last group, or n
  std::int64_t end_ = 0;
  std::int64_t next_ = 0;  // begin of the run after it
};

}  // namespace thinwire
