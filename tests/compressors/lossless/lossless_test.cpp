#include "compressors/lossless/lossless.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "compressors/core/convert.h"
#include "compressors/lossless/lossless_kernels.h"
#include "compressors/lossless/lossless_reference.h"
#include "tests/support/patterns.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using namespace lossless;

using Bytes = std::vector<std::byte>;
// Sizes around those at which vectors, streams' words, chunks change shape.
const std::vector<std::int64_t> kSizes = {
    0, 1, 2, 3, 5, 63, 64, 65, 255, 1021, 4099, kChunk - 1, kChunk, kChunk + 1, 2 * kChunk + 777};

const PayloadCodec& codec() {
  static const auto made = make_lossless_codec();
  return *made;
}

struct Scratch {
  explicit Scratch(std::int64_t n)
      : size(codec().workspace_bytes(n)),
        data(static_cast<std::byte*>(std::aligned_alloc(64, size + 64))) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  Context context() const { return {.workspace = {data, size}}; }
  std::size_t size;
  std::byte* data;
};

// The elements' bytes, as an array of `dtype`.
TensorView as(DType dtype, Bytes& bytes) {
  return {bytes.data(), static_cast<std::int64_t>(bytes.size() / size_bytes(dtype)), dtype};
}

struct Sent {
  EncodeResult result;
  Bytes body;
};
Sent encode(DType dtype, Bytes values) {
  const TensorView grad = as(dtype, values);
  const Scratch scratch(grad.elements);
  Sent sent;
  sent.body.resize(codec().slot_bytes(grad.elements));
  sent.result = codec().encode(scratch.context(), grad, nullptr, sent.body);
  sent.body.resize(sent.result.bytes);
  return sent;
}
Bytes decode(const Bytes& body, DType dtype, std::int64_t n) {
  const Scratch scratch(n);
  Bytes values(static_cast<std::size_t>(n) * size_bytes(dtype), std::byte{0x77});
  codec().decode(scratch.context(), body, as(dtype, values));
  return values;
}

// On every target the same body, and the values again.
Sent expect_exact(DType dtype, const Bytes& values) {
  const Sent sent = encode(dtype, values);
  const auto n = static_cast<std::int64_t>(values.size() / size_bytes(dtype));
  for_each_simd_target([&] {
    EXPECT_EQ(encode(dtype, values).body, sent.body);
    EXPECT_EQ(decode(sent.body, dtype, n), values);
  });
  return sent;
}

Bytes random_bytes(std::size_t size, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  Bytes bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>(engine());
  return bytes;
}

Bytes bytes_of(DType dtype, const std::vector<float>& values) {
  return Array(dtype, values).bytes();
}

std::vector<float> normal_values(std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> normal(0, 0.01F);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = normal(engine);
  return values;
}

class Lossless16 : public testing::TestWithParam<DType> {};

TEST_P(Lossless16, EveryBitPatternComesBack) {
  Bytes values(std::size_t{2} << 16);
  for (std::uint32_t i = 0; i < 1U << 16; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    std::memcpy(values.data() + 2 * std::size_t{i}, &bits, 2);
  }
  EXPECT_TRUE(expect_exact(GetParam(), values).result.nonfinite);
  // The same among values of which nine of ten share a symbol, so that all are coded.
  Bytes coded(10 * values.size());
  for (std::size_t i = 0; i < values.size(); i += 2) {
    std::memcpy(coded.data() + 10 * i, values.data() + i, 2);
  }
  const Sent sent = expect_exact(GetParam(), coded);
  EXPECT_TRUE(sent.result.nonfinite);
  EXPECT_LT(sent.body.size(), coded.size() * 7 / 10);
}

INSTANTIATE_TEST_SUITE_P(, Lossless16, testing::Values(DType::kBF16, DType::kF16));

TEST(Lossless, RandomFloatBitsComeBack) {
  for (const std::int64_t n : kSizes) {
    SCOPED_TRACE(n);
    expect_exact(DType::kF32, random_bytes(4 * static_cast<std::size_t>(n), 1));
  }
}

TEST(Lossless, GradientsOfEverySizeComeBack) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::int64_t n : kSizes) {
      SCOPED_TRACE(testing::Message() << name(dtype) << " n=" << n);
      EXPECT_FALSE(expect_exact(dtype, bytes_of(dtype, normal_values(n, 2))).result.nonfinite);
    }
  }
}

