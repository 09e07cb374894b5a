#include "optim/optim_reference.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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
          .decay = static_cast<float>(o.decoupled ? o.lr * o.weight_decay : 0)};
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

AdamFactors factors_of(const AdamOptions& o, std::int64_t step) {
  if (!o.bias_correction) return with_corrections(o, 1, 1);
  return with_corrections(o, bias_correction(o.beta1, step), bias_correction(o.beta2, step));
}

AdamFactors frozen_factors_of(const AdamOptions& options) {
  AdamOptions o = options;
  o.decoupled = true;
  return with_corrections(o, 1, 1);
}

double bias_correction(double beta, std::int64_t step) {
  double power = 1;
  for (double square = beta; step > 0; step /= 2, square *= square) {
    if (step % 2 == 1) power *= square;
  }
  return 1 - power;
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
      weights[i] = moved(weights[i], m[i], v[i], f);
    }
  });
}

void local_momentum_reference(float m_mix, TensorView grad, const float* m, const float* v,
                              TensorView out) {
  visit(grad, [&](const auto* g) {
    visit(out, [&](auto* sent) {
      using T = std::remove_pointer_t<decltype(sent)>;
      for (std::int64_t i = 0; i < grad.elements; ++i) {
        const float local = mixed(m[i], to_float(g[i]), m_mix);
        sent[i] = from_float<T>(v[i] == 0 ? 0.0F : local);
      }
    });
  });
}

void frozen_adam_reference(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                           const float* v) {
  visit(reduced, [&](const auto* mean) {
    for (std::int64_t i = 0; i < reduced.elements; ++i) {
      m[i] = v[i] == 0 ? 0.0F : to_float(mean[i]);
      if (v[i] != 0) weights[i] = moved(weights[i], m[i], v[i], f);
    }
  });
}

double l1_norm_reference(std::span<const float> values) {
  double sum = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += kNormBlock) {
    const std::size_t n = std::min(kNormBlock, values.size() - begin);
    double lanes[kNormLanes] = {};
    for (std::size_t i = 0; i < n; ++i) {
      lanes[i % kNormLanes] += std::fabs(static_cast<double>(values[begin + i]));
    }
    sum += sum_lanes(lanes);
  }
  return sum;
}

double sum_lanes(double* lanes) {
  for (std::size_t half = kNormLanes / 2; half > 0; half /= 2) {
    for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

}  // namespace thinwire::optim
