// The optimizers written plainly from their papers, one coordinate at a time, in fp64. Every number
// carries a bound on how far the same expression is off when each operation and each constant is
// rounded to fp32 (running error analysis: Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.3), so a comparison needs no tolerance found by trial.
#pragma once

#include <cstdint>
#include <vector>

#include "optim/optim_kernels.h"

namespace thinwire::optim {

struct Bounded {
  double value = 0;
  double error = 0;
};
// A number that fp32 holds.
Bounded exact(double value);
// One that is rounded to fp32 first.
Bounded constant(double value);
Bounded operator+(Bounded a, Bounded b);
Bounded operator-(Bounded a, Bounded b);
Bounded operator*(Bounded a, Bounded b);
// a / b, where b's bound keeps it away from zero.
Bounded operator/(Bounded a, Bounded b);
Bounded sqrt(Bounded a);

struct Coordinate {
  Bounded weight;
  Bounded velocity;        // SGD's u
  Bounded decay_velocity;  // DGC's b
  Bounded m;
  Bounded v;
  Bounded u;       // 0/1 Adam's sum
  Bounded anchor;  // and the weight that it counts from
  Bounded fresh;   // 1-bit LAMB's second variance
};

void reference_sgd(Coordinate& c, Bounded grad, const SgdOptions& options);
void reference_dgc(Coordinate& c, Bounded mean, const SgdOptions& options);
void reference_adam(Coordinate& c, Bounded grad, const AdamOptions& options, AdamSteps steps);
void reference_fold_bias(Coordinate& c, const AdamOptions& options, AdamSteps steps);
Bounded reference_local_momentum(const Coordinate& c, Bounded grad, double beta1);
void reference_frozen_adam(Coordinate& c, Bounded reduced, const AdamOptions& options,
                           AdamSteps steps);
void reference_local_adam(Coordinate& c, Bounded grad, const AdamOptions& options);
Bounded reference_local_sum(const Coordinate& c, Bounded grad, const AdamOptions& options);
void reference_sync_adam(Coordinate& c, Bounded reduced, double sum_lr, const AdamOptions& options);

// LAMB's update d of a coordinate, and of a frozen one what else its layer looks at.
Bounded reference_lamb_moments(Coordinate& c, Bounded grad, const AdamOptions& options,
                               std::int64_t step);
struct FrozenUpdate {
  Bounded direction;
  Bounded update;
  Bounded ratio;
};
FrozenUpdate reference_frozen_lamb_moments(Coordinate& c, Bounded reduced,
                                           const AdamOptions& options);
void reference_lamb_move(Coordinate& c, Bounded trust, Bounded update, const AdamOptions& options);
// Of numbers that are rounded, added in fp64: a sum that is off by their own errors only.
Bounded square_sum(const std::vector<Bounded>& values);
// |max(a + e) - max a| <= max |e|.
Bounded largest(const std::vector<Bounded>& values);
// std::clamp: off by the error of the one of the three that it gives, or of those it may give.
Bounded clamp(Bounded value, Bounded low, Bounded high);

}  // namespace thinwire::optim
