// Encoding with a residual that may be stored in fewer bytes than fp32: opened where the codec
// takes it as it is, unpacked into scratch memory around the call otherwise; the bits are the same.
// After an exception the memory is neither. Thread-safe on disjoint memory.
#pragma once

#include <cstddef>
#include <span>

#include "compressors/core/codec.h"
#include "compressors/core/memory.h"
#include "compressors/core/random.h"

namespace thinwire {

// Whether encode() opens this memory.
bool encodes_opened(const PayloadCodec& codec, const Memory& memory);

// Bytes of scratch that encode() needs for this memory, which may be null.
std::size_t residual_scratch_bytes(const PayloadCodec& codec, const Memory* memory);

// codec.encode(). `scratch`: at least residual_scratch_bytes(), aligned to 64. `dither` rounds the
// residual.
EncodeResult encode(const PayloadCodec& codec, const Context& ctx, TensorView grad, Memory* memory,
                    const Dither& dither, std::span<std::byte> scratch, std::span<std::byte> out);

// codec.joint()->encode_joint(), one dither a part; scratch for the sum of their bytes.
EncodeResult encode(const PayloadCodec& codec, const Context& ctx,
                    std::span<const JointCodec::Part> parts, std::span<const Dither> dithers,
                    std::span<std::byte> scratch, std::span<std::byte> out);

}  // namespace thinwire
