#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>

#include "optim/optim_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "optim/optim_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/highway.h>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"
#include "optim/optim_reference.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire::optim {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using thinwire::HWY_NAMESPACE::F32;
using thinwire::HWY_NAMESPACE::load_float;
using thinwire::HWY_NAMESPACE::store_float;
using thinwire::HWY_NAMESPACE::VF32;

HWY_INLINE VF32 all(float x) { return hn::Set(F32(), x); }

// Elements in whole vectors; the scalar code does the rest.
HWY_INLINE std::int64_t whole_vectors(std::int64_t n) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  return n / lanes * lanes;
}

template <typename T>
HWY_NOINLINE void sgd_vectors(const SgdFactors& f, const T* grad, float* weights, float* velocity,
                              std::int64_t n) {
  const VF32 lr = all(f.lr);
  const VF32 momentum = all(f.momentum);
  const VF32 weight_decay = all(f.weight_decay);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    VF32 d = hn::Add(load_float(grad + i), hn::Mul(weight_decay, w));
    if (velocity != nullptr) {
      const VF32 u = hn::Add(hn::Mul(momentum, load_float(velocity + i)), d);
      store_float(u, velocity + i);
      d = f.nesterov ? hn::Add(d, hn::Mul(momentum, u)) : u;
    }
    store_float(hn::Sub(w, hn::Mul(lr, d)), weights + i);
  }
}

template <typename T>
HWY_NOINLINE void dgc_vectors(const SgdFactors& f, const T* mean, float* weights,
                              float* decay_velocity, std::int64_t n) {
  const VF32 lr = all(f.lr);
  const VF32 momentum = all(f.momentum);
  const VF32 weight_decay = all(f.weight_decay);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    VF32 d = load_float(mean + i);
    if (decay_velocity != nullptr) {
      const VF32 decay = hn::Mul(weight_decay, w);
      const VF32 b = hn::Add(hn::Mul(momentum, load_float(decay_velocity + i)), decay);
      store_float(b, decay_velocity + i);
      d = hn::Add(d, f.nesterov ? hn::Add(decay, hn::Mul(momentum, b)) : b);
    }
    store_float(hn::Sub(w, hn::Mul(lr, d)), weights + i);
  }
}

HWY_INLINE VF32 mixed(VF32 m, VF32 g, VF32 mix) { return hn::Add(m, hn::Mul(mix, hn::Sub(g, m))); }

struct Move {
  VF32 size;
  VF32 eps;
  VF32 decay;
};
HWY_INLINE VF32 moved(VF32 w, VF32 m, VF32 v, const Move& move) {
  const VF32 ratio = hn::Div(hn::Mul(move.size, m), hn::Add(hn::Sqrt(v), move.eps));
  return hn::Sub(w, hn::Add(ratio, hn::Mul(move.decay, w)));
}

template <typename T>
HWY_NOINLINE void adam_vectors(const AdamFactors& f, const T* grad, float* weights, float* m,
                               float* v, std::int64_t n) {
  const VF32 m_mix = all(f.m_mix);
  const VF32 v_keep = all(f.v_keep);
  const VF32 v_mix = all(f.v_mix);
  const VF32 l2 = all(f.l2);
  const VF32 least = all(f.least);
  const Move move{all(f.size), all(f.eps), all(f.decay)};
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    const VF32 g = hn::Add(load_float(grad + i), hn::Mul(l2, w));
    const VF32 new_m = mixed(load_float(m + i), g, m_mix);
    const VF32 new_v = hn::Add(hn::Mul(v_keep, load_float(v + i)), hn::Mul(hn::Mul(v_mix, g), g));
    store_float(new_m, m + i);
    store_float(new_v, v + i);
    store_float(moved(w, new_m, hn::Max(new_v, least), move), weights + i);
  }
}

// What is only written has to be fetched, too, which the hardware does late.
HWY_INLINE void fetch_to_write(float* p) { __builtin_prefetch(p + 256, 1); }

HWY_INLINE auto is_masked(VF32 v) { return hn::Eq(v, hn::Zero(F32())); }

