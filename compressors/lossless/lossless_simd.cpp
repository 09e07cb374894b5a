#include <algorithm>
#include <cstring>
#include <type_traits>

#include "compressors/lossless/lossless_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/lossless/lossless_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"
#include "compressors/lossless/lossless_reference.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire::lossless {
namespace HWY_NAMESPACE {

using namespace thinwire::HWY_NAMESPACE;

// 16-bit values: as many as F32 has lanes, twice.
using W16 = hn::CappedTag<std::uint16_t, 32>;
using W8 = hn::Rebind<std::uint8_t, W16>;

HWY_INLINE std::int64_t lanes16() { return static_cast<std::int64_t>(hn::Lanes(W16())); }
HWY_INLINE std::int64_t lanes32() { return static_cast<std::int64_t>(hn::Lanes(F32())); }

// Lanes of at most 255 as bytes.
template <class V>
HWY_INLINE auto bytes_of(V v) {
  const hn::RebindToSigned<hn::DFromV<V>> di;
  return hn::DemoteTo(hn::Rebind<std::uint8_t, decltype(di)>(), hn::BitCast(di, v));
}

HWY_INLINE std::int64_t split16(const std::uint16_t* in, std::int64_t n, std::uint8_t* raw,
                                std::uint8_t* symbols) {
  std::int64_t i = 0;
  for (; i + lanes16() <= n; i += lanes16()) {
    const auto bits = hn::LoadU(W16(), in + i);
    const auto turned = hn::Or(hn::ShiftLeft<1>(bits), hn::ShiftRight<15>(bits));
    hn::StoreU(bytes_of(hn::And(turned, hn::Set(W16(), 0xFF))), W8(), raw + i);
    hn::StoreU(bytes_of(hn::ShiftRight<8>(turned)), W8(), symbols + i);
  }
  return i;
}

HWY_INLINE std::int64_t split32(const std::uint32_t* in, std::int64_t n, std::uint8_t* raw,
                                std::uint8_t* symbols) {
  const U32 du;
  std::int64_t i = 0;
  for (; i + lanes32() <= n; i += lanes32()) {
    const VU32 bits = hn::LoadU(du, in + i);
    const VU32 turned = hn::Or(hn::ShiftLeft<1>(bits), hn::ShiftRight<31>(bits));
    store_bits16(hn::And(turned, hn::Set(du, 0xFFFF)), raw + 2 * i);
    const VU32 middle = hn::And(hn::ShiftRight<16>(turned), hn::Set(du, 0xFF));
    hn::StoreU(bytes_of(middle), U8(), raw + 2 * n + i);
    hn::StoreU(bytes_of(hn::ShiftRight<24>(turned)), U8(), symbols + i);
  }
  return i;
}

HWY_INLINE auto join16(const std::uint8_t* raw, const std::uint8_t* symbols) {
  const auto low = hn::PromoteTo(W16(), hn::LoadU(W8(), raw));
  const auto high = hn::ShiftLeft<8>(hn::PromoteTo(W16(), hn::LoadU(W8(), symbols)));
  const auto turned = hn::Or(low, high);
  return hn::Or(hn::ShiftRight<1>(turned), hn::ShiftLeft<15>(turned));
}

// `middle`: the plane of bytes above the halves.
HWY_INLINE VU32 join32(const std::uint8_t* halves, const std::uint8_t* middle,
                       const std::uint8_t* symbols) {
  const U32 du;
  const VU32 above = hn::ShiftLeft<16>(hn::PromoteTo(du, hn::LoadU(U8(), middle)));
  const VU32 high = hn::ShiftLeft<24>(hn::PromoteTo(du, hn::LoadU(U8(), symbols)));
  const VU32 turned = hn::Or(hn::Or(load_bits16(halves), above), high);
  return hn::Or(hn::ShiftRight<1>(turned), hn::ShiftLeft<31>(turned));
}

// Raw parts of chunk elements from `done` on lie apart by planes: the reference's loops want whole
// chunks, so ends are done on copies of these few.
constexpr std::int64_t kMostLanes = 32;
struct End {
  std::byte raw[3 * kMostLanes];
  std::int64_t n = 0;
};
HWY_INLINE End take_end(DType type, const std::byte* raw, std::int64_t done, std::int64_t n) {
  End end;
  end.n = n - done;
  const auto count = static_cast<std::size_t>(end.n);
  if (type == DType::kF32) {
    std::memcpy(end.raw, raw + 2 * done, 2 * count);
    std::memcpy(end.raw + 2 * count, raw + 2 * n + done, count);
  } else {
    std::memcpy(end.raw, raw + done, count);
  }
  return end;
}

void split_values(TensorView values, std::byte* raw, std::uint8_t* symbols) {
  const std::int64_t n = values.elements;
  auto* bytes = reinterpret_cast<std::uint8_t*>(raw);
  End end;
  if (values.dtype == DType::kF32) {
    const auto done = split32(static_cast<const std::uint32_t*>(values.data), n, bytes, symbols);
    split_reference(values.slice(done, n), end.raw, symbols + done);
    const auto count = static_cast<std::size_t>(n - done);
    std::memcpy(raw + 2 * done, end.raw, 2 * count);
    std::memcpy(raw + 2 * n + done, end.raw + 2 * count, count);
  } else {
    const auto done = split16(static_cast<const std::uint16_t*>(values.data), n, bytes, symbols);
    split_reference(values.slice(done, n), raw + done, symbols + done);
  }
}

// Calls use(i, fp32 values from i on) for whole vectors; returns how many elements were done.
template <typename F>
HWY_INLINE std::int64_t for_each_vector(DType type, const std::byte* raw,
                                        const std::uint8_t* symbols, std::int64_t n, F&& use) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(raw);
  std::int64_t i = 0;
  if (type == DType::kF32) {
    for (; i + lanes32() <= n; i += lanes32()) {
      use(i, hn::BitCast(F32(), join32(bytes + 2 * i, bytes + 2 * n + i, symbols + i)));
    }
    return i;
  }
  alignas(64) std::uint16_t halves[kMostLanes];
  for (; i + lanes16() <= n; i += lanes16()) {
    hn::Store(join16(bytes + i, symbols + i), W16(), halves);
    for (std::int64_t j = 0; j < lanes16(); j += lanes32()) {
      const VU32 bits = load_bits16(halves + j);
      use(i + j, type == DType::kBF16 ? float_from_bf16_bits(bits) : float_from_fp16_bits(bits));
    }
  }
  return i;
}