TEST(Lossless, NonFiniteValuesAreSentAndFlagged) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::uint32_t bad : {0x7F800000U, 0xFF800000U, 0x7FC00000U, 0xFFFFFFFFU}) {
      Bytes values = bytes_of(dtype, normal_values(kChunk + 9, 3));
      // Inf, -Inf and NaNs, in the dtype's width; the least payload there is.
      std::uint32_t bits = bad;
      if (dtype != DType::kF32) bits >>= 16;
      if (dtype == DType::kF16)
        bits = (bits & 0x8000) | ((bits & 0x7FFF) > 0x7F80 ? 0x7C01 : 0x7C00);
      std::memcpy(values.data() + 100, &bits, size_bytes(dtype));
      EXPECT_TRUE(expect_exact(dtype, values).result.nonfinite) << name(dtype) << " " << bad;
    }
  }
}

TEST(Lossless, AChunkOfOneExponentSendsNoCodes) {
  const std::int64_t n = 3 * kChunk + 1;
  const std::vector<float> equal(static_cast<std::size_t>(n), -0.37F);
  const Sent sent = expect_exact(DType::kBF16, bytes_of(DType::kBF16, equal));
  EXPECT_EQ(sent.body.size(), 2 + static_cast<std::size_t>(n) + 2 * 4);
}

TEST(Lossless, WhatCodingWouldNotShrinkIsSentPlain) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const std::int64_t n = 2 * kChunk + 5;
    const auto size = static_cast<std::size_t>(n) * size_bytes(dtype);
    EXPECT_EQ(expect_exact(dtype, random_bytes(size, 4)).body.size(), 2 + 3 + size);
  }
}

TEST(Lossless, WithAMemoryNothingIsLeft) {
  const std::int64_t n = kChunk + 99;
  Array grad(DType::kBF16, normal_values(n, 5));
  const std::vector<float> residual = normal_values(n, 6);
  Memory memory(n, {.decay = 0.75F});
  memory.restore(residual);
  const Scratch scratch(n);
  Bytes body(codec().slot_bytes(n));
  body.resize(codec().encode(scratch.context(), grad.view(), &memory, body).bytes);
  const Bytes decoded = decode(body, DType::kF32, n);
  const auto values = grad.values();
  for (std::size_t i = 0; i < values.size(); ++i) {
    float got = 0;
    std::memcpy(&got, decoded.data() + 4 * i, 4);
    const float product = 0.75F * residual[i];
    ASSERT_EQ(got, values[i] + product);
    ASSERT_EQ(memory.next()[i], 0.0F);
  }
}

TEST(Lossless, Fp64IsRefusedByName) {
  std::vector<double> values(10);
  Bytes out(1000);
  const Scratch scratch(10);
  try {
    codec().encode(scratch.context(), {values.data(), 10, DType::kF64}, nullptr, out);
    FAIL() << "expected InvalidArgument";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("fp64"), std::string::npos) << error.what();
  }
}

double entropy_bytes(DType dtype, Bytes values) {
  const TensorView view = as(dtype, values);
  std::vector<std::uint8_t> symbols(static_cast<std::size_t>(view.elements));
  Bytes raw(static_cast<std::size_t>(raw_bytes(dtype, view.elements)));
  split(view, raw.data(), symbols.data());
  Counts counts{};
  for (const std::uint8_t s : symbols) ++counts[s];
  double bits = 0;
  for (const std::uint32_t count : counts) {
    if (count != 0) bits += count * std::log2(static_cast<double>(view.elements) / count);
  }
  return static_cast<double>(raw.size()) + bits / 8;
}

TEST(Lossless, IsWithinTwoPercentOfTheEntropy) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const Bytes values = bytes_of(dtype, normal_values(kChunk, 7));
    const auto size = static_cast<double>(encode(dtype, values).body.size());
    EXPECT_LT(size, 1.02 * entropy_bytes(dtype, values)) << name(dtype);
    EXPECT_LT(size, (dtype == DType::kBF16 ? 0.67 : 0.86) * static_cast<double>(values.size()));
  }
}

// Codes.

double kraft(const Lengths& lengths) {
  double sum = 0;
  for (const std::uint8_t length : lengths) sum += length == 0 ? 0 : std::ldexp(1.0, -length);
  return sum;
}

