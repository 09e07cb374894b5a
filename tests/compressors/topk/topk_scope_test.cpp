// scope=bucket: several tensors encoded as one give what one tensor of all their elements does.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "compressors/core/spec.h"
#include "compressors/topk/topk.h"
#include "tests/support/allocations.h"
#include "tests/support/patterns.h"
#include "tests/support/scratch.h"
#include "tests/support/simd_targets.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<std::byte>;

constexpr const char* kSpecs[] = {"topk:0.01,scope=bucket", "topk:0.2,values=q8,scope=bucket",
                                  "topk:0.05,values=ternary,scope=bucket",
                                  "topk:k=7,values=bf16,scope=bucket", "topk:1,scope=bucket"};

const std::vector<std::vector<std::int64_t>>& tables() {
  static const std::vector<std::vector<std::int64_t>> tables = {
      {0, 0},
      {1},
      {0, 1, 0},
      {1, 1, 1},
      {1009},
      {37, 0, 1009, 5},
      {1, 4096, 31, 4097, 2},
      {40009, 33},
      {64, 70001, 9973},
      {3001, 29, 31, 30, 32, 33, 60013, 127, 1, 90017}};
  return tables;
}

std::int64_t sum_of(const std::vector<std::int64_t>& sizes) {
  std::int64_t n = 0;
  for (const std::int64_t size : sizes) n += size;
  return n;
}

struct Encoded {
  EncodeResult result;
  Bytes body;
};

// Several tensors with their memories, and the one that has all their elements.
class Tensors {
 public:
  // memory: none where it is not set. Dtypes go round.
  Tensors(const std::string& spec, const std::vector<std::int64_t>& sizes,
          std::optional<MemoryOptions> memory, std::vector<DType> dtypes = {DType::kF32})
      : codec_(make_codec(spec)), sizes_(sizes), n_(sum_of(sizes)) {
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      grads_.emplace_back(dtypes[i % dtypes.size()], sizes[i], static_cast<std::int64_t>(i % 3));
      if (memory) memories_.push_back(std::make_unique<Memory>(sizes[i], *memory));
    }
    if (memory) whole_memory_ = std::make_unique<Memory>(n_, *memory);
  }

  void fill(Pattern pattern, std::uint64_t seed) {
    for (std::size_t i = 0; i < sizes_.size(); ++i)
      fill(i, make_values(pattern, sizes_[i], seed + i));
  }
  void fill(std::size_t part, const Floats& values) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      grads_[part].set(static_cast<std::int64_t>(i), values[i]);
    }
  }
  void set(std::size_t part, std::int64_t i, float x) { grads_[part].set(i, x); }
  void restore(std::size_t part, const Floats& residual) { memories_[part]->restore(residual); }

  Encoded encode_joint(std::uint64_t step = 0) {
    std::vector<JointCodec::Part> parts;
    for (std::size_t i = 0; i < grads_.size(); ++i) {
      parts.push_back({grads_[i].view(), memories_.empty() ? nullptr : memories_[i].get()});
    }
    const JointCodec& joint = *codec_.payload->joint();
    Scratch scratch(joint.joint_workspace_bytes(n_, parts.size()));
    Encoded encoded{.result = {}, .body = Bytes(codec_.payload->slot_bytes(n_))};
    const Context ctx{.workspace = scratch.span(), .step = step};
    const std::int64_t before = allocations();
    encoded.result = joint.encode_joint(ctx, parts, encoded.body);
    EXPECT_EQ(allocations(), before);
    EXPECT_LE(encoded.result.bytes, encoded.body.size());
    encoded.body.resize(encoded.result.bytes);
    for (const Array& grad : grads_) EXPECT_TRUE(grad.guards_intact());
    return encoded;
  }

  // By encode of the one tensor, whose memory goes on from step to step as the parts' do.
  Encoded encode_whole(std::uint64_t step = 0) {
    Floats values;
    for (const Array& grad : grads_) {
      const Floats part = grad.values();
      values.insert(values.end(), part.begin(), part.end());
    }
    Scratch scratch(codec_.payload->workspace_bytes(n_));
    Encoded encoded{.result = {}, .body = Bytes(codec_.payload->slot_bytes(n_))};
    const Context ctx{.workspace = scratch.span(), .step = step};
    encoded.result = codec_.payload->encode(ctx, view(values), whole_memory_.get(), encoded.body);
    encoded.body.resize(encoded.result.bytes);
    return encoded;
  }

  void commit() {
    for (const auto& memory : memories_) memory->commit();
    if (whole_memory_) whole_memory_->commit();
  }

  // Of all parts, one after the other.
  Floats residuals() const {
    Floats all;
    for (const auto& memory : memories_) {
      all.insert(all.end(), memory->current().begin(), memory->current().end());
    }
    return all;
  }
  Floats whole_residual() const {
    if (!whole_memory_) return {};
    return {whole_memory_->current().begin(), whole_memory_->current().end()};
  }
  void restore_whole(const Floats& residual) { whole_memory_->restore(residual); }

  const PayloadCodec& codec() const { return *codec_.payload; }
  Memory& memory(std::size_t part) { return *memories_[part]; }
  Array& grad(std::size_t part) { return grads_[part]; }
  std::int64_t n() const { return n_; }

 private:
  Codec codec_;
  std::vector<std::int64_t> sizes_;
  std::int64_t n_;
  std::vector<Array> grads_;
  std::vector<std::unique_ptr<Memory>> memories_;
  std::unique_ptr<Memory> whole_memory_;
};

