// The casts one element at a time: the oracle of cast_simd.cpp and its loop tails. Pure functions.
#pragma once

#include "compressors/cast/cast_kernels.h"

namespace thinwire {

bool cast_encode_reference(const CastEncode& args);
void cast_decode_reference(const std::byte* codes, DType type, TensorView out);
void cast_accumulate_reference(const std::byte* codes, DType type, float weight, float* out,
                               std::int64_t n);

}  // namespace thinwire
