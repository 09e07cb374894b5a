#include <algorithm>
#include <bit>
#include <cstring>

#include "compressors/topk/topk_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/topk/topk_simd.cpp"
#include <hwy/foreach_target.h>
// The order is Highway's: highway.h after foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/core/convert-inl.h"
#include "compressors/core/convert.h"
#include "compressors/core/random-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire::topk {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using thinwire::HWY_NAMESPACE::dither_pair;
using thinwire::HWY_NAMESPACE::dithered_bf16_bits;
using thinwire::HWY_NAMESPACE::F32;
using thinwire::HWY_NAMESPACE::load_float;
using thinwire::HWY_NAMESPACE::store_bits16;

// 16 lanes at most: a line has so many elements.
using F = hn::CappedTag<float, 16>;
using U = hn::RebindToUnsigned<F>;
using I = hn::RebindToSigned<F>;

// A chunk is scanned in lines of 16 elements, one of each page in turn: the hardware prefetches
// each page on its own, and none across its end, so several at a time hide more of the latency.
constexpr std::size_t kLine = 16;
constexpr std::size_t kPage = 1024;
constexpr std::size_t kPages = kChunkElements / kPage;

// One bit an element that may be a candidate; vectors of fewer than 8 lanes take a byte each.
struct Hits {
  static std::size_t bytes_a_line() { return kLine / std::min<std::size_t>(8, hn::Lanes(F())); }
  HWY_ALIGN std::uint8_t bits[kChunkElements + 8];
};

struct Running {
  hn::Vec<I> magnitude;      // per lane
  hn::Vec<U> gradient_bits;  // or of all, per lane
};

// How a scan finds the residual, and leaves the next one.
enum class Kept : std::uint8_t { kNothing, kF32, kBF16 };

HWY_INLINE hn::Vec<I> magnitude_of(hn::Vec<F> v) {
  return hn::And(hn::BitCast(I(), v), hn::Set(I(), static_cast<std::int32_t>(kMagnitudeMask)));
}

// One chunk, or what is left of the tensor.
struct Chunk {
  const float* grad;
  const float* residual;
  float* next;
  OpenedResidual opened = {};
  std::size_t count;
  // The whole chunk of fp32 behind it, of each input; null: there is none.
  const float* grad_ahead = nullptr;
  const float* residual_ahead = nullptr;
  const BF16* opened_ahead = nullptr;
  const float* velocity_ahead = nullptr;
};

template <Kept kKept>
HWY_INLINE hn::Vec<F> load_v(const Chunk& chunk, std::size_t i, hn::Vec<F> decay,
                             Running& running) {
  const F d;
  const auto g = hn::LoadU(d, chunk.grad + i);
  running.gradient_bits = hn::Or(running.gradient_bits, hn::BitCast(U(), g));
  if constexpr (kKept == Kept::kF32) {
    return hn::Add(g, hn::Mul(decay, hn::LoadU(d, chunk.residual + i)));
  } else if constexpr (kKept == Kept::kBF16) {
    return hn::Add(g, hn::Mul(decay, load_float(chunk.opened.current + i)));
  } else {
    return g;
  }
}

template <bool kStreaming>
HWY_INLINE void store_v(hn::Vec<F> v, const Chunk& chunk, std::size_t i) {
  if constexpr (kStreaming) {
    hn::Stream(v, F(), chunk.next + i);
  } else if (chunk.next != nullptr) {
    hn::StoreU(v, F(), chunk.next + i);
  }
}

