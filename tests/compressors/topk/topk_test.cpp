#include "compressors/topk/topk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "compressors/core/convert.h"
#include "compressors/core/payload.h"
#include "compressors/core/simd.h"
#include "compressors/core/spec.h"
#include "compressors/topk/topk_reference.h"
#include "tests/support/scratch.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;

struct Encoded {
  EncodeResult result;
  std::vector<std::byte> body;
};

Encoded encode(const PayloadCodec& codec, TensorView grad, Memory* memory, std::uint64_t step = 0) {
  Scratch scratch(codec.workspace_bytes(grad.elements));
  std::vector<std::byte> out(codec.slot_bytes(grad.elements));
  const Context ctx{.workspace = scratch.span(), .step = step};
  Encoded encoded;
  encoded.result = codec.encode(ctx, grad, memory, out);
  EXPECT_LE(encoded.result.bytes, out.size());
  out.resize(encoded.result.bytes);
  encoded.body = out;
  return encoded;
}

Encoded encode(const PayloadCodec& codec, Floats& grad, Memory* memory, std::uint64_t step = 0) {
  return encode(codec, view(grad), memory, step);
}

Floats decode(const PayloadCodec& codec, std::span<const std::byte> body, std::size_t n) {
  Floats out(n, 7.0F);
  codec.decode({}, body, view(out));
  return out;
}

std::size_t sent(std::span<const std::byte> body) {
  if (body.size() < 6) return 0;
  std::uint32_t count = 0;
  std::memcpy(&count, body.data() + 2, sizeof count);
  return count;
}

Floats normals(std::size_t n, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Floats x(n);
  for (float& v : x) v = normal(random);
  return x;
}

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

double squares(std::span<const float> x) {
  double sum = 0;
  for (const float v : x) sum += double{v} * v;
  return sum;
}

class TopKTargets : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { set_simd_limit(GetParam()); }
  void TearDown() override { set_simd_limit(""); }
};

INSTANTIATE_TEST_SUITE_P(, TopKTargets, testing::ValuesIn(simd_targets()),
                         [](const auto& info) { return info.param; });

enum Kind { kNormal, kFewLevels, kAllEqual, kMostlyZero, kHeavyTail, kDenormal, kAscending };

Floats tensor_of(Kind kind, std::size_t n, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  Floats x(n);
  for (std::size_t i = 0; i < n; ++i) {
    const float v = normal(random);
    switch (kind) {
      case kNormal:
        x[i] = v;
        break;
      case kFewLevels:
        x[i] = std::round(v);
        break;
      case kAllEqual:
        x[i] = 0.5F;
        break;
      case kMostlyZero:
        x[i] = random() % 50 == 0 ? v : 0.0F;
        break;
      case kHeavyTail:
        x[i] = std::exp(15 * v) * (v > 0 ? 1.0F : -1.0F);
        break;
      case kDenormal:
        x[i] = v * 1e-42F;
        break;
      case kAscending:
        x[i] = static_cast<float>(i);
        break;
    }
  }
  return x;
}

TEST_P(TopKTargets, MatchesTheReferenceByteForByte) {
  std::mt19937_64 random(11);
  const std::vector<std::size_t> sizes = {1,    2,    3,     15,    16,    17,    31,   63,
                                          64,   65,   127,   1009,  1023,  1024,  1025, 4096,
                                          4099, 9973, 32768, 32769, 40009, 100003};
  for (const std::size_t n : sizes) {
    for (int kind = kNormal; kind <= kAscending; ++kind) {
      TopKOptions options{.density = 0.01, .values = static_cast<TopKValues>(random() % 6)};
      if (random() % 2 == 0) options.density = std::pow(10.0, -static_cast<double>(random() % 5));
      if (random() % 4 == 0) {
        options = {.k = 1 + static_cast<std::int64_t>(random() % n), .values = options.values};
      }
      if (random() % 3 == 0) options.chunk = std::int64_t{64} << random() % 8;
      const auto codec = make_topk_codec(options);
      SCOPED_TRACE(testing::Message() << codec->name() << ", n = " << n << ", kind = " << kind);
      Memory memory(static_cast<std::int64_t>(n),
                    {.transactional = random() % 2 == 0, .decay = random() % 2 == 0 ? 1.0F : 0.9F});
      Floats residual = tensor_of(static_cast<Kind>(kind), n, random);
      if (kind == kAscending) std::fill(residual.begin(), residual.end(), 0.0F);
      memory.restore(residual);
      const Floats grad = tensor_of(static_cast<Kind>(kind), n, random);
      const TopKReference reference =
          encode_topk_reference(options, grad, residual, memory.decay());
      Floats g = grad;
      const Encoded encoded = encode(*codec, view(g), &memory, random());
      ASSERT_EQ(encoded.body, reference.body);
      ASSERT_TRUE(same_bits(g, grad));
      if (reference.residual.empty()) {
        ASSERT_FALSE(memory.written());
        continue;
      }
      memory.commit();
      ASSERT_TRUE(same_bits(memory.current(), reference.residual));
      // Nothing is lost: the residual is v - decoded, and the two are v, bit for bit, where that is
      // exact.
      const Floats decoded = decode(*codec, encoded.body, n);
      for (std::size_t i = 0; i < n; ++i) {
        const float kept = memory.decay() * residual[i];
        const float v = grad[i] + kept;
        ASSERT_EQ(memory.current()[i], v - decoded[i]) << "element " << i;
        if (options.values <= TopKValues::kQ8) {
          ASSERT_EQ(decoded[i] + memory.current()[i], v) << "element " << i;
        }
      }
    }
  }
}

