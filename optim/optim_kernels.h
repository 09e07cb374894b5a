// The optimizers' updates over flat memory, each in one pass. Weights and state are fp32; gradients
// fp32, bf16, fp16 or fp64, read as fp32. n is the gradient's element count and the length of every
// span; any n >= 0, any alignment that the element's size allows. Memory is the caller's, nothing
// is allocated; spans do not overlap each other or the gradient unless said so.
//
// Every element depends on the inputs of its place only, in a fixed order of fp32 operations, none
// contracted: ranges may be split between threads, and all SIMD targets give the same bits. NaN or
// Inf in a gradient goes into the state and the weight of its own element and nowhere else; of NaN
// results the bits are not promised. A zeroed state is the state before the first step.
//
// Pure functions, thread-safe on different memory. InvalidArgument when lengths differ, where state
// is missing that the options need, and for other dtypes, before anything is written. The options'
// ranges are the caller's to check.
#pragma once

#include <cstdint>
#include <span>

#include "compressors/core/tensor_view.h"

namespace thinwire::optim {

struct SgdOptions {
  double lr = 1e-3;
  double momentum = 0;      // M in [0, 1)
  double weight_decay = 0;  // wd >= 0
  bool nesterov = false;    // with momentum > 0
};

// torch.optim.SGD, dampening 0:
//   d = g + wd w;  u <- M u + d;  w <- w - lr u,  nesterov: w <- w - lr (d + M u).
// `velocity` is u; it may be empty when momentum is 0.
void sgd_step(const SgdOptions& options, TensorView grad, std::span<float> weights,
              std::span<float> velocity);

// What follows the exchange in Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887):
// `mean` has had its momentum before it was compressed, weight decay has one of its own:
//   b <- M b + wd w;  w <- w - lr (mean + b),  nesterov: w <- w - lr (mean + wd w + M b).
// Momentum being linear, both together are sgd_step where nothing is lost to compression.
// `decay_velocity` is b; it may be empty when weight_decay is 0.
void dgc_step(const SgdOptions& options, TensorView mean, std::span<float> weights,
              std::span<float> decay_velocity);

struct AdamOptions {
  double lr = 1e-3;
  double beta1 = 0.9;       // in [0, 1)
  double beta2 = 0.999;     // in [0, 1)
  double eps = 1e-8;        // > 0
  double weight_decay = 0;  // wd >= 0
  bool decoupled = false;   // AdamW (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101)
  bool bias_correction = true;
  double least_v = 0;  // of v in sqrt(v), not of v itself; adam_step and frozen_adam_step
};

// How often m and v have been updated, this step included: what their bias corrections go by.
struct AdamSteps {
  std::int64_t m = 1;
  std::int64_t v = 1;
};

// 1 - beta^step by multiplications alone: the same bits whatever the C library. beta in [0, 1),
// step >= 0.
double bias_correction(double beta, std::int64_t step);

// Adam (Kingma and Ba, ICLR 2015, arXiv 1412.6980, algorithm 1) as torch.optim.Adam and AdamW:
//   g <- g + wd w unless decoupled;  m <- m + (1 - beta1)(g - m);  v <- beta2 v + (1 - beta2) g^2;
//   w <- w - lr (m^ / (sqrt(v^) + eps) + wd w if decoupled)
// with m^ = m / (1 - beta1^steps.m), v^ = v / (1 - beta2^steps.v), or m and v without bias
// correction.
// InvalidArgument for steps below 1.
void adam_step(const AdamOptions& options, AdamSteps steps, TensorView grad,
               std::span<float> weights, std::span<float> m, std::span<float> v);

// Steps that exchange momentum under a variance as it is: 1-bit Adam's, whose variance is frozen
// (Tang et al., ICML 2021, arXiv 2102.02888, algorithm 1), and 0/1 Adam's between those that
// measure it. Where v is 0, an element had no gradient as long as v was measured (with decoupled
// weight decay: the other one enters v): it sends 0 and is not updated, whatever stands in the
// gradient there. When a variance freezes for good, both moments are divided by their bias
// corrections once, and updates go on at the same size without.

// Divides both by their bias corrections, unless the options want none.
void fold_bias(const AdamOptions& options, AdamSteps steps, std::span<float> m, std::span<float> v);

// Raises what is below `least` to it, but zeros.
void floor_variance(double least, std::span<float> v);

struct MomentumOptions {
  double beta1 = 0.9;     // in [0, 1)
  double loss_scale = 1;  // what the gradient comes multiplied by, > 0; m does not
  double factor = 1;      // what `out` is multiplied by
};

// Before the exchange: out = factor (S m + (1 - beta1)(g - S m)), S the loss scale; 0 where v is 0.
// `out` has n elements, fp32 or the gradient's dtype (then rounded to nearest even), and may be the
// gradient itself.
void local_momentum(const MomentumOptions& options, TensorView grad, std::span<const float> m,
                    std::span<const float> v, TensorView out);

// After it: m <- reduced;  w <- w - lr (m^ / (sqrt(v^) + eps) + wd w), m^ and v^ as in adam_step.
// Where v is 0, m <- 0 and w stays. Weight decay is decoupled, whatever the options say. `reduced`
// as a gradient above. InvalidArgument for steps below 1.
void frozen_adam_step(const AdamOptions& options, AdamSteps steps, TensorView reduced,
                      std::span<float> weights, std::span<float> m, std::span<const float> v);

// 0/1 Adam (Lu et al., ICLR 2023, arXiv 2202.06009, algorithm 1) with a frozen variance, masked as
// above. u is what the local steps since the last exchange have added up to; weights at that
// exchange, the same on all ranks, are kept as `anchor`.
//
// A step without exchange: m <- m + (1 - beta1)(g - m);  u <- u + lr m;
//   w <- w - lr (m / (sqrt(v) + eps) + wd w).
// `anchor` is given in the first one since an exchange, and empty else: it becomes w from before
// the step, and u, whatever stands there, counts as 0.
void local_adam_step(const AdamOptions& options, TensorView grad, std::span<float> weights,
                     std::span<float> m, std::span<const float> v, std::span<float> u,
                     std::span<float> anchor);
// Before an exchange: out = S u + lr (S m + (1 - beta1)(g - S m)), with options.factor as lr.
void local_sum(const MomentumOptions& options, TensorView grad, std::span<const float> m,
               std::span<const float> v, std::span<const float> u, TensorView out);
// After it, sum_lr > 0 being the sum of lr over those steps and this one:
//   m <- reduced / sum_lr;  w <- anchor - (reduced / (sqrt(v) + eps) + sum_lr wd anchor).
// `anchor` may be `weights`, where no step was taken without exchange.
void sync_adam_step(const AdamOptions& options, double sum_lr, TensorView reduced,
                    std::span<float> weights, std::span<float> m, std::span<const float> v,
                    std::span<const float> anchor);

// LAMB (You et al., ICLR 2020, arXiv 1904.00962) in two passes, between which the size of the step
// is chosen by the norms of all weights and of the whole update
//   d = m^ / (sqrt(v^) + eps) + wd w.
// Sums of squares in fp64, summed as in l1_norm.
struct LambSums {
  double weights = 0;    // of w
  double update = 0;     // of d
  double direction = 0;  // of d without wd w; frozen_lamb_moments only
  float ratio = 0;       // largest (sqrt(v) + eps) / (sqrt(fresh) + eps); frozen_lamb_moments only
};

// m and v as in adam_step, decoupled; weights are only read.
LambSums lamb_moments(const AdamOptions& options, AdamSteps steps, TensorView grad,
                      std::span<const float> weights, std::span<float> m, std::span<float> v);
// 1-bit LAMB (Li et al., HiPC 2022, arXiv 2104.06069) with a frozen variance, masked as above:
//   m' <- reduced / factor;  g' = (m' - beta1 m) / (1 - beta1);  m <- m';
//   fresh <- beta2 fresh + (1 - beta2) g'^2.
LambSums frozen_lamb_moments(const AdamOptions& options, double factor, TensorView reduced,
                             std::span<const float> weights, std::span<float> m,
                             std::span<const float> v, std::span<float> fresh);
// w <- w - lr trust d. Frozen: m and v as they are for m^ and v^, and where v is 0 w stays.
void lamb_move(const AdamOptions& options, AdamSteps steps, double trust, std::span<float> weights,
               std::span<const float> m, std::span<const float> v);
void frozen_lamb_move(const AdamOptions& options, double trust, std::span<float> weights,
                      std::span<const float> m, std::span<const float> v);

// The sum of |x| in fp64, the same bits on every SIMD target: in blocks of kNormBlock, element i of
// a block on lane i mod kNormLanes, the lanes added as a binary tree, the blocks in order. 0 for
// none, NaN when any is NaN.
inline constexpr std::size_t kNormBlock = 4096;
inline constexpr std::size_t kNormLanes = 16;
double l1_norm(std::span<const float> values);
// The same of x^2.
double square_sum(std::span<const float> values);
// No NaN, no Inf.
bool all_finite(TensorView values);

}  // namespace thinwire::optim
