#include "compressors/fedzip/fedzip.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "compressors/fedzip/fedzip_clusters.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::byte>;

constexpr float kDenormal = std::numeric_limits<float>::denorm_min();

struct Scratch {
  explicit Scratch(std::size_t bytes)
      : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64)),
        span(static_cast<std::byte*>(data), bytes) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data;
  std::span<std::byte> span;
};

std::shared_ptr<const PayloadCodec> codec_of(double density, std::int64_t clusters = 3) {
  return make_fedzip_codec({.density = density, .clusters = clusters});
}

Bytes encode(const PayloadCodec& codec, Floats grad, Memory* memory = nullptr) {
  const auto n = static_cast<std::int64_t>(grad.size());
  const Scratch scratch(codec.workspace_bytes(n));
  Bytes out(codec.slot_bytes(n));
  out.resize(codec.encode({.workspace = scratch.span}, view(grad), memory, out).bytes);
  return out;
}

Floats decode(const PayloadCodec& codec, std::span<const std::byte> body, std::size_t n) {
  Floats out(n, 7.0F);
  codec.decode({}, body, view(out));
  return out;
}

// Student's t with 4 degrees of freedom: heavy tails, as gradients have them.
Floats student(std::size_t n, std::uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto uniform = [&] { return (static_cast<double>(engine() >> 11) + 0.5) * 0x1p-53; };
  Floats x(n);
  for (float& v : x) {
    const double normal = std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307 * uniform());
    const double chi = -(std::log(uniform()) + std::log(uniform())) / 2;
    v = static_cast<float>(normal / std::sqrt(chi));
  }
  return x;
}

double squares(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  return sum;
}

std::size_t nonzero(std::span<const float> x) {
  return x.size() - static_cast<std::size_t>(std::count(x.begin(), x.end(), 0.0F));
}

// Bytes that an order-0 model of the decoded values needs.
double entropy_bytes(std::span<const float> decoded) {
  std::map<float, double> counts;
  for (const float v : decoded) ++counts[v];
  double bits = 0;
  const auto n = static_cast<double>(decoded.size());
  for (const auto& [value, count] : counts) bits += count * std::log2(n / count);
  return bits / 8;
}

// Published FedZip code counts bits below the entropy, which no receiver could read. These decode.
TEST(Fedzip, BodiesOfStudentsTTakeTheirEntropyAndLittleMore) {
  constexpr std::size_t kElements = 1'000'000;
  struct Pinned {
    double density;
    std::int64_t clusters;
    std::size_t bytes;
    std::size_t slot;
  };
  const Floats grad = student(kElements, 1);
  for (const Pinned& pinned : {Pinned{0.1, 3, 72'100, 72'300}, Pinned{0.01, 3, 11'450, 11'550},
                               Pinned{0.001, 3, 1'600, 1'610}, Pinned{0.1, 6, 81'000, 89'000},
                               Pinned{0.01, 6, 12'300, 13'250}, Pinned{0.001, 6, 1'720, 1'810}}) {
    SCOPED_TRACE(testing::Message() << pinned.density << ", k = " << pinned.clusters);
    const auto codec = codec_of(pinned.density, pinned.clusters);
    const Bytes body = encode(*codec, grad);
    const Floats decoded = decode(*codec, body, kElements);
    EXPECT_EQ(nonzero(decoded), static_cast<std::size_t>(std::lround(pinned.density * kElements)));
    const double entropy = entropy_bytes(decoded);
    EXPECT_LE(body.size(), pinned.bytes);
    EXPECT_LE(codec->slot_bytes(kElements), pinned.slot);
    EXPECT_LE(static_cast<double>(body.size()), 1.015 * entropy + 50);
    EXPECT_GE(static_cast<double>(body.size()), entropy - 20);
  }
}

// A label for every element: the framework that shipped this took 411,175 bytes by gzip.
TEST(Fedzip, DenseTensorsSendNoPositions) {
  constexpr std::size_t kElements = 200'000;
  const auto codec = codec_of(1, 6);
  const Bytes body = encode(*codec, student(kElements, 2));
  const double entropy = entropy_bytes(decode(*codec, body, kElements));
  EXPECT_LE(static_cast<double>(body.size()), 1.001 * entropy + 50);
  EXPECT_LE(codec->slot_bytes(kElements), kElements * 3 / 8 + 40);
}

