// How much of a layer's v = gradient + residual each codec would lose, for all its parameters at
// once, from a sample of v: the error tables of L-GreCo (Markov et al., MLSys 2024,
// arXiv 2210.17357, section 3). An error is ||v - decode(encode(v))||_2 / ||v||_2.
//
// Beside the codecs' own errors, in tests: of whole tensors within 3 %, low ranks 4 %; of eight
// samples of a tensor within 8 %, low ranks 13 %, more only where a few rows hold all there is.
//
// ErrorCurves are plain values: a fixed list of floats, each a sum over samples, so that curves of
// several ranks, or steps, may be added, averaged, or weighted float by float; errors are then root
// mean squares over the samples. Pure functions, thread-safe; the same sample gives the same floats
// on every SIMD target.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "compressors/adaptive/gradient_sample.h"
#include "compressors/adaptive/lowrank_curve.h"
#include "compressors/adaptive/topk_curve.h"
#include "compressors/onebit/onebit.h"
#include "compressors/topk/topk.h"

namespace thinwire {

// Elements of a block that shares a scale, where onebit has blocks.
inline constexpr std::int64_t kCurveBlock = 256;

class ErrorCurves {
  // Where the floats of each kind begin. Sums of squares as shares of a sample's squared norm.
  enum Place : std::size_t {
    kSamples = 0,  // finite ones
    kNonZero = 1,
    kNonFinite = 2,
    kSquaredNorm = 3,
    kDropped = 4,
    kRoundedQ8 = kDropped + kCurveDensities.size(),  // lost by what is sent as q8
    kRoundedQ4 = kRoundedQ8 + kCurveDensities.size(),
    kBF16 = kRoundedQ4 + kCurveDensities.size(),
    kQuantize = kBF16 + 1,
    kOneBit = kQuantize + 8,
    kLowRank = kOneBit + 4,
  };

 public:
  // The floats, to be serialised and averaged.
  static constexpr std::size_t kValues = kLowRank + kCurveRanks;
  std::span<const float> values() const { return values_; }
  std::span<float> values() { return values_; }

  ErrorCurves& operator+=(const ErrorCurves& other);
  ErrorCurves& operator*=(float factor);

  // No sample, or none with a value of at least 2^-100: then all errors are 0.
  bool zero() const { return values_[kNonZero] == 0; }
  // NaN or Inf was in a sample. Nothing else of that sample is in the curves.
  bool nonfinite() const { return values_[kNonFinite] != 0; }
  // ||v||_2^2 of the whole tensor, the mean over finite samples, at most the largest float.
  double squared_norm() const;

  // density: entries that are sent / elements, as far as kCurveDensities reach. values: kF32,
  // kBF16, kQ8 or kQ4; InvalidArgument for other values.
  double topk(double density, TopKValues values) const;
  // kind=maxabs without rotation in blocks of kCurveBlock. bits in [1, 8].
  double quantize(int bits) const;
  // block: 0 or kCurveBlock.
  double onebit(OneBitScale scale, std::int64_t block) const;
  double bf16() const;
  // rank in [1, kCurveRanks]; PowerSGD's, once its warm start has found the subspace.
  double lowrank(int rank) const;

 private:
  friend ErrorCurves measure_errors(const GradientSample& sample, bool with_lowrank);

  static std::size_t place(OneBitScale scale, std::int64_t block) {
    return kOneBit + 2 * static_cast<std::size_t>(scale) + (block == 0 ? 0 : 1);
  }
  // The mean over samples that are not zero.
  double mean(std::size_t at) const;
  double interpolate(std::size_t curve, double density) const;

  std::array<float, kValues> values_ = {};
};

// with_lowrank: false saves most of the time; low ranks then lose everything.
ErrorCurves measure_errors(const GradientSample& sample, bool with_lowrank = true);

}  // namespace thinwire
