#include "compressors/fedzip/fedzip_labels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

using Labels = std::vector<std::uint8_t>;
using Bytes = std::vector<std::byte>;

struct Coded {
  LabelCode code = LabelCode::kPlain;
  Bytes bytes;
};

std::vector<std::uint32_t> count(const Labels& labels, std::size_t symbols) {
  std::vector<std::uint32_t> counts(symbols);
  for (const std::uint8_t label : labels) ++counts[label];
  return counts;
}

Coded encode(const Labels& labels, std::size_t symbols) {
  Bytes scratch(label_scratch_bytes(labels.size()));
  const LabelPlan plan = plan_labels(labels, count(labels, symbols), scratch);
  Coded coded{plan.code, Bytes(plan.bytes)};
  write_labels(plan, labels, symbols, coded.bytes.data());
  return coded;
}

// From a heap copy of exactly the bytes, in batches.
Labels decode(LabelCode code, const Bytes& bytes, std::size_t size, std::size_t symbols) {
  const auto copy = std::make_unique<std::byte[]>(bytes.size());
  std::copy(bytes.begin(), bytes.end(), copy.get());
  Labels labels(size);
  LabelReader reader(code, symbols, size, {copy.get(), bytes.size()});
  for (std::size_t i = 0; i < size; i += 100) {
    reader.next(std::span(labels).subspan(i, std::min<std::size_t>(100, size - i)));
  }
  return labels;
}

// `weight(s)` labels of each symbol at least, shuffled.
template <typename F>
Labels labels_of(std::size_t symbols, F&& weight) {
  Labels labels;
  for (std::size_t s = 0; s < symbols; ++s) {
    labels.insert(labels.end(), weight(s), static_cast<std::uint8_t>(s));
  }
  std::shuffle(labels.begin(), labels.end(), std::mt19937_64(symbols));
  return labels;
}

double entropy_bits(const Labels& labels, std::size_t symbols) {
  double bits = 0;
  for (const std::uint32_t c : count(labels, symbols)) {
    bits += c * std::log2(static_cast<double>(labels.size()) / c);
  }
  return bits;
}

void expect_round_trip(const Labels& labels, std::size_t symbols) {
  const Coded coded = encode(labels, symbols);
  EXPECT_EQ(decode(coded.code, coded.bytes, labels.size(), symbols), labels);
  EXPECT_LE(coded.bytes.size(), (labels.size() * 8 + 7) / 8);
  EXPECT_GE(static_cast<double>(coded.bytes.size()) * 8, entropy_bits(labels, symbols) - 1);
}

