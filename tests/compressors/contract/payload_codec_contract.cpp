#include "tests/compressors/contract/payload_codec_contract.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "compressors/core/convert.h"
#include "compressors/core/workspace.h"
#include "tests/support/allocations.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

constexpr std::byte kUntouched{0x5A};
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr std::int64_t kManyElements = 1'000'003;  // ten times as many say nothing more there
#else
constexpr std::int64_t kManyElements = 10'000'019;
#endif
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

// Uninitialised scratch of exactly the bytes asked for, aligned to 64.
struct Scratch {
  explicit Scratch(std::size_t bytes)
      : size(bytes), data(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) {
    std::memset(data, 0xFF, (bytes + 64) / 64 * 64);  // NaN as floats, -1 as integers
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::span<std::byte> span() const { return {static_cast<std::byte*>(data), size}; }
  std::size_t size;
  void* data;
};

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), 4 * a.size()) == 0);
}

double squared_norm(const std::vector<float>& values) {
  double sum = 0;
  for (const float v : values) sum += static_cast<double>(v) * static_cast<double>(v);
  return sum;
}

Memory make_memory(Pattern pattern, std::int64_t n, MemoryOptions options = {}) {
  Memory memory(n, options);
  memory.restore(make_values(pattern, n, 77));
  return memory;
}

}  // namespace

void PrintTo(const ContractCase& test, std::ostream* out) { *out << test.spec; }

std::vector<std::int64_t> PayloadCodecContract::sizes() const {
  const std::int64_t b = test_.block;
  return {0, 1, 2, 3, 17, b - 1, b, b + 1, 2 * b - 1, 2 * b + 1, 1009, 4099};
}

std::vector<DType> PayloadCodecContract::dtypes() const {
  std::vector<DType> all = {DType::kF32, DType::kBF16, DType::kF16};
  if (test_.fp64) all.push_back(DType::kF64);
  return all;
}

EncodeOutcome PayloadCodecContract::encode(const std::vector<float>& values, Memory* memory,
                                           const Call& call) const {
  const auto n = static_cast<std::int64_t>(values.size());
  Array grad(call.dtype, values, call.shift);
  const auto before = grad.bytes();
  EncodeOutcome outcome;
  outcome.v = grad.values();
  outcome.zero = std::all_of(outcome.v.begin(), outcome.v.end(), [](float x) { return x == 0; });
  if (memory != nullptr) {
    const auto residual = memory->current();
    for (std::size_t i = 0; i < values.size(); ++i) {
      outcome.v[i] += memory->decay() * residual[i];
    }
  }
  const std::size_t slot = codec_.slot_bytes(n);
  const auto shift = static_cast<std::size_t>(call.out_shift);
  // One byte more than the slot: it, and all after the body, must stay as they are.
  std::vector<std::byte> out(shift + slot + 1, kUntouched);
  const Scratch scratch(codec_.workspace_bytes(n));
  const Context ctx{.threads = call.threads,
                    .workspace = scratch.span(),
                    .step = call.step,
                    .sender = call.sender,
                    .key_hash = Key{.parameter = "w", .end = n}.hash(),
                    .parameter = "w"};
  if (call.give) memory->adopt({std::shared_ptr<void>(), static_cast<float*>(grad.view().data)});
  const std::int64_t before_call = allocations();
  outcome.result = codec_.encode(ctx, grad.view(), memory, std::span(out).subspan(shift));
  EXPECT_EQ(allocations(), before_call) << "encode allocated";
  EXPECT_LE(outcome.result.bytes, slot);
  EXPECT_GE(outcome.result.bytes, 1U);
  const auto body_begin = out.begin() + static_cast<std::ptrdiff_t>(shift);
  const auto body_end = body_begin + static_cast<std::ptrdiff_t>(outcome.result.bytes);
  EXPECT_TRUE(std::all_of(body_end, out.end(), [](std::byte b) { return b == kUntouched; }))
      << "encode wrote beyond its body";
  EXPECT_TRUE(grad.guards_intact()) << "encode wrote outside the gradient";
  outcome.body.assign(body_begin, body_end);
  EXPECT_TRUE(call.give || grad.bytes() == before) << "encode changed the gradient";
  if (memory != nullptr && memory->written()) {
    const auto next = memory->next();
    outcome.residual.assign(next.begin(), next.end());
  }
  return outcome;
}

