// A bounded sample of v = gradient + residual of one tensor, for error_curves.h. Of a matrix
// (shape[0] rows of the rest) the same columns of rows at equal distances, so that it has a rank of
// its own; of anything else blocks at equal distances; all of what is small.
//
// Which part it is follows from the key's hash and a counter alone: the same on all ranks, and over
// consecutive counters every element has its turn. Pure functions, thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "compressors/core/tensor_view.h"

namespace thinwire {

// What a tensor is to low-rank codecs: shape[0] rows, the product of the rest as columns.
struct MatrixExtents {
  std::int64_t rows = 1;
  std::int64_t columns = 1;

  MatrixExtents() = default;
  explicit MatrixExtents(std::span<const std::int64_t> shape);
  std::int64_t elements() const { return rows * columns; }
  bool is_matrix() const { return rows > 1 && columns > 1; }
};

struct SampleSource {
  TensorView grad;                           // only read
  std::span<const std::int64_t> shape = {};  // product == grad.elements
  TensorView residual = {};                  // as many elements, fp32 or bf16, or none; only read
  float decay = 1.0F;                        // v = grad + decay * residual
};

inline constexpr std::int64_t kSampleElements = std::int64_t{1} << 17;
// Fewer would make matrices of too few rows.
inline constexpr std::int64_t kMinSampleElements = std::int64_t{1} << 14;

struct GradientSample {
  std::vector<float> values;  // row by row; keeps its memory from one take_sample to the next
  MatrixExtents extents;      // of the sample; no matrix: one row
  MatrixExtents tensor;       // what it is a part of

  bool whole() const { return extents.elements() == tensor.elements(); }
};

// At most `most_elements` values, and where the tensor has more than that, not many fewer.
// InvalidArgument for sizes that do not fit together, too small a sample, or a dtype that is none
// of gradients.
void take_sample(const SampleSource& source, std::uint64_t key_hash, std::uint64_t counter,
                 GradientSample& sample, std::int64_t most_elements = kSampleElements);

}  // namespace thinwire
