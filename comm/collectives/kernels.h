// The elementwise arithmetic of the exchanges that no codec does: sums of raw values, scaling,
// rounding into the gradient's dtype, the search for NaN and Inf. Each output element depends on
// the inputs of its place only, in a fixed order of operations, so results do not depend on how the
// compiler vectorises. Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/tensor_view.h"

namespace thinwire::collectives {

// out[i] = in[i] as fp32, exact for fp32, bf16 and fp16. out.size() == in.elements.
void load_f32(TensorView in, std::span<float> out);
// out[i] = in[i] rounded to nearest even in out.dtype (fp32, bf16, fp16, fp64).
void store_f32(std::span<const float> in, TensorView out);

// data[i] *= factor; fp32 or fp64. Returns whether any product is NaN or Inf.
bool scale(TensorView data, float factor);
// Whether any of data (any floating dtype) is NaN or Inf.
bool has_nonfinite(TensorView data);
// Whether a finite sum, stored as fp16, has become Inf: flagged as any other Inf. False for the
// wider dtypes.
bool overflowed(TensorView stored);

// out[i] = factor * raw_0[i] + factor * raw_1[i] + ..., added in that order, every product rounded;
// raw_r begins at first + r * stride_bytes. Returns whether any sum is NaN or Inf.
bool sum_scaled(const std::byte* first, std::size_t stride_bytes, int count, float factor,
                std::span<float> out);

}  // namespace thinwire::collectives
