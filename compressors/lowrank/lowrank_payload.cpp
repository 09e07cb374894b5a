#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/workspace.h"
#include "compressors/lowrank/lowrank.h"
#include "compressors/lowrank/lowrank_kernels.h"

namespace thinwire {
namespace {

constexpr auto kMode = static_cast<std::uint8_t>(static_cast<int>(BodyMode::kFamily) + 64);
constexpr std::size_t kHeaderBytes = 6;  // mode, rank, columns
constexpr std::int64_t kMostColumns = std::numeric_limits<std::uint32_t>::max();

// Larger than any element of an orthonormal factor, and of v^T times one.
constexpr float kMostLeft = 2;
constexpr float kMostRight = 0x1p104F;

// n elements in rows of `columns`, the last row perhaps shorter, as two factors of `rank` columns.
struct Cut {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t rank = 0;

  Cut(std::int64_t n, std::int64_t row_length, std::int64_t most_rank)
      : rows((n + row_length - 1) / row_length),
        columns(row_length),
        rank(std::min({most_rank, rows, columns})) {}
  std::int64_t floats() const { return rank * (rows + columns); }
};

// The cut of least rows + columns; what it takes is what any body may take.
Cut square_cut(std::int64_t n, std::int64_t rank) {
  auto side = static_cast<std::int64_t>(std::sqrt(static_cast<double>(n)));
  while (side * side < n) ++side;
  return {n, std::max<std::int64_t>(side, 1), rank};
}

// The cut of a tensor of `shape`: between two of its dimensions, where rows + columns are least,
// with as high a rank as the square cut's floats allow. The square one where that is none.
Cut cut_of(std::int64_t n, std::span<const std::int64_t> shape, std::int64_t rank) {
  const Cut square = square_cut(n, rank);
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  if (product != n) return square;
  std::int64_t columns = 1;
  std::int64_t suffix = 1;
  for (std::size_t i = shape.size(); i > 0; --i) {
    if (shape[i - 1] < 1) return square;  // no elements
    suffix *= shape[i - 1];
    if (n / suffix + suffix <= n / columns + columns) columns = suffix;
  }
  if (columns > kMostColumns) return square;
  const Cut cut(n, columns, std::min(rank, square.floats() / (n / columns + columns)));
  return cut.rank > 0 ? cut : square;
}

struct Factors {
  LowRankFactor left;
  LowRankFactor right;
};

class LowRankPayloadCodec final : public PayloadCodec {
 public:
  explicit LowRankPayloadCodec(std::int64_t rank) : rank_(rank) {}