// The values' own bits.
template <bool kPastCaches>
HWY_INLINE std::int64_t join_same(DType type, const std::byte* raw, const std::uint8_t* symbols,
                                  std::int64_t n, void* out) {
  const auto store = [](auto bits, auto d, auto* to) HWY_ATTR {
    kPastCaches ? hn::Stream(bits, d, to) : hn::StoreU(bits, d, to);
  };
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(raw);
  std::int64_t i = 0;
  if (type == DType::kF32) {
    auto* values = static_cast<std::uint32_t*>(out);
    for (; i + lanes32() <= n; i += lanes32()) {
      store(join32(bytes + 2 * i, bytes + 2 * n + i, symbols + i), U32(), values + i);
    }
  } else {
    auto* values = static_cast<std::uint16_t*>(out);
    for (; i + lanes16() <= n; i += lanes16()) {
      store(join16(bytes + i, symbols + i), W16(), values + i);
    }
  }
  return i;
}

void join_values(DType type, const std::byte* raw, const std::uint8_t* symbols, TensorView out,
                 bool past_caches) {
  const std::int64_t n = out.elements;
  std::int64_t done = 0;
  if (type == out.dtype) {
    done = past_caches ? join_same<true>(type, raw, symbols, n, out.data)
                       : join_same<false>(type, raw, symbols, n, out.data);
  } else {
    done = visit(out, [&](auto* values) {
      return for_each_vector(type, raw, symbols, n,
                             [&](std::int64_t i, VF32 x) { store_float(x, values + i); });
    });
  }
  const End end = take_end(type, raw, done, n);
  join_reference(type, end.raw, symbols + done, out.slice(done, n));
}

