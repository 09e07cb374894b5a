// A residual that is stored as bf16 and worked on as it is must be what unpacking it, encoding and
// packing it again leaves, bit for bit, and so must the payload.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "compressors/core/encode.h"
#include "compressors/core/spec.h"
#include "tests/support/patterns.h"
#include "tests/support/scratch.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

constexpr MemoryOptions kBF16 = {.storage = ResidualStorage::kBF16, .decay = 0.75F};

std::vector<float> residual_of(const Memory& memory) {
  std::vector<float> values(static_cast<std::size_t>(memory.elements()));
  memory.read(values);
  return values;
}

// The layers of one job whose memories are opened where they can be, and of its double, whose are
// unpacked.
class Double {
 public:
  Double(const std::string& spec, const std::vector<std::int64_t>& sizes,
         const std::vector<MemoryOptions>& stored = {})
      : codec_(make_codec(spec)) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      const std::int64_t n = sizes[i];
      MemoryOptions options = stored.empty() ? kBF16 : stored[i];
      options.needs = codec_.payload->memory_needs(n);
      opened_.push_back(std::make_unique<Memory>(n, options));
      unpacked_.push_back(std::make_unique<Memory>(n, options));
      elements_ += n;
    }
  }

  // Both encode the gradients; everything must agree.
  void step(std::uint64_t step, std::vector<Array>& grads, bool commit) {
    SCOPED_TRACE(testing::Message() << "step " << step);
    const PayloadCodec& codec = *codec_.payload;
    const bool joint = codec.joint() != nullptr;
    Scratch workspace(joint ? codec.joint()->joint_workspace_bytes(elements_, grads.size())
                            : codec.workspace_bytes(elements_));
    const Context ctx{.workspace = workspace.span(), .step = step, .sender = 1};
    std::vector<Dither> dithers;
    std::vector<JointCodec::Part> opened;
    std::vector<JointCodec::Part> unpacked;
    std::vector<std::unique_ptr<Scratch>> scratch;
    std::size_t rest = 0;  // of those that are not opened
    for (std::size_t i = 0; i < grads.size(); ++i) {
      dithers.push_back(make_dither(i, step, 1));
      opened.push_back({grads[i].view(), opened_[i].get()});
      unpacked.push_back({grads[i].view(), unpacked_[i].get()});
      EXPECT_EQ(encodes_opened(codec, *opened_[i]), opened_[i]->opens());
      rest += residual_scratch_bytes(codec, opened_[i].get());
      scratch.push_back(std::make_unique<Scratch>(unpacked_[i]->scratch_bytes()));
      unpacked_[i]->unpack(scratch.back()->span());
    }
    Scratch unopened(rest);
    std::vector<std::byte> body(codec.slot_bytes(elements_));
    std::vector<std::byte> expected(body.size());
    const EncodeResult result = joint ? encode(codec, ctx, opened, dithers, unopened.span(), body)
                                      : encode(codec, ctx, opened[0].grad, opened[0].memory,
                                               dithers[0], unopened.span(), body);
    const EncodeResult reference =
        joint ? codec.joint()->encode_joint(ctx, unpacked, expected)
              : codec.encode(ctx, unpacked[0].grad, unpacked[0].memory, expected);
    EXPECT_EQ(result.bytes, reference.bytes);
    EXPECT_EQ(result.nonfinite, reference.nonfinite);
    EXPECT_EQ(result.empty, reference.empty);
    EXPECT_EQ(body, expected);
    for (std::size_t i = 0; i < grads.size(); ++i) {
      unpacked_[i]->pack(dithers[i]);
      EXPECT_EQ(opened_[i]->written(), unpacked_[i]->written());
      for (Memory* memory : {opened_[i].get(), unpacked_[i].get()}) {
        commit ? memory->commit() : memory->rollback();
      }
      EXPECT_EQ(residual_of(*opened_[i]), residual_of(*unpacked_[i]));
      EXPECT_TRUE(std::ranges::equal(opened_[i]->state(), unpacked_[i]->state()));
      EXPECT_TRUE(grads[i].guards_intact());
      EXPECT_FALSE(opened_[i]->is_open());
    }
  }

 private:
  Codec codec_;
  std::vector<std::unique_ptr<Memory>> opened_;
  std::vector<std::unique_ptr<Memory>> unpacked_;
  std::int64_t elements_ = 0;
};

class TopKOpenedSpecs : public testing::TestWithParam<std::string> {};

INSTANTIATE_TEST_SUITE_P(TopKOpened, TopKOpenedSpecs,
                         testing::Values("topk:0.01", "topk:0.001,values=q8", "topk:0.3,values=q4",
                                         "topk:0.02,values=ternary", "topk:0.01,select=sampled",
                                         "topk:0.01,values=q8,select=carried"));

