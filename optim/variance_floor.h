// What a variance is at least where momenta travel in one bit. Every element of a tensor is then
// off by about s, the root mean square of the momentum; where sqrt(v) is less, the error alone
// moves the weight by more than the learning rate.
// The papers have no floor, and diverge where variances of a tensor differ by orders (a ReLU
// network in which some units rest). Pure functions; sums in the fixed order of square_sum.
#pragma once

#include <span>

#include "optim/optim_kernels.h"

namespace thinwire::optim {

// s^2 = mean(m^2), m without bias.
inline double momentum_floor(std::span<const float> m) {
  return m.empty() ? 0 : square_sum(m) / static_cast<double>(m.size());
}

// Of moments that hold their bias, after so many steps, at least 1 of each: so does the floor of v.
inline double momentum_floor(const AdamOptions& options, AdamSteps steps,
                             std::span<const float> m) {
  if (!options.bias_correction) return momentum_floor(m);
  const double of_m = bias_correction(options.beta1, steps.m);
  return momentum_floor(m) * bias_correction(options.beta2, steps.v) / (of_m * of_m);
}

}  // namespace thinwire::optim