void accumulate_values(DType type, const std::byte* raw, const std::uint8_t* symbols, float weight,
                       float* out, std::int64_t n) {
  const F32 df;
  const VF32 factor = hn::Set(df, weight);
  const std::int64_t done = for_each_vector(type, raw, symbols, n, [&](std::int64_t i, VF32 x) {
    hn::StoreU(hn::Add(hn::LoadU(df, out + i), hn::Mul(factor, x)), df, out + i);
  });
  const End end = take_end(type, raw, done, n);
  accumulate_reference(type, end.raw, symbols + done, weight, out + done, end.n);
}

void add_residual_values(TensorView grad, const float* residual, float decay, float* v) {
  const VF32 factor = hn::Set(F32(), decay);
  std::int64_t i = 0;
  visit(grad, [&](const auto* values) {
    for (; i + lanes32() <= grad.elements; i += lanes32()) {
      hn::StoreU(load_sum(values + i, residual + i, factor), F32(), v + i);
    }
  });
  add_residual_reference(grad.slice(i, grad.elements), residual + i, decay, v + i);
}

// extend_decode_table_reference with an entry a lane. A vector's windows go on with windows below
// it or, in the lowest vector, in itself: all are read before it is written.
void extend_table(DecodeTable& table) {
  const hn::CappedTag<std::uint64_t, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  constexpr int kFirst = 16;  // the first bit of Decoded::first
  const auto byte = hn::Set(d, 0xFF);
  const auto run = hn::Set(d, 0xFFFF);
  const auto runs = hn::Set(d, 0xFFFFFFFF);  // below the symbols
  const auto none = hn::Zero(d);
  const auto longest = hn::Set(d, kMaxLength);
  const std::size_t lanes = hn::Lanes(d);
  auto* entries = reinterpret_cast<std::uint64_t*>(table.data());
  for (int turn = 0; turn < 2; ++turn) {
    for (std::size_t w = table.size(); w > 0;) {
      w -= lanes;
      const auto window = hn::LoadU(d, entries + w);
      const auto bits = hn::And(window, byte);
      const auto next = hn::Shr(hn::Iota(d, static_cast<std::uint64_t>(w)), bits);
      const auto after = hn::GatherIndex(d, entries, hn::BitCast(di, next));
      const auto room = hn::Sub(longest, bits);
      const auto first = hn::And(hn::ShiftRight<kFirst>(after), run);
      const auto all = hn::And(after, run);
      const auto one = hn::IfThenElse(hn::Gt(hn::And(first, byte), room), none, first);
      const auto more = hn::IfThenElse(hn::Gt(hn::And(all, byte), room), one, all);
      const auto count = hn::And(hn::ShiftRight<8>(window), byte);
      const auto symbols = hn::Shl(hn::AndNot(runs, after), hn::ShiftLeft<3>(count));
      hn::StoreU(hn::Add(hn::Or(window, symbols), more), d, entries + w);
    }
  }
}

struct SymbolRange {
  std::size_t first = kSymbols;  // but zero
  std::size_t last = 0;
};

#if HWY_TARGET == HWY_SCALAR
// No range is near.
HWY_INLINE std::size_t near_symbols() { return 0; }
HWY_INLINE SymbolRange range_of(std::span<const std::uint8_t>) { return {0, kSymbols - 1}; }
HWY_INLINE void count_near(std::span<const std::uint8_t>, SymbolRange, Counts&) {}
#else
using Bytes = hn::CappedTag<std::uint8_t, 64>;

// Beyond a symbol a lane, going through all symbols once for each of four takes longer than adding
// to a counter for each.
HWY_INLINE std::size_t near_symbols() { return hn::Lanes(Bytes()); }

