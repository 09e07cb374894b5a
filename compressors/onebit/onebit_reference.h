// onebit one element at a time: the oracle of onebit_simd.cpp. Pure functions; they allocate.
#pragma once

#include <span>

#include "compressors/onebit/onebit_kernels.h"

namespace thinwire {

bool onebit_encode_reference(const OneBitEncode& args);
void onebit_decode_reference(const OneBitBody& body, std::int64_t block, TensorView out);
void onebit_accumulate_reference(const OneBitBody& body, std::int64_t block, float weight,
                                 std::span<float> out);

}  // namespace thinwire
