#include "compressors/dct/dctcols.h"

#include <algorithm>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/dct/dctcols_kernels.h"
#include "compressors/randmask/randmask_kernels.h"

namespace thinwire {
namespace {

using Shape = std::span<const std::int64_t>;

// Means of this magnitude come from no sender: a sketch sums fewer than 2^32 values of 2^64.
constexpr float kLimit = 0x1p96F;

class DctColsCodec final : public LinearCodec {
 public:
  explicit DctColsCodec(const DctColsOptions& options) : options_(options) {}

  std::string name() const override {
    const DctColsOptions defaults;
    std::string text = "dctcols:" + std::to_string(options_.rank);
    if (options_.refresh != defaults.refresh) {
      text += ",refresh=" + std::to_string(options_.refresh);
    }
    return text;
  }
  Traits traits() const override { return {.granularity = 0}; }
  bool gains(Shape shape) const override {
    const DctMatrix matrix = dct_matrix(shape);
    return 2 * (sketch_elements(matrix) + chosen(matrix) * matrix.rows) <
           matrix.rows * matrix.columns;
  }
  std::int64_t period() const override { return options_.refresh; }
  int rounds(std::uint64_t step) const override { return chooses(step) ? 2 : 1; }
  std::int64_t round_elements(Shape shape, int round, std::uint64_t step) const override {
    const DctMatrix matrix = dct_matrix(shape);
    return is_sketch(round, step) ? sketch_elements(matrix) : chosen(matrix) * matrix.rows;
  }
  std::size_t round_state_bytes(Shape shape) const override {
    const DctMatrix matrix = dct_matrix(shape);
    return dct_tables_bytes(matrix.columns, chosen(matrix));
  }
  // The columns, counted from 1.
  MemoryNeeds memory_needs(Shape shape) const override {
    return {.state = options_.refresh == 1 ? 0 : chosen(dct_matrix(shape))};
  }

  void project(const Context& ctx, int round, const Tensor& tensor,
               std::span<float> out) const override {
    const Work work = check(ctx, round, tensor, out.size());
    const DctTables& tables = work.tables;
    if (round == 0) {
      dct_fill_tables(tables);
      *tables.finite = true;
      if (!chooses(ctx.step)) recall(ctx, tensor.memory, tables);
    }
    const bool finite =
        *tables.finite &&
        (is_sketch(round, ctx.step)
             ? dctcols_sketch(work.input, stream(ctx), sketches(work.input.matrix), out.data())
             : dctcols_project(work.input, tables, out.data()));
    if (!finite) fill_nan(out);
  }

  // A mean that is not finite leaves the gradient NaN and the memory unwritten.
  void absorb(const Context& ctx, int round, std::span<const float> reduced,
              const Tensor& tensor) const override {
    Work work = check(ctx, round, tensor, reduced.size());
    const DctTables& tables = work.tables;
    *tables.finite = *tables.finite && std::all_of(reduced.begin(), reduced.end(), [](float x) {
      return -kLimit < x && x < kLimit;
    });
    if (is_sketch(round, ctx.step)) {
      if (*tables.finite) choose(work.input.matrix, reduced, tables);
      return;
    }
    if (!*tables.finite) {
      fill_nan(tensor.grad);
      return;
    }
    float* next = tensor.memory == nullptr ? nullptr : tensor.memory->next().data();
    dctcols_absorb(work.input, tables, reduced.data(), next);
    if (tensor.memory == nullptr) return;
    const std::span<float> state = tensor.memory->next_state();
    for (std::size_t c = 0; c < state.size(); ++c) {
      state[c] = static_cast<float>(tables.chosen[c] + 1);
    }
  }

 private:
  struct Work {
    DctColsInput input;
    DctTables tables;
  };

  bool chooses(std::uint64_t step) const {
    return step % static_cast<std::uint64_t>(options_.refresh) == 0;
  }
  bool is_sketch(int round, std::uint64_t step) const { return chooses(step) && round == 0; }

  std::int64_t chosen(const DctMatrix& matrix) const {
    return std::min(options_.rank, matrix.columns);
  }
  // Combinations of rows that are sent for the choice, none where all columns are sent. A column's
  // energy is then known to within a standard deviation of (2 / sketches)^(1/2) of it, at no more
  // than a quarter of the other round's bytes from RANK 4 on.
  int sketches(const DctMatrix& matrix) const {
    if (options_.rank >= matrix.columns) return 0;
    return static_cast<int>(std::min<std::int64_t>((options_.rank + 3) / 4, kMaxDctSketches));
  }
  std::int64_t sketch_elements(const DctMatrix& matrix) const {
    return sketches(matrix) * matrix.columns;
  }

  // The sender is left out: all ranks draw the same.
  static RandomStream stream(const Context& ctx) {
    return random_stream(ctx.key_hash, ctx.step, -1);
  }

