#include <algorithm>
#include <array>
#include <numeric>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/workspace.h"
#include "compressors/lowrank/lowrank.h"
#include "compressors/lowrank/lowrank_kernels.h"

namespace thinwire {
namespace {

// Of a matrix: the left factor has a value for each row, the right one for each column.
enum class Side : std::uint8_t { kLeft = 0, kRight = 1 };

Side other(Side side) { return side == Side::kLeft ? Side::kRight : Side::kLeft; }

struct MatrixShape {
  std::int64_t rows = 1;
  std::int64_t columns = 1;

  explicit MatrixShape(std::span<const std::int64_t> shape) {
    if (shape.empty()) return;
    rows = shape.front();
    for (const std::int64_t extent : shape.subspan(1)) columns *= extent;
  }
  std::int64_t length(Side side) const { return side == Side::kLeft ? rows : columns; }
  std::int64_t shorter() const { return std::min(rows, columns); }
};

// What a step does: v is projected on a basis of side `first`, whose result is a factor of the
// other side. With two rounds that factor, made orthonormal, is the basis of the second round. The
// last basis and the last factor together are M^.
struct Schedule {
  Side first = Side::kRight;
  int rounds = 2;
  bool frozen = false;  // the kept factor of side `first` is a basis already

  Side basis(int round) const { return round == 0 ? first : other(first); }
};

// Both factors with their padding; lives in the round state.
struct Factors {
  std::array<LowRankFactor, 2> of_side;

  const LowRankFactor& operator[](Side side) const {
    return of_side[static_cast<std::size_t>(side)];
  }
};

class LowRankLinearCodec : public LinearCodec {
 public:
  Traits traits() const override { return {.granularity = 0}; }
  int rounds(std::uint64_t step) const override { return schedule({}, step).rounds; }
  std::int64_t round_elements(std::span<const std::int64_t> shape, int round,
                              std::uint64_t step) const override {
    const Side basis = schedule(shape, step).basis(round);
    return std::int64_t{rank(shape)} * MatrixShape(shape).length(other(basis));
  }
  std::size_t round_state_bytes(std::span<const std::int64_t> shape) const override {
    std::size_t bytes = 0;
    for (const Side side : {Side::kLeft, Side::kRight}) {
      bytes += Workspace::bytes_for<float>(padded_floats(shape, side));
    }
    return bytes;
  }
  MemoryNeeds memory_needs(std::span<const std::int64_t> shape) const override {
    std::int64_t floats = 0;
    for (const Side side : kept()) floats += rank(shape) * MatrixShape(shape).length(side);
    return {.state = floats};
  }

  void project(const Context& ctx, int round, const Tensor& tensor,
               std::span<float> out) const override {
    check(ctx, round, tensor, out.size());
    if (tensor.grad.elements == 0) return;
    const Schedule step = schedule(tensor.shape, ctx.step);
    const Factors factors = factors_of(tensor);
    if (round == 0) take_basis(ctx, step, tensor, factors[step.first]);
    const LowRankMatrix v = matrix(tensor);
    if (step.basis(round) == Side::kRight) {
      lowrank_project_left(v, factors[Side::kRight], factors[Side::kLeft], LowRankSums::kFast);
    } else {
      lowrank_project_right(v, factors[Side::kLeft], factors[Side::kRight], LowRankSums::kFast);
    }
    unpad(factors[other(step.basis(round))], out);
  }

  // Where v is not finite in some row or column, neither is what is projected from it; that stays
  // so through all rounds, and no rank writes its memory.
  void absorb(const Context& ctx, int round, std::span<const float> reduced,
              const Tensor& tensor) const override {
    check(ctx, round, tensor, reduced.size());
    const Schedule step = schedule(tensor.shape, ctx.step);
    const bool last = round + 1 == step.rounds;
    if (tensor.grad.elements == 0) {
      if (last && tensor.memory != nullptr) (void)tensor.memory->next();
      return;
    }
    const Factors factors = factors_of(tensor);
    const Side side = other(step.basis(round));
    const bool finite = std::all_of(reduced.begin(), reduced.end(), is_finite);
    pad(reduced, factors[side]);
    if (!last) {
      if (finite) lowrank_orthonormalise(factors[side], stream(ctx));
      return;
    }
    if (!finite) {
      fill_nan(tensor.grad);
      return;
    }
    LowRankReconstruct args{
        .v = matrix(tensor), .left = factors[Side::kLeft], .right = factors[Side::kRight]};
    if (tensor.memory != nullptr) args.next = tensor.memory->next().data();
    lowrank_replace(args);
    if (tensor.memory != nullptr) keep(factors, tensor.memory->next_state());
  }

