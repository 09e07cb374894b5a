#include "tests/optim/reference.h"

#include <cmath>
#include <limits>

namespace thinwire::optim {
namespace {

// Of one rounding to fp32: relative, and absolute among subnormals.
constexpr double kRelative = 0x1p-24;
constexpr double kAbsolute = 0x1p-150;

Bounded rounded(double value, double error) {
  return {value, error + kRelative * (std::fabs(value) + error) + kAbsolute};
}

}  // namespace

Bounded exact(double value) { return {value, 0}; }

Bounded constant(double value) { return rounded(value, 0); }

Bounded operator+(Bounded a, Bounded b) { return rounded(a.value + b.value, a.error + b.error); }

Bounded operator-(Bounded a, Bounded b) { return rounded(a.value - b.value, a.error + b.error); }

Bounded operator*(Bounded a, Bounded b) {
  return rounded(a.value * b.value,
                 std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error);
}

Bounded operator/(Bounded a, Bounded b) {
  const double least = std::fabs(b.value) - b.error;
  if (least <= 0) return {a.value / b.value, std::numeric_limits<double>::infinity()};
  const double quotient = a.value / b.value;
  return rounded(quotient, (a.error + std::fabs(quotient) * b.error) / least);
}

Bounded sqrt(Bounded a) {
  const double root = std::sqrt(a.value);
  // |sqrt(a + e) - sqrt(a)| <= |e| / sqrt(a), and <= sqrt(|e|).
  const double steep = std::sqrt(a.error);
  return rounded(root, root > steep ? a.error / root : steep);
}

void reference_sgd(Coordinate& c, Bounded grad, const SgdOptions& o) {
  const Bounded momentum = constant(o.momentum);
  const Bounded g = grad + constant(o.weight_decay) * c.weight;
  c.velocity = momentum * c.velocity + g;
  const Bounded step = o.nesterov ? g + momentum * c.velocity : c.velocity;
  c.weight = c.weight - constant(o.lr) * step;
}

void reference_dgc(Coordinate& c, Bounded mean, const SgdOptions& o) {
  const Bounded momentum = constant(o.momentum);
  const Bounded decay = constant(o.weight_decay) * c.weight;
  c.decay_velocity = momentum * c.decay_velocity + decay;
  const Bounded step = o.nesterov ? decay + momentum * c.decay_velocity : c.decay_velocity;
  c.weight = c.weight - constant(o.lr) * (mean + step);
}

void reference_adam(Coordinate& c, Bounded grad, const AdamOptions& o, std::int64_t step) {
  const Bounded decay = constant(o.weight_decay) * c.weight;
  const Bounded g = o.decoupled ? grad : grad + decay;
  c.m = constant(o.beta1) * c.m + constant(1 - o.beta1) * g;
  c.v = constant(o.beta2) * c.v + constant(1 - o.beta2) * g * g;
  Bounded m = c.m;
  Bounded v = c.v;
  if (o.bias_correction) {
    m = m / constant(1 - std::pow(o.beta1, static_cast<double>(step)));
    v = v / constant(1 - std::pow(o.beta2, static_cast<double>(step)));
  }
  Bounded update = m / (sqrt(v) + constant(o.eps));
  if (o.decoupled) update = update + decay;
  c.weight = c.weight - constant(o.lr) * update;
}

Bounded reference_local_momentum(const Coordinate& c, Bounded grad, double beta1) {
  if (c.v.value == 0) return exact(0);
  return constant(beta1) * c.m + constant(1 - beta1) * grad;
}

void reference_frozen_adam(Coordinate& c, Bounded reduced, const AdamOptions& o) {
  if (c.v.value == 0) {
    c.m = exact(0);
    return;
  }
  c.m = reduced;
  const Bounded update = c.m / (sqrt(c.v) + constant(o.eps)) + constant(o.weight_decay) * c.weight;
  c.weight = c.weight - constant(o.lr) * update;
}

}  // namespace thinwire::optim
