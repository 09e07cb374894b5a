// The quantisers one element at a time: the oracle of quantize_simd.cpp. Pure functions.
#pragma once

#include "compressors/quantize/quantize_kernels.h"

namespace thinwire {

bool quantize_encode_reference(const QuantizeEncode& args);
bool quantize_decode_reference(const std::byte* records, const QuantizeShape& shape,
                               const QuantizeRotation* rotation, TensorView out);
bool quantize_accumulate_reference(const std::byte* records, const QuantizeShape& shape,
                                   const QuantizeRotation* rotation, float weight, float* out,
                                   std::int64_t n);

}  // namespace thinwire