bool same_bits(std::span<const float> a, std::span<const float> b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}

void expect_as_one_tensor(Tensors& tensors, std::uint64_t step) {
  const Encoded joint = tensors.encode_joint(step);
  const Encoded whole = tensors.encode_whole(step);
  ASSERT_EQ(joint.body, whole.body);
  ASSERT_EQ(joint.result.empty, whole.result.empty);
  ASSERT_EQ(joint.result.nonfinite, whole.result.nonfinite);
  tensors.commit();
  ASSERT_TRUE(same_bits(tensors.residuals(), tensors.whole_residual()));
}

TEST(TopKScope, BodiesAndResidualsAreThoseOfOneTensor) {
  for_each_simd_target([] {
    for (const char* spec : kSpecs) {
      for (const auto& sizes : tables()) {
        SCOPED_TRACE(testing::Message() << spec << ", " << testing::PrintToString(sizes));
        for (const Pattern pattern : {Pattern::kNormal, Pattern::kEqual, Pattern::kAlternating}) {
          const bool transactional = pattern != Pattern::kEqual;
          Tensors tensors(spec, sizes,
                          MemoryOptions{.transactional = transactional, .decay = 0.9F});
          for (std::uint64_t step = 0; step < 2; ++step) {
            tensors.fill(pattern, 10 * step);
            expect_as_one_tensor(tensors, step);
          }
        }
      }
    }
  });
}

TEST(TopKScope, PartsMayDifferInDtypeAndHaveNoMemory) {
  for (const char* spec : kSpecs) {
    for (const auto& sizes : tables()) {
      SCOPED_TRACE(testing::Message() << spec << ", " << testing::PrintToString(sizes));
      for (const Pattern pattern : kPatterns) {
        const std::vector<DType> dtypes = {DType::kBF16, DType::kF32, DType::kF16};
        Tensors forgetful(spec, sizes, {}, dtypes);
        forgetful.fill(pattern, 1);
        const Encoded joint = forgetful.encode_joint();
        EXPECT_EQ(joint.body, forgetful.encode_whole().body) << name(pattern);
        if (pattern == Pattern::kZero || pattern == Pattern::kSparse) continue;
        Tensors tensors(spec, sizes, MemoryOptions{}, dtypes);
        tensors.fill(pattern, 2);
        expect_as_one_tensor(tensors, 0);
      }
    }
  }
}

