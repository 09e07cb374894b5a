#include "tests/optim/reference.h"

#include <algorithm>
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

namespace {

Bounded mixed(Bounded m, Bounded g, double beta) {
  return constant(beta) * m + constant(1 - beta) * g;
}

Bounded without_bias(Bounded x, double beta, std::int64_t step) {
  return x / constant(1 - std::pow(beta, static_cast<double>(step)));
}

Bounded decayed(const Coordinate& c, Bounded grad, const AdamOptions& o) {
  return o.decoupled ? grad : grad + constant(o.weight_decay) * c.weight;
}

// m^ / (sqrt(v^) + eps).
Bounded direction(const Coordinate& c, const AdamOptions& o, AdamSteps steps) {
  const Bounded m = o.bias_correction ? without_bias(c.m, o.beta1, steps.m) : c.m;
  const Bounded v = o.bias_correction ? without_bias(c.v, o.beta2, steps.v) : c.v;
  return m / (sqrt(v) + constant(o.eps));
}

void move(Coordinate& c, const AdamOptions& o, AdamSteps steps) {
  Bounded update = direction(c, o, steps);
  if (o.decoupled) update = update + constant(o.weight_decay) * c.weight;
  c.weight = c.weight - constant(o.lr) * update;
}

// Of moments whose bias is folded in.
AdamOptions frozen(AdamOptions options) {
  options.decoupled = true;
  options.bias_correction = false;
  return options;
}

}  // namespace

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

void reference_adam(Coordinate& c, Bounded grad, const AdamOptions& o, AdamSteps steps) {
  const Bounded g = decayed(c, grad, o);
  c.m = mixed(c.m, g, o.beta1);
  c.v = constant(o.beta2) * c.v + constant(1 - o.beta2) * g * g;
  move(c, o, steps);
}

void reference_fold_bias(Coordinate& c, const AdamOptions& o, AdamSteps steps) {
  c.m = without_bias(c.m, o.beta1, steps.m);
  c.v = without_bias(c.v, o.beta2, steps.v);
}

Bounded reference_local_momentum(const Coordinate& c, Bounded grad, double beta1) {
  return c.v.value == 0 ? exact(0) : mixed(c.m, grad, beta1);
}

void reference_frozen_adam(Coordinate& c, Bounded reduced, const AdamOptions& options,
                           AdamSteps steps) {
  AdamOptions o = options;
  o.decoupled = true;
  c.m = c.v.value == 0 ? exact(0) : reduced;
  if (c.v.value != 0) move(c, o, steps);
}

void reference_local_adam(Coordinate& c, Bounded grad, const AdamOptions& o) {
  if (c.v.value == 0) return;
  c.m = mixed(c.m, grad, o.beta1);
  c.u = c.u + constant(o.lr) * c.m;
  move(c, frozen(o), {});
}

Bounded reference_local_sum(const Coordinate& c, Bounded grad, const AdamOptions& o) {
  return c.v.value == 0 ? exact(0) : c.u + constant(o.lr) * mixed(c.m, grad, o.beta1);
}

void reference_sync_adam(Coordinate& c, Bounded reduced, double sum_lr, const AdamOptions& o) {
  c.m = exact(0);
  if (c.v.value != 0) {
    c.m = reduced / constant(sum_lr);
    const Bounded decay = constant(sum_lr * o.weight_decay) * c.anchor;
    c.weight = c.anchor - (reduced / (sqrt(c.v) + constant(o.eps)) + decay);
  } else {
    c.weight = c.anchor;
  }
}

Bounded reference_lamb_moments(Coordinate& c, Bounded grad, const AdamOptions& o,
                               std::int64_t step) {
  c.m = mixed(c.m, grad, o.beta1);
  c.v = constant(o.beta2) * c.v + constant(1 - o.beta2) * grad * grad;
  return direction(c, o, {.m = step, .v = step}) + constant(o.weight_decay) * c.weight;
}

FrozenUpdate reference_frozen_lamb_moments(Coordinate& c, Bounded reduced, const AdamOptions& o) {
  if (c.v.value == 0) {
    c.m = exact(0);
    return {};
  }
  const Bounded g = (reduced - constant(o.beta1) * c.m) / constant(1 - o.beta1);
  c.m = reduced;
  c.fresh = constant(o.beta2) * c.fresh + constant(1 - o.beta2) * g * g;
  const Bounded moves = direction(c, frozen(o), {});
  const Bounded eps = constant(o.eps);
  return {.direction = moves,
          .update = moves + constant(o.weight_decay) * c.weight,
          .ratio = (sqrt(c.v) + eps) / (sqrt(c.fresh) + eps)};
}

void reference_lamb_move(Coordinate& c, Bounded trust, Bounded update, const AdamOptions& o) {
  c.weight = c.weight - constant(o.lr) * trust * update;
}

Bounded square_sum(const std::vector<Bounded>& values) {
  Bounded sum;
  for (const Bounded& x : values) {
    sum.value += x.value * x.value;
    sum.error += (2 * std::fabs(x.value) + x.error) * x.error;
  }
  return sum;
}

Bounded largest(const std::vector<Bounded>& values) {
  Bounded most;
  for (const Bounded& x : values) {
    most = {std::max(most.value, x.value), std::max(most.error, x.error)};
  }
  return most;
}

Bounded clamp(Bounded value, Bounded low, Bounded high) {
  const auto surely_above = [](Bounded a, Bounded b) {
    return a.value - a.error > b.value + b.error;
  };
  if (surely_above(low, value)) return low;
  if (surely_above(value, high)) return high;
  Bounded result{std::clamp(value.value, low.value, high.value), value.error};
  if (!surely_above(value, low)) result.error = std::max(result.error, low.error);
  if (!surely_above(high, value)) result.error = std::max(result.error, high.error);
  return result;
}

}  // namespace thinwire::optim
