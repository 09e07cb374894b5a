#include "compressors/lossless/lossless_reference.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire::lossless {
namespace {

template <typename T>
T load(const std::byte* p) {
  T value;
  std::memcpy(&value, p, sizeof(value));
  return value;
}

// The bits of value i of n.
std::uint32_t joined(DType type, const std::byte* raw, const std::uint8_t* symbols, std::int64_t i,
                     std::int64_t n) {
  const std::uint32_t symbol = symbols[i];
  if (type != DType::kF32) {
    const auto turned = static_cast<std::uint16_t>(symbol << 8 | load<std::uint8_t>(raw + i));
    return std::rotr(turned, 1);
  }
  const std::uint32_t middle = load<std::uint8_t>(raw + 2 * n + i);
  return std::rotr(symbol << 24 | middle << 16 | load<std::uint16_t>(raw + 2 * i), 1);
}

float joined_float(DType type, std::uint32_t bits) {
  if (type == DType::kF32) return std::bit_cast<float>(bits);
  const auto half = static_cast<std::uint16_t>(bits);
  return type == DType::kBF16 ? to_float(BF16{half}) : to_float(FP16{half});
}

// What a window begins with, whose first one or two symbols are followed by those of `after`, one
// or two.
Decoded joined(Decoded window, Decoded after) {
  const std::uint32_t room = kMaxLength - window.bits();
  const Decoded::Run one = after.first_bits() <= room ? after.first : Decoded::Run{0};
  const Decoded::Run more = after.bits() <= room ? after.all : one;
  window.symbols |= after.symbols << (8 * window.count());
  window.all = static_cast<Decoded::Run>(window.all + more);
  return window;
}

}  // namespace

void split_reference(TensorView values, std::byte* raw, std::uint8_t* symbols) {
  const std::int64_t n = values.elements;
  const auto* in = static_cast<const std::byte*>(values.data);
  for (std::int64_t i = 0; i < n; ++i) {
    if (values.dtype != DType::kF32) {
      const auto turned = std::rotl(load<std::uint16_t>(in + 2 * i), 1);
      raw[i] = static_cast<std::byte>(turned & 0xFF);
      symbols[i] = static_cast<std::uint8_t>(turned >> 8);
      continue;
    }
    const std::uint32_t turned = std::rotl(load<std::uint32_t>(in + 4 * i), 1);
    const auto low = static_cast<std::uint16_t>(turned & 0xFFFF);
    std::memcpy(raw + 2 * i, &low, sizeof(low));
    raw[2 * n + i] = static_cast<std::byte>(turned >> 16 & 0xFF);
    symbols[i] = static_cast<std::uint8_t>(turned >> 24);
  }
}

void join_reference(DType type, const std::byte* raw, const std::uint8_t* symbols, TensorView out) {
  const std::int64_t n = out.elements;
  visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t bits = joined(type, raw, symbols, i, n);
      if (type == out.dtype) {
        std::memcpy(values + i, &bits, std::min(sizeof(T), sizeof(bits)));
      } else {
        values[i] = from_float<T>(joined_float(type, bits));
      }
    }
  });
}

void accumulate_reference(DType type, const std::byte* raw, const std::uint8_t* symbols,
                          float weight, float* out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] += weight * joined_float(type, joined(type, raw, symbols, i, n));
  }
}

void add_residual_reference(TensorView grad, const float* residual, float decay, float* v) {
  visit(grad, [&](const auto* values) {
    for (std::int64_t i = 0; i < grad.elements; ++i) {
      v[i] = to_float(values[i]) + decay * residual[i];
    }
  });
}

void extend_decode_table_reference(DecodeTable& table) {
  // The bits behind a code, filled up with zeros, are a window too, whose codes count as far as
  // they end before the zeros. It is the smaller number: going down, it is met as it was before the
  // turn.
  for (int turn = 0; turn < 2; ++turn) {
    for (std::size_t w = table.size(); w-- > 0;)
      table[w] = joined(table[w], table[w >> table[w].bits()]);
  }
}

void finish_stream(StreamWriter writer, std::span<const std::uint8_t> symbols, const Codes& codes) {
  for (const std::uint8_t symbol : symbols) {
    writer.bits |= std::uint64_t{codes[symbol].bits} << writer.used;
    writer.used += codes[symbol].length;
    for (; writer.used >= 8; writer.used -= 8) {
      *writer.out++ = static_cast<std::byte>(writer.bits & 0xFF);
      writer.bits >>= 8;
    }
  }
  if (writer.used > 0) *writer.out = static_cast<std::byte>(writer.bits & 0xFF);
}

bool finish_stream(StreamReader reader, const DecodeTable& table, std::span<std::uint8_t> symbols) {
  const auto left = static_cast<std::uint64_t>(reader.end - reader.in);
  std::uint64_t bit = reader.bit;
  for (std::uint8_t& symbol : symbols) {
    // Three bytes hold a window at any bit; there are zeros behind the end.
    std::uint32_t window = 0;
    for (std::uint64_t b = 0; b < 3 && bit / 8 + b < left; ++b) {
      window |= std::uint32_t{load<std::uint8_t>(reader.in + bit / 8 + b)} << (8 * b);
    }
    const Decoded& next = table[window >> bit % 8 & (table.size() - 1)];
    symbol = static_cast<std::uint8_t>(next.symbols & 0xFF);
    bit += next.first_bits();
  }
  return (bit + 7) / 8 == left;
}

}  // namespace thinwire::lossless