// The threshold's sample goes over all parts: candidates stay few, and the room for them is that of
// one tensor, which sanitizers watch.
TEST(TopKScope, ThresholdsFarApartInThePartsChangeNothing) {
  const std::vector<std::int64_t> sizes = {60013, 20011, 60017};
  for (const double factor : {1e-6, 1.0, 1e6}) {
    Tensors tensors("topk:0.01,scope=bucket", sizes, MemoryOptions{});
    for (std::uint64_t step = 0; step < 3; ++step) {
      tensors.fill(Pattern::kNormal, step);
      Floats values = make_values(Pattern::kNormal, sizes[1], 7 + step);
      for (float& x : values) x *= static_cast<float>(factor);
      tensors.fill(1, values);
      expect_as_one_tensor(tensors, step);
    }
  }
}

TEST(TopKScope, MemoryOfTheGradientsMayBecomeTheResiduals) {
  const std::vector<std::int64_t> sizes = {5003, 1, 70001};
  Tensors given("topk:0.01,values=q4,scope=bucket", sizes, MemoryOptions{});
  std::vector<std::shared_ptr<Floats>> owners;
  std::vector<JointCodec::Part> parts;
  for (std::uint64_t step = 0; step < 3; ++step) {
    given.fill(Pattern::kNormal, 5 * step);
    parts.clear();
    for (std::size_t i = 0; i < sizes.size(); ++i) {
      owners.push_back(std::make_shared<Floats>(given.grad(i).values()));
      given.memory(i).adopt({owners.back(), owners.back()->data()});
      parts.push_back({view(*owners.back()), &given.memory(i)});
    }
    const JointCodec& joint = *given.codec().joint();
    Scratch scratch(joint.joint_workspace_bytes(given.n(), parts.size()));
    Bytes body(given.codec().slot_bytes(given.n()));
    const Context ctx{.workspace = scratch.span(), .step = step};
    body.resize(joint.encode_joint(ctx, parts, body).bytes);
    EXPECT_EQ(body, given.encode_whole(step).body);
    given.commit();
    EXPECT_TRUE(same_bits(given.residuals(), given.whole_residual()));
  }
}

// The part's residual is large: it would have most of the entries.
TEST(TopKScope, OfAZeroPartNothingIsSentAndItsMemoryStays) {
  for (const bool transactional : {true, false}) {
    for (const auto& sizes : tables()) {
      if (sizes.size() < 2) continue;
      for (std::size_t zero = 0; zero < sizes.size(); ++zero) {
        SCOPED_TRACE(testing::PrintToString(sizes) + ", part " + std::to_string(zero));
        const MemoryOptions options{.transactional = transactional};
        Tensors tensors("topk:0.02,scope=bucket", sizes, options);
        Floats whole;
        Floats kept;
        for (std::size_t i = 0; i < sizes.size(); ++i) {
          Floats residual = make_values(Pattern::kNormal, sizes[i], 40 + i);
          if (i == zero) {
            for (float& x : residual) x *= 1000;
            kept = residual;
          }
          tensors.restore(i, residual);
          if (i == zero) std::fill(residual.begin(), residual.end(), 0.0F);
          whole.insert(whole.end(), residual.begin(), residual.end());
        }
        tensors.fill(Pattern::kNormal, 3);
        tensors.fill(zero, make_values(Pattern::kZero, sizes[zero], 0));
        tensors.restore_whole(whole);
        const Encoded joint = tensors.encode_joint();
        const Encoded expected = tensors.encode_whole();
        ASSERT_EQ(joint.body, expected.body);
        EXPECT_FALSE(tensors.memory(zero).written());
        tensors.commit();
        EXPECT_TRUE(same_bits(tensors.memory(zero).current(), kept));
        Floats residuals = tensors.whole_residual();
        std::int64_t begin = 0;
        for (std::size_t i = 0; i < zero; ++i) begin += sizes[i];
        if (joint.result.empty) continue;
        std::copy(kept.begin(), kept.end(), residuals.begin() + begin);
        EXPECT_TRUE(same_bits(tensors.residuals(), residuals));
      }
    }
  }
}

