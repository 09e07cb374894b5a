// The updates of optim_kernels.h one element at a time: the oracle of optim_simd.cpp and its loop
// tails. Pointers to as many elements as the gradient has; null where a span may be empty. Pure
// functions.
#pragma once

#include <cstddef>

#include "optim/optim_kernels.h"

namespace thinwire::optim {

struct SgdFactors {
  float lr;
  float momentum;
  float weight_decay;
  bool nesterov;
};
SgdFactors factors_of(const SgdOptions& options);

// w <- w - (size m / (sqrt(v) + eps) + decay w): bias corrections are folded into size and eps.
struct AdamFactors {
  float m_mix;   // 1 - beta1
  float v_keep;  // beta2
  float v_mix;   // 1 - beta2
  float l2;      // added to the gradient, times the weight
  float eps;
  float size;
  float decay;
};
AdamFactors factors_of(const AdamOptions& options, std::int64_t step);
AdamFactors frozen_factors_of(const AdamOptions& options);

void sgd_reference(const SgdFactors& f, TensorView grad, float* weights, float* velocity);
void dgc_reference(const SgdFactors& f, TensorView mean, float* weights, float* decay_velocity);
void adam_reference(const AdamFactors& f, TensorView grad, float* weights, float* m, float* v);
void local_momentum_reference(float m_mix, TensorView grad, const float* m, const float* v,
                              TensorView out);
void frozen_adam_reference(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                           const float* v);
double l1_norm_reference(std::span<const float> values);

// Adds kNormLanes lanes as a binary tree; overwrites them.
double sum_lanes(double* lanes);

}  // namespace thinwire::optim