template <typename T, typename Out>
HWY_NOINLINE void local_momentum_vectors(const MomentumFactors& f, const T* grad, const float* m,
                                         const float* v, Out* out, std::int64_t n) {
  const VF32 mix = all(f.m_mix);
  const VF32 loss_scale = all(f.loss_scale);
  const VF32 factor = all(f.factor);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const auto masked = is_masked(load_float(v + i));
    const VF32 local = mixed(hn::Mul(loss_scale, load_float(m + i)), load_float(grad + i), mix);
    store_float(hn::IfThenZeroElse(masked, hn::Mul(factor, local)), out + i);
  }
}

template <bool kFirst, typename T>
HWY_NOINLINE void local_adam_vectors(const AdamFactors& f, const T* grad, float* weights, float* m,
                                     const float* v, float* u, float* anchor, std::int64_t n) {
  const VF32 m_mix = all(f.m_mix);
  const Move move{all(f.size), all(f.eps), all(f.decay)};
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    const VF32 old_m = load_float(m + i);
    VF32 old_u = hn::Zero(F32());
    if constexpr (kFirst) {
      fetch_to_write(u + i);
      fetch_to_write(anchor + i);
      store_float(w, anchor + i);
    } else {
      old_u = load_float(u + i);
    }
    const VF32 variance = load_float(v + i);
    const auto masked = is_masked(variance);
    const VF32 new_m = mixed(old_m, load_float(grad + i), m_mix);
    const VF32 new_u = hn::Add(old_u, hn::Mul(move.size, new_m));
    store_float(hn::IfThenElse(masked, old_m, new_m), m + i);
    store_float(hn::IfThenElse(masked, old_u, new_u), u + i);
    store_float(hn::IfThenElse(masked, w, moved(w, new_m, variance, move)), weights + i);
  }
}

template <typename T, typename Out>
HWY_NOINLINE void local_sum_vectors(const MomentumFactors& f, const T* grad, const float* m,
                                    const float* v, const float* u, Out* out, std::int64_t n) {
  const VF32 mix = all(f.m_mix);
  const VF32 loss_scale = all(f.loss_scale);
  const VF32 factor = all(f.factor);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const auto masked = is_masked(load_float(v + i));
    const VF32 local = mixed(hn::Mul(loss_scale, load_float(m + i)), load_float(grad + i), mix);
    const VF32 sum = hn::Add(hn::Mul(loss_scale, load_float(u + i)), hn::Mul(factor, local));
    store_float(hn::IfThenZeroElse(masked, sum), out + i);
  }
}

template <typename T>
HWY_NOINLINE void sync_adam_vectors(const SyncFactors& f, const T* reduced, float* weights,
                                    float* m, const float* v, const float* anchor, std::int64_t n) {
  const VF32 sum_lr = all(f.sum_lr);
  const VF32 eps = all(f.eps);
  const VF32 decay = all(f.decay);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    fetch_to_write(m + i);
    fetch_to_write(weights + i);
    const VF32 variance = load_float(v + i);
    const auto masked = is_masked(variance);
    const VF32 sum = hn::IfThenZeroElse(masked, load_float(reduced + i));
    const VF32 old = load_float(anchor + i);
    const VF32 change =
        hn::Add(hn::Div(sum, hn::Add(hn::Sqrt(variance), eps)), hn::Mul(decay, old));
    const VF32 now = hn::IfThenElse(masked, old, hn::Sub(old, change));
    store_float(hn::Div(sum, sum_lr), m + i);
    store_float(now, weights + i);
  }
}