HWY_INLINE SymbolRange range_of(std::span<const std::uint8_t> symbols) {
  const Bytes d;
  const std::size_t lanes = hn::Lanes(d);
  const std::size_t whole = symbols.size() / lanes * lanes;
  const auto one = hn::Set(d, 1);
  auto least = hn::Set(d, 0xFF);  // less one, so that zero is the greatest
  auto most = hn::Zero(d);
  for (std::size_t i = 0; i < whole; i += lanes) {
    const auto symbol = hn::LoadU(d, symbols.data() + i);
    least = hn::Min(least, hn::Sub(symbol, one));
    most = hn::Max(most, symbol);
  }
  alignas(64) std::uint8_t leasts[64];
  alignas(64) std::uint8_t mosts[64];
  hn::Store(least, d, leasts);
  hn::Store(most, d, mosts);
  SymbolRange range{.first = *std::min_element(leasts, leasts + lanes) + std::size_t{1},
                    .last = *std::max_element(mosts, mosts + lanes)};
  for (const std::size_t symbol : symbols.subspan(whole)) {
    if (symbol != 0) range.first = std::min(range.first, symbol);
    range.last = std::max(range.last, symbol);
  }
  return range;
}

// Counts symbols of the range, and zeros: the rest.
HWY_INLINE void count_near(std::span<const std::uint8_t> symbols, SymbolRange range,
                           Counts& counts) {
  const Bytes d;
  const hn::Repartition<std::uint64_t, Bytes> d64;
  constexpr std::size_t kTogether = 4;
  constexpr std::size_t kMostVectors = 255;  // before a byte may overflow
  const std::size_t lanes = hn::Lanes(d);
  const std::size_t vectors = symbols.size() / lanes;
  std::uint32_t found = 0;
  for (std::size_t s = range.first; s <= range.last; s += kTogether) {
    const auto symbol_0 = hn::Set(d, static_cast<std::uint8_t>(s));
    const auto symbol_1 = hn::Set(d, static_cast<std::uint8_t>(s + 1));
    const auto symbol_2 = hn::Set(d, static_cast<std::uint8_t>(s + 2));
    const auto symbol_3 = hn::Set(d, static_cast<std::uint8_t>(s + 3));
    std::uint64_t sums[kTogether] = {};
    for (std::size_t begin = 0; begin < vectors; begin += kMostVectors) {
      auto sum_0 = hn::Zero(d);
      auto sum_1 = hn::Zero(d);
      auto sum_2 = hn::Zero(d);
      auto sum_3 = hn::Zero(d);
      const std::size_t end = std::min(begin + kMostVectors, vectors);
      for (std::size_t v = begin; v < end; ++v) {
        const auto symbol = hn::LoadU(d, symbols.data() + v * lanes);
        sum_0 = hn::Sub(sum_0, hn::VecFromMask(d, hn::Eq(symbol, symbol_0)));
        sum_1 = hn::Sub(sum_1, hn::VecFromMask(d, hn::Eq(symbol, symbol_1)));
        sum_2 = hn::Sub(sum_2, hn::VecFromMask(d, hn::Eq(symbol, symbol_2)));
        sum_3 = hn::Sub(sum_3, hn::VecFromMask(d, hn::Eq(symbol, symbol_3)));
      }
      sums[0] += hn::GetLane(hn::SumOfLanes(d64, hn::SumsOf8(sum_0)));
      sums[1] += hn::GetLane(hn::SumOfLanes(d64, hn::SumsOf8(sum_1)));
      sums[2] += hn::GetLane(hn::SumOfLanes(d64, hn::SumsOf8(sum_2)));
      sums[3] += hn::GetLane(hn::SumOfLanes(d64, hn::SumsOf8(sum_3)));
    }
    for (std::size_t j = 0; j < kTogether && s + j <= range.last; ++j) {
      counts[s + j] += static_cast<std::uint32_t>(sums[j]);
      found += static_cast<std::uint32_t>(sums[j]);
    }
  }
  counts[0] += static_cast<std::uint32_t>(vectors * lanes) - found;
  for (const std::uint8_t symbol : symbols.subspan(vectors * lanes)) ++counts[symbol];
}
#endif

