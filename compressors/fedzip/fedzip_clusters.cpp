#include "compressors/fedzip/fedzip_clusters.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace thinwire {
namespace {

constexpr int kBinBits = 11;
constexpr std::uint32_t kBinsOfSign = std::uint32_t{1} << kBinBits;
constexpr std::size_t kBins = 2 * kBinsOfSign;
constexpr std::uint32_t kSignBit = 0x80000000;
constexpr double kNever = std::numeric_limits<double>::infinity();
// Rounds of Lloyd's iteration; most inputs need fewer.
constexpr int kRounds = 20;

std::uint32_t magnitude(float value) { return std::bit_cast<std::uint32_t>(value) & ~kSignBit; }

// Bins in the order of the values they hold: of negative ones the largest magnitudes first.
struct Bins {
  std::uint32_t low = 0;  // bits of the least magnitude
  int shift = 0;

  std::size_t of(float value) const {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t distance = ((bits & ~kSignBit) - low) >> shift;
    // Without a branch, which would be taken at random: kBinsOfSign - 1 - distance for negatives.
    const std::uint32_t flip = 0U - (bits >> 31);
    return (kBinsOfSign + (distance ^ flip)) % kBins;
  }
};

Bins bins_for(std::span<const float> values) {
  std::uint32_t low = std::numeric_limits<std::uint32_t>::max();
  std::uint32_t high = 0;
  for (const float value : values) {
    low = std::min(low, magnitude(value));
    high = std::max(high, magnitude(value));
  }
  return {.low = low,
          .shift = std::max(0, static_cast<int>(std::bit_width(high - low)) - kBinBits)};
}

// The bins that hold values, in order.
struct Atoms {
  std::size_t size = 0;
  std::size_t negative = 0;  // so many come first
  std::span<std::uint16_t> bin;
  std::span<std::uint32_t> count;
  std::span<double> sum;
};

Atoms make_atoms(std::span<const float> values, const Bins& bins, Workspace& workspace) {
  Atoms atoms;
  atoms.bin = workspace.take<std::uint16_t>(kBins);
  atoms.count = workspace.take<std::uint32_t>(kBins);
  atoms.sum = workspace.take<double>(kBins);
  std::fill(atoms.count.begin(), atoms.count.end(), 0U);
  std::fill(atoms.sum.begin(), atoms.sum.end(), 0.0);
  for (const float value : values) {
    const std::size_t bin = bins.of(value);
    ++atoms.count[bin];
    atoms.sum[bin] += static_cast<double>(value);
  }
  for (std::size_t bin = 0; bin < kBins; ++bin) {
    if (atoms.count[bin] == 0) continue;
    atoms.bin[atoms.size] = static_cast<std::uint16_t>(bin);
    atoms.count[atoms.size] = atoms.count[bin];
    atoms.sum[atoms.size] = atoms.sum[bin];
    ++atoms.size;
    if (bin < kBinsOfSign) ++atoms.negative;
  }
  return atoms;
}

// Runs of neighbouring atoms, linked; each knows what its union with the next one would cost. The
// cheapest union is at the root of a tournament.
class Runs {
 public:
  Runs(const Atoms& atoms, Workspace& workspace)
      : negative_(atoms.negative),
        size_(atoms.size),
        leaves_(std::bit_ceil(atoms.size)),
        count_(workspace.take<double>(kBins)),
        sum_(workspace.take<double>(kBins)),
        cost_(workspace.take<double>(kBins)),
        next_(workspace.take<std::uint16_t>(kBins)),
        previous_(workspace.take<std::uint16_t>(kBins)),
        winner_(workspace.take<std::uint16_t>(2 * kBins)) {
    for (std::size_t i = 0; i < size_; ++i) {
      count_[i] = atoms.count[i];
      sum_[i] = atoms.sum[i];
      next_[i] = static_cast<std::uint16_t>(i + 1);
      previous_[i] = static_cast<std::uint16_t>(i == 0 ? 0 : i - 1);
    }
    for (std::size_t i = 0; i < leaves_; ++i) {
      cost_[i] = i < size_ ? cost_of_union(i) : kNever;
      winner_[leaves_ + i] = static_cast<std::uint16_t>(i);
    }
    for (std::size_t node = leaves_ - 1; node > 0; --node) play(node);
  }

  // Unites the cheapest pair. Needs more than one run of a sign.
  void unite_cheapest() {
    const std::size_t left = winner_[1];
    const std::size_t right = next_[left];
    count_[left] += count_[right];
    sum_[left] += sum_[right];
    next_[left] = next_[right];
    if (next_[left] < size_) previous_[next_[left]] = static_cast<std::uint16_t>(left);
    set_cost(right, kNever);
    set_cost(left, cost_of_union(left));
    if (left > 0) set_cost(previous_[left], cost_of_union(previous_[left]));
  }