// The updates of at most a block; sums are taken of what is written to `update`.
template <typename T>
HWY_NOINLINE void lamb_block(const LambFactors& f, const T* grad, const float* weights, float* m,
                             float* v, float* update, std::int64_t n) {
  const VF32 m_mix = all(f.m_mix);
  const VF32 v_keep = all(f.v_keep);
  const VF32 v_mix = all(f.v_mix);
  const VF32 eps = all(f.eps);
  const VF32 size = all(f.size);
  const VF32 decay = all(f.decay);
  std::int64_t i = 0;
  for (const std::int64_t end = whole_vectors(n); i < end;
       i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 g = load_float(grad + i);
    const VF32 new_m = mixed(load_float(m + i), g, m_mix);
    const VF32 new_v = hn::Add(hn::Mul(v_keep, load_float(v + i)), hn::Mul(hn::Mul(v_mix, g), g));
    store_float(new_m, m + i);
    store_float(new_v, v + i);
    const VF32 direction = hn::Div(hn::Mul(size, new_m), hn::Add(hn::Sqrt(new_v), eps));
    store_float(hn::Add(direction, hn::Mul(decay, load_float(weights + i))), update + i);
  }
  for (; i < n; ++i) {
    update[i] = lamb_element(f, to_float(grad[i]), weights[i], m[i], v[i]);
  }
}

// Returns the largest ratio.
template <typename T>
HWY_NOINLINE float frozen_lamb_block(const LambFactors& f, const T* reduced, const float* weights,
                                     float* m, const float* v, float* fresh, float* direction,
                                     float* update, std::int64_t n) {
  const VF32 v_keep = all(f.v_keep);
  const VF32 v_mix = all(f.v_mix);
  const VF32 eps = all(f.eps);
  const VF32 size = all(f.size);
  const VF32 decay = all(f.decay);
  const VF32 beta1 = all(f.beta1);
  const VF32 g_mix = all(f.g_mix);
  const VF32 factor = all(f.factor);
  VF32 largest = hn::Zero(F32());
  std::int64_t i = 0;
  for (const std::int64_t end = whole_vectors(n); i < end;
       i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 variance = load_float(v + i);
    const VF32 old_fresh = load_float(fresh + i);
    const auto masked = is_masked(variance);
    const VF32 next = hn::IfThenZeroElse(masked, hn::Div(load_float(reduced + i), factor));
    const VF32 g = hn::Mul(hn::Sub(next, hn::Mul(beta1, load_float(m + i))), g_mix);
    const VF32 new_fresh = hn::Add(hn::Mul(v_keep, old_fresh), hn::Mul(hn::Mul(v_mix, g), g));
    store_float(next, m + i);
    store_float(hn::IfThenElse(masked, old_fresh, new_fresh), fresh + i);
    const VF32 root = hn::Add(hn::Sqrt(variance), eps);
    const VF32 ratio = hn::Div(root, hn::Add(hn::Sqrt(new_fresh), eps));
    largest = hn::Max(largest, hn::IfThenZeroElse(masked, ratio));
    const VF32 moves = hn::Div(hn::Mul(size, next), root);
    const VF32 decays = hn::Mul(decay, load_float(weights + i));
    store_float(hn::IfThenZeroElse(masked, moves), direction + i);
    store_float(hn::IfThenZeroElse(masked, hn::Add(moves, decays)), update + i);
  }
  float ratio = hn::GetLane(hn::MaxOfLanes(F32(), largest));
  for (; i < n; ++i) {
    const FrozenLambElement element =
        frozen_lamb_element(f, to_float(reduced[i]), weights[i], m[i], v[i], fresh[i]);
    direction[i] = element.direction;
    update[i] = element.update;
    ratio = std::max(ratio, element.ratio);
  }
  return ratio;
}

HWY_NOINLINE void lamb_move_vectors(const LambFactors& f, float lr, bool masks, float* weights,
                                    const float* m, const float* v, std::int64_t n) {
  const VF32 step = all(lr);
  const VF32 eps = all(f.eps);
  const VF32 size = all(f.size);
  const VF32 decay = all(f.decay);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    const VF32 variance = load_float(v + i);
    const VF32 direction =
        hn::Div(hn::Mul(size, load_float(m + i)), hn::Add(hn::Sqrt(variance), eps));
    const VF32 moved = hn::Sub(w, hn::Mul(step, hn::Add(direction, hn::Mul(decay, w))));
    store_float(masks ? hn::IfThenElse(is_masked(variance), w, moved) : moved, weights + i);
  }
}