// Elements from `i` on and those from i + 16 on, of a row of 32.
template <bool kStreaming>
HWY_INLINE void store_rounded(hn::Vec<F> low, hn::Vec<F> high, const Chunk& chunk, std::size_t i) {
  if (chunk.opened.next == nullptr) return;
  const auto noise =
      dither_pair(chunk.opened.dither, chunk.opened.element + static_cast<std::uint32_t>(i));
  const auto first = dithered_bf16_bits(low, noise.low);
  const auto second = dithered_bf16_bits(high, noise.high);
  auto* to = reinterpret_cast<std::uint16_t*>(chunk.opened.next + i);
#if HWY_TARGET != HWY_SCALAR
  if (hn::Lanes(F()) == kLine) {
    const hn::Repartition<std::uint16_t, F> halves;
    const auto upper =
        hn::ConcatOdd(halves, hn::BitCast(halves, second), hn::BitCast(halves, first));
    if constexpr (kStreaming) {
      hn::Stream(upper, halves, to);
    } else {
      hn::StoreU(upper, halves, to);
    }
    return;
  }
#endif
  store_bits16(hn::ShiftRight<16>(first), to);
  store_bits16(hn::ShiftRight<16>(second), to + kLine);
}

// Elements that are scanned in one go: a cache line of what is stored.
template <Kept kKept>
inline constexpr std::size_t kStep = kKept == Kept::kBF16 ? 2 * kLine : kLine;

// Elements [at, at + kStep).
template <Kept kKept, bool kStreaming>
HWY_INLINE void scan_step(const Chunk& chunk, std::size_t at, hn::Vec<F> decay, hn::Vec<I> below,
                          Running& running, std::uint8_t* hits) {
  const std::size_t lanes = hn::Lanes(F());
  const auto look_at = [&](hn::Vec<F> v, std::uint8_t*& to) HWY_ATTR {
    const auto magnitude = magnitude_of(v);
    running.magnitude = hn::Max(running.magnitude, magnitude);
    std::uint8_t bits[8];  // as many as StoreMaskBits may write
    const std::size_t bytes = hn::StoreMaskBits(I(), hn::Gt(magnitude, below), bits);
    std::memcpy(to, bits, bytes);
    to += bytes;
  };
  if constexpr (kKept == Kept::kBF16) {
    std::uint8_t* later = hits + Hits::bytes_a_line();
    for (std::size_t i = at; i < at + kLine; i += lanes) {
      const auto low = load_v<kKept>(chunk, i, decay, running);
      const auto high = load_v<kKept>(chunk, i + kLine, decay, running);
      store_rounded<kStreaming>(low, high, chunk, i);
      look_at(low, hits);
      look_at(high, later);
    }
  } else {
    for (std::size_t i = at; i < at + kStep<kKept>; i += lanes) {
      const auto v = load_v<kKept>(chunk, i, decay, running);
      store_v<kStreaming>(v, chunk, i);
      look_at(v, hits);
    }
  }
}

template <Kept kKept, bool kStreaming>
HWY_INLINE void scan_lines(const Chunk chunk, hn::Vec<F> decay, hn::Vec<I> below, Running& so_far,
                           std::uint8_t* hits) {
  const std::size_t bytes = Hits::bytes_a_line();
  // A local, in registers: for all the compiler knows, stores of bits may change what lies outside.
  Running running = so_far;
  const auto scan = [&](std::size_t at) HWY_ATTR {
    scan_step<kKept, kStreaming>(chunk, at, decay, below, running, hits + at / kLine * bytes);
  };
  constexpr std::size_t kSize = kStep<kKept>;
  std::size_t at = 0;
  if (chunk.count == kChunkElements) {
    for (; at < kPage; at += kSize) {
      for (std::size_t page = 0; page < kPages; ++page) scan(at + page * kPage);
    }
    so_far = running;
    return;
  }
  for (; at + kSize <= chunk.count; at += kSize) scan(at);
  so_far = running;
  const std::size_t rest = chunk.count - at;
  if (rest == 0) return;
  // The last elements through padded copies, zeros behind them: never candidates.
  HWY_ALIGN float grad[kSize] = {};
  HWY_ALIGN float residual[kSize] = {};
  HWY_ALIGN float next[kSize];
  HWY_ALIGN BF16 opened[kSize] = {};
  HWY_ALIGN BF16 opened_next[kSize];
  Chunk last{.grad = grad, .residual = residual, .next = next, .count = kSize};
  std::memcpy(grad, chunk.grad + at, rest * sizeof(float));
  if constexpr (kKept == Kept::kF32) {
    std::memcpy(residual, chunk.residual + at, rest * sizeof(float));
  } else if constexpr (kKept == Kept::kBF16) {
    std::memcpy(opened, chunk.opened.current + at, rest * sizeof(BF16));
    last.opened = {.current = opened,
                   .next = opened_next,
                   .dither = chunk.opened.dither,
                   .element = chunk.opened.element + static_cast<std::uint32_t>(at)};
  }
  scan_step<kKept, false>(last, 0, decay, below, so_far, hits + at / kLine * bytes);
  if constexpr (kKept == Kept::kBF16) {
    if (chunk.opened.next == nullptr) return;
    std::memcpy(chunk.opened.next + at, opened_next, rest * sizeof(BF16));
  } else if (chunk.next != nullptr) {
    std::memcpy(chunk.next + at, next, rest * sizeof(float));
  }
}