// Averaging over zeros, too, would shrink every update by the density.
TEST(Fedzip, CentroidsAreTheMeansOfTheirMembersAndOfTheirSign) {
  for (const std::size_t n : {std::size_t{7}, std::size_t{1000}, std::size_t{50'000}}) {
    for (const double density : {0.05, 0.7, 1.0}) {
      for (const std::int64_t clusters : {3, 4, 6, 32, 33, 100, 256}) {
        SCOPED_TRACE(testing::Message() << n << " elements, " << density << ", k = " << clusters);
        const auto codec = codec_of(density, clusters);
        const Floats grad = student(n, n);
        Memory memory(static_cast<std::int64_t>(n));
        const Floats decoded = decode(*codec, encode(*codec, grad, &memory), n);
        struct Members {
          double sum = 0;
          double count = 0;
        };
        std::map<float, Members> members;
        for (std::size_t i = 0; i < n; ++i) {
          if (decoded[i] == 0) {
            ASSERT_EQ(memory.next()[i], grad[i]) << "what is not sent stays whole";
            continue;
          }
          ASSERT_EQ(std::signbit(decoded[i]), std::signbit(grad[i])) << i;
          members[decoded[i]].sum += double{grad[i]};
          members[decoded[i]].count += 1;
        }
        EXPECT_LE(members.size(), static_cast<std::size_t>(clusters - 1));
        for (const auto& [centroid, of] : members) {
          EXPECT_EQ(centroid, static_cast<float>(of.sum / of.count));
        }
      }
    }
  }
}

TEST(Fedzip, TernaryIsOneMeanOfEachSign) {
  const auto codec = codec_of(0.5);
  const Floats grad = {5, -1, 0, 0.25F, -3, 7, 0, -0.5F, 0, 0.125F};
  EXPECT_EQ(decode(*codec, encode(*codec, grad), grad.size()),
            (Floats{6, -1.5F, 0, 0, -1.5F, 6, 0, -1.5F, 0, 0}));
}

// Least squared error of `most` runs of the sorted values, by dynamic programming over all cuts.
double least_error(Floats values, std::size_t most) {
  std::sort(values.begin(), values.end());
  const std::size_t m = values.size();
  std::vector<double> sum(m + 1);
  std::vector<double> square(m + 1);
  for (std::size_t i = 0; i < m; ++i) {
    sum[i + 1] = sum[i] + double{values[i]};
    square[i + 1] = square[i] + double{values[i]} * values[i];
  }
  const auto error = [&](std::size_t begin, std::size_t end) {
    const double s = sum[end] - sum[begin];
    return square[end] - square[begin] - s * s / static_cast<double>(end - begin);
  };
  std::vector<double> best(m + 1, std::numeric_limits<double>::infinity());
  best[0] = 0;
  for (std::size_t cluster = 0; cluster < most; ++cluster) {
    for (std::size_t end = m; end > 0; --end) {
      for (std::size_t begin = 0; begin < end; ++begin) {
        best[end] = std::min(best[end], best[begin] + error(begin, end));
      }
    }
  }
  return best[m];
}

TEST(Fedzip, ClustersAreNearlyTheBestThereAre) {
  const Scratch scratch(cluster_scratch_bytes());
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    Floats values = student(4000, seed);
    std::erase_if(values, [](float v) { return std::fabs(v) < 2.13F; });  // the largest tenth
    std::vector<std::uint8_t> labels(values.size());
    for (const std::size_t most : {5U, 9U, 31U}) {
      const auto clusters = cluster_values(values, most, Workspace(scratch.span), labels);
      ASSERT_EQ(clusters.size, most);
      double error = 0;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const double apart = double{values[i]} - double{clusters.centroid[labels[i]]};
        error += apart * apart;
      }
      EXPECT_LE(error, 1.15 * least_error(values, most)) << seed << ", " << most << " clusters";
    }
  }
}

