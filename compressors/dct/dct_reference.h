// The cosine transform's codec one tile and one element at a time: the oracle of dct_simd.cpp. Pure
// functions; unlike the kernels, these allocate.
#pragma once

#include <vector>

#include "compressors/dct/dct_kernels.h"

namespace thinwire {

// n^(1/2) times the orthonormal DCT-II of n = 2^m <= kMaxDctTile values, and its transpose.
std::vector<float> dct_forward_reference(const std::vector<float>& values);
std::vector<float> dct_inverse_reference(const std::vector<float>& coefficients);

bool dct_encode_reference(const DctEncode& args);
bool dct_decode_reference(const std::byte* records, const DctShape& shape, TensorView out);
bool dct_accumulate_reference(const std::byte* records, const DctShape& shape, float weight,
                              float* out, std::int64_t n);

}  // namespace thinwire