// Numbers of the set bits' elements, in order, to `at`; returns how many. Writes up to three more.
HWY_INLINE std::size_t list_hits(const Chunk& chunk, Hits& hits, std::uint16_t* at) {
  const std::size_t lanes = std::min<std::size_t>(8, hn::Lanes(F()));  // of a byte
  const std::size_t bytes = (chunk.count + kLine - 1) / kLine * Hits::bytes_a_line();
  std::memset(hits.bits + bytes, 0, 8);  // the last word may begin before it and end behind
  std::size_t listed = 0;
  for (std::size_t byte = 0; byte < bytes; byte += 8) {
    // The memory would stand idle: a line of those that the next chunk begins with.
    const std::size_t ahead = byte / 8 % kPages * kPage + byte / 8 / kPages * kLine;
    if (chunk.grad_ahead != nullptr) __builtin_prefetch(chunk.grad_ahead + ahead);
    if (chunk.residual_ahead != nullptr) __builtin_prefetch(chunk.residual_ahead + ahead);
    if (chunk.opened_ahead != nullptr) __builtin_prefetch(chunk.opened_ahead + ahead);
    if (chunk.velocity_ahead != nullptr) __builtin_prefetch(chunk.velocity_ahead + ahead);
    std::uint64_t word = 0;
    std::memcpy(&word, hits.bits + byte, sizeof word);
    const std::size_t base = byte * lanes;
    const auto count = static_cast<std::size_t>(hwy::PopCount(word));
    // Four at a time whether they are there or not: a branch a word that is seldom mispredicted.
    for (std::size_t done = 0; done < count; done += 4) {
      for (std::size_t j = 0; j < 4; ++j, word &= word - 1) {
        const auto bit = static_cast<std::size_t>(std::countr_zero(word));
        at[listed + done + j] = static_cast<std::uint16_t>(base + bit / 8 * lanes + bit % 8);
      }
    }
    listed += count;
  }
  return listed;
}

// Appends the elements whose bits are set, in order.
template <Kept kKept, bool kStreaming>
HWY_INLINE void take_hits(const Scan& args, const Chunk& chunk, Hits& hits, std::uint32_t first,
                          Candidates& c) {
  std::uint16_t at[kChunkElements + 4];
  const std::size_t count = list_hits(chunk, hits, at);
  // Stored in place of the residual, perhaps; what went around the caches is computed again.
  const bool stored = !kStreaming && chunk.next != nullptr;
  for (std::size_t j = 0; j < count; ++j) {
    const std::size_t i = at[j];
    float v = stored ? chunk.next[i] : chunk.grad[i];
    if (kKept == Kept::kBF16) {
      const float kept = args.decay * to_float(chunk.opened.current[i]);
      v += kept;
    } else if (kKept == Kept::kF32 && !stored) {
      const float kept = args.decay * chunk.residual[i];
      v += kept;
    }
    c.value[c.count + j] = v;
    c.index[c.count + j] = first + static_cast<std::uint32_t>(i);
  }
  c.count += count;
}