template <typename T>
HWY_NOINLINE void frozen_adam_vectors(const AdamFactors& f, const T* reduced, float* weights,
                                      float* m, const float* v, std::int64_t n) {
  const Move move{all(f.size), all(f.eps), all(f.decay)};
  const VF32 least = all(f.least);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    fetch_to_write(m + i);
    const VF32 w = load_float(weights + i);
    const VF32 variance = load_float(v + i);
    const auto masked = is_masked(variance);
    const VF32 new_m = hn::IfThenZeroElse(masked, load_float(reduced + i));
    store_float(new_m, m + i);
    const VF32 now = moved(w, new_m, hn::Max(variance, least), move);
    store_float(hn::IfThenElse(masked, w, now), weights + i);
  }
}

void sgd_all(const SgdFactors& f, TensorView grad, float* weights, float* velocity) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit(grad, [&](const auto* g) { sgd_vectors(f, g, weights, velocity, n); });
  sgd_reference(f, grad.slice(n, grad.elements), weights + n,
                velocity == nullptr ? nullptr : velocity + n);
}

void dgc_all(const SgdFactors& f, TensorView mean, float* weights, float* decay_velocity) {
  const std::int64_t n = whole_vectors(mean.elements);
  visit(mean, [&](const auto* g) { dgc_vectors(f, g, weights, decay_velocity, n); });
  dgc_reference(f, mean.slice(n, mean.elements), weights + n,
                decay_velocity == nullptr ? nullptr : decay_velocity + n);
}

void adam_all(const AdamFactors& f, TensorView grad, float* weights, float* m, float* v) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit(grad, [&](const auto* g) { adam_vectors(f, g, weights, m, v, n); });
  adam_reference(f, grad.slice(n, grad.elements), weights + n, m + n, v + n);
}

// f(gradient, out), out being of the gradient's type or fp32.
template <typename F>
void visit_out(TensorView grad, TensorView out, F&& f) {
  visit(grad, [&](auto* g) {
    if (out.dtype == grad.dtype) {
      f(g, static_cast<decltype(g)>(out.data));
    } else {
      f(g, static_cast<float*>(out.data));
    }
  });
}

void local_momentum_all(const MomentumFactors& f, TensorView grad, const float* m, const float* v,
                        TensorView out) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit_out(grad, out,
            [&](const auto* g, auto* sent) { local_momentum_vectors(f, g, m, v, sent, n); });
  local_momentum_reference(f, grad.slice(n, grad.elements), m + n, v + n,
                           out.slice(n, out.elements));
}

void local_sum_all(const MomentumFactors& f, TensorView grad, const float* m, const float* v,
                   const float* u, TensorView out) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit_out(grad, out,
            [&](const auto* g, auto* sent) { local_sum_vectors(f, g, m, v, u, sent, n); });
  local_sum_reference(f, grad.slice(n, grad.elements), m + n, v + n, u + n,
                      out.slice(n, out.elements));
}

void local_adam_all(const AdamFactors& f, TensorView grad, float* weights, float* m, const float* v,
                    float* u, float* anchor) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit(grad, [&](const auto* g) {
    anchor == nullptr ? local_adam_vectors<false>(f, g, weights, m, v, u, anchor, n)
                      : local_adam_vectors<true>(f, g, weights, m, v, u, anchor, n);
  });
  local_adam_reference(f, grad.slice(n, grad.elements), weights + n, m + n, v + n, u + n,
                       anchor == nullptr ? nullptr : anchor + n);
}

void sync_adam_all(const SyncFactors& f, TensorView reduced, float* weights, float* m,
                   const float* v, const float* anchor) {
  const std::int64_t n = whole_vectors(reduced.elements);
  visit(reduced, [&](const auto* g) { sync_adam_vectors(f, g, weights, m, v, anchor, n); });
  sync_adam_reference(f, reduced.slice(n, reduced.elements), weights + n, m + n, v + n, anchor + n);
}

void lamb_move_all(const LambFactors& f, float lr, bool masks, float* weights, const float* m,
                   const float* v, std::int64_t elements) {
  const std::int64_t n = whole_vectors(elements);
  lamb_move_vectors(f, lr, masks, weights, m, v, n);
  lamb_move_reference(f, lr, masks, weights + n, m + n, v + n, elements - n);
}