std::vector<Counts> histograms() {
  std::vector<Counts> all;
  Counts fibonacci{};  // a Huffman code of 22 bits
  std::uint32_t a = 1;
  std::uint32_t b = 1;
  for (std::size_t s = 0; s < 23; ++s) {
    fibonacci[7 * s] = a;
    a = std::exchange(b, a + b);
  }
  all.push_back(fibonacci);
  Counts even{};
  even.fill(kChunk / kSymbols);
  all.push_back(even);
  Counts two{};
  two[3] = 1;
  two[255] = kChunk - 1;
  all.push_back(two);
  Counts steep{};  // every symbol, one of them nearly always
  steep.fill(1);
  steep[100] = kChunk - 255;
  all.push_back(steep);
  std::mt19937_64 engine(8);
  for (int i = 0; i < 200; ++i) {
    Counts random{};
    const std::size_t symbols = 2 + engine() % 255;
    for (std::size_t s = 0; s < symbols; ++s)
      random[s] = static_cast<std::uint32_t>(engine() >> (50 + engine() % 14)) + 1;
    all.push_back(random);
  }
  return all;
}

TEST(LosslessCode, LengthsAreCompleteBoundedAndNearTheEntropy) {
  for (const Counts& counts : histograms()) {
    const Lengths lengths = code_lengths(counts);
    EXPECT_TRUE(is_complete(lengths));
    EXPECT_EQ(kraft(lengths), 1.0);
    double total = 0;
    double bits = 0;
    double entropy = 0;
    for (const std::uint32_t count : counts) total += count;
    for (std::size_t s = 0; s < kSymbols; ++s) {
      EXPECT_EQ(lengths[s] == 0, counts[s] == 0) << s;
      EXPECT_LE(lengths[s], kMaxLength);
      for (std::size_t t = 0; t < kSymbols; ++t) {
        EXPECT_TRUE(counts[s] == 0 || counts[t] <= counts[s] || lengths[t] <= lengths[s]);
      }
      if (counts[s] == 0) continue;
      bits += static_cast<double>(counts[s]) * lengths[s];
      entropy += counts[s] * std::log2(total / counts[s]);
    }
    // Huffman's codes are below one bit a symbol more; the bound on lengths costs little.
    EXPECT_LT(bits, entropy + 1.05 * total);
  }
}

TEST(LosslessCode, LengthsOfNoPrefixCodeAreRefused) {
  Lengths lengths{};
  EXPECT_FALSE(is_complete(lengths));
  lengths[0] = 1;
  EXPECT_FALSE(is_complete(lengths));
  lengths[1] = 1;
  EXPECT_TRUE(is_complete(lengths));
  lengths[2] = kMaxLength;
  EXPECT_FALSE(is_complete(lengths));
  lengths.fill(8);
  EXPECT_TRUE(is_complete(lengths));
  lengths[9] = kMaxLength + 1;
  EXPECT_FALSE(is_complete(lengths));
}

TEST(LosslessCode, TheTableHoldsWhatCodesBeginAWindow) {
  for (const Counts& counts : histograms()) {
    const Lengths lengths = code_lengths(counts);
    const Codes codes = make_codes(lengths);
    DecodeTable table;
    fill_decode_table(lengths, table);
    const DecodeTable single = table;
    extend_decode_table_reference(table);
    for_each_simd_target([&] {
      DecodeTable got = single;
      extend_decode_table(got);
      ASSERT_EQ(std::memcmp(got.data(), table.data(), sizeof(table)), 0);
    });
    for (std::uint32_t window = 0; window < table.size(); ++window) {
      const Decoded entry = table[window];
      std::uint32_t bits = 0;
      ASSERT_GE(entry.count(), 1U);
      ASSERT_LE(entry.count(), 4U);
      for (std::uint32_t i = 0; i < entry.count(); ++i) {
        const Code code = codes[entry.symbols >> (8 * i) & 0xFF];
        ASSERT_GT(code.length, 0);
        ASSERT_EQ(window >> bits & ((1U << code.length) - 1), code.bits);
        bits += code.length;
        ASSERT_TRUE(i > 0 || entry.first_bits() == bits);
      }
      ASSERT_EQ(entry.bits(), bits);
      ASSERT_LE(bits, static_cast<std::uint32_t>(kMaxLength));
    }
  }
}

// Symbols in the shares of a histogram, shuffled.
std::vector<std::uint8_t> draw(const Counts& counts, std::size_t n, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  std::discrete_distribution<int> symbol(counts.begin(), counts.end());
  std::vector<std::uint8_t> symbols(n);
  for (std::uint8_t& s : symbols) s = static_cast<std::uint8_t>(symbol(engine));
  return symbols;
}

