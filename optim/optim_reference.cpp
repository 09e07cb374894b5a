#include "optim/optim_reference.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "compressors/core/codec_support.h"

namespace thinwire::optim {
namespace {

AdamFactors with_corrections(const AdamOptions& o, double of_m, double of_v) {
  const double root = std::sqrt(of_v);
  return {.m_mix = static_cast<float>(1 - o.beta1),
          .v_keep = static_cast<float>(o.beta2),
          .v_mix = static_cast<float>(1 - o.beta2),
          .l2 = static_cast<float>(o.decoupled ? 0 : o.weight_decay),
          .eps = static_cast<float>(o.eps * root),
          .size = static_cast<float>(o.lr * root / of_m),
          .decay = static_cast<float>(o.decoupled ? o.lr * o.weight_decay : 0),
          .least = static_cast<float>(o.least_v)};
}

float mixed(float m, float g, float mix) { return m + mix * (g - m); }

float moved(float weight, float m, float v, const AdamFactors& f) {
  return weight - (f.size * m / (std::sqrt(v) + f.eps) + f.decay * weight);
}

}  // namespace

SgdFactors factors_of(const SgdOptions& o) {
  return {.lr = static_cast<float>(o.lr),
          .momentum = static_cast<float>(o.momentum),
          .weight_decay = static_cast<float>(o.weight_decay),
          .nesterov = o.nesterov};
}

AdamFactors factors_of(const AdamOptions& o, AdamSteps steps) {
  if (!o.bias_correction) return with_corrections(o, 1, 1);
  return with_corrections(o, bias_correction(o.beta1, steps.m), bias_correction(o.beta2, steps.v));
}

AdamFactors frozen_factors_of(const AdamOptions& options, AdamSteps steps) {
  AdamOptions o = options;
  o.decoupled = true;
  return factors_of(o, steps);
}

AdamFactors local_factors_of(const AdamOptions& options) {
  AdamOptions o = options;
  o.bias_correction = false;
  return frozen_factors_of(o, {});
}

MomentumFactors factors_of(const MomentumOptions& o) {
  return {.m_mix = static_cast<float>(1 - o.beta1),
          .loss_scale = static_cast<float>(o.loss_scale),
          .factor = static_cast<float>(o.factor)};
}

SyncFactors factors_of(const AdamOptions& o, double sum_lr) {
  return {.sum_lr = static_cast<float>(sum_lr),
          .eps = static_cast<float>(o.eps),
          .decay = static_cast<float>(sum_lr * o.weight_decay)};
}

LambFactors lamb_factors_of(const AdamOptions& options, AdamSteps steps) {
  AdamOptions o = options;
  o.lr = 1;
  o.decoupled = true;
  const AdamFactors f = factors_of(o, steps);
  return {.m_mix = f.m_mix,
          .v_keep = f.v_keep,
          .v_mix = f.v_mix,
          .eps = f.eps,
          .size = f.size,
          .decay = f.decay,
          .beta1 = static_cast<float>(o.beta1),
          .g_mix = static_cast<float>(1 / (1 - o.beta1)),
          .factor = 1};
}

LambFactors frozen_lamb_factors_of(const AdamOptions& options, double factor) {
  AdamOptions o = options;
  o.bias_correction = false;
  LambFactors f = lamb_factors_of(o, {});
  f.factor = static_cast<float>(factor);
  return f;
}

double bias_correction(double beta, std::int64_t step) {
  double power = 1;
  for (double square = beta; step > 0; step /= 2, square *= square) {
    if (step % 2 == 1) power *= square;
  }
  return 1 - power;
}

void fold_bias(const AdamOptions& options, AdamSteps steps, std::span<float> m,
               std::span<float> v) {
  if (!options.bias_correction) return;
  const auto of_m = static_cast<float>(bias_correction(options.beta1, steps.m));
  const auto of_v = static_cast<float>(bias_correction(options.beta2, steps.v));
  for (float& x : m) x /= of_m;
  for (float& x : v) x /= of_v;
}

void floor_variance(double least, std::span<float> v) {
  const auto floor = static_cast<float>(least);
  for (float& x : v) {
    if (x != 0 && x < floor) x = floor;
  }
}

void sgd_reference(const SgdFactors& f, TensorView grad, float* weights, float* velocity) {
  visit(grad, [&](const auto* g) {
    for (std::int64_t i = 0; i < grad.elements; ++i) {
      float d = to_float(g[i]) + f.weight_decay * weights[i];
      if (velocity != nullptr) {
        velocity[i] = f.momentum * velocity[i] + d;
        d = f.nesterov ? d + f.momentum * velocity[i] : velocity[i];
      }
      weights[i] -= f.lr * d;
    }
  });
}

void dgc_reference(const SgdFactors& f, TensorView mean, float* weights, float* decay_velocity) {
  visit(mean, [&](const auto* g) {
    for (std::int64_t i = 0; i < mean.elements; ++i) {
      float d = to_float(g[i]);
      if (decay_velocity != nullptr) {
        const float decay = f.weight_decay * weights[i];
        float& b = decay_velocity[i];
        b = f.momentum * b + decay;
        d += f.nesterov ? decay + f.momentum * b : b;
      }
      weights[i] -= f.lr * d;
    }
  });
}

void adam_reference(const AdamFactors& f, TensorView grad, float* weights, float* m, float* v) {
  visit(grad, [&](const auto* gradient) {
    for (std::int64_t i = 0; i < grad.elements; ++i) {
      const float g = to_float(gradient[i]) + f.l2 * weights[i];
      m[i] = mixed(m[i], g, f.m_mix);
      v[i] = f.v_keep * v[i] + f.v_mix * g * g;
      weights[i] = moved(weights[i], m[i], std::max(v[i], f.least), f);
    }
  });
}

void local_momentum_reference(const MomentumFactors& f, TensorView grad, const float* m,
                              const float* v, TensorView out) {
  visit(grad, [&](const auto* g) {
    visit(out, [&](auto* sent) {
      using T = std::remove_pointer_t<decltype(sent)>;
      for (std::int64_t i = 0; i < grad.elements; ++i) {
        const float local = mixed(f.loss_scale * m[i], to_float(g[i]), f.m_mix);
        sent[i] = from_float<T>(v[i] == 0 ? 0.0F : f.factor * local);
      }
    });
  });
}

void frozen_adam_reference(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                           const float* v) {
  visit(reduced, [&](const auto* mean) {
    for (std::int64_t i = 0; i < reduced.elements; ++i) {
      m[i] = v[i] == 0 ? 0.0F : to_float(mean[i]);
      if (v[i] != 0) weights[i] = moved(weights[i], m[i], std::max(v[i], f.least), f);
    }
  });
}

void local_adam_reference(const AdamFactors& f, TensorView grad, float* weights, float* m,
                          const float* v, float* u, float* anchor) {
  visit(grad, [&](const auto* g) {
    for (std::int64_t i = 0; i < grad.elements; ++i) {
      if (anchor != nullptr) {
        anchor[i] = weights[i];
        u[i] = 0;
      }
      if (v[i] == 0) continue;
      m[i] = mixed(m[i], to_float(g[i]), f.m_mix);
      u[i] += f.size * m[i];
      weights[i] = moved(weights[i], m[i], v[i], f);
    }
  });
}

void local_sum_reference(const MomentumFactors& f, TensorView grad, const float* m, const float* v,
                         const float* u, TensorView out) {
  visit(grad, [&](const auto* g) {
    visit(out, [&](auto* sent) {
      using T = std::remove_pointer_t<decltype(sent)>;
      for (std::int64_t i = 0; i < grad.elements; ++i) {
        const float local = mixed(f.loss_scale * m[i], to_float(g[i]), f.m_mix);
        const float sum = f.loss_scale * u[i] + f.factor * local;
        sent[i] = from_float<T>(v[i] == 0 ? 0.0F : sum);
      }
    });
  });
}

void sync_adam_reference(const SyncFactors& f, TensorView reduced, float* weights, float* m,
                         const float* v, const float* anchor) {
  visit(reduced, [&](const auto* mean) {
    for (std::int64_t i = 0; i < reduced.elements; ++i) {
      const float sum = v[i] == 0 ? 0.0F : to_float(mean[i]);
      m[i] = sum / f.sum_lr;
      weights[i] = anchor[i];
      if (v[i] != 0) weights[i] -= sum / (std::sqrt(v[i]) + f.eps) + f.decay * weights[i];
    }
  });
}

float lamb_element(const LambFactors& f, float grad, float weight, float& m, float& v) {
  m = mixed(m, grad, f.m_mix);
  v = f.v_keep * v + f.v_mix * grad * grad;
  return f.size * m / (std::sqrt(v) + f.eps) + f.decay * weight;
}

FrozenLambElement frozen_lamb_element(const LambFactors& f, float reduced, float weight, float& m,
                                      float v, float& fresh) {
  if (v == 0) {
    m = 0;
    return {};
  }
  const float next = reduced / f.factor;
  const float g = (next - f.beta1 * m) * f.g_mix;
  m = next;
  fresh = f.v_keep * fresh + f.v_mix * g * g;
  const float root = std::sqrt(v) + f.eps;
  const float direction = f.size * next / root;
  return {.direction = direction,
          .update = direction + f.decay * weight,
          .ratio = root / (std::sqrt(fresh) + f.eps)};
}

LambSums lamb_moments_reference(const LambFactors& f, TensorView grad, const float* weights,
                                float* m, float* v) {
  const auto n = static_cast<std::size_t>(grad.elements);
  std::vector<float> update(n);
  visit(grad, [&](const auto* gradient) {
    for (std::size_t i = 0; i < n; ++i) {
      update[i] = lamb_element(f, to_float(gradient[i]), weights[i], m[i], v[i]);
    }
  });
  return {.weights = square_sum_reference({weights, n}), .update = square_sum_reference(update)};
}

LambSums frozen_lamb_moments_reference(const LambFactors& f, TensorView reduced,
                                       const float* weights, float* m, const float* v,
                                       float* fresh) {
  const auto n = static_cast<std::size_t>(reduced.elements);
  std::vector<float> direction(n);
  std::vector<float> update(n);
  LambSums sums;
  visit(reduced, [&](const auto* mean) {
    for (std::size_t i = 0; i < n; ++i) {
      const FrozenLambElement element =
          frozen_lamb_element(f, to_float(mean[i]), weights[i], m[i], v[i], fresh[i]);
      direction[i] = element.direction;
      update[i] = element.update;
      sums.ratio = std::max(sums.ratio, element.ratio);
    }
  });
  sums.weights = square_sum_reference({weights, n});
  sums.update = square_sum_reference(update);
  sums.direction = square_sum_reference(direction);
  return sums;
}

void lamb_move_reference(const LambFactors& f, float lr, bool masked, float* weights,
                         const float* m, const float* v, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    if (masked && v[i] == 0) continue;
    const float update = f.size * m[i] / (std::sqrt(v[i]) + f.eps) + f.decay * weights[i];
    weights[i] -= lr * update;
  }
}

namespace {

template <typename Term>
double sum_of(std::span<const float> values, Term&& term) {
  double sum = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += kNormBlock) {
    const std::size_t n = std::min(kNormBlock, values.size() - begin);
    double lanes[kNormLanes] = {};
    for (std::size_t i = 0; i < n; ++i) {
      lanes[i % kNormLanes] += term(static_cast<double>(values[begin + i]));
    }
    sum += sum_lanes(lanes);
  }
  return sum;
}

}  // namespace

double l1_norm_reference(std::span<const float> values) {
  return sum_of(values, [](double x) { return std::fabs(x); });
}

double square_sum_reference(std::span<const float> values) {
  return sum_of(values, [](double x) { return x * x; });
}

bool all_finite_reference(TensorView values) {
  return visit(values, [&](const auto* x) {
    return std::all_of(x, x + values.elements,
                       [](auto value) { return is_finite(to_float(value)); });
  });
}

double sum_lanes(double* lanes) {
  for (std::size_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

}  // namespace thinwire::optim
