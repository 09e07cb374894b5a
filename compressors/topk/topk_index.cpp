#include "compressors/topk/topk_index.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr int kMaxParameter = 31;
constexpr std::uint64_t kWordBits = 64;
// A gap whose quotient is not below this comes as so many zeros, a one and all its bits.
constexpr int kLongQuotient = 24;
constexpr int kLongGapBits = 32;

[[noreturn]] void corrupt(const char* what) {
  throw CorruptPayload(std::string("indices of a body: ") + what +
                       "\nhint: sender and receiver must use the same codec, version and tensor");
}

std::uint64_t load_word(const std::byte* data) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, sizeof word);
  return word;
}

std::uint64_t load_tail(const std::byte* data, std::size_t bytes) {
  std::uint64_t word = 0;
  std::memcpy(&word, data, bytes);
  return word;
}

void write_gaps(int parameter, std::span<const std::uint32_t> indices, std::byte* out) {
  BitWriter writer(out);
  const std::uint64_t mask = (std::uint64_t{1} << parameter) - 1;
  std::uint64_t lowest = 0;
  // As long as the entries left take another word at least, whole words may be stored early.
  const std::size_t tail =
      std::min(indices.size(), kWordBits / static_cast<std::size_t>(parameter + 1) + 1);
  const std::size_t early = indices.size() - tail;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    const std::uint64_t gap = indices[i] - lowest;
    lowest = std::uint64_t{indices[i]} + 1;
    const std::uint64_t quotient = gap >> parameter;
    if (quotient >= kLongQuotient) [[unlikely]] {
      writer.put(std::uint64_t{1} << kLongQuotient, kLongQuotient + 1);
      writer.put(gap, kLongGapBits);
      continue;
    }
    const std::uint64_t code = ((gap & mask) << 1 | 1) << quotient;
    const auto length = static_cast<int>(quotient) + 1 + parameter;
    i < early ? writer.put_early(code, length) : writer.put(code, length);
  }
  writer.finish();
}

void write_bitmap(std::int64_t n, std::span<const std::uint32_t> indices, std::byte* out) {
  const auto bytes = static_cast<std::size_t>((n + 7) / 8);
  std::memset(out, 0, bytes);
  for (const std::uint32_t index : indices) {
    out[index / 8] |= static_cast<std::byte>(1U << (index % 8));
  }
}

// Bits of the gaps at parameter b.
std::uint64_t gap_bits(std::span<const std::uint32_t> indices, int b) {
  const auto long_code = static_cast<std::uint32_t>(kLongQuotient + kLongGapBits - b);
  const auto code = [&](std::uint32_t gap) {
    const std::uint32_t quotient = gap >> b;
    return quotient < kLongQuotient ? quotient : long_code;
  };
  std::uint64_t bits = code(indices[0]) + indices.size() * static_cast<std::uint64_t>(b + 1);
  for (std::size_t i = 1; i < indices.size(); ++i) bits += code(indices[i] - indices[i - 1] - 1);
  return bits;
}

// What the gaps of `count` independent positions take at parameter b, in the mean and six standard
// deviations more, their quotients being geometric with `ratio`.
double likely_bits(double count, double ratio, int b) {
  const double mean = ratio / (1 - ratio);
  const double deviation = std::sqrt(ratio * count) / (1 - ratio);
  return count * (b + 1) + count * mean + 6 * deviation;
}

}  // namespace

std::size_t plan_topk_indices(std::int64_t n, std::int64_t count) {
  if (count == 0) return 0;
  const auto positions = static_cast<std::uint64_t>(n);
  const auto entries = static_cast<std::uint64_t>(count);
  std::uint64_t least = positions;  // a bitmap
  // A gap of at least g more has probability (1 - p)^g, so that the quotients' ratio is
  // (1 - p)^(2^b). Plain products only: they round alike on every host.
  double ratio = 1 - static_cast<double>(count) / static_cast<double>(n);
  for (int b = 0; b <= kMaxParameter; ++b) {
    const std::uint64_t worst =
        entries * static_cast<std::uint64_t>(b + 1) + ((positions - entries) >> b);
    const double likely = likely_bits(static_cast<double>(count), ratio, b);
    ratio *= ratio;
    const std::uint64_t bits =
        likely < static_cast<double>(worst) ? static_cast<std::uint64_t>(likely) + 1 : worst;
    least = std::min(least, bits);
  }
  return static_cast<std::size_t>((least + 7) / 8);
}

TopKIndexCoding choose_topk_coding(std::int64_t n, std::span<const std::uint32_t> indices) {
  if (indices.empty()) return {};
  const std::uint64_t mean_gap = static_cast<std::uint64_t>(n) / indices.size();
  int b = std::max(0, static_cast<int>(std::bit_width(mean_gap)) - 1);
  std::uint64_t bits = gap_bits(indices, b);
  const auto step = [&](int by) {
    const std::uint64_t other = gap_bits(indices, b + by);
    if (by > 0 ? other >= bits : other > bits) return false;
    bits = other;
    b += by;
    return true;
  };
  while (b > 0 && step(-1)) continue;
  while (b < kMaxParameter && step(1)) continue;
  if (static_cast<std::uint64_t>(n) <= bits) {
    return {.bitmap = true, .parameter = 0, .bits = static_cast<std::uint64_t>(n)};
  }
  return {.bitmap = false, .parameter = b, .bits = bits};
}