TEST_P(TopKTargets, WithoutMemoryTheGradientAloneIsEncoded) {
  for (const std::size_t n : {std::size_t{1}, std::size_t{1009}, std::size_t{100003}}) {
    const TopKOptions options{.density = 0.01};
    const auto codec = make_topk_codec(options);
    const Floats grad = normals(n, n);
    Floats g = grad;
    const Encoded encoded = encode(*codec, view(g), nullptr);
    EXPECT_EQ(encoded.body, encode_topk_reference(options, grad, {}, 1.0F).body);
    EXPECT_TRUE(same_bits(g, grad));
  }
}

TEST_P(TopKTargets, SixteenBitGradientsCountAsTheirFp32Values) {
  for (const std::size_t n : {std::size_t{37}, std::size_t{70001}}) {
    const TopKOptions options{.density = 0.01, .values = TopKValues::kQ8};
    const auto codec = make_topk_codec(options);
    const Floats residual = normals(n, 1);
    Floats wide = normals(n, 2);
    wide[0] = 1e-7F;  // denormal as fp16
    std::vector<BF16> bf16(n);
    std::vector<FP16> fp16(n);
    Floats as_bf16(n);
    Floats as_fp16(n);
    for (std::size_t i = 0; i < n; ++i) {
      bf16[i] = to_bf16(wide[i]);
      fp16[i] = to_fp16(wide[i]);
      as_bf16[i] = to_float(bf16[i]);
      as_fp16[i] = to_float(fp16[i]);
    }
    const auto count = static_cast<std::int64_t>(n);
    const auto check = [&](void* data, DType dtype, const Floats& values) {
      Memory memory(count);
      memory.restore(residual);
      const Encoded encoded = encode(*codec, {data, count, dtype}, &memory, 3);
      const TopKReference reference = encode_topk_reference(options, values, residual, 1.0F);
      EXPECT_EQ(encoded.body, reference.body);
      memory.commit();
      EXPECT_TRUE(same_bits(memory.current(), reference.residual));
    };
    check(bf16.data(), DType::kBF16, as_bf16);
    check(fp16.data(), DType::kF16, as_fp16);
  }
}

TEST_P(TopKTargets, SampledBytesAreTheSameOnEveryTarget) {
  const auto codec = make_topk_codec({.density = 0.01, .select = TopKSelect::kSampled});
  Floats grad = normals(200003, 5);
  Memory memory(200003);
  const Encoded here = encode(*codec, grad, &memory, 9);
  memory.rollback();
  set_simd_limit("");
  EXPECT_EQ(here.body, encode(*codec, grad, &memory, 9).body);
  EXPECT_GE(sent(here.body), 1600U);
  EXPECT_LE(sent(here.body), 2000U);
}

TEST_P(TopKTargets, AccumulateAddsTheRoundedProductAtSentPositionsOnly) {
  constexpr std::size_t kElements = 5003;
  for (const double density : {0.01, 0.5}) {
    const auto codec = make_topk_codec({.density = density, .values = TopKValues::kBF16});
    Floats grad = normals(kElements, 6);
    const Encoded encoded = encode(*codec, grad, nullptr);
    const Floats decoded = decode(*codec, encoded.body, kElements);
    const Floats before = normals(kElements, 7);
    Floats sum = before;
    codec->accumulate({}, encoded.body, 0.3F, sum);
    for (std::size_t i = 0; i < kElements; ++i) {
      const volatile float product = 0.3F * decoded[i];
      const float expected = decoded[i] == 0.0F ? before[i] : before[i] + product;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(sum[i]), std::bit_cast<std::uint32_t>(expected)) << i;
    }
  }
}

// A memory as the codec needs it.
Memory memory_for(const PayloadCodec& codec, std::size_t n, bool transactional = true,
                  float decay = 1.0F) {
  const auto count = static_cast<std::int64_t>(n);
  return Memory(
      count, {.transactional = transactional, .decay = decay, .needs = codec.memory_needs(count)});
}

// What the reference starts from, as the memory has it.
struct Before {
  Floats residual;
  Floats velocity;
  std::uint32_t threshold = 0;
  float norm = 0;

  explicit Before(const Memory& memory)
      : residual(memory.current().begin(), memory.current().end()),
        velocity(memory.velocity().begin(), memory.velocity().end()) {
    if (memory.state().empty()) return;
    threshold = std::bit_cast<std::uint32_t>(memory.state()[0]);
    norm = memory.state()[3];
  }
};

