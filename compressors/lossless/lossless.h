// Lossless: every value bit for bit, NaN payloads and infinities included. The exponents of
// gradients take few values, so they are cut off and Huffman-coded (Huffman, Proc. IRE 1952) in
// several interleaved streams; sign and mantissa go as they are. For fp32, bf16 and fp16; fp64 is
// InvalidArgument. Formulas and bytes: FORMAT.md.
//
// There is no residual: a reducer gives lossless codecs no memory. With one, v is computed and sent
// in fp32, the residual becomes zero, and NaN or Inf are marked as in every codec; without, they go
// as they are and only result.nonfinite tells.
//
// slot_bytes(n) holds any dtype's values uncoded, as fp32: 4 bytes an element. Where messages are
// made of slots (the exchanges), nothing is gained on the wire; frames of thinwire.codec carry a
// body's true size.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

std::shared_ptr<const PayloadCodec> make_lossless_codec();

extern const Family kLosslessFamily;

}  // namespace thinwire