// fp16 and bf16 to fp32, exactly.
template <typename T>
HWY_INLINE void widen_as(const void* from, std::size_t count, float* to) {
  const auto* values = static_cast<const T*>(from);
  const std::size_t lanes = hn::Lanes(F32());
  std::size_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(load_float(values + i), F32(), to + i);
  for (; i < count; ++i) to[i] = to_float(values[i]);
}

// `count` gradient values as fp32: those at `from`, or a copy in `to`.
HWY_INLINE const float* widen(const void* from, DType dtype, std::size_t count, float* to) {
  if (dtype == DType::kF32) return static_cast<const float*>(from);
  dtype == DType::kBF16 ? widen_as<BF16>(from, count, to) : widen_as<FP16>(from, count, to);
  return to;
}

// The squares of a line: element i's is added to lane i.
HWY_INLINE void add_squares(const float* line, double* lanes) {
  const hn::CappedTag<double, 8> d;
  const hn::Rebind<float, decltype(d)> as_float;
  for (std::size_t i = 0; i < kLine; i += hn::Lanes(d)) {
    const auto v = hn::PromoteTo(d, hn::LoadU(as_float, line + i));
    hn::Store(hn::Add(hn::Load(d, lanes + i), hn::Mul(v, v)), d, lanes + i);
  }
}