void write_topk_indices(const TopKIndexCoding& coding, std::int64_t n,
                        std::span<const std::uint32_t> indices, std::span<std::byte> out) {
  if (indices.empty()) return;
  coding.bitmap ? write_bitmap(n, indices, out.data())
                : write_gaps(coding.parameter, indices, out.data());
}

TopKIndexReader::TopKIndexReader(bool bitmap, int parameter, std::int64_t n, std::int64_t count,
                                 std::span<const std::byte> bytes)
    : bitmap_(bitmap),
      parameter_(parameter),
      n_(static_cast<std::uint64_t>(n)),
      left_(static_cast<std::uint64_t>(count)),
      bits_{.data = bytes.data(), .end = bytes.data() + bytes.size()} {
  if (count < 0 || count > n) corrupt("more entries than elements");
  if (bitmap) {
    const std::uint64_t size = (n_ + 7) / 8;
    if (left_ > 0 && bytes.size() < size) corrupt("bitmap cut short");
    bits_.end = bits_.data + std::min<std::uint64_t>(size, bytes.size());
  } else if (parameter < 0 || parameter > kMaxParameter) {
    corrupt("gap parameter out of range");
  }
}

std::size_t TopKIndexReader::next(std::span<std::uint32_t> out) {
  const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(out.size(), left_));
  if (wanted == 0) return 0;
  return bitmap_ ? next_bits(out.first(wanted)) : next_gaps(out.first(wanted));
}

// Any gap, the quotient bit by bit.
std::uint64_t TopKIndexReader::read_gap(BitReader& bits) const {
  std::uint64_t quotient = 0;
  while (bits.take(1) == 0) {
    if (++quotient > kLongQuotient) corrupt("gap code too long");
  }
  if (quotient == kLongQuotient) return bits.take(kLongGapBits);
  return (quotient << parameter_) | bits.take(parameter_);
}

std::size_t TopKIndexReader::next_gaps(std::span<std::uint32_t> out) {
  BitReader bits = bits_;
  std::uint64_t position = position_;
  const int parameter = parameter_;
  const std::uint64_t mask = (std::uint64_t{1} << parameter) - 1;
  // A code's length is about parameter + 2.5 in the mean: so many nearly always fit into 56 bits.
  const auto group = static_cast<std::size_t>(std::max(1, 56 / (parameter + 4)));
  for (std::size_t first = 0; first < out.size(); first += group) {
    bits.refill();
    for (std::uint32_t& index : out.subspan(first, std::min(group, out.size() - first))) {
      int quotient = std::countr_zero(bits.buffer);
      int length = quotient + 1 + parameter;
      if (length > bits.buffered) [[unlikely]] {
        bits.refill();
        quotient = std::countr_zero(bits.buffer);
        length = quotient + 1 + parameter;
      }
      std::uint64_t gap = 0;
      if (quotient < kLongQuotient && length <= bits.buffered) [[likely]] {
        gap = (static_cast<std::uint64_t>(quotient) << parameter) |
              (bits.buffer >> quotient >> 1 & mask);
        bits.skip(length);
      } else {
        // By way of a copy, so that `bits` itself may live in registers.
        BitReader rest = bits;
        gap = read_gap(rest);
        bits = rest;
      }
      position += gap;
      if (position >= n_) [[unlikely]]
        corrupt("index beyond the tensor");
      index = static_cast<std::uint32_t>(position++);
    }
  }
  bits_ = bits;
  position_ = position;
  left_ -= out.size();
  if (left_ == 0 && !bits.padded_with_zeros()) corrupt("bits after the last gap");
  return out.size();
}

std::size_t TopKIndexReader::next_bits(std::span<std::uint32_t> out) {
  BitReader bits = bits_;
  for (std::uint32_t& index : out) {
    while (bits.buffer == 0) {
      if (bits.data == bits.end) corrupt("fewer bits than entries");
      const auto bytes = std::min<std::size_t>(8, static_cast<std::size_t>(bits.end - bits.data));
      bits.buffer = bytes == 8 ? load_word(bits.data) : load_tail(bits.data, bytes);
      bits.data += bytes;
      position_ += kWordBits;
    }
    const std::uint64_t at =
        position_ - kWordBits + static_cast<std::uint64_t>(std::countr_zero(bits.buffer));
    if (at >= n_) corrupt("bit beyond the tensor");
    index = static_cast<std::uint32_t>(at);
    bits.buffer &= bits.buffer - 1;
  }
  left_ -= out.size();
  if (left_ == 0) {
    bool zero = bits.buffer == 0;
    for (; zero && bits.data != bits.end; ++bits.data) zero = *bits.data == std::byte{0};
    if (!zero) corrupt("more bits than entries");
  }
  bits_ = bits;
  return out.size();
}

}  // namespace thinwire
