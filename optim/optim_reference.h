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
  float least;  // of v in sqrt(v)
};
AdamFactors factors_of(const AdamOptions& options, AdamSteps steps);
AdamFactors frozen_factors_of(const AdamOptions& options, AdamSteps steps);
// Of local steps, whose moments hold no bias.
AdamFactors local_factors_of(const AdamOptions& options);

void sgd_reference(const SgdFactors& f, TensorView grad, float* weights, float* velocity);
void dgc_reference(const SgdFactors& f, TensorView mean, float* weights, float* decay_velocity);
void adam_reference(const AdamFactors& f, TensorView grad, float* weights, float* m, float* v);

struct MomentumFactors {
  float m_mix;  // 1 - beta1
  float loss_scale;
  float factor;
};
MomentumFactors factors_of(const MomentumOptions& options);
void local_momentum_reference(const MomentumFactors& f, TensorView grad, const float* m,
                              const float* v, TensorView out);
void frozen_adam_reference(const AdamFactors& f, TensorView reduced, float* weights, float* m,
                           const float* v);

// What leads from the anchor to the weights after an exchange:
// w <- anchor - (reduced / (sqrt(v) + eps) + decay anchor).
struct SyncFactors {
  float sum_lr;
  float eps;
  float decay;
};
SyncFactors factors_of(const AdamOptions& options, double sum_lr);
void local_adam_reference(const AdamFactors& f, TensorView grad, float* weights, float* m,
                          const float* v, float* u, float* anchor);
void local_sum_reference(const MomentumFactors& f, TensorView grad, const float* m, const float* v,
                         const float* u, TensorView out);
void sync_adam_reference(const SyncFactors& f, TensorView reduced, float* weights, float* m,
                         const float* v, const float* anchor);

// d = size m / (sqrt(v) + eps) + decay w.
struct LambFactors {
  float m_mix;
  float v_keep;
  float v_mix;
  float eps;
  float size;
  float decay;
  float beta1;   // frozen only, as what follows
  float g_mix;   // 1 / (1 - beta1)
  float factor;  // m is `reduced` divided by it
};
LambFactors lamb_factors_of(const AdamOptions& options, AdamSteps steps);
LambFactors frozen_lamb_factors_of(const AdamOptions& options, double factor);
// One element: the new m and v (or fresh), and what is returned.
float lamb_element(const LambFactors& f, float grad, float weight, float& m, float& v);
struct FrozenLambElement {
  float direction = 0;
  float update = 0;
  float ratio = 0;
};
FrozenLambElement frozen_lamb_element(const LambFactors& f, float reduced, float weight, float& m,
                                      float v, float& fresh);
LambSums lamb_moments_reference(const LambFactors& f, TensorView grad, const float* weights,
                                float* m, float* v);
LambSums frozen_lamb_moments_reference(const LambFactors& f, TensorView reduced,
                                       const float* weights, float* m, const float* v,
                                       float* fresh);
// `lr` is the step's size, trust included. masked: where v is 0 the weight stays.
void lamb_move_reference(const LambFactors& f, float lr, bool masked, float* weights,
                         const float* m, const float* v, std::int64_t n);

double l1_norm_reference(std::span<const float> values);
double square_sum_reference(std::span<const float> values);
bool all_finite_reference(TensorView values);

// Adds kNormLanes lanes as a binary tree; overwrites them.
double sum_lanes(double* lanes);

}  // namespace thinwire::optim
