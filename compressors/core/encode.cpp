#include "compressors/core/encode.h"

namespace thinwire {
namespace {

// Returns the scratch that is left.
std::span<std::byte> make_ready(const PayloadCodec& codec, Memory* memory, const Dither& dither,
                                std::span<std::byte> scratch) {
  if (memory == nullptr) return scratch;
  if (encodes_opened(codec, *memory)) {
    memory->open(dither);
    return scratch;
  }
  memory->unpack(scratch);
  return scratch.subspan(memory->scratch_bytes());
}

void put_away(Memory* memory, const Dither& dither) {
  if (memory == nullptr) return;
  if (memory->is_open()) {
    memory->close();
  } else {
    memory->pack(dither);
  }
}

}  // namespace

bool encodes_opened(const PayloadCodec& codec, const Memory& memory) {
  return memory.opens() && codec.traits().opened_residual;
}

std::size_t residual_scratch_bytes(const PayloadCodec& codec, const Memory* memory) {
  return memory == nullptr || encodes_opened(codec, *memory) ? 0 : memory->scratch_bytes();
}

EncodeResult encode(const PayloadCodec& codec, const Context& ctx, TensorView grad, Memory* memory,
                    const Dither& dither, std::span<std::byte> scratch, std::span<std::byte> out) {
  make_ready(codec, memory, dither, scratch);
  const EncodeResult result = codec.encode(ctx, grad, memory, out);
  put_away(memory, dither);
  return result;
}

EncodeResult encode(const PayloadCodec& codec, const Context& ctx,
                    std::span<const JointCodec::Part> parts, std::span<const Dither> dithers,
                    std::span<std::byte> scratch, std::span<std::byte> out) {
  for (std::size_t i = 0; i < parts.size(); ++i) {
    scratch = make_ready(codec, parts[i].memory, dithers[i], scratch);
  }
  const EncodeResult result = codec.joint()->encode_joint(ctx, parts, out);
  for (std::size_t i = 0; i < parts.size(); ++i) put_away(parts[i].memory, dithers[i]);
  return result;
}

}  // namespace thinwire
