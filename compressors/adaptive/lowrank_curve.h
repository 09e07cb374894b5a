// What the best approximations of a matrix by low ranks lose: what PowerSGD loses once its warm
// start has found the subspace. By a randomised range finder (Halko, Martinsson, Tropp, SIAM Review
// 2011, algorithm 4.4). Pure functions, thread-safe; the same floats on every SIMD target.
#pragma once

#include <array>

#include "compressors/adaptive/gradient_sample.h"

namespace thinwire {

inline constexpr int kCurveRanks = 16;

// Element r - 1: the share of the tensor's squared norm that rank r leaves. `squares`: the squared
// norm of the sample, which is finite and not zero. 1 for what is no matrix.
//
// A part of a matrix is closer to a low rank than the matrix is: rank r holds about
// r (1 / sqrt(rows) + 1 / sqrt(columns))^2 of noise. Singular values of a sample are taken over to
// the size of the tensor by the model of a low rank in noise (Benaych-Georges, Nadakuditi,
// J. Multivariate Analysis 2012), which lies in as many rows and columns as carry the energy.
std::array<double, kCurveRanks> measure_lowrank(const GradientSample& sample, double squares);

}  // namespace thinwire