Array PayloadCodecContract::decode(const std::vector<std::byte>& body, std::int64_t n,
                                   DType dtype) const {
  const auto copy = std::make_unique<std::byte[]>(body.size());
  std::copy(body.begin(), body.end(), copy.get());
  Array out(dtype, std::vector<float>(static_cast<std::size_t>(n), kNaN), 1);
  const Scratch scratch(codec_.workspace_bytes(n));
  const std::int64_t before_call = allocations();
  codec_.decode({.workspace = scratch.span()}, {copy.get(), body.size()}, out.view());
  EXPECT_EQ(allocations(), before_call) << "decode allocated";
  EXPECT_TRUE(out.guards_intact()) << "decode wrote outside its output";
  return out;
}

std::vector<float> PayloadCodecContract::accumulate(const std::vector<std::byte>& body,
                                                    float weight, std::vector<float> sum) const {
  const Scratch scratch(codec_.workspace_bytes(static_cast<std::int64_t>(sum.size())));
  codec_.accumulate({.workspace = scratch.span()}, body, weight, sum);
  return sum;
}

std::vector<float> PayloadCodecContract::sum(const std::vector<std::vector<std::byte>>& bodies,
                                             float weight, std::int64_t n) const {
  const std::vector<std::span<const std::byte>> views(bodies.begin(), bodies.end());
  const Scratch scratch(codec_.workspace_bytes(n));
  Array out(DType::kF32, std::vector<float>(static_cast<std::size_t>(n), kNaN), 1);
  const std::int64_t before_call = allocations();
  codec_.sum({.workspace = scratch.span()}, views, weight,
             {static_cast<float*>(out.view().data), static_cast<std::size_t>(n)});
  EXPECT_EQ(allocations(), before_call) << "sum allocated";
  EXPECT_TRUE(out.guards_intact()) << "sum wrote outside its output";
  return out.values();
}

void PayloadCodecContract::expect_decoded_or_refused(const std::vector<std::byte>& body,
                                                     std::int64_t n) const {
  const auto copy = std::make_unique<std::byte[]>(body.size());
  std::copy(body.begin(), body.end(), copy.get());
  const Scratch scratch(codec_.workspace_bytes(n));
  Array out(DType::kF32, n);
  try {
    codec_.decode({.workspace = scratch.span()}, {copy.get(), body.size()}, out.view());
  } catch (const CorruptPayload&) {
  }
  EXPECT_TRUE(out.guards_intact());
  Array sum(DType::kF32, std::vector<float>(static_cast<std::size_t>(n)));
  try {
    codec_.accumulate({.workspace = scratch.span()}, {copy.get(), body.size()}, 0.5F,
                      {static_cast<float*>(sum.view().data), static_cast<std::size_t>(n)});
  } catch (const CorruptPayload&) {
  }
  EXPECT_TRUE(sum.guards_intact());
  const std::span<const std::byte> bytes(copy.get(), body.size());
  const std::array bodies = {bytes, bytes};
  try {
    codec_.sum({.workspace = scratch.span()}, bodies, 0.5F,
               {static_cast<float*>(sum.view().data), static_cast<std::size_t>(n)});
  } catch (const CorruptPayload&) {
  }
  EXPECT_TRUE(sum.guards_intact());
}

// x = decoded + residual: the residual is v - decoded, one rounding, to the last bit.
TEST_P(PayloadCodecContract, NothingIsLost) {
  for (const DType dtype : dtypes()) {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : sizes()) {
        SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n << " " << name(dtype));
        Memory memory = make_memory(Pattern::kNormal, n, {.decay = 0.875F});
        const auto got = encode(make_values(pattern, n, 5), &memory, {.dtype = dtype});
        ASSERT_FALSE(got.result.nonfinite);
        ASSERT_EQ(got.result.empty, got.zero);
        ASSERT_EQ(memory.written(), !got.result.empty);
        const auto decoded = decode(got.body, n);
        for (std::size_t i = 0; i < got.residual.size(); ++i) {
          ASSERT_EQ(got.residual[i], got.v[i] - decoded[i])
              << "element " << i << ", v " << got.v[i] << ", decoded " << decoded[i];
        }
      }
    }
  }
}

