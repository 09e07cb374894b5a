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
  const Move move{all(f.size), all(f.eps), all(f.decay)};
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    const VF32 g = hn::Add(load_float(grad + i), hn::Mul(l2, w));
    const VF32 new_m = mixed(load_float(m + i), g, m_mix);
    const VF32 new_v = hn::Add(hn::Mul(v_keep, load_float(v + i)), hn::Mul(hn::Mul(v_mix, g), g));
    store_float(new_m, m + i);
    store_float(new_v, v + i);
    store_float(moved(w, new_m, new_v, move), weights + i);
  }
}

template <typename T, typename Out>
HWY_NOINLINE void local_momentum_vectors(float m_mix, const T* grad, const float* m, const float* v,
                                         Out* out, std::int64_t n) {
  const VF32 mix = all(m_mix);
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const auto masked = hn::Eq(load_float(v + i), hn::Zero(F32()));
    const VF32 local = mixed(load_float(m + i), load_float(grad + i), mix);
    store_float(hn::IfThenZeroElse(masked, local), out + i);
  }
}

template <typename T>
HWY_NOINLINE void frozen_adam_vectors(const AdamFactors& f, const T* reduced, float* weights,
                                      float* m, const float* v, std::int64_t n) {
  const Move move{all(f.size), all(f.eps), all(f.decay)};
  for (std::int64_t i = 0; i < n; i += static_cast<std::int64_t>(hn::Lanes(F32()))) {
    const VF32 w = load_float(weights + i);
    const VF32 variance = load_float(v + i);
    const auto masked = hn::Eq(variance, hn::Zero(F32()));
    const VF32 new_m = hn::IfThenZeroElse(masked, load_float(reduced + i));
    store_float(new_m, m + i);
    store_float(hn::IfThenElse(masked, w, moved(w, new_m, variance, move)), weights + i);
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

void local_momentum_all(float m_mix, TensorView grad, const float* m, const float* v,
                        TensorView out) {
  const std::int64_t n = whole_vectors(grad.elements);
  visit(grad, [&](auto* g) {
    if (out.dtype == grad.dtype) {
      local_momentum_vectors(m_mix, g, m, v, static_cast<decltype(g)>(out.data), n);
    } else {
      local_momentum_vectors(m_mix, g, m, v, static_cast<float*>(out.data), n);
    }
  });
  local_momentum_reference(m_mix, grad.slice(n, grad.elements), m + n, v + n,
                           out.slice(n, out.elements));
}

void frozen_adam_all(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                     const float* v) {
  const std::int64_t n = whole_vectors(reduced.elements);
  visit(reduced, [&](const auto* g) { frozen_adam_vectors(f, g, weights, m, v, n); });
  frozen_adam_reference(f, reduced.slice(n, reduced.elements), weights + n, m + n, v + n);
}

// |element i| of a line is added to lane i.
HWY_INLINE void add_line(const float* line, double* lanes) {
  const hn::CappedTag<double, 8> d;
  const hn::Rebind<float, decltype(d)> as_float;
  for (std::size_t i = 0; i < kNormLanes; i += hn::Lanes(d)) {
    const auto x = hn::PromoteTo(d, hn::Abs(hn::LoadU(as_float, line + i)));
    hn::Store(hn::Add(hn::Load(d, lanes + i), x), d, lanes + i);
  }
}

double l1_norm_all(std::span<const float> values) {
  double sum = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += kNormBlock) {
    const std::size_t n = std::min(kNormBlock, values.size() - begin);
    const std::size_t whole = n / kNormLanes * kNormLanes;
    const float* block = values.data() + begin;
    HWY_ALIGN double lanes[kNormLanes] = {};
    HWY_ALIGN float last[kNormLanes] = {};
    for (std::size_t i = 0; i < whole; i += kNormLanes) add_line(block + i, lanes);
    std::memcpy(last, block + whole, (n - whole) * sizeof(float));
    add_line(last, lanes);
    sum += sum_lanes(lanes);
  }
  return sum;
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
HWY_EXPORT(l1_norm_all);

namespace {

void check(TensorView grad, std::initializer_list<std::size_t> lengths) {
  for (const std::size_t length : lengths) {
    if (length == static_cast<std::size_t>(grad.elements)) continue;
    throw InvalidArgument("weights or state of " + std::to_string(length) + " elements: expected " +
                          std::to_string(grad.elements) + ", as many as the gradient has");
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

void adam_step(const AdamOptions& options, std::int64_t step, TensorView grad,
               std::span<float> weights, std::span<float> m, std::span<float> v) {
  check(grad, {weights.size(), m.size(), v.size()});
  if (step < 1) {
    throw InvalidArgument("Adam's step " + std::to_string(step) + ": expected 1 or more");
  }
  HWY_DYNAMIC_DISPATCH(adam_all)
  (factors_of(options, step), grad, weights.data(), m.data(), v.data());
}

void local_momentum(double beta1, TensorView grad, std::span<const float> m,
                    std::span<const float> v, TensorView out) {
  check(grad, {m.size(), v.size(), static_cast<std::size_t>(out.elements)});
  if (out.dtype != grad.dtype && out.dtype != DType::kF32) {
    throw InvalidArgument("momentum as " + std::string(name(out.dtype)) + ": expected fp32 or " +
                          std::string(name(grad.dtype)) + ", the gradient's");
  }
  HWY_DYNAMIC_DISPATCH(local_momentum_all)
  (static_cast<float>(1 - beta1), grad, m.data(), v.data(), out);
}

void frozen_adam_step(const AdamOptions& options, TensorView reduced, std::span<float> weights,
                      std::span<float> m, std::span<const float> v) {
  check(reduced, {weights.size(), m.size(), v.size()});
  HWY_DYNAMIC_DISPATCH(frozen_adam_all)
  (frozen_factors_of(options), reduced, weights.data(), m.data(), v.data());
}

double l1_norm(std::span<const float> values) { return HWY_DYNAMIC_DISPATCH(l1_norm_all)(values); }

}  // namespace thinwire::optim
#endif  // HWY_ONCE
