#include <algorithm>
#include <cstring>

#include "compressors/topk/topk_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/topk/topk_simd.cpp"
#include <hwy/foreach_target.h>
// The order is Highway's: highway.h after foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace thinwire::topk {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// 16 lanes at most: an index vector has 32-bit lanes, kCandidateSlack and kChunkElements rely on
// it.
using F = hn::CappedTag<float, 16>;
using U = hn::RebindToUnsigned<F>;
using I = hn::RebindToSigned<F>;

// Two streams are read; a little ahead of the hardware's prefetchers, which stop at page ends.
constexpr std::size_t kPrefetchElements = 512;

struct Running {
  hn::Vec<I> magnitude;      // per lane
  hn::Vec<U> gradient_bits;  // or of all, per lane
};

template <bool kResidual>
HWY_INLINE hn::Vec<F> load_v(F d, const float* grad, const float* residual, hn::Vec<F> decay,
                             Running& running) {
  const auto g = hn::LoadU(d, grad);
  running.gradient_bits = hn::Or(running.gradient_bits, hn::BitCast(U(), g));
  if constexpr (kResidual) {
    return hn::Add(g, hn::Mul(decay, hn::LoadU(d, residual)));
  } else {
    return g;
  }
}

HWY_INLINE hn::Vec<I> magnitude_of(hn::Vec<F> v) {
  return hn::And(hn::BitCast(I(), v), hn::Set(I(), static_cast<std::int32_t>(kMagnitudeMask)));
}

HWY_INLINE void append(hn::Vec<F> v, hn::Vec<I> magnitude, hn::Vec<I> below, std::uint32_t first,
                       Candidates& c) {
  const auto taken = hn::Gt(magnitude, below);
  hn::CompressStore(v, hn::RebindMask(F(), taken), F(), c.value + c.count);
  c.count +=
      hn::CompressStore(hn::Iota(U(), first), hn::RebindMask(U(), taken), U(), c.index + c.count);
}

// grad, residual, next: this chunk's.
template <bool kResidual>
HWY_INLINE void scan_chunk(const Scan& args, const float* grad, const float* residual, float* next,
                           std::size_t count, std::uint32_t first, Running& running,
                           Candidates& c) {
  const F d;
  const std::size_t lanes = hn::Lanes(d);
  const auto decay = hn::Set(d, args.decay);
  const auto below = hn::Set(I(), static_cast<std::int32_t>(c.threshold - 1));
  std::size_t i = 0;
  for (; i + 4 * lanes <= count; i += 4 * lanes) {
    if constexpr (kResidual) hwy::Prefetch(residual + i + kPrefetchElements);
    hwy::Prefetch(grad + i + kPrefetchElements);
    const auto v0 = load_v<kResidual>(d, grad + i, residual + i, decay, running);
    const auto v1 = load_v<kResidual>(d, grad + i + lanes, residual + i + lanes, decay, running);
    const auto v2 =
        load_v<kResidual>(d, grad + i + 2 * lanes, residual + i + 2 * lanes, decay, running);
    const auto v3 =
        load_v<kResidual>(d, grad + i + 3 * lanes, residual + i + 3 * lanes, decay, running);
    if (next != nullptr) {
      if (args.streaming) {
        hn::Stream(v0, d, next + i);
        hn::Stream(v1, d, next + i + lanes);
        hn::Stream(v2, d, next + i + 2 * lanes);
        hn::Stream(v3, d, next + i + 3 * lanes);
      } else {
        hn::StoreU(v0, d, next + i);
        hn::StoreU(v1, d, next + i + lanes);
        hn::StoreU(v2, d, next + i + 2 * lanes);
        hn::StoreU(v3, d, next + i + 3 * lanes);
      }
    }
    const auto m0 = magnitude_of(v0);
    const auto m1 = magnitude_of(v1);
    const auto m2 = magnitude_of(v2);
    const auto m3 = magnitude_of(v3);
    const auto most = hn::Max(hn::Max(m0, m1), hn::Max(m2, m3));
    running.magnitude = hn::Max(running.magnitude, most);
    if (HWY_UNLIKELY(!hn::AllFalse(I(), hn::Gt(most, below)))) {
      const auto at = first + static_cast<std::uint32_t>(i);
      const auto step = static_cast<std::uint32_t>(lanes);
      append(v0, m0, below, at, c);
      append(v1, m1, below, at + step, c);
      append(v2, m2, below, at + 2 * step, c);
      append(v3, m3, below, at + 3 * step, c);
    }
  }
  // The last elements of a tensor through a padded copy, zeros behind them: never candidates.
  for (; i < count; i += lanes) {
    const std::size_t rest = std::min(lanes, count - i);
    HWY_ALIGN float g[16] = {};
    HWY_ALIGN float r[16] = {};
    std::memcpy(g, grad + i, rest * sizeof(float));
    if constexpr (kResidual) std::memcpy(r, residual + i, rest * sizeof(float));
    const auto v = load_v<kResidual>(d, g, r, decay, running);
    HWY_ALIGN float stored[16];
    hn::Store(v, d, stored);
    if (next != nullptr) std::memcpy(next + i, stored, rest * sizeof(float));
    const auto m = magnitude_of(v);
    running.magnitude = hn::Max(running.magnitude, m);
    append(v, m, below, first + static_cast<std::uint32_t>(i), c);
  }
}

