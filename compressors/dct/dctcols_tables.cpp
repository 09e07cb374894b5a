#include <algorithm>
#include <bit>
#include <cmath>

#include "compressors/dct/dct_angles.h"
#include "compressors/dct/dctcols_kernels.h"

namespace thinwire {
namespace {

// The radices of n, in the order fours, two, odd primes; what is left of n beside them.
std::int64_t split(std::int64_t n, DctFft& fft) {
  const auto take = [&](int radix) {
    for (; n % radix == 0; n /= radix) {
      fft.radices[static_cast<std::size_t>(fft.levels++)] = radix;
    }
  };
  take(4);
  take(2);
  for (int radix = 3; radix <= kMaxDctRadix && n > 1; radix += 2) take(radix);
  return n;
}

DctFft fft_for(std::int64_t columns) {
  DctFft fft{.size = columns};
  if (columns == 0 || split(columns, fft) == 1) return fft;
  fft = {.size =
             static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(2 * columns - 1)))};
  split(fft.size, fft);
  return fft;
}

// Pairs factor * cos, factor * sin of 2 pi t / whole, t < count: products of every 16th and of the
// first 16, in fp64.
void fill_turns(float* pairs, std::int64_t count, std::int64_t whole, double factor) {
  constexpr std::int64_t kStep = 16;
  std::array<DctTurn, kStep> first;
  for (std::int64_t t = 0; t < std::min(kStep, count); ++t) {
    first[static_cast<std::size_t>(t)] = dct_turn(t, whole);
  }
  for (std::int64_t begin = 0; begin < count; begin += kStep) {
    DctTurn base = dct_turn(begin, whole);
    base = {factor * base.cos, factor * base.sin};
    for (std::int64_t t = begin; t < std::min(begin + kStep, count); ++t) {
      const DctTurn& turn = first[static_cast<std::size_t>(t - begin)];
      pairs[2 * t] = static_cast<float>(base.cos * turn.cos - base.sin * turn.sin);
      pairs[2 * t + 1] = static_cast<float>(base.sin * turn.cos + base.cos * turn.sin);
    }
  }
}

// The conjugate chirp, periodic, as the first of all rows in lines[0]; its transform.
void fill_convolution(const DctTables& tables) {
  const std::int64_t m = tables.columns;
  const std::int64_t size = tables.fft.size;
  for (std::int64_t j = 0; j < m; ++j) {
    const DctTurn turn = dct_turn(j * j % (2 * m), 2 * m);
    tables.chirp[2 * j] = static_cast<float>(turn.cos);
    tables.chirp[2 * j + 1] = static_cast<float>(turn.sin);
  }
  float* lines = tables.lines[0];
  std::fill_n(lines, size * kDctLine, 0.0F);
  for (std::int64_t j = 0; j < m; ++j) {
    for (const std::int64_t line : {j, (size - j) % size}) {
      lines[line * kDctLine] = tables.chirp[2 * j];
      lines[line * kDctLine + kDctHalf] = tables.chirp[2 * j + 1];
    }
  }
  dctcols_fft(tables);
  for (std::int64_t k = 0; k < size; ++k) {
    const float* line = tables.lines[1] + k * kDctLine;
    tables.spectrum[2 * k] = line[0] / static_cast<float>(size);
    tables.spectrum[2 * k + 1] = line[kDctHalf] / static_cast<float>(size);
  }
}

// Takes the parts of the state from `space`, which counts or hands out.
template <typename Space>
DctTables lay_out(Space& space, std::int64_t columns, std::int64_t chosen) {
  DctTables tables{.columns = columns, .fft = fft_for(columns)};
  const auto m = static_cast<std::size_t>(columns);
  const auto size = static_cast<std::size_t>(tables.fft.size);
  tables.finite = space.template take<bool>(1).data();
  tables.chosen = space.template take<std::uint32_t>(static_cast<std::size_t>(chosen));
  tables.fft.roots = space.template take<float>(2 * size).data();
  tables.posts = space.template take<float>(2 * m).data();
  if (tables.convolves()) {
    tables.chirp = space.template take<float>(2 * m).data();
    tables.spectrum = space.template take<float>(2 * size).data();
  }
  for (float*& lines : tables.lines) {
    lines = space.template take<float>(static_cast<std::size_t>(kDctLine) * size).data();
  }
  return tables;
}

struct Counter {
  template <typename T>
  std::span<T> take(std::size_t count) {
    bytes += Workspace::bytes_for<T>(count);
    return {};
  }
  std::size_t bytes = 0;
};

}  // namespace

DctMatrix dct_matrix(std::span<const std::int64_t> shape) {
  const std::int64_t first = shape.empty() ? 1 : shape[0];
  std::int64_t rest = 1;
  for (std::size_t i = 1; i < shape.size(); ++i) rest *= shape[i];
  if (first == 0 || rest == 0) return {};
  return {std::max(first, rest), std::min(first, rest), first < rest};
}

std::size_t dct_tables_bytes(std::int64_t columns, std::int64_t chosen) {
  Counter counter;
  lay_out(counter, columns, chosen);
  return counter.bytes;
}

DctTables dct_tables(std::span<std::byte> state, std::int64_t columns, std::int64_t chosen) {
  Workspace workspace(state);
  return lay_out(workspace, columns, chosen);
}

void dct_fill_tables(const DctTables& tables) {
  const std::int64_t m = tables.columns;
  if (m == 0) return;
  fill_turns(tables.fft.roots, tables.fft.size, tables.fft.size, 1);
  fill_turns(tables.posts, m, 4 * m, std::sqrt(0.5 / static_cast<double>(m)));
  tables.posts[0] = static_cast<float>(std::sqrt(0.25 / static_cast<double>(m)));
  if (tables.convolves()) fill_convolution(tables);
}

}  // namespace thinwire
