#include "compressors/adaptive/topk_curve.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "compressors/topk/topk_values.h"

namespace thinwire {
namespace {

// 32 bins an octave: where values lie evenly in a bin, its ends and its count say all that counts.
constexpr int kShift = 23 - 5;
// What is 2^-40 of the largest counts as zero: 2^80 such entries would weigh as much as that one.
constexpr std::uint32_t kBins = 40U << 5;
constexpr std::uint32_t kMagnitude = 0x7FFFFFFF;
constexpr double kBitsAnOctave = 1 << 23;
constexpr double kMostBits = 0x7F7FFFFF;  // of finite floats
// Of the values' scales (topk_values.cpp): q8 has steps, q4 has bins that are decoded to their
// middles. A block's scale ends at its largest magnitude rounded up to bf16, by half of a unit on
// average.
constexpr double kSteps = 127;
constexpr double kCoarseBins = 8;
constexpr double kEndBits = 1 << 15;
// The logarithm of the largest of m draws is about that of the quantile exp(-gamma) / m, gamma
// Euler's constant: exactly so for the tail of a power law (Gumbel).
constexpr double kLargestOf = 0.5615;

double square(double x) { return x * x; }

// Magnitude of bits between two floats.
double value_of(double bits) {
  return double{std::bit_cast<float>(static_cast<std::uint32_t>(std::min(bits, kMostBits)))};
}

// Squared error of q4's bin, number `bin` of a scale.
double coarse_error(double value, double low, double range, double bin) {
  const double begin = low + range / kCoarseBins * bin;
  const double middle = value_of(begin + range / (2 * kCoarseBins));
  return square(value - std::min(middle, 1.5 * value_of(begin)));
}

double square_of_octave(std::uint32_t bits) {
  const double octave = std::bit_cast<float>(std::max(bits & 0x7F800000U, 0x00800000U));
  return octave * octave;
}

class Histogram {
 public:
  Histogram(std::span<const float> values, std::uint32_t largest)
      : end_(largest + 0.5), base_((largest >> kShift) - std::min(largest >> kShift, kBins - 1)) {
    count(values);
    for (std::uint32_t bin = 1; bin < kBins; ++bin) {
      below_[bin + 1] = below_[bin] + counts_[bin] * mean_square(begin(bin), end(bin));
    }
    for (std::uint32_t bin = kBins - 1; bin > 0; --bin) {
      above_[bin] = above_[bin + 1] + counts_[bin];
      octaves_[bin] = octaves_[bin + 1] + counts_[bin] * square_of_octave((base_ + bin) << kShift);
    }
  }

  double nonzero() const { return above_[1]; }
  double energy() const { return below_[kBins]; }

  // Where the `count` largest begin, count in (0, nonzero()].
  struct Place {
    std::uint32_t bin = 0;
    double bits = 0;     // of the magnitude, between two floats
    double below = 0;    // sum of squares of the rest
    double octaves = 0;  // sum over the largest of 4^exponent
  };
  Place largest(double count) const {
    // The last bin that so many are in or above; there are such.
    const auto found = std::lower_bound(above_.rbegin(), above_.rend() - 1, count);
    const auto bin = static_cast<std::uint32_t>(above_.rend() - found - 1);
    const double share = (count - above_[bin + 1]) / counts_[bin];
    const double bits = end(bin) - share * (end(bin) - begin(bin));
    return {.bin = bin,
            .bits = bits,
            .below = below_[bin] + (1 - share) * counts_[bin] * mean_square(begin(bin), bits),
            .octaves = octaves_[bin + 1] + share * (octaves_[bin] - octaves_[bin + 1])};
  }