TEST_P(PayloadCodecContract, TheResidualMayTakeTheGradientsMemory) {
  for_each_simd_target([&] {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : sizes()) {
        SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n);
        Memory apart = make_memory(Pattern::kNormal, n, {.decay = 0.875F});
        Memory given = make_memory(Pattern::kNormal, n, {.decay = 0.875F});
        const auto values = make_values(pattern, n, 5);
        const auto expected = encode(values, &apart, {.shift = 1});
        const auto got = encode(values, &given, {.shift = 1, .give = true});
        given.rollback();  // the gradient is gone
        EXPECT_EQ(got.body, expected.body);
        EXPECT_TRUE(same_bits(got.residual, expected.residual));
      }
    }
  });
}

TEST_P(PayloadCodecContract, WithoutMemoryDecodeGivesTheSameAsWithAnEmptyOne) {
  for (const Pattern pattern : {Pattern::kNormal, Pattern::kSparse, Pattern::kSpike}) {
    for (const std::int64_t n : sizes()) {
      SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n);
      const auto values = make_values(pattern, n, 6);
      Memory memory(n);
      const auto alone = encode(values, nullptr);
      if (alone.zero) continue;  // an empty body with a memory, a plain one without
      const auto with = encode(values, &memory);
      EXPECT_EQ(alone.body, with.body);
      Memory one(n, {.transactional = false});
      const auto in_place = encode(values, &one);
      EXPECT_EQ(in_place.body, with.body);
      EXPECT_TRUE(same_bits(in_place.residual, with.residual));
    }
  }
}

TEST_P(PayloadCodecContract, AccumulateAddsTheWeightedDecodedValues) {
  for (const Pattern pattern : kPatterns) {
    if (pattern == Pattern::kHuge) continue;
    for (const std::int64_t n : sizes()) {
      const auto body = encode(make_values(pattern, n, 8), nullptr).body;
      const auto decoded = decode(body, n);
      const auto start = make_values(Pattern::kNormal, n, 9);
      const auto sum = accumulate(body, 0.3F, start);
      for (std::size_t i = 0; i < sum.size(); ++i) {
        const float product = 0.3F * decoded[i];
        ASSERT_EQ(sum[i], start[i] + product) << name(pattern) << " n=" << n << " element " << i;
      }
    }
  }
}

// Bit for bit what accumulate of one body after the other adds to zeros.
TEST_P(PayloadCodecContract, SumIsAccumulateInTheOrderOfTheSenders) {
  for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, test_.block + 1,
                               std::int64_t{8191}, std::int64_t{8193}, std::int64_t{20011}}) {
    std::vector<std::vector<std::byte>> bodies;
    for (const std::size_t senders : {1U, 2U, 7U, 8U, 9U, 17U}) {
      while (bodies.size() < senders) {
        Memory memory(n);
        const Pattern pattern = bodies.size() % 5 == 3 ? Pattern::kZero : Pattern::kNormal;
        bodies.push_back(encode(make_values(pattern, n, 30 + bodies.size()), &memory).body);
      }
      std::vector<float> expected(static_cast<std::size_t>(n));
      for (const auto& body : bodies) expected = accumulate(body, 0.3F, expected);
      ASSERT_TRUE(same_bits(sum(bodies, 0.3F, n), expected)) << "n=" << n << " of " << senders;
    }
    bodies[4] = {static_cast<std::byte>(BodyMode::kNonFinite)};
    for (const float x : sum(bodies, 1, n)) ASSERT_TRUE(std::isnan(x));
  }
}

TEST_P(PayloadCodecContract, SumNamesTheSenderOfACorruptBody) {
  const std::int64_t n = 1009;
  const auto good = encode(make_values(Pattern::kNormal, n, 40), nullptr).body;
  for (const std::size_t bad : {std::size_t{0}, std::size_t{2}, std::size_t{10}}) {
    std::vector<std::vector<std::byte>> bodies(11, good);
    bodies[bad].resize(3);
    try {
      sum(bodies, 1, n);
      ADD_FAILURE() << "a body of 3 bytes was taken";
    } catch (const CorruptPayload& error) {
      const std::string what = error.what();
      EXPECT_NE(what.find("rank " + std::to_string(bad) + ":"), std::string::npos) << what;
    }
  }
}