  Work check(const Context& ctx, int round, const Tensor& tensor, std::size_t size) const {
    check_device(ctx);
    if (round < 0 || round >= rounds(ctx.step)) {
      fail_argument(ctx, "round " + std::to_string(round) + ", expected 0 to " +
                             std::to_string(rounds(ctx.step) - 1));
    }
    const std::int64_t n = tensor.grad.elements;
    const DctMatrix matrix = dct_matrix(tensor.shape);
    if (matrix.rows * matrix.columns != n) {
      fail_argument(ctx, "shape of " + std::to_string(matrix.rows * matrix.columns) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    if (tensor.memory != nullptr && tensor.memory->elements() != n) {
      fail_argument(ctx, "memory of " + std::to_string(tensor.memory->elements()) +
                             " elements, expected the gradient's " + std::to_string(n));
    }
    const std::int64_t kept = memory_needs(tensor.shape).state;
    if (tensor.memory != nullptr && !tensor.memory->state().empty() &&
        static_cast<std::int64_t>(tensor.memory->state().size()) != kept) {
      fail_argument(ctx, "memory with a state of " + std::to_string(tensor.memory->state().size()) +
                             " floats, expected " + std::to_string(kept));
    }
    const std::int64_t count = round_elements(tensor.shape, round, ctx.step);
    if (static_cast<std::int64_t>(size) != count) {
      fail_argument(ctx, "projection of " + std::to_string(size) + " elements, expected " +
                             std::to_string(count));
    }
    DctColsInput input{.grad = tensor.grad, .matrix = matrix};
    if (tensor.memory != nullptr) {
      input.residual = tensor.memory->current().data();
      input.decay = tensor.memory->decay();
    }
    return {input, dct_tables(tensor.round_state, matrix.columns, chosen(matrix))};
  }

  // The columns of most energy in the mean sketch, ties to the lowest.
  void choose(const DctMatrix& matrix, std::span<const float> sketch,
              const DctTables& tables) const {
    const std::int64_t m = matrix.columns;
    const int count = sketches(matrix);
    if (count > 0) {
      float* lines = tables.lines[0];
      std::fill_n(lines, m * kDctLine, 0.0F);
      for (int q = 0; q < count; ++q) {
        for (std::int64_t j = 0; j < m; ++j) {
          lines[tables.line_of(j) * kDctLine + q] = sketch[static_cast<std::size_t>(q * m + j)];
        }
      }
      dctcols_transform(tables);
    }
    // Room of 128 bytes a column.
    auto* energies = reinterpret_cast<double*>(tables.lines[0]);
    auto* order = reinterpret_cast<std::uint32_t*>(energies + m);
    for (std::int64_t k = 0; k < m; ++k) {
      const float* line = tables.lines[1] + k * kDctLine;
      const float* mirror = tables.lines[1] + (k == 0 ? 0 : m - k) * kDctLine;
      double energy = 0;
      for (int q = 0; q < count; ++q) {
        const float x = tables.posts[2 * k] * (line[q] + mirror[q]) +
                        tables.posts[2 * k + 1] * (line[q + kDctHalf] - mirror[q + kDctHalf]);
        energy += static_cast<double>(x) * static_cast<double>(x);
      }
      energies[k] = energy;
      order[k] = static_cast<std::uint32_t>(k);
    }
    const auto r = static_cast<std::int64_t>(tables.chosen.size());
    std::nth_element(order, order + r, order + m, [&](std::uint32_t a, std::uint32_t b) {
      return energies[a] != energies[b] ? energies[a] > energies[b] : a < b;
    });
    std::copy_n(order, r, tables.chosen.begin());
    std::sort(tables.chosen.begin(), tables.chosen.end());
  }

  // The columns chosen at an earlier step; random ones where there are none.
  static void recall(const Context& ctx, const Memory* memory, const DctTables& tables) {
    const std::span<std::uint32_t> chosen = tables.chosen;
    const std::span<const float> state =
        memory == nullptr ? std::span<const float>() : memory->state();
    const auto m = static_cast<float>(tables.columns);
    float last = 0;
    const bool known = !state.empty() && std::all_of(state.begin(), state.end(), [&](float x) {
      const bool good = x > last && x <= m && x == static_cast<float>(static_cast<int>(x));
      last = x;
      return good;
    });
    if (known) {
      std::transform(state.begin(), state.end(), chosen.begin(),
                     [](float x) { return static_cast<std::uint32_t>(x) - 1; });
      return;
    }
    for_each_position(stream(ctx), static_cast<std::int64_t>(chosen.size()), tables.columns,
                      [&](std::int64_t i, std::int64_t column) {
                        chosen[static_cast<std::size_t>(i)] = static_cast<std::uint32_t>(column);
                      });
  }

  DctColsOptions options_;
};

}  // namespace

std::shared_ptr<const LinearCodec> make_dctcols_codec(const DctColsOptions& options) {
  if (options.rank < 1 || options.rank > kMaxDctColsRank) {
    throw InvalidArgument("dctcols of " + std::to_string(options.rank) +
                          " columns: expected 1 to " + std::to_string(kMaxDctColsRank));
  }
  if (options.refresh < 1 || options.refresh > kMaxDctColsRefresh) {
    throw InvalidArgument("dctcols with columns kept for " + std::to_string(options.refresh) +
                          " steps: expected 1 to " + std::to_string(kMaxDctColsRefresh));
  }
  return std::make_shared<DctColsCodec>(options);
}

}  // namespace thinwire
