// Laws of the low-rank payload beyond the contract: shapes, what fits a slot, what comes through.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "compressors/core/spec.h"
#include "compressors/core/workspace.h"
#include "tests/support/patterns.h"

namespace thinwire {
namespace {

using Floats = std::vector<float>;
using Shape = std::vector<std::int64_t>;

struct Body {
  std::vector<std::byte> bytes;
  int rank() const { return std::to_integer<int>(bytes[1]); }
  std::uint32_t columns() const {
    std::uint32_t value = 0;
    std::memcpy(&value, bytes.data() + 2, sizeof value);
    return value;
  }
};

struct Scratch {
  explicit Scratch(std::size_t bytes)
      : size(bytes), data(std::aligned_alloc(64, bytes + 64 - bytes % 64)) {}
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::span<std::byte> span() const { return {static_cast<std::byte*>(data), size}; }
  std::size_t size;
  void* data;
};

Body encode(const Codec& codec, Floats values, const Shape& shape, Memory* memory = nullptr,
            std::uint64_t step = 0) {
  const TensorView grad = view(values);
  const Scratch scratch(codec.payload->workspace_bytes(grad.elements));
  Body body{std::vector<std::byte>(codec.payload->slot_bytes(grad.elements))};
  const Context ctx{.workspace = scratch.span(), .step = step, .shape = shape};
  body.bytes.resize(codec.payload->encode(ctx, grad, memory, body.bytes).bytes);
  return body;
}

Floats decode(const Codec& codec, const Body& body, std::int64_t n) {
  const Scratch scratch(codec.payload->workspace_bytes(n));
  Floats out(static_cast<std::size_t>(n));
  codec.payload->decode({.workspace = scratch.span()}, body.bytes, view(out));
  return out;
}

double distance(const Floats& a, const Floats& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const auto d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    sum += d * d;
  }
  return std::sqrt(sum);
}
double norm(const Floats& a) { return distance(a, Floats(a.size())); }

// rows x columns of rank 2.
Floats of_rank_two(std::int64_t rows, std::int64_t columns) {
  const Floats a = make_values(Pattern::kNormal, 2 * rows, 1);
  const Floats b = make_values(Pattern::kNormal, 2 * columns, 2);
  Floats values;
  for (std::int64_t i = 0; i < rows; ++i) {
    for (std::int64_t c = 0; c < columns; ++c) {
      values.push_back(a[static_cast<std::size_t>(2 * i)] * b[static_cast<std::size_t>(2 * c)] +
                       a[static_cast<std::size_t>(2 * i + 1)] *
                           b[static_cast<std::size_t>(2 * c + 1)]);
    }
  }
  return values;
}

TEST(LowRankPayload, MatricesOfThatRankComeThroughWhole) {
  const Codec codec = make_codec("lowrank:3");
  for (const Shape& shape : {Shape{40, 60}, Shape{60, 40}, Shape{6, 10, 5, 8}}) {
    const std::int64_t rows = shape.size() == 2 ? shape[0] : 60;
    const Floats values = of_rank_two(rows, 2400 / rows);
    const Body body = encode(codec, values, shape);
    EXPECT_EQ(body.columns(), 2400 / rows);
    EXPECT_LT(distance(decode(codec, body, 2400), values), 1e-5 * norm(values));
  }
}

TEST(LowRankPayload, RankFollowsTheShapeWithinTheSlot) {
  const Codec codec = make_codec("lowrank:4");
  const auto cut = [&](std::int64_t n, const Shape& shape) {
    const Body body = encode(codec, make_values(Pattern::kNormal, n, 3), shape);
    EXPECT_LE(body.bytes.size(), codec.payload->slot_bytes(n));
    return std::pair(body.rank(), body.columns());
  };
  using Pair = std::pair<int, std::uint32_t>;
  EXPECT_EQ(codec.payload->slot_bytes(2500), 6U + 4 * 4 * 100);
  EXPECT_EQ(cut(2500, {50, 50}), (Pair{4, 50}));
  EXPECT_EQ(cut(2500, {20, 125}), (Pair{2, 125}));    // 400 floats hold 2 columns of 145
  EXPECT_EQ(cut(2500, {10, 10, 25}), (Pair{3, 25}));  // 100 x 25
  EXPECT_EQ(cut(2500, {2500}), (Pair{4, 50}));        // no rank fits: square
  EXPECT_EQ(cut(2500, {2, 1250}), (Pair{4, 50}));
  EXPECT_EQ(cut(2500, {}), (Pair{4, 50}));
  EXPECT_EQ(cut(2500, {7, 3}), (Pair{4, 50}));  // of another tensor
  EXPECT_EQ(cut(1, {}), (Pair{1, 1}));
  EXPECT_EQ(cut(1, {1, 1}), (Pair{1, 1}));
  EXPECT_EQ(cut(7, {}), (Pair{3, 3}));  // 3 x 3, two of them missing
}

// One power iteration a step is as good as many while the matrix stays.
TEST(LowRankPayload, AKeptFactorImprovesTheNextBody) {
  const Codec codec = make_codec("lowrank:2");
  const Floats values = make_values(Pattern::kNormal, 3600, 4);
  Memory memory(3600, {.decay = 0, .needs = codec.payload->memory_needs(3600)});
  std::vector<double> errors;
  for (std::uint64_t step = 0; step < 12; ++step) {
    const Body body = encode(codec, values, {60, 60}, &memory, step);
    memory.commit();
    errors.push_back(distance(decode(codec, body, 3600), values));
  }
  EXPECT_LE(errors[11], errors[5] * (1 + 1e-6));
  EXPECT_LT(errors[5], errors[0]);
}

}  // namespace
}  // namespace thinwire