// fp16 and bf16 to fp32, exactly.
HWY_INLINE void widen(DType dtype, const void* from, std::size_t count, float* to) {
  const auto* bits = static_cast<const std::uint16_t*>(from);
  const F d;
  const hn::Rebind<hwy::float16_t, F> d16;
  const hn::Rebind<std::uint16_t, F> du16;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t i = 0; i < count; i += lanes) {
    HWY_ALIGN std::uint16_t rest[16] = {};
    const std::uint16_t* source = bits + i;
    if (i + lanes > count) {
      std::memcpy(rest, source, (count - i) * sizeof(std::uint16_t));
      source = rest;
    }
    const auto narrow = hn::LoadU(du16, source);
    if (dtype == DType::kBF16) {
      const auto wide = hn::ShiftLeft<16>(hn::PromoteTo(U(), narrow));
      hn::StoreU(hn::BitCast(d, wide), d, to + i);
    } else {
      hn::StoreU(hn::PromoteTo(d, hn::BitCast(d16, narrow)), d, to + i);
    }
  }
}

ScanSummary scan_all(const Scan& args, Candidates& c) {
  const I di;
  Running running{hn::Zero(di), hn::Zero(U())};
  HWY_ALIGN float widened[kChunkElements];
  const auto total = static_cast<std::size_t>(args.count);
  const std::size_t element_bytes = size_bytes(args.dtype);
  // Locals: the compiler cannot know that float stores leave the struct alone.
  Candidates local = c;
  for (std::size_t i = 0; i < total; i += kChunkElements) {
    const std::size_t count = std::min(kChunkElements, total - i);
    if (local.count + count > local.capacity) keep_largest(local);
    const void* source = static_cast<const char*>(args.grad) + i * element_bytes;
    if (args.dtype != DType::kF32) widen(args.dtype, source, count, widened);
    const float* grad = args.dtype == DType::kF32 ? static_cast<const float*>(source) : widened;
    float* next = args.next == nullptr ? nullptr : args.next + i;
    const auto first = args.first + static_cast<std::uint32_t>(i);
    if (args.residual != nullptr) {
      scan_chunk<true>(args, grad, args.residual + i, next, count, first, running, local);
    } else {
      scan_chunk<false>(args, grad, nullptr, next, count, first, running, local);
    }
  }
  if (args.streaming) hwy::FlushStream();
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

}  // namespace HWY_NAMESPACE
}  // namespace thinwire::topk
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire::topk {

HWY_EXPORT(scan_all);

ScanSummary scan(const Scan& args, Candidates& candidates) {
  return HWY_DYNAMIC_DISPATCH(scan_all)(args, candidates);
}

}  // namespace thinwire::topk
#endif