// Of a chunk, or what is left of the tensor.
HWY_INLINE double chunk_squares(const float* values, std::size_t count) {
  HWY_ALIGN double lanes[kLine] = {};
  HWY_ALIGN float last[kLine] = {};
  const std::size_t whole = count / kLine * kLine;
  for (std::size_t i = 0; i < whole; i += kLine) add_squares(values + i, lanes);
  std::memcpy(last, values + whole, (count - whole) * sizeof(float));
  add_squares(last, lanes);
  for (std::size_t half = kLine / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

struct Corrected {
  hn::Vec<F> velocity;
  hn::Vec<F> gradient;  // what stands in for it
};

HWY_INLINE Corrected correct(hn::Vec<F> grad, hn::Vec<F> velocity, const Momentum& m) {
  const F d;
  const auto g = hn::Mul(hn::Set(d, m.scale), grad);
  const auto factor = hn::Set(d, m.factor);
  if (m.nesterov) {
    const auto u = hn::Mul(factor, hn::Add(velocity, g));
    return {u, hn::Add(u, g)};
  }
  const auto u = hn::Add(hn::Mul(factor, velocity), g);
  return {u, u};
}

// One line of a chunk: what stands in for the gradient goes to `to`.
template <bool kStreaming>
HWY_INLINE void correct_line(const float* grad, const Momentum& m, std::size_t at, float* to,
                             hn::Vec<U>& gradient_bits) {
  const F d;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t i = at; i < at + kLine; i += lanes) {
    const auto g = hn::LoadU(d, grad + i);
    gradient_bits = hn::Or(gradient_bits, hn::BitCast(U(), g));
    const Corrected corrected = correct(g, hn::LoadU(d, m.velocity + i), m);
    hn::Store(corrected.gradient, d, to + i);
    if constexpr (kStreaming) {
      hn::Stream(corrected.velocity, d, m.next + i);
    } else if (m.next != nullptr) {
      hn::StoreU(corrected.velocity, d, m.next + i);
    }
  }
}

// A chunk of gradient values with momentum correction, to `to`; whole lines of it are written.
template <bool kStreaming>
HWY_INLINE void correct_chunk(const float* grad, const Momentum& m, std::size_t count, float* to,
                              Running& running) {
  auto bits = running.gradient_bits;
  std::size_t at = 0;
  if (count == kChunkElements) {
    for (; at < kPage; at += kLine) {
      for (std::size_t page = 0; page < kPages; ++page) {
        correct_line<kStreaming>(grad, m, at + page * kPage, to, bits);
      }
    }
    at = count;
  }
  for (; at + kLine <= count; at += kLine) correct_line<kStreaming>(grad, m, at, to, bits);
  if (at < count) {
    const std::size_t rest = count - at;
    HWY_ALIGN float last[kLine] = {};
    HWY_ALIGN float velocity[kLine] = {};
    HWY_ALIGN float next[kLine];
    std::memcpy(last, grad + at, rest * sizeof(float));
    std::memcpy(velocity, m.velocity + at, rest * sizeof(float));
    Momentum copied = m;
    copied.velocity = velocity;
    copied.next = next;
    correct_line<false>(last, copied, 0, to + at, bits);
    if (m.next != nullptr) std::memcpy(m.next + at, next, rest * sizeof(float));
  }
  running.gradient_bits = bits;
}

template <Kept kKept, bool kStreaming>
void scan_chunks(const Scan& args, Running& running, Candidates& c) {
  HWY_ALIGN float widened[kChunkElements];
  HWY_ALIGN float corrected[kChunkElements];
  Hits hits;
  const auto decay = hn::Set(F(), args.decay);
  const auto total = static_cast<std::size_t>(args.count);
  for (std::size_t i = 0; i < total; i += kChunkElements) {
    const std::size_t count = std::min(kChunkElements, total - i);
    if (c.count + count > c.capacity) keep_largest(c);
    const void* source = static_cast<const char*>(args.grad) + i * size_bytes(args.dtype);
    Chunk chunk{.grad = widen(source, args.dtype, count, widened),
                .residual = kKept == Kept::kF32 ? args.residual + i : nullptr,
                .next = args.next == nullptr ? nullptr : args.next + i,
                .opened = part_of(args.opened, i),
                .count = count};
    const bool followed = i + 2 * kChunkElements <= total;
    if (followed && args.dtype == DType::kF32) chunk.grad_ahead = chunk.grad + kChunkElements;
    if (followed && kKept == Kept::kF32) chunk.residual_ahead = chunk.residual + kChunkElements;
    if (followed && kKept == Kept::kBF16) {
      chunk.opened_ahead = chunk.opened.current + kChunkElements;
    }
    if (args.momentum.velocity != nullptr) {
      Momentum momentum = args.momentum;
      momentum.velocity += i;
      if (momentum.next != nullptr) momentum.next += i;
      if (args.squares != nullptr) *args.squares += chunk_squares(chunk.grad, count);
      momentum.streaming ? correct_chunk<true>(chunk.grad, momentum, count, corrected, running)
                         : correct_chunk<false>(chunk.grad, momentum, count, corrected, running);
      chunk.grad = corrected;
      if (followed) chunk.velocity_ahead = momentum.velocity + kChunkElements;
    }
    const auto gradient_bits = running.gradient_bits;
    const auto below = hn::Set(I(), static_cast<std::int32_t>(c.threshold - 1));
    scan_lines<kKept, kStreaming>(chunk, decay, below, running, hits.bits);
    if (chunk.grad == corrected) running.gradient_bits = gradient_bits;
    take_hits<kKept, kStreaming>(args, chunk, hits, args.first + static_cast<std::uint32_t>(i), c);
  }
  if (kStreaming || args.momentum.streaming) hwy::FlushStream();
}

template <Kept kKept>
void scan_kept(const Scan& args, Running& running, Candidates& c) {
  args.streaming ? scan_chunks<kKept, true>(args, running, c)
                 : scan_chunks<kKept, false>(args, running, c);
}

ScanSummary scan_all(const Scan& args, Candidates& c) {
  Running running{hn::Zero(I()), hn::Zero(U())};
  // A local: the compiler cannot know that float stores leave the struct alone.
  Candidates local = c;
  if (args.opened.current != nullptr) {
    scan_kept<Kept::kBF16>(args, running, local);
  } else if (args.residual != nullptr) {
    scan_kept<Kept::kF32>(args, running, local);
  } else {
    scan_kept<Kept::kNothing>(args, running, local);
  }
  c = local;
  HWY_ALIGN std::uint32_t lanes[16] = {};
  ScanSummary summary;
  hn::Store(hn::BitCast(U(), running.magnitude), U(), lanes);
  for (const std::uint32_t bits : lanes) summary.magnitude = std::max(summary.magnitude, bits);
  hn::Store(running.gradient_bits, U(), lanes);
  std::uint32_t any = 0;
  for (std::size_t i = 0; i < hn::Lanes(U()); ++i) any |= lanes[i];
  summary.gradient_nonzero = (any & kMagnitudeMask) != 0;
  return summary;
}

// Elements [at, at + lanes) of the gradient as fp32.
HWY_INLINE hn::Vec<F> load_gradient(const Scan& args, std::size_t at) {
  switch (args.dtype) {
    case DType::kBF16:
      return load_float(static_cast<const BF16*>(args.grad) + at);
    case DType::kF16:
      return load_float(static_cast<const FP16*>(args.grad) + at);
    default:
      return hn::LoadU(F(), static_cast<const float*>(args.grad) + at);
  }
}

// Whole lines: v as the scan has stored it, but for the entries' elements.
void patch_lines(const Scan& args, std::span<const std::uint32_t> indices, std::size_t first,
                 const float* values) {
  const F d;
  const std::size_t lanes = hn::Lanes(d);
  const auto decay = hn::Set(d, args.decay);
  const auto place = hn::Iota(I(), 0);
  const auto element = [&](std::size_t entry) { return std::size_t{indices[entry] - args.first}; };
  const std::size_t whole = static_cast<std::size_t>(args.count) / kLine * kLine;
  std::size_t entry = first;
  const auto store = [&] {
    args.next[element(entry)] = values[entry - first];
    ++entry;
  };
  // A line that holds entries from before must keep them.
  const std::size_t begun = first == 0 ? 0 : (element(first - 1) / kLine + 1) * kLine;
  while (entry < indices.size() && element(entry) < begun) store();
  while (entry < indices.size() && element(entry) < whole) {
    const std::size_t line = element(entry) / kLine * kLine;
    for (std::size_t i = line; i < line + kLine; i += lanes) {
      auto v = load_gradient(args, i);
      if (args.momentum.velocity != nullptr) {
        v = correct(v, hn::LoadU(d, args.momentum.velocity + i), args.momentum).gradient;
      }
      if (args.residual != nullptr) {
        v = hn::Add(v, hn::Mul(decay, hn::LoadU(d, args.residual + i)));
      }
      for (; entry < indices.size() && element(entry) < i + lanes; ++entry) {
        const auto lane = static_cast<std::int32_t>(element(entry) - i);
        const auto here = hn::RebindMask(d, hn::Eq(place, hn::Set(I(), lane)));
        v = hn::IfThenElse(here, hn::Set(d, values[entry - first]), v);
      }
      hn::Stream(v, d, args.next + i);
    }
  }
  while (entry < indices.size()) store();
  hwy::FlushStream();
}

double squares_of(const void* grad, DType dtype, std::int64_t count) {
  HWY_ALIGN float widened[kChunkElements];
  const auto total = static_cast<std::size_t>(count);
  double sum = 0;
  for (std::size_t begin = 0; begin < total; begin += kChunkElements) {
    const std::size_t size = std::min(kChunkElements, total - begin);
    const void* source = static_cast<const char*>(grad) + begin * size_bytes(dtype);
    sum += chunk_squares(widen(source, dtype, size, widened), size);
  }
  return sum;
}

void compact_all(Candidates& c, std::uint32_t least, std::size_t ties) {
  const F d;
  const std::size_t lanes = hn::Lanes(d);
  const auto limit = hn::Set(I(), static_cast<std::int32_t>(least));
  const auto one_by_one = [&](std::size_t i, std::size_t& kept) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, c.value + i, sizeof bits);
    bits &= kMagnitudeMask;
    const bool tie = bits == least && ties > 0;
    c.value[kept] = c.value[i];
    c.index[kept] = c.index[i];
    kept += bits > least || tie ? 1 : 0;
    ties -= tie ? 1 : 0;
  };
  std::size_t kept = 0;
  std::size_t i = 0;
  // Vectors are stored whole, over candidates that have been read.
  for (; i + lanes <= c.count; i += lanes) {
    const auto v = hn::LoadU(d, c.value + i);
    const auto magnitude = magnitude_of(v);
    if (HWY_UNLIKELY(ties > 0 && !hn::AllFalse(I(), hn::Eq(magnitude, limit)))) {
      for (std::size_t j = i; j < i + lanes; ++j) one_by_one(j, kept);
      continue;
    }
    const auto stays = hn::Gt(magnitude, limit);
    const auto index = hn::LoadU(U(), c.index + i);
    hn::CompressStore(v, hn::RebindMask(d, stays), d, c.value + kept);
    kept += hn::CompressStore(index, hn::RebindMask(U(), stays), U(), c.index + kept);
  }
  for (; i < c.count; ++i) one_by_one(i, kept);
  c.count = kept;
}

