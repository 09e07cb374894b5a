// Casts: every element of v = gradient + residual as bf16 or fp16, rounded to nearest even; finite
// values beyond the type's range become its largest value and the difference stays in the residual.
// What rounding loses stays in the residual too (Seide et al., Interspeech 2014).
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
// Takes fp32, bf16, fp16 and fp64 gradients (fp64 is rounded to fp32 first).
#pragma once

#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

// `dtype` is kBF16 or kF16; InvalidArgument otherwise.
std::shared_ptr<const PayloadCodec> make_cast_codec(DType dtype);

extern const Family kBF16Family;
extern const Family kFP16Family;

}  // namespace thinwire