  // The first atom of the run behind the one that begins at `first`.
  std::size_t next(std::size_t first) const { return next_[first]; }

 private:
  // By how much the squared error grows.
  double cost_of_union(std::size_t left) const {
    const std::size_t right = next_[left];
    if (right == size_ || right == negative_) return kNever;
    const double apart = sum_[left] / count_[left] - sum_[right] / count_[right];
    return apart * apart * (count_[left] * count_[right] / (count_[left] + count_[right]));
  }
  void play(std::size_t node) {
    const std::uint16_t a = winner_[2 * node];
    const std::uint16_t b = winner_[2 * node + 1];
    winner_[node] = cost_[a] <= cost_[b] ? a : b;
  }
  void set_cost(std::size_t run, double cost) {
    cost_[run] = cost;
    for (std::size_t node = (leaves_ + run) / 2; node > 0; node /= 2) {
      const std::size_t before = winner_[node];
      play(node);
      if (winner_[node] == before && before != run) return;
    }
  }

  std::size_t negative_;
  std::size_t size_;
  std::size_t leaves_;
  std::span<double> count_;
  std::span<double> sum_;
  std::span<double> cost_;
  std::span<std::uint16_t> next_;
  std::span<std::uint16_t> previous_;
  std::span<std::uint16_t> winner_;
};

// Cluster i holds the atoms [first[i], first[i + 1]).
struct Partition {
  std::size_t size = 0;
  std::array<std::size_t, kFedzipMostClusters + 1> first;
  std::array<double, kFedzipMostClusters> mean;
};

void find_means(const Atoms& atoms, Partition& parts) {
  for (std::size_t i = 0; i < parts.size; ++i) {
    double count = 0;
    double sum = 0;
    for (std::size_t atom = parts.first[i]; atom < parts.first[i + 1]; ++atom) {
      count += atoms.count[atom];
      sum += atoms.sum[atom];
    }
    parts.mean[i] = sum / count;
  }
}

// Moves each boundary to the middle between its neighbours' means; every cluster keeps an atom.
bool move_boundaries(const Atoms& atoms, Partition& parts) {
  bool moved = false;
  const auto mean = [&](std::size_t atom) { return atoms.sum[atom] / atoms.count[atom]; };
  for (std::size_t i = 1; i < parts.size; ++i) {
    std::size_t at = parts.first[i];
    if (at == atoms.negative) continue;
    const std::size_t least = parts.first[i - 1] + 1;
    const std::size_t most = parts.first[i + 1] - 1;
    const double middle = (parts.mean[i - 1] + parts.mean[i]) / 2;
    while (at > least && mean(at - 1) > middle) --at;
    while (at < most && mean(at) <= middle) ++at;
    moved = moved || at != parts.first[i];
    parts.first[i] = at;
  }
  return moved;
}

Partition partition(const Atoms& atoms, std::size_t most, Workspace& workspace) {
  Runs runs(atoms, workspace);
  Partition parts;
  parts.size = std::min(atoms.size, most);
  for (std::size_t left = atoms.size; left > parts.size; --left) runs.unite_cheapest();
  parts.first[0] = 0;
  for (std::size_t i = 0; i < parts.size; ++i) parts.first[i + 1] = runs.next(parts.first[i]);
  find_means(atoms, parts);
  for (int round = 0; round < kRounds && move_boundaries(atoms, parts); ++round) {
    find_means(atoms, parts);
  }
  return parts;
}

}  // namespace

std::size_t cluster_scratch_bytes() {
  return 4 * Workspace::bytes_for<double>(kBins) + Workspace::bytes_for<std::uint32_t>(kBins) +
         3 * Workspace::bytes_for<std::uint16_t>(kBins) +
         Workspace::bytes_for<std::uint16_t>(2 * kBins) + Workspace::bytes_for<std::uint8_t>(kBins);
}

FedzipClusters cluster_values(std::span<const float> values, std::size_t most, Workspace workspace,
                              std::span<std::uint8_t> labels) {
  FedzipClusters clusters;
  if (values.empty()) return clusters;
  const Bins bins = bins_for(values);
  const Atoms atoms = make_atoms(values, bins, workspace);
  const Partition parts = partition(atoms, most, workspace);
  const auto label_of_bin = workspace.take<std::uint8_t>(kBins);
  clusters.size = parts.size;
  for (std::size_t i = 0; i < parts.size; ++i) {
    clusters.centroid[i] = static_cast<float>(parts.mean[i]);
    clusters.count[i] = 0;
    for (std::size_t atom = parts.first[i]; atom < parts.first[i + 1]; ++atom) {
      clusters.count[i] += atoms.count[atom];
      label_of_bin[atoms.bin[atom]] = static_cast<std::uint8_t>(i);
    }
  }
  for (std::size_t i = 0; i < values.size(); ++i) labels[i] = label_of_bin[bins.of(values[i])];
  return clusters;
}

}  // namespace thinwire
