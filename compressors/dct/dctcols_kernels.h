// The inner loops of the column codec on plain pointers, and the layout of what it keeps between
// rounds. Pure functions, thread-safe; the caller owns all memory. The same bits on every SIMD
// target.
//
// Rows are transformed 32 at a time, in two halves side by side: row i of the first half is the
// real part and row i of the second half the imaginary part of a complex sequence, whose discrete
// Fourier transform has both rows' DCT-II (Makhoul, A fast cosine transform in one and two
// dimensions, IEEE Trans. ASSP 28, 1980). Sizes without prime factors above kMaxDctRadix are
// transformed by the mixed-radix FFT, others as a convolution (Bluestein, IEEE Trans. AU 18, 1970).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"
#include "compressors/core/workspace.h"

namespace thinwire {

// A tensor as a matrix of n rows and m <= n columns: its first extent by the product of the others,
// or transposed.
struct DctMatrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  bool transposed = false;  // (i, j) is element j * rows + i, otherwise i * columns + j
};
DctMatrix dct_matrix(std::span<const std::int64_t> shape);

// Rows of a half, and floats of a line: the values of 32 rows in one column.
inline constexpr std::int64_t kDctHalf = 16;
inline constexpr std::int64_t kDctLine = 2 * kDctHalf;
// Prime factors up to this are transformed directly, in fewer operations than a convolution takes.
inline constexpr int kMaxDctRadix = 61;
// What is transformed is bounded to +-2^64, so that no sum overflows.
inline constexpr float kDctColsClip = 0x1p64F;

// Combinations of rows in a sketch.
inline constexpr int kMaxDctSketches = 16;

// The discrete Fourier transform of `size` values.
struct DctFft {
  std::int64_t size = 1;
  int levels = 0;
  std::array<int, 40> radices{};  // outermost first; their product is `size`
  float* roots = nullptr;         // pairs cos, sin of 2 pi t / size, t < size
};

// What lies in the caller's round state for m columns of which r are sent.
struct DctTables {
  std::int64_t columns = 0;
  DctFft fft = {};            // of m values, or of 2 m - 1 or more
  float* posts = nullptr;     // m pairs: half of DCT-II's factor times cos, sin of pi k / (2 m)
  float* chirp = nullptr;     // m pairs cos, sin of pi j^2 / m; null where fft.size == m
  float* spectrum = nullptr;  // fft.size pairs: transform of the chirp's conjugate, over fft.size
  float* lines[2] = {};       // scratch, fft.size lines each
  std::span<std::uint32_t> chosen = {};  // r columns, ascending
  bool* finite = nullptr;                // nothing absorbed so far was NaN or Inf

  bool convolves() const { return fft.size != columns; }
  // The line that holds column j before the transform. After an inverse transform, which is done
  // by the forward one, line 0 or else fft.size - line_of(j) holds it.
  std::int64_t line_of(std::int64_t j) const { return j % 2 == 0 ? j / 2 : columns - (j + 1) / 2; }
};

std::size_t dct_tables_bytes(std::int64_t columns, std::int64_t chosen);
// InvalidArgument when the state is too small. Contents are as they were.
DctTables dct_tables(std::span<std::byte> state, std::int64_t columns, std::int64_t chosen);
// Writes roots, posts, chirp and spectrum.
void dct_fill_tables(const DctTables& tables);

struct DctColsInput {
  TensorView grad = {};
  const float* residual = nullptr;  // grad.elements values or null
  float decay = 1.0F;
  DctMatrix matrix = {};
};

// Both of `out` = the first `sketches` rows of R V, m floats each, R having entries +-1 from
// `stream`; and `out` = the chosen columns of V Q, n floats each. Return whether all v were finite;
// if not, `out` is unspecified.
bool dctcols_sketch(const DctColsInput& input, const RandomStream& stream, int sketches,
                    float* out);
bool dctcols_project(const DctColsInput& input, const DctTables& tables, float* out);

// tables.lines[1] = the discrete Fourier transform of tables.lines[0]: of fft.size values, or of
// m values, which then leaves tables.lines[0] unspecified.
void dctcols_fft(const DctTables& tables);
void dctcols_transform(const DctTables& tables);

// grad = the rows of which `mean` are the chosen columns, rounded to its dtype; next = v - grad.
// `next` may be null or equal input.residual.
void dctcols_absorb(const DctColsInput& input, const DctTables& tables, const float* mean,
                    float* next);

}  // namespace thinwire
