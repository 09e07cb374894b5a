#include "compressors/adaptive/error_curves.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "compressors/adaptive/error_curves_kernels.h"
#include "compressors/core/error.h"
#include "compressors/quantize/quantize_scales.h"

namespace thinwire {
namespace {

static_assert(kCurveBlock == kErrorBlock);

// Elements that onebit masks, nearly: eight whole bytes of zeros and the zeros beside them.
std::int64_t masked_elements(std::span<const float> block) {
  constexpr std::size_t kGroup = 64;
  const auto is_zero = [](float x) { return x == 0; };
  std::size_t masked = 0;
  std::size_t done = 0;
  for (std::size_t begin = 0; begin + kGroup <= block.size(); begin += kGroup) {
    if (begin < done || !std::all_of(&block[begin], &block[begin] + kGroup, is_zero)) continue;
    std::size_t first = begin;
    while (first > done && is_zero(block[first - 1])) --first;
    std::size_t last = begin + kGroup;
    while (last < block.size() && is_zero(block[last])) ++last;
    masked += last - first;
    done = last;
  }
  return static_cast<std::int64_t>(masked);
}

// Squared errors of onebit over elements of which so many are sent.
struct OneBitErrors {
  double l2 = 0;
  double l1 = 0;

  OneBitErrors(double squares, double magnitudes, std::int64_t sent) {
    if (sent == 0) return;
    const auto m = static_cast<double>(sent);
    l2 = 2 * squares - 2 * magnitudes * std::sqrt(squares / m);
    l1 = squares - magnitudes * magnitudes / m;
  }
};

// Sums over all blocks of a sample.
struct BlockTotals {
  std::uint32_t largest = 0;  // bits
  double squares = 0;
  double magnitudes = 0;
  double bf16 = 0;                       // squared error
  std::int64_t sent = 0;                 // by onebit
  std::array<double, 8> quantised = {};  // squared errors of 1 bit, 2 bits, ...
  double onebit_l2 = 0;                  // likewise, of blocks with a scale of their own
  double onebit_l1 = 0;

  void add(const BlockErrors& block, std::span<const float> values) {
    largest = std::max(largest, block.largest);
    const double unit = std::bit_cast<float>(block.largest);
    if (block.largest >= kInfBits32 || unit < double{kQuantizeTiny}) return;
    const double block_squares = block.squares * unit * unit;
    const double block_magnitudes = block.magnitudes * unit;
    const auto n = static_cast<std::int64_t>(values.size());
    const std::int64_t block_sent = n - masked_elements(values);
    squares += block_squares;
    magnitudes += block_magnitudes;
    bf16 += block.bf16 * unit * unit;
    sent += block_sent;
    // One bit sends the mean magnitude, zeros included.
    quantised[0] += OneBitErrors(block_squares, block_magnitudes, n).l1;
    for (std::size_t j = 0; j < block.rounding.size(); ++j) {
      const double step = unit / quantize_levels(kErrorLeastBits + static_cast<int>(j));
      quantised[j + 1] += block.rounding[j] * step * step;
    }
    const OneBitErrors onebit(block_squares, block_magnitudes, block_sent);
    onebit_l2 += onebit.l2;
    onebit_l1 += onebit.l1;
  }
};

BlockTotals measure_blocks(std::span<const float> values) {
  constexpr auto kBlock = static_cast<std::size_t>(kErrorBlock);
  // As many blocks as stay in the first-level cache until they have been added.
  std::array<BlockErrors, 16> blocks;
  BlockTotals totals;
  std::size_t at = 0;
  while (values.size() - at >= kBlock) {
    const std::size_t count = std::min(blocks.size(), (values.size() - at) / kBlock);
    block_errors(&values[at], count, blocks.data());
    for (std::size_t i = 0; i < count; ++i, at += kBlock) {
      totals.add(blocks[i], values.subspan(at, kBlock));
    }
  }
  if (at < values.size()) {
    std::array<float, kBlock> padded = {};
    std::copy(values.begin() + static_cast<std::ptrdiff_t>(at), values.end(), padded.begin());
    block_errors(padded.data(), 1, blocks.data());
    totals.add(blocks[0], values.subspan(at));
  }
  return totals;
}

float to_share(double squares, double all) {
  return static_cast<float>(std::max(squares / all, 0.0));
}

}  // namespace

ErrorCurves measure_errors(const GradientSample& sample, bool with_lowrank) {
  ErrorCurves curves;
  std::array<float, ErrorCurves::kValues>& out = curves.values_;
  const BlockTotals totals = measure_blocks(sample.values);
  if (totals.largest >= kInfBits32) {
    out[ErrorCurves::kNonFinite] = 1;
    return curves;
  }
  out[ErrorCurves::kSamples] = 1;
  if (std::bit_cast<float>(totals.largest) < kQuantizeTiny) return curves;
  out[ErrorCurves::kNonZero] = 1;
  const double all = totals.squares;
  const auto n = static_cast<double>(sample.values.size());
  const auto tensor_elements = static_cast<double>(sample.tensor.elements());
  out[ErrorCurves::kSquaredNorm] = static_cast<float>(
      std::min(all * (tensor_elements / n), double{std::numeric_limits<float>::max()}));

  const TopKCurve topk = measure_topk(sample.values, totals.largest, sample.tensor.elements());
  for (std::size_t i = 0; i < kCurveDensities.size(); ++i) {
    out[ErrorCurves::kDropped + i] = static_cast<float>(topk.dropped[i]);
    out[ErrorCurves::kRoundedQ8 + i] = static_cast<float>(topk.q8[i]);
    out[ErrorCurves::kRoundedQ4 + i] = static_cast<float>(topk.q4[i]);
  }
  out[ErrorCurves::kBF16] = to_share(totals.bf16, all);
  for (std::size_t i = 0; i < totals.quantised.size(); ++i) {
    out[ErrorCurves::kQuantize + i] = to_share(totals.quantised[i], all);
  }
  const OneBitErrors onebit(all, totals.magnitudes, totals.sent);
  out[ErrorCurves::place(OneBitScale::kL2, 0)] = to_share(onebit.l2, all);
  out[ErrorCurves::place(OneBitScale::kL1, 0)] = to_share(onebit.l1, all);
  out[ErrorCurves::place(OneBitScale::kL2, kCurveBlock)] = to_share(totals.onebit_l2, all);
  out[ErrorCurves::place(OneBitScale::kL1, kCurveBlock)] = to_share(totals.onebit_l1, all);
  std::array<double, kCurveRanks> ranks;
  ranks.fill(1);
  if (with_lowrank) ranks = measure_lowrank(sample, all);
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    out[ErrorCurves::kLowRank + r] = static_cast<float>(ranks[r]);
  }
  return curves;
}

