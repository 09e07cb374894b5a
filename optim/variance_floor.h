// What a variance is at least where momenta or gradients travel in one bit. Every element of a
// tensor is then off by about s, the root mean square of what travels; where sqrt(v) is less than
// what that does to the momentum, the error alone moves the weight by more than the learning rate.
// The papers have no floor, and diverge where variances of a tensor differ by orders (a ReLU
// network in which some units rest). Pure functions; sums in the fixed order of l1_norm and
// square_sum.
#pragma once

#include <span>

#include "optim/optim_kernels.h"

namespace thinwire::optim {

// Where the momentum itself travels, or sums of it: s^2 = mean(m^2). m without bias.
inline double momentum_floor(std::span<const float> m) {
  return m.empty() ? 0 : square_sum(m) / static_cast<double>(m.size());
}

// Where gradients travel: mean(v) estimates s^2. A step sends its error and takes back the last one
// (error feedback), of which the momentum gets (1 - beta1): 2 (1 - beta1)^2 s^2. v with its bias.
inline double gradient_floor(double beta1, std::span<const float> v) {
  return v.empty() ? 0 : 2 * (1 - beta1) * (1 - beta1) * l1_norm(v) / static_cast<double>(v.size());
}

}  // namespace thinwire::optim