TEST(FedzipLabels, EveryDistributionComesBack) {
  for (const std::size_t symbols : {1U, 2U, 3U, 5U, 17U, 128U, 255U, 256U}) {
    SCOPED_TRACE(symbols);
    expect_round_trip(labels_of(symbols, [](std::size_t) { return 1U; }), symbols);
    expect_round_trip(labels_of(symbols, [](std::size_t) { return 37U; }), symbols);
    expect_round_trip(labels_of(symbols, [](std::size_t s) { return 1 + 4000 / (s + 1); }),
                      symbols);
    expect_round_trip(labels_of(symbols, [](std::size_t s) { return s == 0 ? 60'000U : 1U; }),
                      symbols);
  }
  // Fibonacci weights: a Huffman tree deeper than the code words may be.
  std::vector<std::size_t> weights = {1, 1};
  while (weights.size() < 22) weights.push_back(weights.end()[-1] + weights.end()[-2]);
  expect_round_trip(labels_of(22, [&](std::size_t s) { return weights[s]; }), 22);
}

// Each of the three is the smallest for something, or it would not be here.
TEST(FedzipLabels, TheSmallestCodeIsTaken) {
  EXPECT_EQ(encode(labels_of(2, [](std::size_t) { return 5000U; }), 2).code, LabelCode::kPlain);
  EXPECT_EQ(encode(labels_of(5, [](std::size_t s) { return 160U >> s; }), 5).code,
            LabelCode::kHuffman);
  const Labels skewed = labels_of(5, [](std::size_t s) { return s == 0 ? 50'000U : 500U; });
  const Coded coded = encode(skewed, 5);
  EXPECT_EQ(coded.code, LabelCode::kRans);
  EXPECT_LE(static_cast<double>(coded.bytes.size()) * 8, 1.002 * entropy_bits(skewed, 5) + 200);
}

TEST(FedzipLabels, PlansHoldEvenDistributions) {
  for (std::size_t symbols = 1; symbols <= 256; ++symbols) {
    const Labels labels = labels_of(symbols, [&](std::size_t) { return 20'000 / symbols; });
    EXPECT_LE(encode(labels, symbols).bytes.size(), label_slot_bytes(labels.size(), symbols) + 8)
        << symbols;
  }
  EXPECT_EQ(label_slot_bytes(1'000'000, 2), 125'000U);
  EXPECT_EQ(label_slot_bytes(1'000'000, 1), 0U);
  EXPECT_LE(label_slot_bytes(1'000'000, 5), 292'500U);  // log2(5) = 2.3219
}

void expect_corrupt(LabelCode code, const Bytes& bytes, std::size_t size, std::size_t symbols) {
  EXPECT_THROW(decode(code, bytes, size, symbols), CorruptPayload) << size << " of " << symbols;
}

TEST(FedzipLabels, BrokenTablesAreRefused) {
  const Labels labels = labels_of(5, [](std::size_t s) { return 160U >> s; });
  const Coded good = encode(labels, 5);
  ASSERT_EQ(good.code, LabelCode::kHuffman);
  const auto with = [&](std::size_t at, int value) {
    Bytes bad = good.bytes;
    bad[at] = static_cast<std::byte>(value);
    return bad;
  };
  // Published: words of 2, 1 and 1 bits, whose Kraft sum is 5/4.
  expect_corrupt(LabelCode::kHuffman, with(4, 0x11), 310, 5);
  expect_corrupt(LabelCode::kHuffman, with(4, 0x32), 310, 5);  // incomplete
  expect_corrupt(LabelCode::kHuffman, with(4, 0x20), 310, 5);  // a symbol without a word
  expect_corrupt(LabelCode::kHuffman, with(4, 0xD1), 310, 5);  // a word of 13 bits
  expect_corrupt(LabelCode::kHuffman, with(6, 0x14), 310, 5);  // a word of no symbol
  expect_corrupt(LabelCode::kHuffman, with(0, 1), 310, 5);     // the stream's length
  expect_corrupt(LabelCode::kHuffman, with(3, 0x7F), 310, 5);
  expect_corrupt(LabelCode::kHuffman, good.bytes, 300, 5);  // labels left over
  expect_corrupt(LabelCode::kHuffman, good.bytes, 318, 5);
  expect_corrupt(LabelCode::kHuffman, good.bytes, 310, 1);

  const Labels skewed = labels_of(3, [](std::size_t s) { return s == 0 ? 9000U : 100U; });
  const Coded rans = encode(skewed, 3);
  ASSERT_EQ(rans.code, LabelCode::kRans);
  for (const int high : {0x10, 0xFF}) {  // frequencies of 4096 and more
    Bytes bad = rans.bytes;
    bad[5] = static_cast<std::byte>(high);
    expect_corrupt(LabelCode::kRans, bad, 9200, 3);
  }
  Bytes bad = rans.bytes;
  bad[4] = bad[5] = std::byte{0};  // a frequency of 0
  expect_corrupt(LabelCode::kRans, bad, 9200, 3);
  bad = rans.bytes;
  bad[10] = bad[11] = std::byte{0};  // a state below 2^16
  expect_corrupt(LabelCode::kRans, bad, 9200, 3);
  expect_corrupt(LabelCode::kRans, rans.bytes, 9199, 3);
  expect_corrupt(LabelCode::kRans, rans.bytes, 9201, 3);
  expect_corrupt(LabelCode::kPlain, Bytes(1, std::byte{0xFF}), 4, 3);  // label 3 of 3
  expect_corrupt(LabelCode::kPlain, Bytes(1, std::byte{0x80}), 3, 4);  // bits behind the last
  expect_corrupt(LabelCode::kPlain, {}, 4, 3);
}

}  // namespace
}  // namespace thinwire