TEST_P(PayloadCodecContract, DecodeRoundsOnceToTheOutputsDtype) {
  const std::int64_t n = 1009;
  const auto body = encode(make_values(Pattern::kNormal, n, 10), nullptr).body;
  const auto exact = decode(body, n);
  const auto bf16 = decode(body, n, DType::kBF16).values();
  const auto fp16 = decode(body, n, DType::kF16).values();
  for (std::size_t i = 0; i < exact.size(); ++i) {
    ASSERT_EQ(bf16[i], to_float(to_bf16(exact[i]))) << i;
    ASSERT_EQ(fp16[i], to_float(to_fp16(exact[i]))) << i;
  }
}

// Same bytes and floats on every SIMD target, thread count and alignment.
TEST_P(PayloadCodecContract, IsDeterministic) {
  for (const DType dtype : dtypes()) {
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kAlternating}) {
      for (const std::int64_t n : {test_.block + 1, std::int64_t{4099}, std::int64_t{20011}}) {
        SCOPED_TRACE(testing::Message() << name(pattern) << " n=" << n << " " << name(dtype));
        const auto values = make_values(pattern, n, 11);
        Memory memory = make_memory(Pattern::kNormal, n);
        const auto expected = encode(values, &memory, {.dtype = dtype});
        const auto decoded = decode(expected.body, n);
        const auto sum = accumulate(expected.body, 0.7F, values);
        memory.rollback();
        for_each_simd_target([&] {
          for (const int threads : {1, 2, 5}) {
            const auto got = encode(
                values, &memory,
                {.dtype = dtype, .threads = threads, .shift = threads, .out_shift = threads});
            memory.rollback();
            ASSERT_EQ(got.body, expected.body) << threads << " threads";
            ASSERT_TRUE(same_bits(got.residual, expected.residual)) << threads << " threads";
          }
          ASSERT_TRUE(same_bits(decode(expected.body, n), decoded));
          ASSERT_TRUE(same_bits(accumulate(expected.body, 0.7F, values), sum));
        });
        if (HasFailure()) return;
      }
    }
  }
}

TEST_P(PayloadCodecContract, RollbackForgetsTheStepBitForBit) {
  const std::int64_t n = 1009;
  Memory memory = make_memory(Pattern::kSpike, n);
  const std::vector<float> before(memory.current().begin(), memory.current().end());
  const auto first = encode(make_values(Pattern::kNormal, n, 12), &memory);
  memory.rollback();
  EXPECT_TRUE(same_bits(memory.current(), before));
  const auto second = encode(make_values(Pattern::kNormal, n, 12), &memory);
  EXPECT_EQ(first.body, second.body);
  EXPECT_TRUE(same_bits(first.residual, second.residual));
}

TEST_P(PayloadCodecContract, NonFiniteValuesAreFlaggedAndNeverEnterMemory) {
  for_each_simd_target([&] {
    for (const DType dtype : dtypes()) {
      for (const std::int64_t n : {std::int64_t{1}, test_.block + 1, std::int64_t{1009}}) {
        for (const float bad : {kNaN, kInf, -kInf}) {
          for (const std::int64_t at : {std::int64_t{0}, n / 2, n - 1}) {
            for (const bool transactional : {true, false}) {
              SCOPED_TRACE(testing::Message() << name(dtype) << " n=" << n << " " << bad << " at "
                                              << at << " transactional=" << transactional);
              // The array keeps fp32 inputs finite: put the bad value in after rounding.
              Array grad(dtype, make_values(Pattern::kNormal, n, 13));
              grad.set(at, bad);
              Memory memory = make_memory(Pattern::kNormal, n, {.transactional = transactional});
              const std::vector<float> before(memory.current().begin(), memory.current().end());
              std::vector<std::byte> out(codec_.slot_bytes(n));
              const Scratch scratch(codec_.workspace_bytes(n));
              const Context ctx{.workspace = scratch.span()};
              const auto result = codec_.encode(ctx, grad.view(), &memory, out);
              ASSERT_TRUE(result.nonfinite);
              ASSERT_EQ(result.bytes, 1U);
              ASSERT_FALSE(memory.written());
              ASSERT_TRUE(same_bits(memory.current(), before));
              out.resize(result.bytes);
              for (const float x : decode(out, n)) ASSERT_TRUE(std::isnan(x));
              for (const float x : accumulate(out, 1, before)) ASSERT_TRUE(std::isnan(x));
            }
          }
        }
      }
    }
  });
}