// Regression: labels of 32 clusters and more aliased one another, or raised.
TEST(Fedzip, AsManyValuesAsClustersArriveExactly) {
  for (const std::int64_t clusters : {3, 4, 32, 33, 64, 100, 255, 256}) {
    for (const std::size_t n : {std::size_t{255}, std::size_t{20'000}}) {
      const auto codec = codec_of(1, clusters);
      const auto values = static_cast<std::size_t>(clusters - 1);
      Floats grad(n);
      for (std::size_t i = 0; i < n; ++i) {
        const auto level = static_cast<float>(i % values / 2 + 1);
        grad[i] = i % values % 2 == 0 ? level : -level;
      }
      EXPECT_EQ(decode(*codec, encode(*codec, grad), n), grad) << clusters;
    }
  }
}

TEST(Fedzip, MoreClustersThanValuesAreNotNeeded) {
  for (const std::int64_t clusters : {3, 4, 32, 256}) {
    for (const double density : {0.3, 0.5, 1.0}) {
      const auto codec = codec_of(density, clusters);
      Floats grad(1000);
      for (std::size_t i = 0; i < 300; ++i) grad[3 * i] = i % 2 == 0 ? 2.0F : -0.75F;
      EXPECT_EQ(decode(*codec, encode(*codec, grad), grad.size()), grad) << clusters;
      const Floats equal(1000, -0.37F);
      const Floats decoded = decode(*codec, encode(*codec, equal), equal.size());
      EXPECT_EQ(nonzero(decoded), static_cast<std::size_t>(std::lround(density * 1000)));
      for (const float v : decoded) EXPECT_TRUE(v == 0 || v == -0.37F);
    }
  }
}

// A cluster's mean c of m values of one sign: the squares it sends, m c^2, are at least the sum of
// their squares / m. So a step leaves at most 1 - 1 / n of ||v||^2, and never more than came.
TEST(Fedzip, Contracts) {
  for (const std::size_t n : {std::size_t{1}, std::size_t{64}, std::size_t{5000}}) {
    std::vector<Floats> tensors = {student(n, 3), Floats(n, 1e-3F), Floats(n),
                                   Floats(n),     student(n, 4),    Floats(n)};
    for (std::size_t i = 0; i < n; ++i) {
      const float sign = i % 2 == 0 ? 1.0F : -1.0F;
      tensors[2][i] = sign * (1 + static_cast<float>(i % 3) * 0x1p-20F);
      tensors[3][i] = sign * static_cast<float>(i % 7) * kDenormal;
      tensors[5][i] = sign * std::ldexp(1.0F, static_cast<int>(i * 31 % 250) - 125);
    }
    tensors[3][0] = kDenormal;
    tensors[4][n / 2] = 1e30F;  // an outlier
    for (const Floats& grad : tensors) {
      for (const double density : {0.01, 0.4, 1.0}) {
        for (const std::int64_t clusters : {3, 6, 256}) {
          const auto codec = codec_of(density, clusters);
          Memory memory(static_cast<std::int64_t>(n));
          const Bytes body = encode(*codec, grad, &memory);
          const double left = squares(memory.next());
          EXPECT_LE(left, (1 - 1 / static_cast<double>(n)) * squares(grad) * (1 + 1e-6))
              << n << " elements, " << codec->name();
          // Means: the squares part without a rest but for the rounding of centroids, which
          // denormal ones feel.
          const double rounding = 8 * static_cast<double>(n) * double{kDenormal} * kDenormal;
          EXPECT_NEAR(left + squares(decode(*codec, body, n)), squares(grad),
                      1e-5 * squares(grad) + rounding);
        }
      }
    }
  }
}

TEST(Fedzip, AnOutlierTakesAClusterOfItsOwn) {
  const auto codec = codec_of(0.1, 4);
  Floats grad = student(10'000, 5);
  for (float& g : grad) g = std::clamp(g, -9.0F, 9.0F);
  grad[77] = 1e20F;
  const Floats decoded = decode(*codec, encode(*codec, grad), grad.size());
  EXPECT_EQ(decoded[77], 1e20F);
  EXPECT_EQ(nonzero(decoded), 1000U);
  for (std::size_t i = 0; i < grad.size(); ++i) EXPECT_TRUE(i == 77 || std::fabs(decoded[i]) < 9);
}

// What random positions take is planned for; gaps of nine take a quarter of a bit more each.
TEST(Fedzip, WhatDoesNotFitTheSlotStaysSmallestFirst) {
  constexpr std::size_t kElements = 100'000;
  const auto codec = codec_of(0.1);
  Floats grad(kElements, 0.0F);
  for (std::size_t i = 0; i < kElements / 10; ++i) {
    grad[10 * i + 9] = 1 + static_cast<float>(i * 7919 % 10'000);
  }
  Memory memory(kElements);
  const Bytes body = encode(*codec, grad, &memory);
  EXPECT_LE(body.size(), codec->slot_bytes(kElements));
  const Floats decoded = decode(*codec, body, kElements);
  EXPECT_LT(nonzero(decoded), 10'000U);
  EXPECT_GT(nonzero(decoded), 9'000U);
  float sent = std::numeric_limits<float>::infinity();
  float stayed = 0;
  for (std::size_t i = 0; i < kElements; ++i) {
    ASSERT_EQ(memory.next()[i], grad[i] - decoded[i]);
    if (decoded[i] != 0) sent = std::min(sent, grad[i]);
    if (decoded[i] == 0) stayed = std::max(stayed, grad[i]);
  }
  EXPECT_LT(stayed, sent);
}

TEST(Fedzip, SlotsFollowTheDensity) {
  for (const std::int64_t clusters : {3, 6, 256}) {
    for (const std::int64_t n : {1, 2, 3, 10, 1000, 1'000'000}) {
      std::size_t before = 0;
      for (const double density : {1e-6, 1e-4, 0.01, 0.1, 0.3}) {
        const std::size_t slot = codec_of(density, clusters)->slot_bytes(n);
        EXPECT_GE(slot, before) << n << " at " << density;
        EXPECT_LE(slot, 7 + 4 * 256 + static_cast<std::size_t>(n) * 2 + 16);
        before = slot;
      }
    }
  }
}

TEST(Fedzip, WhatCancelsSendsNoEntries) {
  const auto codec = codec_of(0.5, 6);
  Memory memory(4);
  memory.restore(Floats{-1, 2, -3, 4});
  const Bytes body = encode(*codec, {1, -2, 3, -4}, &memory);
  EXPECT_EQ(body.size(), 6U);
  EXPECT_EQ(decode(*codec, body, 4), Floats(4));
}

// Regression: 254 KB that inflated to 256 MB.
TEST(Fedzip, BombsAreRefused) {
  const auto codec = codec_of(0.01);
  constexpr std::size_t kElements = 10'000;
  const Bytes good = encode(*codec, student(kElements, 6));
  for (const std::uint32_t count : {101U, 10'000U, 0x7FFFFFFFU, 0xFFFFFFFFU}) {
    Bytes bad = good;
    std::memcpy(bad.data() + 2, &count, sizeof count);
    EXPECT_THROW(decode(*codec, bad, kElements), CorruptPayload) << count;
  }
  Bytes bad = good;
  bad[6] = std::byte{2};  // three clusters beside zero's
  EXPECT_THROW(decode(*codec, bad, kElements), CorruptPayload);
  bad = good;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(bad.data() + 7, &nan, sizeof nan);
  EXPECT_THROW(decode(*codec, bad, kElements), CorruptPayload);
  bad = good;
  bad[1] |= std::byte{0xC0};
  EXPECT_THROW(decode(*codec, bad, kElements), CorruptPayload);
}

TEST(Fedzip, DamagedBodiesAreRefusedOrDecodeWithinBounds) {
  constexpr std::size_t kElements = 3001;
  std::mt19937_64 random(9);
  for (const double density : {0.05, 0.4, 1.0}) {
    for (const std::int64_t clusters : {3, 6, 100}) {
      const auto codec = codec_of(density, clusters);
      const Bytes body = encode(*codec, student(kElements, 8));
      for (std::size_t cut = 0; cut < body.size(); ++cut) {
        EXPECT_THROW(decode(*codec, std::span(body).first(cut), kElements), CorruptPayload) << cut;
      }
      for (int round = 0; round < 1000; ++round) {
        Bytes damaged = body;
        damaged[random() % damaged.size()] ^= static_cast<std::byte>(1U << random() % 8);
        try {
          const Floats decoded = decode(*codec, damaged, kElements);
          EXPECT_TRUE(std::all_of(decoded.begin(), decoded.end(),
                                  [](float x) { return std::isfinite(x); }));
        } catch (const CorruptPayload&) {
        }
      }
    }
  }
}

TEST(Fedzip, RefusesWhatItCannotDo) {
  for (const double density : {0.0, -0.1, 1.5, std::nan("")}) {
    EXPECT_THROW(codec_of(density), InvalidArgument);
  }
  for (const std::int64_t clusters : {-1, 0, 2, 257}) {
    EXPECT_THROW(codec_of(0.1, clusters), InvalidArgument);
  }
  EXPECT_THROW((void)codec_of(0.1)->slot_bytes(std::int64_t{1} << 32), InvalidArgument);
  std::vector<double> wide(10);
  Bytes out(100);
  EXPECT_THROW(codec_of(0.1)->encode({}, {wide.data(), 10, DType::kF64}, nullptr, out),
               InvalidArgument);
}

}  // namespace
}  // namespace thinwire
