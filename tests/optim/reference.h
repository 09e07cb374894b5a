// The optimizers written plainly from their papers, one coordinate at a time, in fp64. Every number
// carries a bound on how far the same expression is off when each operation and each constant is
// rounded to fp32 (running error analysis: Higham, Accuracy and Stability of Numerical Algorithms,
// section 3.3), so a comparison needs no tolerance found by trial.
#pragma once

#include <cstdint>

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
};

void reference_sgd(Coordinate& c, Bounded grad, const SgdOptions& options);
void reference_dgc(Coordinate& c, Bounded mean, const SgdOptions& options);
void reference_adam(Coordinate& c, Bounded grad, const AdamOptions& options, std::int64_t step);
Bounded reference_local_momentum(const Coordinate& c, Bounded grad, double beta1);
void reference_frozen_adam(Coordinate& c, Bounded reduced, const AdamOptions& options);

}  // namespace thinwire::optim