TEST_P(TopKOpenedSpecs, EqualsUnpackingAndPacking) {
  for_each_simd_target([&] {
    for (const Pattern pattern : kPatterns) {
      for (const std::int64_t n : {1, 15, 31, 33, 127, 4096, 4099, 70001}) {
        for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
          SCOPED_TRACE(testing::Message() << name(pattern) << " " << n << " " << name(dtype));
          Double both(GetParam(), {n});
          for (std::uint64_t step = 0; step < 4; ++step) {
            std::vector<Array> grads;
            grads.emplace_back(dtype, make_values(pattern, n, step), n % 3);
            both.step(step, grads, step != 2);
          }
          if (testing::Test::HasFailure()) return;
        }
      }
    }
  });
}

// Past the caches, and samples that tell a threshold.
TEST_P(TopKOpenedSpecs, EqualsUnpackingAndPackingOfManyElements) {
  for_each_simd_target([&] {
    constexpr std::int64_t kElements = (1 << 20) + 77;
    Double both(GetParam(), {kElements});
    for (std::uint64_t step = 0; step < 3; ++step) {
      std::vector<Array> grads;
      grads.emplace_back(DType::kF32, make_values(Pattern::kNormal, kElements, step));
      both.step(step, grads, true);
    }
  });
}

TEST_P(TopKOpenedSpecs, NaNAndInfLeaveTheResidual) {
  Double both(GetParam(), {5000});
  std::uint64_t step = 0;
  for (const float bad : {0.0F, std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::quiet_NaN(), 0.0F}) {
    std::vector<Array> grads;
    grads.emplace_back(DType::kF32, make_values(Pattern::kNormal, 5000, step));
    if (bad != 0) grads[0].set(4990, bad);
    both.step(step++, grads, true);
  }
}

TEST(TopKOpenedBucket, EqualsUnpackingAndPacking) {
  for_each_simd_target([&] {
    const std::vector<std::int64_t> sizes = {40000, 1, 333, 9000};
    Double both("topk:0.01,values=q4,scope=bucket", sizes);
    for (std::uint64_t step = 0; step < 4; ++step) {
      std::vector<Array> grads;
      for (std::size_t i = 0; i < sizes.size(); ++i) {
        const Pattern pattern = i == step ? Pattern::kZero : Pattern::kNormal;
        grads.emplace_back(i == 2 ? DType::kF16 : DType::kF32,
                           make_values(pattern, sizes[i], 10 * step + i));
      }
      both.step(step, grads, step != 1);
    }
  });
}

// Rules may store the residuals of a bucket's layers in different ways.
TEST(TopKOpenedBucket, OthersMayBeStoredInOtherWays) {
  const std::vector<std::int64_t> sizes = {3000, 2000, 500, 700};
  const std::vector<MemoryOptions> stored = {
      kBF16,
      {.transactional = false},
      {.transactional = false, .storage = ResidualStorage::kBF16},
      {.storage = ResidualStorage::kQ8}};
  Double both("topk:0.01,values=q4,scope=bucket", sizes, stored);
  for (std::uint64_t step = 0; step < 5; ++step) {
    std::vector<Array> grads;
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      grads.emplace_back(DType::kF32, make_values(Pattern::kNormal, sizes[i], 10 * step + i));
    }
    if (step == 2) grads[0].set(7, std::numeric_limits<float>::quiet_NaN());
    if (step == 3) grads[1].set(7, std::numeric_limits<float>::infinity());
    both.step(step, grads, true);
  }
}

TEST(TopKOpened, IsClosedAfterAnError) {
  const Codec codec = make_codec("topk:0.01");
  Memory memory(100, kBF16);
  std::vector<float> grad(99);
  Scratch workspace(codec.payload->workspace_bytes(100));
  std::vector<std::byte> body(codec.payload->slot_bytes(100));
  EXPECT_THROW(encode(*codec.payload, {.workspace = workspace.span()}, view(grad), &memory,
                      make_dither(1, 2, 3), {}, body),
               InvalidArgument);
  EXPECT_FALSE(memory.is_open());
  EXPECT_FALSE(memory.written());
}

TEST(TopKOpened, MomentumAndChunksAreUnpacked) {
  for (const char* spec : {"topk:0.01,momentum=0.9", "topk:0.01,chunk=100", "q4", "onebit"}) {
    const Codec codec = make_codec(spec);
    const Memory memory(100, kBF16);
    EXPECT_FALSE(encodes_opened(*codec.payload, memory)) << spec;
    EXPECT_EQ(residual_scratch_bytes(*codec.payload, &memory), memory.scratch_bytes()) << spec;
  }
  const Codec topk = make_codec("topk:0.01");
  const Memory in_place(100, {.transactional = false, .storage = ResidualStorage::kBF16});
  EXPECT_FALSE(encodes_opened(*topk.payload, in_place));
  EXPECT_EQ(residual_scratch_bytes(*topk.payload, nullptr), 0U);
}

}  // namespace
}  // namespace thinwire