 protected:
  explicit LowRankLinearCodec(std::int64_t rank) : rank_(rank) {}

  virtual Schedule schedule(std::span<const std::int64_t> shape, std::uint64_t step) const = 0;
  // The sides whose factors go from step to step, in the order of the memory's state.
  virtual std::span<const Side> kept() const = 0;

  int rank(std::span<const std::int64_t> shape) const {
    return static_cast<int>(std::min(rank_, MatrixShape(shape).shorter()));
  }
  std::int64_t rank_;

 private:
  std::size_t padded_floats(std::span<const std::int64_t> shape, Side side) const {
    return static_cast<std::size_t>(rank(shape) *
                                    LowRankFactor::stride_of(MatrixShape(shape).length(side)));
  }
  Factors factors_of(const Tensor& tensor) const {
    Workspace state(tensor.round_state);
    Factors factors;
    for (const Side side : {Side::kLeft, Side::kRight}) {
      factors.of_side[static_cast<std::size_t>(side)] = {
          .data = state.take<float>(padded_floats(tensor.shape, side)).data(),
          .length = MatrixShape(tensor.shape).length(side),
          .rank = rank(tensor.shape)};
    }
    return factors;
  }
  static LowRankMatrix matrix(const Tensor& tensor) {
    LowRankMatrix v{.grad = tensor.grad, .columns = MatrixShape(tensor.shape).columns};
    if (tensor.memory != nullptr) {
      v.residual = tensor.memory->current().data();
      v.decay = tensor.memory->decay();
    }
    return v;
  }
  // The sender is left out: all ranks draw the same.
  static RandomStream stream(const Context& ctx) {
    return random_stream(ctx.key_hash, ctx.step, -1);
  }

  // The basis that the step begins with, from what is kept. Nothing kept is all zeros, of which a
  // random basis becomes.
  void take_basis(const Context& ctx, const Schedule& step, const Tensor& tensor,
                  const LowRankFactor& basis) const {
    std::fill_n(basis.data, basis.rank * basis.stride(), 0.0F);
    bool zero = true;
    if (tensor.memory != nullptr && !tensor.memory->state().empty()) {
      std::span<const float> rest = tensor.memory->state();
      for (const Side side : kept()) {
        const auto size =
            static_cast<std::size_t>(basis.rank * MatrixShape(tensor.shape).length(side));
        if (side == step.first) {
          const auto values = rest.first(size);
          zero = std::all_of(values.begin(), values.end(), [](float x) { return x == 0; });
          pad(values, basis);
        }
        rest = rest.subspan(size);
      }
    }
    if (zero || !step.frozen) lowrank_orthonormalise(basis, stream(ctx));
  }
  void keep(const Factors& factors, std::span<float> state) const {
    if (state.empty()) return;
    for (const Side side : kept()) {
      const LowRankFactor& factor = factors[side];
      const auto size = static_cast<std::size_t>(factor.rank * factor.length);
      unpad(factor, state.first(size));
      state = state.subspan(size);
    }
  }

  static void pad(std::span<const float> values, const LowRankFactor& factor) {
    for (int j = 0; j < factor.rank; ++j) {
      float* column = factor.column(j);
      std::copy_n(values.data() + j * factor.length, factor.length, column);
      std::fill(column + factor.length, column + factor.stride(), 0.0F);
    }
  }
  static void unpad(const LowRankFactor& factor, std::span<float> values) {
    for (int j = 0; j < factor.rank; ++j) {
      std::copy_n(factor.column(j), factor.length, values.data() + j * factor.length);
    }
  }