// One step beside the reference. False where the memory stays unwritten.
bool step_as_reference(const TopKOptions& options, const Floats& grad, Memory& memory, bool give,
                       std::uint64_t step) {
  const auto codec = make_topk_codec(options);
  const Before before(memory);
  const TopKReference reference = encode_topk_reference(options, {.grad = grad,
                                                                  .residual = before.residual,
                                                                  .decay = memory.decay(),
                                                                  .velocity = before.velocity,
                                                                  .threshold = before.threshold,
                                                                  .last_norm = before.norm,
                                                                  .world_size = 4});
  auto owned = std::make_shared<Floats>(grad);
  Scratch scratch(codec->workspace_bytes(memory.elements()));
  std::vector<std::byte> out(codec->slot_bytes(memory.elements()));
  if (give) memory.adopt({owned, owned->data()});
  const Context ctx{.workspace = scratch.span(), .step = step, .world_size = 4};
  out.resize(codec->encode(ctx, view(*owned), &memory, out).bytes);
  EXPECT_EQ(out, reference.body);
  EXPECT_EQ(memory.written(), !reference.residual.empty());
  if (reference.residual.empty()) return false;
  memory.commit();
  EXPECT_TRUE(same_bits(memory.current(), reference.residual));
  EXPECT_TRUE(same_bits(memory.velocity(), reference.velocity));
  if (options.momentum && options.momentum->clip_norm == TopKClipNorm::kLast) {
    EXPECT_EQ(memory.state()[3], reference.norm);
  }
  // Nothing is lost: velocities are zero where something is sent, and nowhere else by accident.
  const Floats decoded = decode(*codec, out, grad.size());
  for (std::size_t i = 0; i < memory.velocity().size(); ++i) {
    if (decoded[i] != 0) {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(memory.velocity()[i]), 0U) << i;
    }
  }
  return true;
}

// Small enough for the selection to be without a sample.
constexpr std::size_t kSizesOfSteps[] = {1, 17, 64, 1009, 4099, 32003};