TEST_P(PayloadCodecContract, AZeroGradientSendsNothingAndKeepsItsResidual) {
  for (const std::int64_t n : {1, 1009}) {
    Memory memory = make_memory(Pattern::kNormal, n);
    const auto got = encode(make_values(Pattern::kZero, n, 14), &memory);
    EXPECT_TRUE(got.result.empty);
    EXPECT_EQ(got.result.bytes, 1U);
    EXPECT_FALSE(memory.written());
    for (const float x : decode(got.body, n)) EXPECT_EQ(std::bit_cast<std::uint32_t>(x), 0U);
    const auto start = make_values(Pattern::kNormal, n, 15);
    EXPECT_TRUE(same_bits(accumulate(got.body, 1, start), start));
  }
}

TEST_P(PayloadCodecContract, WhatIsSentIsNoSmallerThanPromised) {
  for (const Pattern pattern : {Pattern::kNormal, Pattern::kEqual, Pattern::kSparse}) {
    const std::int64_t n = 10007;
    Memory memory(n);
    const auto got = encode(make_values(pattern, n, 16), &memory);
    const double all = squared_norm(got.v);
    if (test_.least_sent > 0) {
      EXPECT_LE(squared_norm(got.residual), (1 - test_.least_sent) * all) << name(pattern);
    } else {
      EXPECT_GT(all, 0);
    }
  }
}

// The mean over many senders and steps is within six standard errors of x: an element's error is
// below a step, so its variance is at most step^2 / 4; the step is read off the decoded values.
TEST_P(PayloadCodecContract, UnbiasedWhereItSaysSo) {
  if (!codec_.traits().unbiased) {
    EXPECT_TRUE(test_.spec.find("stochastic") == std::string::npos);
    return;
  }
  const std::int64_t n = 512;
  const int trials = 2000;
  const auto values = make_values(Pattern::kNormal, n, 17);
  std::vector<double> mean(static_cast<std::size_t>(n));
  double step = 0;
  for (int t = 0; t < trials; ++t) {
    Call call;
    call.step = static_cast<std::uint64_t>(t / 2);
    call.sender = t % 2;
    const auto decoded = decode(encode(values, nullptr, call).body, n);
    for (std::size_t i = 0; i < decoded.size(); ++i) {
      mean[i] += static_cast<double>(decoded[i]) / trials;
      step = std::max(step, static_cast<double>(std::fabs(decoded[i] - values[i])));
    }
  }
  const double sigma = step / 2 / std::sqrt(trials);
  double total = 0;
  for (std::size_t i = 0; i < mean.size(); ++i) {
    ASSERT_NEAR(mean[i], static_cast<double>(values[i]), 6 * sigma) << "element " << i;
    total += mean[i] - static_cast<double>(values[i]);
  }
  EXPECT_NEAR(total / static_cast<double>(n), 0, 6 * sigma / std::sqrt(n));
}

TEST_P(PayloadCodecContract, RangesAtItsGranularityEncodeAlone) {
  const std::int64_t grain = codec_.traits().granularity;
  const bool random = codec_.traits().unbiased || test_.random;
  if (grain == 0 || random || test_.one_scale) {
    EXPECT_TRUE(codec_.traits().sparse || random || test_.one_scale);
    return;
  }
  const std::int64_t n = 4 * grain + 5;
  const auto values = make_values(Pattern::kNormal, n, 18);
  const auto whole = decode(encode(values, nullptr).body, n);
  for (const std::int64_t begin : {std::int64_t{0}, grain, 3 * grain}) {
    for (const std::int64_t end : {begin + grain, n}) {
      const std::vector<float> range(values.begin() + begin, values.begin() + end);
      const auto decoded = decode(encode(range, nullptr).body, end - begin);
      EXPECT_TRUE(std::equal(decoded.begin(), decoded.end(), whole.begin() + begin))
          << "[" << begin << ", " << end << ")";
    }
  }
}