void count_values(std::span<const std::uint8_t> symbols, std::array<Counts, kStreams>& counts) {
  const auto n = static_cast<std::int64_t>(symbols.size());
  const auto stream = [&](std::size_t s) {
    const auto begin = static_cast<std::size_t>(stream_begin(n, s));
    return symbols.subspan(begin, static_cast<std::size_t>(stream_begin(n, s + 1)) - begin);
  };
  const SymbolRange range = range_of(symbols);
  if (range.last < range.first + near_symbols()) {
    for (std::size_t s = 0; s < kStreams; ++s) count_near(stream(s), range, counts[s]);
    return;
  }
  // The last stream is the shortest. Four tables in turn: adding to one counter twice in a row
  // would wait for the first sum.
  const std::size_t common = stream(kStreams - 1).size();
  const std::uint8_t* const in[] = {stream(0).data(), stream(1).data(), stream(2).data(),
                                    stream(3).data()};
  for (std::size_t i = 0; i < common; ++i) {
    ++counts[0][in[0][i]];
    ++counts[1][in[1][i]];
    ++counts[2][in[2][i]];
    ++counts[3][in[3][i]];
  }
  for (std::size_t s = 0; s < kStreams; ++s) {
    for (const std::uint8_t symbol : stream(s).subspan(common)) ++counts[s][symbol];
  }
}

HWY_INLINE std::uint64_t load64(const void* p) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

// Codes that fit behind the at most 7 bits that a writer or reader begins a word with.
constexpr std::int64_t kCodesPerWord = (64 - 7) / kMaxLength;

HWY_INLINE void write_bits(StreamWriter& writer, std::uint64_t bits, std::uint32_t used) {
  std::memcpy(writer.out, &bits, sizeof(bits));
  writer.out += used >> 3;
  writer.bits = bits >> (used & 0x38);
  writer.used = used & 7;
}

HWY_INLINE void write_word(StreamWriter& writer, const std::uint8_t* symbols, const Codes& codes) {
  std::uint64_t bits = writer.bits;
  std::uint32_t used = writer.used;
  for (std::int64_t j = 0; j < kCodesPerWord; ++j) {
    const Code code = codes[symbols[j]];
    bits |= std::uint64_t{code.bits} << used;
    used += code.length;
  }
  write_bits(writer, bits, used);
}

#if HWY_TARGET <= HWY_AVX3
// Two registers hold a table of 64 entries. Exponents that occur lie close together, but for zero,
// whose code stands last.
class NearCodes {
 public:
  static constexpr std::int64_t kAtOnce = 32;

  explicit NearCodes(const Codes& codes) {
    std::size_t last = kSymbols - 1;
    while (codes[last].length == 0) --last;
    std::size_t first = 1;
    while (first < last && codes[first].length == 0) ++first;
    all_are_near_ = last - first < kZero;
    if (!all_are_near_) return;
    first_ = static_cast<std::uint16_t>(first);
    alignas(64) std::uint16_t table[kZero + 1] = {};
    for (std::size_t s = first; s <= last; ++s) table[s - first] = packed(codes[s]);
    table[kZero] = packed(codes[0]);
    low_ = hn::Load(W16(), table);
    high_ = hn::Load(W16(), table + kAtOnce);
  }
  bool all_are_near() const { return all_are_near_; }

  // The codes of kAtOnce symbols, four to a word.
  struct Words {
    static constexpr std::size_t kCount = kAtOnce / 4;
    alignas(64) std::uint64_t bits[kCount];
    alignas(64) std::uint64_t length[kCount];

    HWY_INLINE void write(std::size_t j, StreamWriter& writer) const {
      write_bits(writer, writer.bits | bits[j] << writer.used,
                 writer.used + static_cast<std::uint32_t>(length[j]));
    }
  };
  HWY_INLINE void look_up(const std::uint8_t* symbols, Words& words) const {
    const W16 d16;
    const hn::Repartition<std::uint32_t, W16> d32;
    const hn::Repartition<std::uint64_t, W16> d64;
    const auto symbol = hn::PromoteTo(d16, hn::LoadU(W8(), symbols));
    const auto place = hn::Min(hn::Sub(symbol, hn::Set(d16, first_)), hn::Set(d16, kZero));
    // Highway 1.0 has no lookup of 16-bit lanes.
    const hn::Vec<W16> code{_mm512_permutex2var_epi16(low_.raw, place.raw, high_.raw)};
    const auto half = hn::Set(d32, 0xFFFF);
    const auto bits = hn::BitCast(d32, hn::And(code, hn::Set(d16, (1U << kMaxLength) - 1)));
    const auto length = hn::BitCast(d32, hn::ShiftRight<kMaxLength>(code));
    const auto first_length = hn::And(length, half);
    const auto second = hn::Shl(hn::ShiftRight<16>(bits), first_length);
    const auto pair = hn::BitCast(d64, hn::Or(hn::And(bits, half), second));
    const auto lengths = hn::BitCast(d64, hn::Add(first_length, hn::ShiftRight<16>(length)));
    const auto word = hn::Set(d64, 0xFFFFFFFF);
    const auto first_lengths = hn::And(lengths, word);
    const auto second_pair = hn::Shl(hn::ShiftRight<32>(pair), first_lengths);
    hn::Store(hn::Or(hn::And(pair, word), second_pair), d64, words.bits);
    hn::Store(hn::Add(first_lengths, hn::ShiftRight<32>(lengths)), d64, words.length);
  }

