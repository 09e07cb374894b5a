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

// Bits in, whole words out; the last bytes by finish(). Writes nothing beyond the bits put.
class BitWriter {
 public:
  explicit BitWriter(std::byte* out) : begin_(out), out_(out) {}

  // length in [0, 63]; bits above it are zero.
  void put(std::uint64_t bits, int length) {
    word_ |= bits << fill_;
    const int fill = fill_ + length;
    if (fill < 64) {
      fill_ = fill;
      return;
    }
    std::memcpy(out_, &word_, sizeof word_);
    out_ += sizeof word_;
    // fill_ is at least 1 here, since length <= 63.
    word_ = bits >> (64 - fill_);
    fill_ = fill - 64;
  }

  std::size_t finish() {
    const auto bytes = static_cast<std::size_t>((fill_ + 7) / 8);
    std::memcpy(out_, &word_, bytes);
    return static_cast<std::size_t>(out_ - begin_) + bytes;
  }

 private:
  std::byte* begin_;
  std::byte* out_;
  std::uint64_t word_ = 0;
  int fill_ = 0;
};

std::size_t write_gaps(int parameter, std::span<const std::uint32_t> indices, std::byte* out) {
  BitWriter writer(out);
  const std::uint64_t mask = (std::uint64_t{1} << parameter) - 1;
  const auto longest_quotient = static_cast<std::uint64_t>(62 - parameter);
  std::uint64_t lowest = 0;
  for (const std::uint32_t index : indices) {
    const std::uint64_t gap = index - lowest;
    lowest = std::uint64_t{index} + 1;
    std::uint64_t quotient = gap >> parameter;
    for (; quotient > longest_quotient; quotient -= std::min<std::uint64_t>(quotient, 32)) {
      writer.put(0, static_cast<int>(std::min<std::uint64_t>(quotient, 32)));
    }
    const std::uint64_t code = (((gap & mask) << 1) | 1) << quotient;
    writer.put(code, static_cast<int>(quotient) + 1 + parameter);
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
      data_(bytes.data()),
      end_(bytes.data() + bytes.size()) {
  if (count < 0 || count > n) corrupt("more entries than elements");
  if (bitmap) {
    const std::uint64_t size = (n_ + 7) / 8;
    if (left_ > 0 && bytes.size() < size) corrupt("bitmap cut short");
    end_ = data_ + std::min<std::uint64_t>(size, bytes.size());
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
void TopKIndexReader::refill() {
  if (end_ - data_ >= 8) {
    buffer_ |= load_word(data_) << buffered_;
    const int bytes = (63 - buffered_) / 8;
    data_ += bytes;
    buffered_ += 8 * bytes;
    // Bits of the word above `buffered_` are in the buffer too; the next refill ors the same again.
    return;
  }
  while (buffered_ <= 56 && data_ < end_) {
    buffer_ |= static_cast<std::uint64_t>(*data_++) << buffered_;
    buffered_ += 8;
  }
}

std::size_t TopKIndexReader::next_gaps(std::span<std::uint32_t> out) {
  const std::uint64_t mask = (std::uint64_t{1} << parameter_) - 1;
  for (std::uint32_t& index : out) {
    // 32 bits hold most entries; a refill gives at least 56.
    if (buffered_ < 32) refill();
    int quotient = std::countr_zero(buffer_);
    int length = quotient + 1 + parameter_;
    if (length > buffered_) [[unlikely]] {
      refill();
      quotient = std::countr_zero(buffer_);
      length = quotient + 1 + parameter_;
    }
    std::uint64_t gap = 0;
    if (length <= std::min(buffered_, 63)) [[likely]] {
      gap =
          (static_cast<std::uint64_t>(quotient) << parameter_) | (buffer_ >> quotient >> 1 & mask);
      buffer_ >>= length;
      buffered_ -= length;
    } else {
      gap = read_long_gap();
    }
    const std::uint64_t at = position_ + gap;
    if (at >= n_) corrupt("index beyond the tensor");
    index = static_cast<std::uint32_t>(at);
    position_ = at + 1;
  }
  left_ -= out.size();
  if (left_ == 0 && (buffer_ & ((std::uint64_t{1} << (buffered_ % 8)) - 1)) != 0) {
    corrupt("bits after the last gap");
  }
  return out.size();
}

// A code longer than the buffer: the quotient bit by bit, so that a hostile one ends at n.
std::uint64_t TopKIndexReader::read_long_gap() {
  const auto take = [this](int bits) {
    if (buffered_ < bits) refill();
    if (buffered_ < bits) corrupt("gaps cut short");
    const std::uint64_t value = buffer_ & ((std::uint64_t{1} << bits) - 1);
    buffer_ >>= bits;
    buffered_ -= bits;
    return value;
  };
  std::uint64_t quotient = 0;
  while (take(1) == 0) {
    ++quotient;
    if (quotient << parameter_ >= n_) corrupt("gap beyond the tensor");
  }
  return (quotient << parameter_) | take(parameter_);
}

std::size_t TopKIndexReader::next_bits(std::span<std::uint32_t> out) {
  for (std::uint32_t& index : out) {
    while (buffer_ == 0) {
      if (data_ == end_) corrupt("fewer bits than entries");
      const auto bytes = std::min<std::size_t>(8, static_cast<std::size_t>(end_ - data_));
      buffer_ = bytes == 8 ? load_word(data_) : load_tail(data_, bytes);
      data_ += bytes;
      position_ += kWordBits;
    }
    const std::uint64_t at =
        position_ - kWordBits + static_cast<std::uint64_t>(std::countr_zero(buffer_));
    if (at >= n_) corrupt("bit beyond the tensor");
    index = static_cast<std::uint32_t>(at);
    buffer_ &= buffer_ - 1;
  }
  left_ -= out.size();
  if (left_ == 0) {
    bool zero = buffer_ == 0;
    for (; zero && data_ != end_; ++data_) zero = *data_ == std::byte{0};
    if (!zero) corrupt("more bits than entries");
  }
  return out.size();
}

}  // namespace thinwire