  struct Rounded {
    double q8 = 0;
    double q4 = 0;
  };
  // Squared errors of the `count` largest in blocks of `block`, of a tensor of so many times as
  // many values. The largest of a block stands at the end of its scale, the others lie anywhere.
  Rounded rounded(double count, double block, double times) const {
    Place least = largest(count);
    // Near zero values lie evenly: the least of more of them is the smaller.
    if (count == nonzero()) {
      const auto value = static_cast<float>(value_of(least.bits) / times);
      least.bits = std::max<double>(std::bit_cast<std::uint32_t>(value), kBitsAnOctave);
    }
    const Place top = largest(count / block);
    const double range = largest(count * kLargestOf / block).bits + kEndBits - least.bits;
    Rounded sum{.q8 = (least.octaves - top.octaves) * square(range / kBitsAnOctave / kSteps) / 12};
    for (std::uint32_t bin = least.bin; bin < kBins; ++bin) {
      if (counts_[bin] == 0) continue;
      const double density = counts_[bin] / (end(bin) - begin(bin));
      const double first = std::max(begin(bin), least.bits);
      const double split = std::clamp(top.bits, first, end(bin));
      if (split > first) {
        const double bits = (first + split) / 2;
        const double place = std::floor((bits - least.bits) / range * kCoarseBins);
        const double spread = square(value_of(split) - value_of(first)) / 12;
        sum.q4 +=
            density * (split - first) *
            (coarse_error(value_of(bits), least.bits, range, std::min(place, kCoarseBins - 1)) +
             spread);
      }
      if (end(bin) > split) {
        const double bits = (split + end(bin)) / 2;
        const double own_range = bits - least.bits;
        const double entries = density * (end(bin) - split);
        sum.q8 += entries * square_of_octave((base_ + bin) << kShift) *
                  std::min(square(own_range / kBitsAnOctave / kSteps) / 12,
                           square(2 * kEndBits / kBitsAnOctave) / 3);
        sum.q4 += entries * coarse_error(value_of(bits), least.bits, own_range, kCoarseBins - 1);
      }
    }
    return sum;
  }

 private:
  // Four counts at a time, so that equal values in a row do not wait for one another.
  void count(std::span<const float> values) {
    std::array<std::array<std::uint32_t, kBins>, 4> parts = {};
    const auto bin_of = [&](float value) {
      const std::uint32_t bin = (std::bit_cast<std::uint32_t>(value) & kMagnitude) >> kShift;
      return bin > base_ ? bin - base_ : 0;
    };
    std::size_t i = 0;
    for (; i + 4 <= values.size(); i += 4) {
      ++parts[0][bin_of(values[i])];
      ++parts[1][bin_of(values[i + 1])];
      ++parts[2][bin_of(values[i + 2])];
      ++parts[3][bin_of(values[i + 3])];
    }
    for (; i < values.size(); ++i) ++parts[0][bin_of(values[i])];
    for (std::uint32_t bin = 0; bin < kBins; ++bin) {
      counts_[bin] = parts[0][bin] + parts[1][bin] + parts[2][bin] + parts[3][bin];
    }
  }

  // Bits of the ends of a bin; the last one ends at the largest.
  double begin(std::uint32_t bin) const { return (base_ + bin) << kShift; }
  double end(std::uint32_t bin) const { return std::min(begin(bin + 1), end_); }
  // Of magnitudes that lie evenly between these, in one octave.
  static double mean_square(double low_bits, double high_bits) {
    const double low = value_of(low_bits);
    const double high = value_of(high_bits);
    return (low * low + low * high + high * high) / 3;
  }

  double end_;
  std::uint32_t base_;
  // Of bin 0, which is zeros and what counts as such, nothing is counted in any sum.
  std::array<double, kBins> counts_;
  std::array<double, kBins + 1> below_ = {};    // squares in the bins before
  std::array<double, kBins + 1> above_ = {};    // counts in this bin and all after
  std::array<double, kBins + 1> octaves_ = {};  // 4^exponent likewise
};

}  // namespace

TopKCurve measure_topk(std::span<const float> values, std::uint32_t largest,
                       std::int64_t tensor_elements) {
  const Histogram histogram(values, largest);
  const auto n = static_cast<double>(values.size());
  const double times = static_cast<double>(tensor_elements) / n;
  TopKCurve curve;
  for (std::size_t i = 0; i < kCurveDensities.size(); ++i) {
    const double kept = std::min(kCurveDensities[i] * n, histogram.nonzero());
    const auto block = std::clamp(kept * times, 1.0, static_cast<double>(kTopKBlock));
    const Histogram::Rounded rounded = histogram.rounded(kept, block, times);
    curve.dropped[i] = histogram.largest(kept).below / histogram.energy();
    curve.q8[i] = rounded.q8 / histogram.energy();
    curve.q4[i] = rounded.q4 / histogram.energy();
  }
  return curve;
}

}  // namespace thinwire