TEST_P(PayloadCodecContract, HostileBytesAreRefusedOrDecoded) {
  std::mt19937_64 engine(19);
  for (const std::int64_t n :
       {std::int64_t{0}, std::int64_t{1}, test_.block + 1, std::int64_t{1009}}) {
    const auto good = encode(make_values(Pattern::kNormal, n, 20), nullptr).body;
    const auto decoded = decode(good, n);
    auto longer = good;
    for (int i = 0; i < 9; ++i) longer.push_back(static_cast<std::byte>(engine()));
    EXPECT_TRUE(same_bits(decode(longer, n), decoded)) << "trailing bytes were looked at";
    for (std::size_t size = 0; size < good.size(); ++size) {
      std::vector<std::byte> bad(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(size));
      expect_decoded_or_refused(bad, n);
    }
    EXPECT_THROW(decode({}, n), CorruptPayload);
    for (std::size_t bit = 0; bit < 8 * std::min<std::size_t>(good.size(), 400); ++bit) {
      auto bad = good;
      bad[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
      expect_decoded_or_refused(bad, n);
    }
    for (int trial = 0; trial < 200; ++trial) {
      std::vector<std::byte> bad(1 + engine() % (2 * good.size() + 1));
      for (std::byte& b : bad) b = static_cast<std::byte>(engine());
      if (trial % 2 == 0) bad[0] = good[0];
      expect_decoded_or_refused(bad, n);
    }
    // The right bytes for another size.
    for (const std::int64_t other : {n + 1, 2 * n + 70, n / 2})
      expect_decoded_or_refused(good, other);
  }
}

TEST_P(PayloadCodecContract, WrongUseIsRefusedByName) {
  const std::int64_t n = 100;
  Array grad(DType::kF32, make_values(Pattern::kNormal, n, 21));
  std::vector<std::byte> out(codec_.slot_bytes(n));
  const Scratch scratch(codec_.workspace_bytes(n));
  const Context ctx{.workspace = scratch.span(), .sender = 3, .parameter = "layer.weight"};
  Memory other(n + 1);
  try {
    codec_.encode(ctx, grad.view(), &other, out);
    FAIL() << "expected InvalidArgument";
  } catch (const InvalidArgument& error) {
    const std::string what = error.what();
    EXPECT_NE(what.find("rank 3"), std::string::npos) << what;
    EXPECT_NE(what.find("\"layer.weight\""), std::string::npos) << what;
    EXPECT_NE(what.find("101"), std::string::npos) << what;
    EXPECT_NE(what.find("100"), std::string::npos) << what;
  }
  EXPECT_THROW(codec_.encode(ctx, grad.view(), nullptr, std::span(out).first(out.size() - 1)),
               InvalidArgument);
  EXPECT_THROW(codec_.encode(ctx, {grad.view().data, n, DType::kOther}, nullptr, out),
               InvalidArgument);
  Context device = ctx;
  device.device = Device::kCuda;
  EXPECT_THROW(codec_.encode(device, grad.view(), nullptr, out), NotAvailable);
}

TEST_P(PayloadCodecContract, NameIsItsCanonicalSpec) {
  EXPECT_EQ(made_.spec, codec_.name());
  EXPECT_EQ(make_codec(codec_.name()).payload->name(), codec_.name());
  EXPECT_GT(made_.family_id, 0);
}

// A codec of each family; the others run a hundredth.
TEST_P(PayloadCodecContract, ManyElements) {
  const std::int64_t n = test_.large ? kManyElements : 100'003;
  Memory memory(n);
  const auto got = encode(make_values(Pattern::kNormal, n, 22), &memory);
  const auto decoded = decode(got.body, n);
  std::int64_t wrong = 0;
  for (std::size_t i = 0; i < decoded.size(); ++i) {
    wrong += got.residual[i] == got.v[i] - decoded[i] ? 0 : 1;
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace thinwire