TEST(TopKScope, ZeroPartsAloneAreEmpty) {
  for (const bool transactional : {true, false}) {
    Tensors tensors("topk:0.5,scope=bucket", {50, 3, 700},
                    MemoryOptions{.transactional = transactional});
    tensors.restore(2, Floats(700, 1.0F));
    tensors.fill(Pattern::kZero, 0);
    const Encoded joint = tensors.encode_joint();
    EXPECT_TRUE(joint.result.empty);
    EXPECT_EQ(joint.body, Bytes{static_cast<std::byte>(BodyMode::kEmpty)});
    for (std::size_t i = 0; i < 3; ++i) EXPECT_FALSE(tensors.memory(i).written());
  }
}

TEST(TopKScope, NonfiniteValuesInAnyPartLeaveAllMemories) {
  const std::vector<std::int64_t> sizes = {5003, 17, 0, 40009};
  for (const bool transactional : {true, false}) {
    for (const std::size_t bad : {0U, 1U, 3U}) {
      for (const float poison :
           {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
        Tensors tensors("topk:0.02,scope=bucket", sizes,
                        MemoryOptions{.transactional = transactional});
        tensors.fill(Pattern::kNormal, 1);
        tensors.encode_joint();
        tensors.commit();
        const Floats before = tensors.residuals();
        tensors.fill(Pattern::kNormal, 2);
        tensors.set(bad, sizes[bad] - 1, poison);
        const Encoded joint = tensors.encode_joint();
        EXPECT_TRUE(joint.result.nonfinite);
        EXPECT_EQ(joint.body, Bytes{static_cast<std::byte>(BodyMode::kNonFinite)});
        for (std::size_t i = 0; i < sizes.size(); ++i) EXPECT_FALSE(tensors.memory(i).written());
        tensors.commit();
        EXPECT_TRUE(same_bits(tensors.residuals(), before));
      }
    }
  }
}

// Sums of `bodies` into one array and into parts, each part an array of its own.
void expect_sums_as_one_tensor(const PayloadCodec& codec, const std::vector<std::int64_t>& sizes,
                               const std::vector<Bytes>& bodies) {
  const std::vector<std::span<const std::byte>> views(bodies.begin(), bodies.end());
  Floats whole(static_cast<std::size_t>(sum_of(sizes)), 5.0F);
  codec.sum({}, views, 0.25F, whole);
  Floats accumulated(whole.size());
  for (const Bytes& body : bodies) codec.accumulate({}, body, 0.25F, accumulated);
  ASSERT_TRUE(same_bits(whole, accumulated));
  std::vector<Array> arrays;
  std::vector<std::span<float>> outs;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    arrays.emplace_back(DType::kF32, Floats(static_cast<std::size_t>(sizes[i]), 7.0F),
                        static_cast<std::int64_t>(i % 5));
  }
  for (Array& array : arrays) {
    const TensorView out = array.view();
    outs.push_back({static_cast<float*>(out.data), static_cast<std::size_t>(out.elements)});
  }
  codec.joint()->sum_joint({}, views, 0.25F, outs);
  std::size_t begin = 0;
  for (std::size_t i = 0; i < outs.size(); ++i) {
    EXPECT_TRUE(same_bits(outs[i], std::span(whole).subspan(begin, outs[i].size()))) << i;
    EXPECT_TRUE(arrays[i].guards_intact());
    begin += outs[i].size();
  }
}

void expect_sums_of(const std::vector<std::int64_t>& sizes, std::size_t senders) {
  SCOPED_TRACE(testing::PrintToString(sizes) + ", senders " + std::to_string(senders));
  Tensors tensors("topk:0.03,values=q8,scope=bucket", sizes, {});
  std::vector<Bytes> bodies;
  for (std::size_t i = 0; i < senders; ++i) {
    tensors.fill(Pattern::kNormal, 100 * i);
    bodies.push_back(tensors.encode_joint().body);
  }
  expect_sums_as_one_tensor(tensors.codec(), sizes, bodies);
  bodies[0] = {static_cast<std::byte>(BodyMode::kEmpty)};
  expect_sums_as_one_tensor(tensors.codec(), sizes, bodies);
  bodies[senders / 2] = {static_cast<std::byte>(BodyMode::kNonFinite)};
  expect_sums_as_one_tensor(tensors.codec(), sizes, bodies);
}