 private:
  static constexpr std::uint16_t kZero = 63;
  static std::uint16_t packed(Code code) {
    return static_cast<std::uint16_t>(code.bits | code.length << kMaxLength);
  }

  bool all_are_near_ = false;
  std::uint16_t first_ = 0;
  hn::Vec<W16> low_ = hn::Zero(W16());
  hn::Vec<W16> high_ = hn::Zero(W16());
};
#endif

void encode_values(std::span<const std::uint8_t> symbols, const Codes& codes, const Streams& sizes,
                   std::byte* out) {
  const auto n = static_cast<std::int64_t>(symbols.size());
  StreamWriter a{out};
  StreamWriter b{a.out + sizes[0]};
  StreamWriter c{b.out + sizes[1]};
  StreamWriter d{c.out + sizes[2]};
  const std::uint8_t* const in = symbols.data();
  // A word is written while its stream has 64 symbols, hence bytes for a word, left.
  const std::int64_t common = n - stream_begin(n, kStreams - 1) - 64;
  std::int64_t i = 0;
#if HWY_TARGET <= HWY_AVX3
  const NearCodes near(codes);
  for (; near.all_are_near() && i + NearCodes::kAtOnce <= common; i += NearCodes::kAtOnce) {
    NearCodes::Words words[kStreams];
    for (std::size_t s = 0; s < kStreams; ++s) {
      near.look_up(in + stream_begin(n, s) + i, words[s]);
    }
    for (std::size_t j = 0; j < NearCodes::Words::kCount; ++j) {
      words[0].write(j, a);
      words[1].write(j, b);
      words[2].write(j, c);
      words[3].write(j, d);
    }
  }
#endif
  for (; i <= common; i += kCodesPerWord) {
    write_word(a, in + stream_begin(n, 0) + i, codes);
    write_word(b, in + stream_begin(n, 1) + i, codes);
    write_word(c, in + stream_begin(n, 2) + i, codes);
    write_word(d, in + stream_begin(n, 3) + i, codes);
  }
  const StreamWriter writers[] = {a, b, c, d};
  for (std::size_t s = 0; s < kStreams; ++s) {
    const std::int64_t begin = std::min(stream_begin(n, s) + i, stream_begin(n, s + 1));
    finish_stream(writers[s], {in + begin, in + stream_begin(n, s + 1)}, codes);
  }
}

// A word's worth of windows, each of up to four symbols.
constexpr std::ptrdiff_t kMostSymbolsPerWord = 4 * kCodesPerWord;

// So many words can be read, and their symbols be written, whatever they are.
HWY_INLINE std::ptrdiff_t words_ahead(const StreamReader& reader, const std::uint8_t* out,
                                      const std::uint8_t* end) {
  return std::min((reader.end - reader.in) / 8, (end - out) / kMostSymbolsPerWord);
}