// Counting, encoding and decoding of symbols on every target, against plain loops.
void expect_streams_match(std::span<const std::uint8_t> symbols, const Lengths& lengths) {
  const auto n = static_cast<std::int64_t>(symbols.size());
  const Codes codes = make_codes(lengths);
  DecodeTable table;
  fill_decode_table(lengths, table);
  extend_decode_table(table);
  std::array<Counts, kStreams> expected_counts{};
  Streams sizes{};
  Bytes expected;
  for (std::size_t s = 0; s < kStreams; ++s) {
    const auto begin = static_cast<std::size_t>(stream_begin(n, s));
    const auto end = static_cast<std::size_t>(stream_begin(n, s + 1));
    const auto part = symbols.subspan(begin, end - begin);
    std::size_t bits = 0;
    for (const std::uint8_t symbol : part) {
      bits += lengths[symbol];
      ++expected_counts[s][symbol];
    }
    sizes[s] = (bits + 7) / 8;
    expected.resize(expected.size() + sizes[s]);
    finish_stream({.out = expected.data() + expected.size() - sizes[s]}, part, codes);
  }
  for_each_simd_target([&] {
    std::array<Counts, kStreams> counts{};
    count_symbols(symbols, counts);
    ASSERT_EQ(counts, expected_counts);
    Bytes got(expected.size());  // exactly
    encode_streams(symbols, codes, sizes, got.data());
    ASSERT_EQ(got, expected);
    std::vector<std::uint8_t> decoded(symbols.size());
    ASSERT_TRUE(decode_streams(got.data(), sizes, table, decoded));
    ASSERT_TRUE(std::ranges::equal(decoded, symbols));
  });
}

TEST(LosslessCode, StreamsMatchTheReferenceOnEveryTarget) {
  const auto all = histograms();
  for (std::size_t h = 0; h < 7; ++h) {
    for (const std::size_t n : {1U, 4U, 5U, 6U, 257U, 300U, 4099U}) {
      SCOPED_TRACE(testing::Message() << "histogram " << h << " n=" << n);
      expect_streams_match(draw(all[h], n, h), code_lengths(all[h]));
    }
  }
}

// Around what two registers can look up: 63 symbols in a row, and zero.
TEST(LosslessCode, SymbolsMayBeNearOrFar) {
  for (const bool with_zero : {false, true}) {
    for (const std::size_t first : {1U, 100U, 192U}) {
      for (const std::size_t span : {1U, 2U, 32U, 62U, 63U, 64U}) {
        Counts counts{};
        counts[0] = with_zero ? 1000 : 0;
        for (std::size_t i = 0; i < span; ++i) {
          counts[first + i] = static_cast<std::uint32_t>(1 + 7 * i % 50);
        }
        if (span == 1 && !with_zero) continue;  // no code
        SCOPED_TRACE(testing::Message() << span << " from " << first << ", zero: " << with_zero);
        expect_streams_match(draw(counts, 2000, span), code_lengths(counts));
      }
    }
  }
}

// One stream of the shortest codes, another of the longest: they end far apart.
TEST(LosslessCode, StreamsMayDiffer) {
  const Counts steep = histograms()[3];
  std::vector<std::uint8_t> symbols(kChunk, 100);
  for (std::size_t i = 0; i < kChunk / 4; ++i) {
    symbols[kChunk / 4 + i] = static_cast<std::uint8_t>(i % 100);
  }
  const Lengths lengths = code_lengths(steep);
  DecodeTable table;
  fill_decode_table(lengths, table);
  extend_decode_table(table);
  Streams sizes{};
  for (std::size_t i = 0; i < symbols.size(); ++i) sizes[i / (kChunk / 4)] += lengths[symbols[i]];
  for (std::size_t& size : sizes) size = (size + 7) / 8;
  Bytes coded(sizes[0] + sizes[1] + sizes[2] + sizes[3]);
  for_each_simd_target([&] {
    encode_streams(symbols, make_codes(lengths), sizes, coded.data());
    std::vector<std::uint8_t> decoded(symbols.size());
    ASSERT_TRUE(decode_streams(coded.data(), sizes, table, decoded));
    ASSERT_EQ(decoded, symbols);
  });
}