TEST(TopKScope, SumsAreThoseOfOneTensor) {
  for_each_simd_target([&] {
    for (const auto& sizes : tables()) {
      for (const std::size_t senders : {1U, 9U}) expect_sums_of(sizes, senders);
    }
  });
  expect_sums_of({700'001, 33, 500'009}, 2);  // written around the caches
}

TEST(TopKScope, DamagedBodiesNameTheirSender) {
  const std::vector<std::int64_t> sizes = {100, 900};
  Tensors tensors("topk:0.1,scope=bucket", sizes, {});
  tensors.fill(Pattern::kNormal, 1);
  const Bytes good = tensors.encode_joint().body;
  std::vector<Floats> sums = {Floats(100), Floats(900)};
  const std::vector<std::span<float>> outs(sums.begin(), sums.end());
  for (const Bytes& bad :
       {Bytes(), Bytes{std::byte{0xF7}}, Bytes(good.begin(), good.begin() + 50)}) {
    const std::vector<std::span<const std::byte>> bodies = {good, good, bad};
    try {
      tensors.codec().joint()->sum_joint({}, bodies, 1.0F, outs);
      ADD_FAILURE() << "a body of " << bad.size() << " bytes was summed";
    } catch (const CorruptPayload& error) {
      EXPECT_NE(std::string(error.what()).find("rank 2"), std::string::npos) << error.what();
    }
  }
}

TEST(TopKScope, RefusesWhatItCannotDo) {
  Tensors tensors("topk:0.1,scope=bucket", {100, 900}, {});
  const JointCodec& joint = *tensors.codec().joint();
  Scratch scratch(joint.joint_workspace_bytes(1000, 2));
  Bytes out(tensors.codec().slot_bytes(1000));
  const Context ctx{.workspace = scratch.span()};
  Memory memory(99);
  std::vector<JointCodec::Part> parts = {{tensors.grad(0).view(), &memory},
                                         {tensors.grad(1).view()}};
  EXPECT_THROW(joint.encode_joint(ctx, parts, out), InvalidArgument);
  parts[0].memory = nullptr;
  EXPECT_THROW(joint.encode_joint(ctx, parts, std::span(out).first(10)), InvalidArgument);
  std::vector<double> wide(100);
  parts[0].grad = {wide.data(), 100, DType::kF64};
  EXPECT_THROW(joint.encode_joint(ctx, parts, out), InvalidArgument);
  EXPECT_THROW(joint.joint_workspace_bytes(std::int64_t{1} << 32, 2), InvalidArgument);

  EXPECT_EQ(make_topk_codec({.density = 0.1})->joint(), nullptr);
  const TopKOptions good{.density = 0.1, .scope = TopKScope::kBucket};
  EXPECT_EQ(make_topk_codec(good)->name(), "topk:0.1,scope=bucket");
  TopKOptions bad = good;
  bad.select = TopKSelect::kCarried;
  EXPECT_THROW(make_topk_codec(bad), InvalidArgument);
  bad = good;
  bad.chunk = 64;
  EXPECT_THROW(make_topk_codec(bad), InvalidArgument);
  bad = good;
  bad.momentum.emplace();
  EXPECT_THROW(make_topk_codec(bad), InvalidArgument);
}

// Alone, a tensor is encoded as with scope=layer.
TEST(TopKScope, ATensorAloneIsEncodedAsWithScopeLayer) {
  Floats grad = make_values(Pattern::kNormal, 5003, 1);
  std::vector<Bytes> bodies;
  for (const TopKScope scope : {TopKScope::kLayer, TopKScope::kBucket}) {
    const auto codec = make_topk_codec({.density = 0.01, .scope = scope});
    Scratch scratch(codec->workspace_bytes(5003));
    Bytes& body = bodies.emplace_back(codec->slot_bytes(5003));
    body.resize(codec->encode({.workspace = scratch.span()}, view(grad), nullptr, body).bytes);
  }
  EXPECT_EQ(bodies[0], bodies[1]);
}

}  // namespace
}  // namespace thinwire