  std::string name() const override { return "lowrank:" + std::to_string(rank_); }
  Traits traits() const override { return {.granularity = 0}; }
  std::size_t slot_bytes(std::int64_t n) const override {
    return kHeaderBytes + sizeof(float) * static_cast<std::size_t>(most_floats(n));
  }
  std::size_t workspace_bytes(std::int64_t n) const override {
    return Workspace::bytes_for<float>(padded_floats(n));
  }
  MemoryNeeds memory_needs(std::int64_t n) const override { return {.state = most_floats(n)}; }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    check_encode(ctx, grad, memory, out, slot_bytes(grad.elements));
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    const Cut cut = cut_of(grad.elements, ctx.shape, rank_);
    const Factors factors = factors_of(ctx, grad.elements, cut);
    LowRankReconstruct args{
        .v = {.grad = grad, .columns = cut.columns}, .left = factors.left, .right = factors.right};
    if (memory != nullptr) {
      args.v.residual = memory->current().data();
      args.v.decay = memory->decay();
    }
    if (!iterate(ctx, memory, args)) return write_mark(BodyMode::kNonFinite, out);
    if (memory != nullptr) {
      keep(factors.right, memory->next_state());
      args.next = memory->next().data();
      lowrank_subtract(args);
    }
    return write(cut, factors, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, kMode, out)) return;
    const Factors factors = read(ctx, body, out.elements);
    lowrank_decode(factors.left, factors.right, out);
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, kMode, out)) return;
    const Factors factors = read(ctx, body, static_cast<std::int64_t>(out.size()));
    lowrank_add(factors.left, factors.right, weight, out);
  }

 private:
  std::int64_t most_floats(std::int64_t n) const {
    return n == 0 ? 0 : square_cut(n, rank_).floats();
  }
  std::size_t padded_floats(std::int64_t n) const {
    return static_cast<std::size_t>(most_floats(n) + rank_ * 2 * kLowRankLanes);
  }
  Factors factors_of(const Context& ctx, std::int64_t n, const Cut& cut) const {
    float* data = Workspace(ctx.workspace).take<float>(padded_floats(n)).data();
    const int rank = static_cast<int>(cut.rank);
    const LowRankFactor left{.data = data, .length = cut.rows, .rank = rank};
    return {left, {.data = left.column(rank), .length = cut.columns, .rank = rank}};
  }

  // Power iterations on v: one from the right factor that the last step left, two from a random
  // one. False when v is not finite.
  static bool iterate(const Context& ctx, const Memory* memory, const LowRankReconstruct& args) {
    const RandomStream stream = random_stream(ctx.key_hash, ctx.step, ctx.sender);
    const LowRankFactor& right = args.right;
    std::fill_n(right.data, right.rank * right.stride(), 0.0F);
    bool warm = false;
    if (memory != nullptr && !memory->state().empty()) {
      const float* kept = memory->state().data();
      warm = std::any_of(kept, kept + right.rank * right.length, [](float x) { return x != 0; });
      for (int j = 0; j < right.rank; ++j) {
        std::copy_n(kept + j * right.length, right.length, right.column(j));
      }
    }
    for (int iteration = warm ? 1 : 0; iteration < 2; ++iteration) {
      lowrank_orthonormalise(right, stream);
      lowrank_project_left(args.v, right, args.left, LowRankSums::kExact);
      const float* left = args.left.data;
      if (!std::all_of(left, left + args.left.rank * args.left.stride(), is_finite)) return false;
      lowrank_orthonormalise(args.left, stream);
      lowrank_project_right(args.v, args.left, right, LowRankSums::kExact);
    }
    return true;
  }
  static void keep(const LowRankFactor& right, std::span<float> state) {
    if (state.empty()) return;
    float* to = state.data();
    for (int j = 0; j < right.rank; ++j) to = std::copy_n(right.column(j), right.length, to);
    std::fill(to, state.data() + state.size(), 0.0F);
  }

  static EncodeResult write(const Cut& cut, const Factors& factors, std::span<std::byte> out) {
    out[0] = std::byte{kMode};
    out[1] = static_cast<std::byte>(cut.rank);
    const auto columns = static_cast<std::uint32_t>(cut.columns);
    std::memcpy(out.data() + 2, &columns, sizeof columns);
    std::size_t at = kHeaderBytes;
    for (const LowRankFactor& factor : {factors.left, factors.right}) {
      for (int j = 0; j < factor.rank; ++j) {
        const std::size_t size = sizeof(float) * static_cast<std::size_t>(factor.length);
        std::memcpy(out.data() + at, factor.column(j), size);
        at += size;
      }
    }
    return {.bytes = at};
  }

  // The factors of a body, padded, in the workspace.
  Factors read(const Context& ctx, std::span<const std::byte> body, std::int64_t n) const {
    if (body.size() < kHeaderBytes) fail_size(ctx, body, kHeaderBytes);
    const auto rank = std::to_integer<std::int64_t>(body[1]);
    std::uint32_t columns = 0;
    std::memcpy(&columns, body.data() + 2, sizeof columns);
    if (columns < 1 || columns > n) fail_body(ctx, "rows of " + std::to_string(columns), n);
    const Cut cut(n, columns, rank);
    if (rank < 1 || rank > rank_ || cut.rank != rank || cut.floats() > most_floats(n)) {
      fail_body(ctx, "rank " + std::to_string(rank), n);
    }
    const std::size_t size = kHeaderBytes + sizeof(float) * static_cast<std::size_t>(cut.floats());
    if (body.size() < size) fail_size(ctx, body, size);
    const Factors factors = factors_of(ctx, n, cut);
    const std::byte* from = body.data() + kHeaderBytes;
    from = read_factor(ctx, from, kMostLeft, factors.left);
    read_factor(ctx, from, kMostRight, factors.right);
    return factors;
  }
  static const std::byte* read_factor(const Context& ctx, const std::byte* from, float most,
                                      const LowRankFactor& factor) {
    for (int j = 0; j < factor.rank; ++j) {
      float* column = factor.column(j);
      const std::size_t size = sizeof(float) * static_cast<std::size_t>(factor.length);
      std::memcpy(column, from, size);
      from += size;
      std::fill(column + factor.length, column + factor.stride(), 0.0F);
      if (!std::all_of(column, column + factor.length,
                       [=](float x) { return std::fabs(x) <= most; })) {
        fail_corrupt(ctx, "lowrank body with factors that no sender writes");
      }
    }
    return from;
  }
  [[noreturn]] void fail_size(const Context& ctx, std::span<const std::byte> body,
                              std::size_t expected) const {
    fail_corrupt(ctx, name() + " body of " + std::to_string(body.size()) + " bytes, expected " +
                          std::to_string(expected));
  }
  [[noreturn]] void fail_body(const Context& ctx, const std::string& what, std::int64_t n) const {
    fail_corrupt(ctx, name() + " body of " + what + " for " + std::to_string(n) +
                          " elements\nhint: all ranks need the same policy and version");
  }

  std::int64_t rank_;
};

}  // namespace

std::shared_ptr<const PayloadCodec> make_lowrank_codec(std::int64_t rank) {
  if (rank < 1 || rank > kMaxLowRank) {
    throw InvalidArgument("lowrank of rank " + std::to_string(rank) + ": expected 1 to " +
                          std::to_string(kMaxLowRank));
  }
  return std::make_shared<LowRankPayloadCodec>(rank);
}

}  // namespace thinwire