void frozen_adam_all(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                     const float* v) {
  const std::int64_t n = whole_vectors(reduced.elements);
  visit(reduced, [&](const auto* g) { frozen_adam_vectors(f, g, weights, m, v, n); });
  frozen_adam_reference(f, reduced.slice(n, reduced.elements), weights + n, m + n, v + n);
}

using Doubles = hn::CappedTag<double, kNormLanes / 2>;

// |x|, or its square, is added to each lane.
template <bool kSquares>
HWY_INLINE hn::Vec<Doubles> added(hn::Vec<Doubles> sum, const float* x) {
  const hn::Rebind<float, Doubles> as_float;
  const auto size = hn::PromoteTo(Doubles(), hn::Abs(hn::LoadU(as_float, x)));
  return hn::Add(sum, kSquares ? hn::Mul(size, size) : size);
}

// At most a block; some lanes after the others, so that their sums stay in registers.
template <bool kSquares>
double block_sum(const float* block, std::size_t n) {
  const Doubles d;
  const std::size_t whole = n / kNormLanes * kNormLanes;
  HWY_ALIGN double lanes[kNormLanes];
  HWY_ALIGN float last[kNormLanes] = {};
  std::memcpy(last, block + whole, (n - whole) * sizeof(float));
  for (std::size_t low = 0; low < kNormLanes / 2; low += hn::Lanes(d)) {
    const std::size_t high = low + kNormLanes / 2;
    auto low_sum = hn::Zero(d);
    auto high_sum = hn::Zero(d);
    for (std::size_t i = 0; i < whole; i += kNormLanes) {
      low_sum = added<kSquares>(low_sum, block + i + low);
      high_sum = added<kSquares>(high_sum, block + i + high);
    }
    hn::Store(added<kSquares>(low_sum, last + low), d, lanes + low);
    hn::Store(added<kSquares>(high_sum, last + high), d, lanes + high);
  }
  return sum_lanes(lanes);
}

template <bool kSquares>
double sum_all(std::span<const float> values) {
  double sum = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += kNormBlock) {
    sum += block_sum<kSquares>(values.data() + begin, std::min(kNormBlock, values.size() - begin));
  }
  return sum;
}

double l1_norm_all(std::span<const float> values) { return sum_all<false>(values); }
double square_sum_all(std::span<const float> values) { return sum_all<true>(values); }

LambSums lamb_moments_all(const LambFactors& f, TensorView grad, const float* weights, float* m,
                          float* v) {
  LambSums sums;
  HWY_ALIGN float update[kNormBlock];
  visit(grad, [&](const auto* g) {
    const auto elements = static_cast<std::size_t>(grad.elements);
    for (std::size_t begin = 0; begin < elements; begin += kNormBlock) {
      const std::size_t n = std::min(kNormBlock, elements - begin);
      lamb_block(f, g + begin, weights + begin, m + begin, v + begin, update,
                 static_cast<std::int64_t>(n));
      sums.weights += block_sum<true>(weights + begin, n);
      sums.update += block_sum<true>(update, n);
    }
  });
  return sums;
}

LambSums frozen_lamb_moments_all(const LambFactors& f, TensorView reduced, const float* weights,
                                 float* m, const float* v, float* fresh) {
  LambSums sums;
  HWY_ALIGN float direction[kNormBlock];
  HWY_ALIGN float update[kNormBlock];
  visit(reduced, [&](const auto* g) {
    const auto elements = static_cast<std::size_t>(reduced.elements);
    for (std::size_t begin = 0; begin < elements; begin += kNormBlock) {
      const std::size_t n = std::min(kNormBlock, elements - begin);
      const float ratio =
          frozen_lamb_block(f, g + begin, weights + begin, m + begin, v + begin, fresh + begin,
                            direction, update, static_cast<std::int64_t>(n));
      sums.ratio = std::max(sums.ratio, ratio);
      sums.weights += block_sum<true>(weights + begin, n);
      sums.direction += block_sum<true>(direction, n);
      sums.update += block_sum<true>(update, n);
    }
  });
  return sums;
}