HWY_INLINE void read_word(StreamReader& reader, const DecodeTable& table, std::uint8_t*& out) {
  std::uint64_t bits = load64(reader.in) >> reader.bit;
  std::uint64_t used = reader.bit;
  std::uint8_t* at = out;
  for (std::int64_t j = 0; j < kCodesPerWord; ++j) {
    const std::uint64_t next = load64(&table[bits & (table.size() - 1)]);
    const auto symbols = static_cast<std::uint32_t>(next >> 32);
    std::memcpy(at, &symbols, sizeof(symbols));
    at += next >> 8 & 0xFF;
    bits >>= next & 63;  // a byte of bits, and a shift takes six
    used += next;        // in its lowest byte
  }
  out = at;
  reader.in += (used & 0xFF) >> 3;
  reader.bit = used & 7;
}

bool decode_values(const std::byte* in, const Streams& sizes, const DecodeTable& table,
                   std::span<std::uint8_t> symbols) {
  const auto n = static_cast<std::int64_t>(symbols.size());
  StreamReader a{in, in + sizes[0]};
  StreamReader b{a.end, a.end + sizes[1]};
  StreamReader c{b.end, b.end + sizes[2]};
  StreamReader d{c.end, c.end + sizes[3]};
  std::uint8_t* const out = symbols.data();
  std::uint8_t* const ends[] = {out + stream_begin(n, 1), out + stream_begin(n, 2),
                                out + stream_begin(n, 3), out + n};
  std::uint8_t* to_a = out;
  std::uint8_t* to_b = ends[0];
  std::uint8_t* to_c = ends[1];
  std::uint8_t* to_d = ends[2];
  for (;;) {
    std::ptrdiff_t words = std::min({words_ahead(a, to_a, ends[0]), words_ahead(b, to_b, ends[1]),
                                     words_ahead(c, to_c, ends[2]), words_ahead(d, to_d, ends[3])});
    if (words <= 0) break;
    for (; words > 0; --words) {
      read_word(a, table, to_a);
      read_word(b, table, to_b);
      read_word(c, table, to_c);
      read_word(d, table, to_d);
    }
  }
  const auto finish = [&](StreamReader& reader, std::uint8_t* to, std::uint8_t* end) {
    while (words_ahead(reader, to, end) > 0) read_word(reader, table, to);
    return finish_stream(reader, table, {to, end});
  };
  return finish(a, to_a, ends[0]) && finish(b, to_b, ends[1]) && finish(c, to_c, ends[2]) &&
         finish(d, to_d, ends[3]);
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire::lossless
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire::lossless {

HWY_EXPORT(split_values);
HWY_EXPORT(join_values);
HWY_EXPORT(accumulate_values);
HWY_EXPORT(add_residual_values);
HWY_EXPORT(count_values);
HWY_EXPORT(encode_values);
HWY_EXPORT(extend_table);
HWY_EXPORT(decode_values);

void split(TensorView values, std::byte* raw, std::uint8_t* symbols) {
  HWY_DYNAMIC_DISPATCH(split_values)(values, raw, symbols);
}
void join(DType type, const std::byte* raw, const std::uint8_t* symbols, TensorView out,
          bool past_caches) {
  HWY_DYNAMIC_DISPATCH(join_values)(type, raw, symbols, out, past_caches);
}
void accumulate(DType type, const std::byte* raw, const std::uint8_t* symbols, float weight,
                float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(accumulate_values)(type, raw, symbols, weight, out, n);
}
void add_residual(TensorView grad, const float* residual, float decay, float* v) {
  HWY_DYNAMIC_DISPATCH(add_residual_values)(grad, residual, decay, v);
}
void count_symbols(std::span<const std::uint8_t> symbols, std::array<Counts, kStreams>& counts) {
  HWY_DYNAMIC_DISPATCH(count_values)(symbols, counts);
}
void encode_streams(std::span<const std::uint8_t> symbols, const Codes& codes, const Streams& sizes,
                    std::byte* out) {
  HWY_DYNAMIC_DISPATCH(encode_values)(symbols, codes, sizes, out);
}
void extend_decode_table(DecodeTable& table) { HWY_DYNAMIC_DISPATCH(extend_table)(table); }
bool decode_streams(const std::byte* in, const Streams& sizes, const DecodeTable& table,
                    std::span<std::uint8_t> symbols) {
  return HWY_DYNAMIC_DISPATCH(decode_values)(in, sizes, table, symbols);
}

}  // namespace thinwire::lossless
#endif  // HWY_ONCE