  void check(const Context& ctx, int round, const Tensor& tensor, std::size_t size) const {
    check_device(ctx);
    const int rounds_now = rounds(ctx.step);
    if (round < 0 || round >= rounds_now) {
      fail_argument(ctx, "round " + std::to_string(round) + ", expected 0 to " +
                             std::to_string(rounds_now - 1));
    }
    const MatrixShape shape(tensor.shape);
    const std::int64_t n = tensor.grad.elements;
    if (shape.rows * shape.columns != n) {
      fail_argument(ctx, "shape of " + std::to_string(shape.rows * shape.columns) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    if (tensor.memory != nullptr && tensor.memory->elements() != n) {
      fail_argument(ctx, "memory of " + std::to_string(tensor.memory->elements()) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    if (tensor.memory != nullptr && !tensor.memory->state().empty() &&
        static_cast<std::int64_t>(tensor.memory->state().size()) !=
            memory_needs(tensor.shape).state) {
      fail_argument(ctx, "memory with a state of " + std::to_string(tensor.memory->state().size()) +
                             " floats, expected " +
                             std::to_string(memory_needs(tensor.shape).state));
    }
    const std::int64_t elements = round_elements(tensor.shape, round, ctx.step);
    if (static_cast<std::int64_t>(size) != elements) {
      fail_argument(ctx, "projection of " + std::to_string(size) + " elements, expected " +
                             std::to_string(elements));
    }
    if (tensor.round_state.size() < round_state_bytes(tensor.shape)) {
      fail_argument(ctx, "round state of " + std::to_string(tensor.round_state.size()) +
                             " bytes, expected " + std::to_string(round_state_bytes(tensor.shape)));
    }
  }
};

class PowerSgdCodec final : public LowRankLinearCodec {
 public:
  explicit PowerSgdCodec(const PowerSgdOptions& options)
      : LowRankLinearCodec(options.rank), rounds_(options.rounds) {}

  std::string name() const override {
    return "powersgd:" + std::to_string(rank_) + (rounds_ == 1 ? ",rounds=1" : "");
  }
  std::int64_t period() const override { return rounds_ == 1 ? 2 : 1; }
  bool gains(std::span<const std::int64_t> shape) const override {
    const MatrixShape matrix(shape);
    return (matrix.rows + matrix.columns) * rank(shape) * 2 < matrix.rows * matrix.columns;
  }

 protected:
  Schedule schedule(std::span<const std::int64_t> /*shape*/, std::uint64_t step) const override {
    if (rounds_ == 2) return {.first = Side::kRight, .rounds = 2};
    return {.first = step % 2 == 0 ? Side::kRight : Side::kLeft, .rounds = 1};
  }
  std::span<const Side> kept() const override {
    static constexpr std::array kSides = {Side::kRight, Side::kLeft};
    return std::span(kSides).first(rounds_ == 2 ? 1 : 2);
  }

 private:
  std::int64_t rounds_;
};

class GaloreCodec final : public LowRankLinearCodec {
 public:
  explicit GaloreCodec(const GaloreOptions& options)
      : LowRankLinearCodec(options.rank), refresh_(options.refresh) {}

  std::string name() const override {
    const std::string refresh =
        refresh_ == GaloreOptions().refresh ? "" : ",refresh=" + std::to_string(refresh_);
    return "galore:" + std::to_string(rank_) + refresh;
  }
  std::int64_t period() const override { return refresh_; }
  bool gains(std::span<const std::int64_t> shape) const override {
    return 2 * rank(shape) < MatrixShape(shape).shorter();
  }

 protected:
  Schedule schedule(std::span<const std::int64_t> shape, std::uint64_t step) const override {
    const MatrixShape matrix(shape);
    const Side side = matrix.rows <= matrix.columns ? Side::kLeft : Side::kRight;
    if (step % static_cast<std::uint64_t>(refresh_) == 0) {
      return {.first = other(side), .rounds = 2};
    }
    return {.first = side, .rounds = 1, .frozen = true};
  }
  std::span<const Side> kept() const override {
    static constexpr std::array kSides = {Side::kRight, Side::kLeft};
    return kSides;
  }

 private:
  std::int64_t refresh_;
};

void check_range(const std::string& what, std::int64_t value, std::int64_t most) {
  if (value >= 1 && value <= most) return;
  throw InvalidArgument(what + " " + std::to_string(value) + ": expected 1 to " +
                        std::to_string(most));
}

}  // namespace

std::shared_ptr<const LinearCodec> make_powersgd_codec(const PowerSgdOptions& options) {
  check_range("powersgd of rank", options.rank, kMaxLowRank);
  check_range("powersgd with rounds", options.rounds, 2);
  return std::make_shared<PowerSgdCodec>(options);
}

std::shared_ptr<const LinearCodec> make_galore_codec(const GaloreOptions& options) {
  check_range("galore of rank", options.rank, kMaxLowRank);
  check_range("galore refreshed every", options.refresh, kMaxLowRankRefresh);
  return std::make_shared<GaloreCodec>(options);
}

}  // namespace thinwire