bool all_finite_all(TensorView values) {
  return visit(values, [&](const auto* x) {
    const std::int64_t n = whole_vectors(values.elements);
    auto finite = hn::Eq(hn::Zero(F32()), hn::Zero(F32()));
    for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
      finite = hn::And(finite, hn::IsFinite(load_float(x + i)));
    }
    return hn::AllTrue(F32(), finite) && all_finite_reference(values.slice(n, values.elements));
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire::optim
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire::optim {

HWY_EXPORT(sgd_all);
HWY_EXPORT(dgc_all);
HWY_EXPORT(adam_all);
HWY_EXPORT(local_momentum_all);
HWY_EXPORT(frozen_adam_all);
HWY_EXPORT(local_adam_all);
HWY_EXPORT(local_sum_all);
HWY_EXPORT(sync_adam_all);
HWY_EXPORT(lamb_moments_all);
HWY_EXPORT(frozen_lamb_moments_all);
HWY_EXPORT(lamb_move_all);
HWY_EXPORT(l1_norm_all);
HWY_EXPORT(square_sum_all);
HWY_EXPORT(all_finite_all);

namespace {

void check(TensorView grad, std::initializer_list<std::size_t> lengths) {
  for (const std::size_t length : lengths) {
    if (length == static_cast<std::size_t>(grad.elements)) continue;
    throw InvalidArgument("weights or state of " + std::to_string(length) + " elements: expected " +
                          std::to_string(grad.elements) + ", as many as the gradient has");
  }
}

void check(AdamSteps steps) {
  if (steps.m < 1 || steps.v < 1) {
    throw InvalidArgument("Adam's steps " + std::to_string(steps.m) + " and " +
                          std::to_string(steps.v) + ": expected 1 or more");
  }
}

void check_out(TensorView grad, TensorView out) {
  if (out.dtype != grad.dtype && out.dtype != DType::kF32) {
    throw InvalidArgument("momentum as " + std::string(name(out.dtype)) + ": expected fp32 or " +
                          std::string(name(grad.dtype)) + ", the gradient's");
  }
}

float* check_velocity(TensorView grad, std::span<float> velocity, const char* option,
                      double value) {
  if (!velocity.empty()) {
    check(grad, {velocity.size()});
    return velocity.data();
  }
  if (value != 0 && grad.elements > 0) {
    throw InvalidArgument(std::string(option) + " " + std::to_string(value) +
                          " without a velocity: expected one of " + std::to_string(grad.elements) +
                          " elements");
  }
  return nullptr;
}

}  // namespace

void sgd_step(const SgdOptions& options, TensorView grad, std::span<float> weights,
              std::span<float> velocity) {
  check(grad, {weights.size()});
  float* u = check_velocity(grad, velocity, "momentum", options.momentum);
  HWY_DYNAMIC_DISPATCH(sgd_all)(factors_of(options), grad, weights.data(), u);
}

void dgc_step(const SgdOptions& options, TensorView mean, std::span<float> weights,
              std::span<float> decay_velocity) {
  check(mean, {weights.size()});
  float* b = check_velocity(mean, decay_velocity, "weight_decay", options.weight_decay);
  HWY_DYNAMIC_DISPATCH(dgc_all)(factors_of(options), mean, weights.data(), b);
}

void adam_step(const AdamOptions& options, AdamSteps steps, TensorView grad,
               std::span<float> weights, std::span<float> m, std::span<float> v) {
  check(grad, {weights.size(), m.size(), v.size()});
  check(steps);
  HWY_DYNAMIC_DISPATCH(adam_all)
  (factors_of(options, steps), grad, weights.data(), m.data(), v.data());
}

void local_momentum(const MomentumOptions& options, TensorView grad, std::span<const float> m,
                    std::span<const float> v, TensorView out) {
  check(grad, {m.size(), v.size(), static_cast<std::size_t>(out.elements)});
  check_out(grad, out);
  HWY_DYNAMIC_DISPATCH(local_momentum_all)(factors_of(options), grad, m.data(), v.data(), out);
}

void frozen_adam_step(const AdamOptions& options, AdamSteps steps, TensorView reduced,
                      std::span<float> weights, std::span<float> m, std::span<const float> v) {
  check(reduced, {weights.size(), m.size(), v.size()});
  check(steps);
  HWY_DYNAMIC_DISPATCH(frozen_adam_all)
  (frozen_factors_of(options, steps), reduced, weights.data(), m.data(), v.data());
}

void local_adam_step(const AdamOptions& options, TensorView grad, std::span<float> weights,
                     std::span<float> m, std::span<const float> v, std::span<float> u,
                     std::span<float> anchor) {
  check(grad, {weights.size(), m.size(), v.size(), u.size()});
  if (!anchor.empty()) check(grad, {anchor.size()});
  HWY_DYNAMIC_DISPATCH(local_adam_all)
  (local_factors_of(options), grad, weights.data(), m.data(), v.data(), u.data(),
   anchor.empty() ? nullptr : anchor.data());
}

void local_sum(const MomentumOptions& options, TensorView grad, std::span<const float> m,
               std::span<const float> v, std::span<const float> u, TensorView out) {
  check(grad, {m.size(), v.size(), u.size(), static_cast<std::size_t>(out.elements)});
  check_out(grad, out);
  HWY_DYNAMIC_DISPATCH(local_sum_all)
  (factors_of(options), grad, m.data(), v.data(), u.data(), out);
}

void sync_adam_step(const AdamOptions& options, double sum_lr, TensorView reduced,
                    std::span<float> weights, std::span<float> m, std::span<const float> v,
                    std::span<const float> anchor) {
  check(reduced, {weights.size(), m.size(), v.size(), anchor.size()});
  if (!(sum_lr > 0)) {
    throw InvalidArgument("a sum of learning rates of " + std::to_string(sum_lr) +
                          ": expected more than 0");
  }
  HWY_DYNAMIC_DISPATCH(sync_adam_all)
  (factors_of(options, sum_lr), reduced, weights.data(), m.data(), v.data(), anchor.data());
}

LambSums lamb_moments(const AdamOptions& options, AdamSteps steps, TensorView grad,
                      std::span<const float> weights, std::span<float> m, std::span<float> v) {
  check(grad, {weights.size(), m.size(), v.size()});
  check(steps);
  return HWY_DYNAMIC_DISPATCH(lamb_moments_all)(lamb_factors_of(options, steps), grad,
                                                weights.data(), m.data(), v.data());
}

LambSums frozen_lamb_moments(const AdamOptions& options, double factor, TensorView reduced,
                             std::span<const float> weights, std::span<float> m,
                             std::span<const float> v, std::span<float> fresh) {
  check(reduced, {weights.size(), m.size(), v.size(), fresh.size()});
  return HWY_DYNAMIC_DISPATCH(frozen_lamb_moments_all)(frozen_lamb_factors_of(options, factor),
                                                       reduced, weights.data(), m.data(), v.data(),
                                                       fresh.data());
}

void lamb_move(const AdamOptions& options, AdamSteps steps, double trust, std::span<float> weights,
               std::span<const float> m, std::span<const float> v) {
  check(view(weights), {m.size(), v.size()});
  check(steps);
  HWY_DYNAMIC_DISPATCH(lamb_move_all)
  (lamb_factors_of(options, steps), static_cast<float>(options.lr * trust), false, weights.data(),
   m.data(), v.data(), view(weights).elements);
}

void frozen_lamb_move(const AdamOptions& options, double trust, std::span<float> weights,
                      std::span<const float> m, std::span<const float> v) {
  check(view(weights), {m.size(), v.size()});
  HWY_DYNAMIC_DISPATCH(lamb_move_all)
  (frozen_lamb_factors_of(options, 1), static_cast<float>(options.lr * trust), true, weights.data(),
   m.data(), v.data(), view(weights).elements);
}

bool all_finite(TensorView values) { return HWY_DYNAMIC_DISPATCH(all_finite_all)(values); }

double square_sum(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(square_sum_all)(values);
}

double l1_norm(std::span<const float> values) { return HWY_DYNAMIC_DISPATCH(l1_norm_all)(values); }

}  // namespace thinwire::optim
#endif  // HWY_ONCE
