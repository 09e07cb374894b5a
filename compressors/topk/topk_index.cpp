#include "compressors/topk/topk_index.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr int kMaxParameter = 31;
constexpr std::uint64_t kWordBits = 64;

static_assert(std::endian::native == std::endian::little, "words are stored as they lie");

[[noreturn]] void corrupt(const char* what) {
  throw CorruptPayload(std::string("topk body: ") + what +
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

// Bits in, whole bytes out, the last one by finish().
class BitWriter {
 public:
  // Fewer than 8 bits wait in word_, so that this many more fit.
  static constexpr int kEarlyBits = 56;

  explicit BitWriter(std::byte* out) : begin_(out), out_(out) {}

  // length in [0, kEarlyBits]; bits above it are zero. Stores nothing beyond the bits put.
  void put(std::uint64_t bits, int length) {
    word_ |= bits << fill_;
    fill_ += length;
    const auto bytes = static_cast<std::size_t>(fill_ / 8);
    std::memcpy(out_, &word_, bytes);
    advance();
  }

  // The same, but stores a whole word: only where more bits than that are yet to come.
  void put_early(std::uint64_t bits, int length) {
    word_ |= bits << fill_;
    fill_ += length;
    std::memcpy(out_, &word_, sizeof word_);
    advance();
  }

  std::size_t finish() {
    if (fill_ > 0) std::memcpy(out_, &word_, 1);
    return static_cast<std::size_t>(out_ - begin_) + (fill_ > 0 ? 1 : 0);
  }

 private:
  void advance() {
    out_ += fill_ / 8;
    // fill_ is below 64.
    word_ >>= fill_ & ~7;
    fill_ &= 7;
  }

  std::byte* begin_;
  std::byte* out_;
  std::uint64_t word_ = 0;
  int fill_ = 0;
};

std::size_t write_gaps(int parameter, std::span<const std::uint32_t> indices, std::byte* out) {
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
    std::uint64_t quotient = gap >> parameter;
    const std::uint64_t code = ((gap & mask) << 1) | 1;
    const auto length = static_cast<int>(std::min<std::uint64_t>(quotient, 64)) + 1 + parameter;
    if (i < early && length <= BitWriter::kEarlyBits) [[likely]] {
      writer.put_early(code << quotient, length);
      continue;
    }
    while (quotient + static_cast<std::uint64_t>(parameter) + 1 > BitWriter::kEarlyBits) {
      const std::uint64_t zeros = std::min<std::uint64_t>(quotient, 16);
      writer.put(0, static_cast<int>(zeros));
      quotient -= zeros;
    }
    writer.put(code << quotient, static_cast<int>(quotient) + 1 + parameter);
  }
  return writer.finish();
}

std::size_t write_bitmap(std::int64_t n, std::span<const std::uint32_t> indices, std::byte* out) {
  const auto bytes = static_cast<std::size_t>((n + 7) / 8);
  std::memset(out, 0, bytes);
  for (const std::uint32_t index : indices) {
    out[index / 8] |= static_cast<std::byte>(1U << (index % 8));
  }
  return bytes;
}

}  // namespace

TopKIndexPlan plan_topk_indices(std::int64_t n, std::int64_t count) {
  if (count == 0) return {};
  TopKIndexPlan plan{.bitmap = true, .parameter = 0, .worst_bytes = 0};
  auto best_bits = static_cast<std::uint64_t>(n);
  const auto entries = static_cast<std::uint64_t>(count);
  const std::uint64_t gaps = static_cast<std::uint64_t>(n) - entries;  // their sum at most
  for (int b = 0; b <= kMaxParameter; ++b) {
    const std::uint64_t bits = entries * static_cast<std::uint64_t>(b + 1) + (gaps >> b);
    if (bits < best_bits) {
      best_bits = bits;
      plan.bitmap = false;
      plan.parameter = b;
    }
  }
  plan.worst_bytes = static_cast<std::size_t>((best_bits + 7) / 8);
  return plan;
}

std::size_t write_topk_indices(const TopKIndexPlan& plan, std::int64_t n,
                               std::span<const std::uint32_t> indices, std::span<std::byte> out) {
  if (indices.empty()) return 0;
  return plan.bitmap ? write_bitmap(n, indices, out.data())
                     : write_gaps(plan.parameter, indices, out.data());
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

// At least 56 bits ahead, or all there are.
void TopKIndexReader::Bits::refill() {
  if (end - data >= 8) [[likely]] {
    // Bits of the word above `buffered` are in the buffer too; the next refill ors the same again.
    buffer |= load_word(data) << buffered;
    const int bytes = (63 - buffered) / 8;
    data += bytes;
    buffered += 8 * bytes;
    return;
  }
  while (buffered <= 56 && data < end) {
    buffer |= static_cast<std::uint64_t>(*data++) << buffered;
    buffered += 8;
  }
}

// count in [0, 32].
std::uint64_t TopKIndexReader::Bits::take(int count) {
  if (buffered < count) refill();
  if (buffered < count) corrupt("gaps cut short");
  const std::uint64_t value = buffer & ((std::uint64_t{1} << count) - 1);
  buffer >>= count;
  buffered -= count;
  return value;
}

// Any gap, the quotient bit by bit, so that a hostile one ends at n.
std::uint64_t TopKIndexReader::read_gap(Bits& bits) const {
  std::uint64_t quotient = 0;
  while (bits.take(1) == 0) {
    ++quotient;
    if (quotient << parameter_ >= n_) corrupt("gap beyond the tensor");
  }
  return (quotient << parameter_) | bits.take(parameter_);
}

std::size_t TopKIndexReader::next_gaps(std::span<std::uint32_t> out) {
  Bits bits = bits_;
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
      if (length > std::min(bits.buffered, 63)) [[unlikely]] {
        bits.refill();
        quotient = std::countr_zero(bits.buffer);
        length = quotient + 1 + parameter;
      }
      std::uint64_t gap = 0;
      if (length <= std::min(bits.buffered, 63)) [[likely]] {
        gap = (static_cast<std::uint64_t>(quotient) << parameter) |
              (bits.buffer >> quotient >> 1 & mask);
        bits.buffer >>= length;
        bits.buffered -= length;
      } else {
        // By way of a copy, so that `bits` itself may live in registers.
        Bits rest = bits;
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
  if (left_ == 0 && (bits.buffer & ((std::uint64_t{1} << (bits.buffered % 8)) - 1)) != 0) {
    corrupt("bits after the last gap");
  }
  return out.size();
}

std::size_t TopKIndexReader::next_bits(std::span<std::uint32_t> out) {
  Bits bits = bits_;
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