TEST(LosslessKernels, MatchTheReferenceBitForBit) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (const std::int64_t n : {1, 15, 16, 17, 31, 32, 33, 63, 100, 1009}) {
      SCOPED_TRACE(testing::Message() << name(dtype) << " n=" << n);
      Array in(dtype, make_values(Pattern::kNormal, n, 9), 1);
      const auto size = static_cast<std::size_t>(n);
      const auto raw_size = static_cast<std::size_t>(raw_bytes(dtype, n));
      Bytes raw(raw_size);
      std::vector<std::uint8_t> symbols(size);
      split_reference(in.view(), raw.data(), symbols.data());
      const auto start = make_values(Pattern::kNormal, n, 10);
      auto sum = start;
      accumulate_reference(dtype, raw.data(), symbols.data(), 0.3F, sum.data(), n);
      auto v = start;
      add_residual_reference(in.view(), start.data(), 0.7F, v.data());
      for_each_simd_target([&] {
        Bytes other_raw(raw_size);
        std::vector<std::uint8_t> other(size);
        split(in.view(), other_raw.data(), other.data());
        EXPECT_EQ(other_raw, raw);
        EXPECT_EQ(other, symbols);
        for (const DType to : {DType::kF32, DType::kBF16, DType::kF16, DType::kF64}) {
          Array expected(to, n, 1);
          Array got(to, n, 1);
          join_reference(dtype, raw.data(), symbols.data(), expected.view());
          join(dtype, raw.data(), symbols.data(), got.view(), false);
          EXPECT_EQ(got.bytes(), expected.bytes()) << name(to);
          EXPECT_TRUE(got.guards_intact());
          EXPECT_TRUE(to != dtype || got.bytes() == in.bytes());
        }
        auto other_sum = start;
        accumulate(dtype, raw.data(), symbols.data(), 0.3F, other_sum.data(), n);
        EXPECT_EQ(other_sum, sum);
        auto other_v = start;
        add_residual(in.view(), start.data(), 0.7F, other_v.data());
        EXPECT_EQ(other_v, v);
      });
    }
  }
}

// Hostile bodies.

void expect_corrupt(const Bytes& body, std::int64_t n, const char* what) {
  try {
    decode(body, DType::kF32, n);
    ADD_FAILURE() << "taken, expected: " << what;
  } catch (const CorruptPayload& error) {
    EXPECT_NE(std::string(error.what()).find(what), std::string::npos) << error.what();
  }
}

TEST(Lossless, CorruptBodiesAreRefused) {
  const std::int64_t n = 4000;
  const Bytes good = encode(DType::kBF16, bytes_of(DType::kBF16, normal_values(n, 11))).body;
  const std::size_t kind = 2 + static_cast<std::size_t>(n);
  ASSERT_EQ(good[kind], std::byte{1});
  const auto with = [&](std::size_t at, int value) {
    Bytes bad = good;
    bad[at] = static_cast<std::byte>(value);
    return bad;
  };
  expect_corrupt(with(1, 3), n, "dtype");
  expect_corrupt(with(kind, 3), n, "kind");
  expect_corrupt(with(kind + 1, 0xFF), n, "no symbols");
  expect_corrupt(with(kind + 3, 0xFF), n, "prefix code");  // lengths of 15
  expect_corrupt(with(kind + 3, 0x11), n, "prefix code");  // oversubscribed
  Bytes incomplete = good;
  const auto first = std::to_integer<std::size_t>(good[kind + 1]);
  const auto last = std::to_integer<std::size_t>(good[kind + 2]);
  const std::size_t length_bytes = (last - first) / 2 + 1;
  std::fill_n(incomplete.begin() + static_cast<std::ptrdiff_t>(kind + 3), length_bytes,
              std::byte{0xBB});
  expect_corrupt(incomplete, n, "prefix code");
  const std::size_t sizes = kind + 3 + length_bytes;
  for (std::size_t s = 0; s < kStreams; ++s) {
    Bytes shorter = good;
    std::uint16_t size = 0;
    std::memcpy(&size, good.data() + sizes + 2 * s, 2);
    --size;
    std::memcpy(shorter.data() + sizes + 2 * s, &size, 2);
    expect_corrupt(shorter, n, "stream");
  }
  expect_corrupt(with(sizes + 1, 0xFF), n, "too early");
  Bytes cut = good;
  cut.pop_back();
  expect_corrupt(cut, n, "too early");
  expect_corrupt(good, n + 1, "");
  expect_corrupt(good, n - 1, "");
}

}  // namespace
}  // namespace thinwire