TEST_P(TopKTargets, CarriedThresholdsMatchTheReferenceStepByStep) {
  std::mt19937_64 random(21);
  for (const std::size_t n : kSizesOfSteps) {
    for (int kind = kNormal; kind <= kAscending; ++kind) {
      TopKOptions options{.density = std::pow(10.0, -1.0 - static_cast<double>(random() % 3)),
                          .values = static_cast<TopKValues>(random() % 6),
                          .select = TopKSelect::kCarried};
      const bool transactional = random() % 2 == 0;
      SCOPED_TRACE(testing::Message() << make_topk_codec(options)->name() << ", n = " << n
                                      << ", kind = " << kind << ", " << transactional);
      Memory memory =
          memory_for(*make_topk_codec(options), n, transactional, random() % 2 == 0 ? 1.0F : 0.9F);
      for (std::uint64_t step = 0; step < 6; ++step) {
        Floats grad = tensor_of(static_cast<Kind>(kind), n, random);
        // Now and then far fewer pass, or far more.
        if (step == 3) std::for_each(grad.begin(), grad.end(), [](float& g) { g *= 1e-3F; });
        if (step == 4) std::for_each(grad.begin(), grad.end(), [](float& g) { g *= 1e3F; });
        if (!transactional && kind == kHeavyTail && step == 4) break;  // not finite
        step_as_reference(options, grad, memory, transactional && step % 2 == 1, step);
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(TopKTargets, MomentumMatchesTheReferenceStepByStep) {
  std::mt19937_64 random(22);
  for (const std::size_t n : kSizesOfSteps) {
    for (int round = 0; round < 10; ++round) {
      TopKMomentum momentum{.factor = 0.9, .nesterov = round % 2 == 1};
      if (round % 3 != 0) {
        momentum.clip = 0.5 * std::sqrt(static_cast<double>(n));
        momentum.clip_norm = round % 3 == 1 ? TopKClipNorm::kTensor : TopKClipNorm::kLast;
      }
      TopKOptions options{.density = 0.01,
                          .values = static_cast<TopKValues>(random() % 6),
                          .select = round % 2 == 0 ? TopKSelect::kCarried : TopKSelect::kExact,
                          .momentum = momentum};
      if (round % 4 == 1) options.chunk = std::int64_t{64} << random() % 8;
      const bool transactional = random() % 2 == 0;
      SCOPED_TRACE(testing::Message()
                   << make_topk_codec(options)->name() << ", n = " << n << ", " << transactional);
      Memory memory = memory_for(*make_topk_codec(options), n, transactional);
      for (std::uint64_t step = 0; step < 5; ++step) {
        Floats grad = tensor_of(step == 2 ? kMostlyZero : kNormal, n, random);
        if (step == 3) std::fill(grad.begin(), grad.end(), 0.0F);
        step_as_reference(options, grad, memory, transactional && round % 2 == 0, step);
        if (HasFailure()) return;
      }
    }
  }
}

// Large tensors are written around the caches, those in place are not: the same, bit for bit.
TEST_P(TopKTargets, WhatIsWrittenAroundTheCachesIsTheSame) {
  constexpr std::size_t kElements = (std::size_t{1} << 20) + 37;
  static const std::array grads = {normals(kElements, 0), normals(kElements, 1),
                                   normals(kElements, 2)};
  for (const bool with_momentum : {false, true}) {
    TopKOptions options{.density = 0.01,
                        .values = with_momentum ? TopKValues::kQ8 : TopKValues::kF32,
                        .select = TopKSelect::kCarried};
    if (with_momentum) {
      options.momentum = {.factor = 0.9, .clip = 500, .clip_norm = TopKClipNorm::kLast};
    }
    const auto codec = make_topk_codec(options);
    SCOPED_TRACE(codec->name());
    Memory apart = memory_for(*codec, kElements);
    Memory in_place = memory_for(*codec, kElements, false);
    for (std::uint64_t step = 0; step < grads.size(); ++step) {
      Floats grad = grads[step];
      const Encoded around = encode(*codec, grad, &apart, step);
      const Encoded through = encode(*codec, grad, &in_place, step);
      ASSERT_EQ(around.body, through.body);
      ASSERT_GE(sent(around.body), 8389U);
      ASSERT_LE(sent(around.body), 10486U);
      apart.commit();
      in_place.commit();
      ASSERT_TRUE(same_bits(apart.current(), in_place.current()));
      ASSERT_TRUE(same_bits(apart.velocity(), in_place.velocity()));
      ASSERT_TRUE(same_bits(apart.state(), in_place.state()));
    }
  }
}

TEST(TopK, ContractsByTheShareItKeeps) {
  for (const std::size_t n : {std::size_t{10}, std::size_t{1009}, std::size_t{65537}}) {
    for (const double density : {0.001, 0.1, 0.7}) {
      const auto codec = make_topk_codec({.density = density});
      Floats grad = normals(n, n);
      Memory memory(static_cast<std::int64_t>(n));
      const Encoded encoded = encode(*codec, grad, &memory);
      memory.commit();
      const double share = static_cast<double>(sent(encoded.body)) / static_cast<double>(n);
      EXPECT_LE(squares(memory.current()), (1 - share) * squares(grad) * (1 + 1e-9));
    }
  }
}

// Regression: some codes cut a selection that is too large at the tensor's end.
TEST(TopK, TrapPositionalBiasATooLargeSelectionIsCutByMagnitude) {
  constexpr std::size_t kElements = 100000;
  constexpr std::size_t kCount = 1000;
  const auto codec = make_topk_codec({.k = kCount});
  Floats grad(kElements);
  // Growing magnitudes: every threshold taken early lets too many pass, the largest come last.
  for (std::size_t i = 0; i < kElements; ++i) grad[i] = static_cast<float>(i + 1);
  const Floats decoded = decode(*codec, encode(*codec, grad, nullptr).body, kElements);
  for (std::size_t i = 0; i < kElements; ++i) {
    ASSERT_EQ(decoded[i] != 0.0F, i >= kElements - kCount) << "element " << i;
  }
}

// Regression: with threshold 0, |v| >= threshold selects the whole tensor.
TEST(TopK, TrapThresholdZeroSelectsNoZeros) {
  constexpr std::size_t kElements = 100000;
  const auto codec = make_topk_codec({.density = 0.01});
  Floats grad(kElements, 0.0F);
  grad[5] = 1.0F;
  grad[77777] = -2.0F;
  grad[99999] = std::numeric_limits<float>::denorm_min();
  Memory memory(kElements);
  const Encoded encoded = encode(*codec, grad, &memory);
  EXPECT_EQ(sent(encoded.body), 3U);
  EXPECT_TRUE(same_bits(decode(*codec, encoded.body, kElements), grad));
}

TEST(TopK, TrapAllZeroGradientSendsNothingAndKeepsTheResidual) {
  for (const bool transactional : {true, false}) {
    for (const std::size_t n : {std::size_t{1}, std::size_t{100}, std::size_t{100003}}) {
      const auto codec = make_topk_codec({.density = 0.01});
      const Floats residual = normals(n, 3);
      Memory memory(static_cast<std::int64_t>(n), {.transactional = transactional});
      memory.restore(residual);
      Floats grad(n, -0.0F);
      const Encoded encoded = encode(*codec, grad, &memory);
      EXPECT_TRUE(encoded.result.empty);
      EXPECT_EQ(encoded.body.size(), 1U);
      EXPECT_FALSE(memory.written());
      EXPECT_TRUE(same_bits(memory.current(), residual));
      EXPECT_TRUE(same_bits(decode(*codec, encoded.body, n), Floats(n, 0.0F)));
    }
  }
}

// Regression: fewer than k entries must make a shorter body, not repeat or invent some.
TEST(TopK, TrapFewerThanKEntriesMakeAShorterBody) {
  constexpr std::size_t kElements = 50000;
  const auto codec = make_topk_codec({.k = 5000});
  Floats grad(kElements, 0.0F);
  for (std::size_t i = 0; i < kElements; i += 100) grad[i] = 1.0F;
  const Encoded encoded = encode(*codec, grad, nullptr);
  EXPECT_EQ(sent(encoded.body), 500U);
  EXPECT_LT(encoded.body.size(), codec->slot_bytes(kElements) / 5);
  EXPECT_TRUE(same_bits(decode(*codec, encoded.body, kElements), grad));
}

// Regression: what rounding to 16 or 8 bits loses must come back through the residual.
TEST(TopK, TrapRoundingOfSentValuesIsFedBack) {
  constexpr std::size_t kElements = 1000;
  for (const TopKValues values : {TopKValues::kBF16, TopKValues::kQ8}) {
    const auto codec = make_topk_codec({.k = 10, .values = values});
    Memory memory(kElements);
    const Floats target = normals(kElements, 8);
    std::vector<double> received(kElements, 0.0);
    for (std::uint64_t step = 0; step < 400; ++step) {
      Floats grad = target;
      if (step > 0) {
        // Later steps only push the rest out.
        std::fill(grad.begin(), grad.end(), 0.0F);
        grad[0] = std::numeric_limits<float>::denorm_min();
      }
      const Encoded encoded = encode(*codec, grad, &memory, step);
      memory.commit();
      const Floats decoded = decode(*codec, encoded.body, kElements);
      for (std::size_t i = 0; i < kElements; ++i) received[i] += decoded[i];
    }
    for (std::size_t i = 0; i < kElements; ++i) ASSERT_NEAR(received[i], target[i], 1e-5) << i;
  }
}

TEST(TopK, TiesGoToTheLowestIndex) {
  constexpr std::size_t kElements = 50000;
  const auto codec = make_topk_codec({.k = 7});
  Floats grad(kElements, -3.0F);
  grad[40000] = 4.0F;
  const Floats decoded = decode(*codec, encode(*codec, grad, nullptr).body, kElements);
  for (std::size_t i = 0; i < kElements; ++i) {
    ASSERT_EQ(decoded[i] != 0.0F, i < 6 || i == 40000) << "element " << i;
  }
}

TEST(TopK, AMisleadingSampleChangesNothing) {
  // All large entries in one run: almost no sampled line sees them, or one sees only them.
  constexpr std::size_t kElements = 1 << 20;
  for (const std::size_t run : {std::size_t{500}, std::size_t{20000}}) {
    const TopKOptions options{.density = 0.001};
    const auto codec = make_topk_codec(options);
    Floats grad = normals(kElements, 12);
    for (float& g : grad) g *= 1e-3F;
    for (std::size_t i = 0; i < run; ++i) grad[300000 + i] += 1.0F;
    const auto expected = encode_topk_reference(options, grad, {}, 1.0F).body;
    for (std::uint64_t step = 0; step < 4; ++step) {
      EXPECT_EQ(encode(*codec, grad, nullptr, step).body, expected);
    }
  }
}

TEST(TopK, SampledSelectionStaysBetweenTheBounds) {
  const auto codec = make_topk_codec({.density = 0.001, .select = TopKSelect::kSampled});
  for (std::uint64_t step = 0; step < 20; ++step) {
    Floats grad = normals(300000, step);
    Memory memory(300000);
    const std::size_t count = sent(encode(*codec, grad, &memory, step).body);
    EXPECT_GE(count, 240U);
    EXPECT_LE(count, 300U);
  }
}

TEST(TopK, NonfiniteValuesAreFoundAndLeaveTheMemoryAlone) {
  for (const bool transactional : {true, false}) {
    for (const float poison : {std::nanf(""), std::numeric_limits<float>::infinity(),
                               -std::numeric_limits<float>::infinity()}) {
      for (const std::size_t n : {std::size_t{1}, std::size_t{1009}, std::size_t{100003}}) {
        for (const std::size_t at : {std::size_t{0}, n / 2, n - 1}) {
          const auto codec = make_topk_codec({.density = 0.01});
          const Floats residual = normals(n, 2);
          Memory memory(static_cast<std::int64_t>(n), {.transactional = transactional});
          memory.restore(residual);
          Floats grad = normals(n, 1);
          grad[at] = poison;
          const Encoded encoded = encode(*codec, grad, &memory);
          ASSERT_TRUE(encoded.result.nonfinite);
          ASSERT_EQ(encoded.body.size(), 1U);
          ASSERT_FALSE(memory.written());
          ASSERT_TRUE(same_bits(memory.current(), residual));
          ASSERT_TRUE(std::isnan(decode(*codec, encoded.body, n).front()));
        }
      }
    }
  }
}

TEST(TopK, TheSumOverflowingIsNonfinite) {
  const auto codec = make_topk_codec({.k = 1});
  Memory memory(2);
  memory.restore(Floats{3e38F, 0.0F});
  Floats grad = {3e38F, 1.0F};
  EXPECT_TRUE(encode(*codec, grad, &memory).result.nonfinite);
}

TEST(TopK, PayloadsOfTenMillionNormalsAreAsSmallAsPromised) {
  constexpr std::size_t kElements = 10'000'000;
  constexpr double kEntries = 10'000;
  Floats grad = normals(kElements, 1);
  const auto bits = [&](TopKValues values) {
    const auto codec = make_topk_codec({.density = 0.001, .values = values});
    const Encoded encoded = encode(*codec, grad, nullptr);
    EXPECT_EQ(sent(encoded.body), 10'000U);
    const double slot = static_cast<double>(codec->slot_bytes(kElements)) * 8 / kEntries;
    EXPECT_LE(static_cast<double>(encoded.body.size()) * 8 / kEntries, slot);
    return slot;
  };
  EXPECT_LE(bits(TopKValues::kTernary), 12.65);
  EXPECT_LE(bits(TopKValues::kQ2), 13.7);
  EXPECT_LE(bits(TopKValues::kQ4), 15.7);
  EXPECT_LE(bits(TopKValues::kQ8), 19.7);
  EXPECT_LE(bits(TopKValues::kBF16), 27.65);
  EXPECT_LE(bits(TopKValues::kF32), 43.65);
}

// Gaps of 0 and 2048 in turn take half a bit an entry more than independent positions.
TEST(TopK, WhatTheSlotHasNoRoomForStaysBehindSmallestFirst) {
  constexpr std::size_t kElements = std::size_t{1} << 20;
  const TopKOptions options{.k = 1022, .values = TopKValues::kQ4};
  Floats grad(kElements);
  for (std::size_t i = 0; i < 511; ++i) {
    grad[2050 * i] = 1.0F + static_cast<float>(i) / 1024;
    grad[2050 * i + 1] = -1.5F - static_cast<float>(i) / 1024;
  }
  const auto codec = make_topk_codec(options);
  Memory memory(kElements);
  const Encoded encoded = encode(*codec, grad, &memory);
  const TopKReference reference = encode_topk_reference(options, grad, {}, 1.0F);
  EXPECT_EQ(encoded.body, reference.body);
  EXPECT_TRUE(same_bits(memory.next(), reference.residual));
  EXPECT_GT(encoded.body.size() + 24, codec->slot_bytes(kElements));
  EXPECT_LT(sent(encoded.body), 1022U);
  EXPECT_GT(sent(encoded.body), 960U);
  EXPECT_EQ(memory.next()[0], grad[0]);
  EXPECT_NE(memory.next()[2050 * 510 + 1], grad[2050 * 510 + 1]);
}

// What passes a carried threshold takes more room than the slot has.
TEST(TopK, TooLongIndicesOfACarriedSelectionLeaveTheSmallestBehind) {
  constexpr std::size_t kElements = std::size_t{1} << 14;
  for (const TopKValues values : {TopKValues::kF32, TopKValues::kQ4}) {
    const TopKOptions options{.k = 400, .values = values, .select = TopKSelect::kCarried};
    Floats grad(kElements, 0.5F);
    for (std::size_t i = 0; i < 200; ++i) {
      grad[81 * i] = 1.0F + static_cast<float>(i) / 1024;
      grad[81 * i + 1] = -1.5F - static_cast<float>(i) / 1024;
    }
    Memory memory = memory_for(*make_topk_codec(options), kElements);
    memory.restore_state(Floats{1.0F, 1.0F, 0.0F, 0.0F});
    EXPECT_TRUE(step_as_reference(options, grad, memory, false, 0));
  }
}

TEST(TopK, CarriedSelectionStaysBetweenTheBoundsWhateverTheGradientsDo) {
  constexpr std::size_t kElements = 300000;
  const auto codec = make_topk_codec({.density = 0.001, .select = TopKSelect::kCarried});
  Memory memory = memory_for(*codec, kElements);
  for (std::uint64_t step = 0; step < 25; ++step) {
    Floats grad = normals(kElements, step);
    const float scale = step % 7 == 6 ? 30.0F : 1.0F / static_cast<float>(step + 1);
    for (float& g : grad) g *= scale;
    const std::size_t count = sent(encode(*codec, grad, &memory, step).body);
    memory.commit();
    EXPECT_GE(count, 240U) << "step " << step;
    EXPECT_LE(count, 300U) << "step " << step;
  }
}

// A state that no step can have left is a first step.
TEST(TopK, StrangeCarriedThresholdsDoNoHarm) {
  const auto codec = make_topk_codec({.density = 0.01, .select = TopKSelect::kCarried});
  for (const float threshold :
       {-1.0F, std::nanf(""), std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::max(), std::numeric_limits<float>::denorm_min()}) {
    for (const std::size_t n : {std::size_t{1009}, std::size_t{100003}}) {
      Memory memory = memory_for(*codec, n);
      memory.restore_state(Floats{threshold, threshold, threshold, threshold});
      Floats grad = normals(n, 3);
      const std::size_t count = sent(encode(*codec, grad, &memory).body);
      EXPECT_GE(count, n * 8 / 1000) << threshold;
      EXPECT_LE(count, (n + 50) / 100) << threshold;
    }
  }
}

TEST(TopK, MomentumNeedsAMemoryWithAVelocity) {
  const auto codec = make_topk_codec({.density = 0.1, .momentum = TopKMomentum{}});
  Floats grad(100, 1.0F);
  EXPECT_THROW(encode(*codec, grad, nullptr), InvalidArgument);
  Memory plain(100);
  EXPECT_THROW(encode(*codec, grad, &plain), InvalidArgument);
  EXPECT_FALSE(plain.written());
  for (const TopKMomentum& bad :
       {TopKMomentum{.factor = 1}, TopKMomentum{.factor = -0.1}, TopKMomentum{.clip = -1},
        TopKMomentum{.clip_norm = TopKClipNorm::kLast}}) {
    EXPECT_THROW(make_topk_codec({.density = 0.1, .momentum = bad}), InvalidArgument);
  }
}

// Entries are sent when the velocity has built them up: plain momentum SGD, only later.
TEST(TopK, MomentumSendsWhatMomentumSgdWould) {
  constexpr std::size_t kElements = 64;
  constexpr double kFactor = 0.9;
  const auto codec = make_topk_codec({.k = 64, .momentum = TopKMomentum{.factor = kFactor}});
  Memory memory = memory_for(*codec, kElements);
  // All are sent every step, so that factor masking clears every velocity: gradients arrive whole.
  for (std::uint64_t step = 0; step < 3; ++step) {
    Floats grad = normals(kElements, step);
    EXPECT_TRUE(
        same_bits(decode(*codec, encode(*codec, grad, &memory, step).body, kElements), grad));
    memory.commit();
  }
  // Nothing of the first element is sent for two steps: u = g, m g + g; v = g + (m g + g).
  const auto one = make_topk_codec({.k = 1, .momentum = TopKMomentum{.factor = kFactor}});
  Memory two = memory_for(*one, 2);
  for (const float other : {10.0F, 10.0F}) {
    Floats grad = {1.0F, other};
    encode(*one, grad, &two);
    two.commit();
  }
  EXPECT_FLOAT_EQ(two.velocity()[0], 1.9F);
  EXPECT_FLOAT_EQ(two.current()[0], 2.9F);
  EXPECT_EQ(two.velocity()[1], 0.0F);
  EXPECT_EQ(two.current()[1], 0.0F);
}

TEST(TopK, GradientsAreClippedToTheRanksShareOfTheNorm) {
  TopKOptions options{.density = 1, .momentum = TopKMomentum{.factor = 0, .clip = 3}};
  const auto codec = make_topk_codec(options);
  Memory memory = memory_for(*codec, 1000);
  Floats grad = normals(1000, 4);
  Scratch scratch(codec->workspace_bytes(1000));
  std::vector<std::byte> out(codec->slot_bytes(1000));
  codec->encode({.workspace = scratch.span(), .world_size = 9}, view(grad), &memory, out);
  EXPECT_NEAR(std::sqrt(squares(decode(*codec, out, 1000))), 1.0, 1e-6);
}

// ResNet-50 (He et al. 2016): 53 convolutions, each with a scale and a shift, one matrix, a bias.
struct ResNet50 {
  std::vector<std::int64_t> weights;
  std::vector<std::int64_t> vectors;

  ResNet50() {
    add(64, 3 * 7 * 7);
    std::int64_t in = 64;
    const std::int64_t widths[] = {64, 128, 256, 512};
    const int blocks[] = {3, 4, 6, 3};
    for (std::size_t stage = 0; stage < 4; ++stage) {
      const std::int64_t width = widths[stage];
      for (int block = 0; block < blocks[stage]; ++block) {
        add(width, in);
        add(width, width * 9);
        add(4 * width, width);
        if (block == 0) add(4 * width, in);
        in = 4 * width;
      }
    }
    weights.push_back(1000 * in);
    vectors.push_back(1000);
  }

 private:
  void add(std::int64_t out, std::int64_t in) {
    weights.push_back(out * in);
    vectors.insert(vectors.end(), 2, out);
  }
};

std::int64_t total(const std::vector<std::int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), std::int64_t{0});
}

TEST(TopK, PayloadsOfResNet50AreAsSmallAsPromised) {
  const ResNet50 model;
  ASSERT_EQ(model.weights.size(), 54U);
  ASSERT_EQ(total(model.weights), 25'502'912);
  ASSERT_EQ(model.vectors.size(), 107U);
  ASSERT_EQ(total(model.vectors), 54'120);
  const auto codec = make_topk_codec({.density = 0.001, .values = TopKValues::kQ8});
  std::size_t bodies = 0;
  std::size_t slots = 0;
  Floats values = normals(1 << 22, 1);
  for (const std::int64_t n : model.weights) {
    bodies += encode(*codec, view(values).slice(0, n), nullptr).body.size() + kPayloadHeaderBytes;
    slots += codec->slot_bytes(n) + kPayloadHeaderBytes;
  }
  constexpr std::size_t kMostOfWeights = 66'000;
  EXPECT_LE(bodies, kMostOfWeights) << "each tensor in a message of its own";
  EXPECT_LE(slots, kMostOfWeights) << "as planned";
  const Codec q8 = make_codec("q8");
  for (const std::int64_t n : model.vectors) {
    slots += q8.payload->slot_bytes(n) + kPayloadHeaderBytes;
  }
  EXPECT_LE(slots, 130'000U) << "with scales, shifts and the bias";
}

TEST(TopK, EveryChunkSendsItsOwnLargest) {
  constexpr std::size_t kElements = 1000;
  Floats grad = normals(kElements, 6);
  for (std::size_t i = 0; i < 256; ++i) grad[i] *= 1000;
  const auto codec = make_topk_codec({.k = 4, .chunk = 256});
  const Floats decoded = decode(*codec, encode(*codec, grad, nullptr).body, kElements);
  for (std::size_t begin = 0; begin < kElements; begin += 256) {
    std::size_t count = 0;
    for (std::size_t i = begin; i < std::min(begin + 256, kElements); ++i) {
      count += decoded[i] != 0.0F ? 1 : 0;
    }
    EXPECT_EQ(count, 4U) << "chunk at " << begin;
  }
}

TEST(TopK, EmptyTensorsMakeOneByte) {
  const auto codec = make_topk_codec({.density = 0.5});
  EXPECT_EQ(codec->slot_bytes(0), 1U);
  Floats none;
  Memory memory(0);
  const Encoded encoded = encode(*codec, none, &memory);
  EXPECT_TRUE(encoded.result.empty);
  EXPECT_TRUE(decode(*codec, encoded.body, 0).empty());
}

TEST(TopK, DamagedBodiesAreRefusedOrDecodeWithinBounds) {
  constexpr std::size_t kElements = 3001;
  std::mt19937_64 random(9);
  for (const TopKValues values : {TopKValues::kF32, TopKValues::kBF16, TopKValues::kQ8,
                                  TopKValues::kQ4, TopKValues::kQ2, TopKValues::kTernary}) {
    for (const double density : {0.01, 0.4}) {
      const auto codec = make_topk_codec({.density = density, .values = values});
      Floats grad = normals(kElements, 4);
      const std::vector<std::byte> body = encode(*codec, grad, nullptr).body;
      for (std::size_t cut = 0; cut < body.size(); ++cut) {
        const std::vector<std::byte> part(body.begin(),
                                          body.begin() + static_cast<std::ptrdiff_t>(cut));
        EXPECT_THROW(decode(*codec, part, kElements), CorruptPayload) << "cut at " << cut;
      }
      for (int round = 0; round < 3000; ++round) {
        std::vector<std::byte> damaged = body;
        // Not the mode: one bit may make a mark of it, which says that all is NaN.
        damaged[1 + random() % (damaged.size() - 1)] ^= static_cast<std::byte>(1U << random() % 8);
        Floats sum(kElements, 0.0F);
        try {
          codec->accumulate({}, damaged, 1.0F, sum);
          ASSERT_TRUE(std::all_of(sum.begin(), sum.end(), [](float x) { return is_finite(x); }))
              << codec->name();
        } catch (const CorruptPayload&) {
        }
      }
      EXPECT_THROW(decode(*codec, body, 1000), CorruptPayload) << "a shorter tensor";
    }
  }
}

TEST(TopK, BodiesOfOtherValuesAreRefused) {
  Floats grad = normals(1000, 4);
  const auto q8 = make_topk_codec({.density = 0.01, .values = TopKValues::kQ8});
  const auto fp32 = make_topk_codec({.density = 0.01});
  const auto ternary = make_topk_codec({.density = 0.01, .values = TopKValues::kTernary});
  EXPECT_THROW(decode(*fp32, encode(*q8, grad, nullptr).body, 1000), CorruptPayload);
  EXPECT_THROW(decode(*q8, encode(*ternary, grad, nullptr).body, 1000), CorruptPayload);
}

TEST(TopK, DecodesToSixteenBitsWithOneRounding) {
  Floats grad = {0.1F, 0.0F, -1e-7F, 70000.0F};
  const auto codec = make_topk_codec({.k = 4});
  const Encoded encoded = encode(*codec, grad, nullptr);
  std::vector<BF16> bf16(4);
  std::vector<FP16> fp16(4);
  codec->decode({}, encoded.body, {bf16.data(), 4, DType::kBF16});
  codec->decode({}, encoded.body, {fp16.data(), 4, DType::kF16});
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(bf16[i].bits, to_bf16(grad[i]).bits);
    EXPECT_EQ(fp16[i].bits, to_fp16(grad[i]).bits);
  }
}

TEST(TopK, RefusesWhatItCannotDo) {
  EXPECT_THROW(make_topk_codec({}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.density = 0.1, .k = 3}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.density = 1.5}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.density = -0.5}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.density = std::nan("")}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.k = -1}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.k = 1, .chunk = 63}), InvalidArgument);
  EXPECT_THROW(make_topk_codec({.k = 1, .chunk = 65537}), InvalidArgument);
  const auto codec = make_topk_codec({.density = 0.1});
  EXPECT_THROW((void)codec->slot_bytes(std::int64_t{1} << 32), InvalidArgument);
  EXPECT_THROW((void)codec->slot_bytes(-1), InvalidArgument);
  std::vector<double> wide(10);
  EXPECT_THROW(encode(*codec, {wide.data(), 10, DType::kF64}, nullptr), InvalidArgument);
  Floats grad(10, 1.0F);
  Memory memory(9);
  EXPECT_THROW(encode(*codec, grad, &memory), InvalidArgument);
}

TEST(TopK, NamesAreTheSpecs) {
  EXPECT_EQ(make_topk_codec({.density = 0.001})->name(), "topk:0.001");
  EXPECT_EQ(make_topk_codec({.k = 50, .values = TopKValues::kQ8})->name(), "topk:k=50,values=q8");
  EXPECT_EQ(make_topk_codec(
                {.density = 0.01, .values = TopKValues::kBF16, .select = TopKSelect::kSampled})
                ->name(),
            "topk:0.01,values=bf16,select=sampled");
  EXPECT_EQ(make_topk_codec({.density = 0.01,
                             .select = TopKSelect::kCarried,
                             .momentum = TopKMomentum{.factor = 0.5,
                                                      .nesterov = true,
                                                      .clip = 0.25,
                                                      .clip_norm = TopKClipNorm::kLast}})
                ->name(),
            "topk:0.01,select=carried,momentum=0.5,nesterov,clip=0.25,clip_norm=last");
}

}  // namespace
}  // namespace thinwire