template <bool kStreaming>
HWY_INLINE void move_lines(std::span<float> range, float* to) {
  const F d;
  const auto move = [&](std::size_t begin, std::size_t end) {
    std::memcpy(to + begin, range.data() + begin, (end - begin) * sizeof(float));
    std::memset(range.data() + begin, 0, (end - begin) * sizeof(float));
  };
  const std::size_t past =
      reinterpret_cast<std::uintptr_t>(to) % (kLine * sizeof(float)) / sizeof(float);
  const std::size_t first = std::min(range.size(), (kLine - past) % kLine);
  const std::size_t last = first + (range.size() - first) / kLine * kLine;
  move(0, first);
  for (std::size_t i = first; i < last; i += hn::Lanes(d)) {
    const auto v = hn::LoadU(d, range.data() + i);
    if constexpr (kStreaming) {
      hn::Stream(v, d, to + i);
    } else {
      hn::StoreU(v, d, to + i);
    }
    hn::StoreU(hn::Zero(d), d, range.data() + i);
  }
  move(last, range.size());
}

void move_range(std::span<float> range, float* to, bool streaming) {
  streaming ? move_lines<true>(range, to) : move_lines<false>(range, to);
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire::topk
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire::topk {

HWY_EXPORT(scan_all);
HWY_EXPORT(patch_lines);
HWY_EXPORT(squares_of);
HWY_EXPORT(compact_all);
HWY_EXPORT(move_range);

ScanSummary scan(const Scan& args, Candidates& candidates) {
  return HWY_DYNAMIC_DISPATCH(scan_all)(args, candidates);
}

void patch(const Scan& args, std::span<const std::uint32_t> indices, std::size_t first,
           const float* values) {
  if (args.streaming) {
    HWY_DYNAMIC_DISPATCH(patch_lines)(args, indices, first, values);
    return;
  }
  for (std::size_t i = first; i < indices.size(); ++i) {
    args.next[indices[i] - args.first] = values[i - first];
  }
}

double sum_of_squares(const void* grad, DType dtype, std::int64_t count) {
  return HWY_DYNAMIC_DISPATCH(squares_of)(grad, dtype, count);
}

void compact(Candidates& candidates, std::uint32_t least, std::size_t ties) {
  HWY_DYNAMIC_DISPATCH(compact_all)(candidates, least, ties);
}

void move_out(std::span<float> range, float* to, bool streaming) {
  HWY_DYNAMIC_DISPATCH(move_range)(range, to, streaming);
}

}  // namespace thinwire::topk
#endif
