// Cosines and sines in fp64, the same bits everywhere: a C library's may differ in the last place.
// Pure functions.
#pragma once

#include <cstdint>
#include <numbers>

namespace thinwire {

// Taylor series in Horner's form for x in [0, pi/4]: what is left out is below 2^-54.
constexpr double dct_cosine(double x) {
  double sum = 0;
  for (int k = 18; k > 0; k -= 2) sum = (1 - sum) * (x * x) / (k * (k - 1));
  return 1 - sum;
}
constexpr double dct_sine(double x) {
  double sum = 0;
  for (int k = 17; k > 1; k -= 2) sum = (1 - sum) * (x * x) / (k * (k - 1));
  return x * (1 - sum);
}

struct DctTurn {
  double cos = 1;
  double sin = 0;
};

// The angle 2 pi * part / whole, part in [0, whole), whole < 2^60.
constexpr DctTurn dct_turn(std::int64_t part, std::int64_t whole) {
  const std::int64_t octant = 8 * part / whole;
  const std::int64_t rest = 8 * part - octant * whole;
  const std::int64_t folded = octant % 2 == 0 ? rest : whole - rest;
  const double x =
      static_cast<double>(folded) / static_cast<double>(whole) * (std::numbers::pi / 4);
  const double c = dct_cosine(x);
  const double s = dct_sine(x);
  const bool steep = octant % 4 == 1 || octant % 4 == 2;  // nearer to the sine's axis
  const double cos = steep ? s : c;
  const double sin = steep ? c : s;
  return {octant >= 2 && octant < 6 ? -cos : cos, octant >= 4 ? -sin : sin};
}

}  // namespace thinwire