ErrorCurves& ErrorCurves::operator+=(const ErrorCurves& other) {
  for (std::size_t i = 0; i < kValues; ++i) values_[i] += other.values_[i];
  return *this;
}

ErrorCurves& ErrorCurves::operator*=(float factor) {
  for (float& value : values_) value *= factor;
  return *this;
}

double ErrorCurves::squared_norm() const {
  return values_[kSamples] == 0 ? 0 : double{values_[kSquaredNorm]} / double{values_[kSamples]};
}

double ErrorCurves::mean(std::size_t at) const {
  return zero() ? 0 : double{values_[at]} / double{values_[kNonZero]};
}

double ErrorCurves::interpolate(std::size_t curve, double density) const {
  const auto above =
      std::lower_bound(kCurveDensities.begin() + 1, kCurveDensities.end() - 1, density);
  const auto i = static_cast<std::size_t>(above - kCurveDensities.begin());
  const double share = std::clamp(
      (density - kCurveDensities[i - 1]) / (kCurveDensities[i] - kCurveDensities[i - 1]), 0.0, 1.0);
  return (1 - share) * mean(curve + i - 1) + share * mean(curve + i);
}

double ErrorCurves::topk(double density, TopKValues values) const {
  const double dropped = interpolate(kDropped, density);
  switch (values) {
    case TopKValues::kF32:
      return std::sqrt(dropped);
    case TopKValues::kBF16:
      return std::sqrt(dropped + mean(kBF16) * (1 - dropped));
    case TopKValues::kQ8:
      return std::sqrt(dropped + interpolate(kRoundedQ8, density));
    case TopKValues::kQ4:
      return std::sqrt(dropped + interpolate(kRoundedQ4, density));
    case TopKValues::kQ2:
    case TopKValues::kTernary:
      break;
  }
  throw InvalidArgument("error of topk with values=" +
                        std::string(kTopKValuesWords[static_cast<std::size_t>(values)]) +
                        ": expected fp32, bf16, q8 or q4");
}

double ErrorCurves::quantize(int bits) const {
  return std::sqrt(mean(kQuantize + static_cast<std::size_t>(bits - 1)));
}

double ErrorCurves::onebit(OneBitScale scale, std::int64_t block) const {
  return std::sqrt(mean(place(scale, block)));
}

double ErrorCurves::bf16() const { return std::sqrt(mean(kBF16)); }

double ErrorCurves::lowrank(int rank) const {
  return std::sqrt(mean(kLowRank + static_cast<std::size_t>(rank - 1)));
}

}  // namespace thinwire
