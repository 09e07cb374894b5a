#include "compressors/onebit/onebit_runs.h"

#include <algorithm>
#include <cstring>

namespace thinwire {
namespace {

struct Link {
  std::uint32_t length = 0;
  std::uint32_t distance = 0;
};
static_assert(sizeof(Link) == kOneBitLinkBytes);

// The low `count` bits, count in [0, 64].
std::uint64_t low_bits(std::int64_t count) {
  return count == kOneBitGroup ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

Link read_link(const std::byte* signs, std::int64_t begin) {
  Link link;
  std::memcpy(&link, signs + (begin + 7) / 8, sizeof(link));
  return link;
}

}  // namespace

OneBitRunWriter::OneBitRunWriter(std::byte* first, std::byte* signs, std::int64_t n)
    : distance_(first), signs_(signs), n_(n) {
  const auto none = static_cast<std::uint32_t>(n);
  std::memcpy(distance_, &none, sizeof(none));
}

void OneBitRunWriter::add(std::int64_t begin, std::int64_t end) {
  const auto distance = static_cast<std::uint32_t>(begin - last_end_);
  std::memcpy(distance_, &distance, sizeof(distance));
  std::byte* at = signs_ + (begin + 7) / 8;
  std::fill(at, signs_ + end / 8, std::byte{0});
  const Link link{.length = static_cast<std::uint32_t>(end - begin),
                  .distance = static_cast<std::uint32_t>(n_ - end)};
  std::memcpy(at, &link, sizeof(link));
  distance_ = at + sizeof(link.length);
  last_end_ = end;
  block_first_ = std::min(block_first_, begin);
  masked_ += end - begin;
}

bool onebit_runs_valid(const std::byte* signs, std::int64_t n, std::int64_t first) {
  std::int64_t begin = first;
  while (begin < n) {
    if (!onebit_holds_link(begin, n)) return false;
    const Link link = read_link(signs, begin);
    const std::int64_t end = begin + link.length;
    if (end > n || !onebit_holds_link(begin, end)) return false;
    begin = end + link.distance;
  }
  return begin == n;
}

void OneBitRunReader::begin_at(std::int64_t begin) {
  begin_ = begin;
  if (begin_ >= n_) return;
  const Link link = read_link(signs_, begin_);
  end_ = begin_ + link.length;
  next_ = end_ + link.distance;
}

std::uint64_t OneBitRunReader::sent_beside_runs(std::int64_t base) {
  const std::int64_t after = base + kOneBitGroup;
  std::uint64_t sent = ~std::uint64_t{0};
  while (begin_ < std::min(after, n_)) {
    const std::int64_t from = std::max<std::int64_t>(begin_ - base, 0);
    const std::int64_t to = std::min(end_, after) - base;
    sent &= ~(low_bits(to) ^ low_bits(from));
    if (end_ > after) break;
    begin_at(next_);
  }
  return sent;
}

}  // namespace thinwire
