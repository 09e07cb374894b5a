#include "compressors/core/encode.h"

namespace thinwire {
namespace {

// Memories are ready for a codec while it lives.
class Ready {
 public:
  Ready(const PayloadCodec& codec, std::span<const JointCodec::Part> parts,
        std::span<const Dither> dithers, std::span<std::byte> scratch)
      : parts_(parts), dithers_(dithers) {
    for (std::size_t i = 0; i < parts.size(); ++i) {
      Memory* memory = parts[i].memory;
      if (memory == nullptr) continue;
      if (encodes_opened(codec, *memory)) {
        memory->open(dithers[i]);
      } else {
        memory->unpack(scratch);
        scratch = scratch.subspan(memory->scratch_bytes());
      }
    }
  }
  Ready(const Ready&) = delete;
  Ready& operator=(const Ready&) = delete;
  ~Ready() {
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      Memory* memory = parts_[i].memory;
      if (memory == nullptr) continue;
      memory->is_open() ? memory->close() : memory->pack(dithers_[i]);
    }
  }

 private:
  std::span<const JointCodec::Part> parts_;
  std::span<const Dither> dithers_;
};

}  // namespace

bool encodes_opened(const PayloadCodec& codec, const Memory& memory) {
  return memory.opens() && codec.traits().opened_residual;
}

std::size_t residual_scratch_bytes(const PayloadCodec& codec, const Memory* memory) {
  return memory == nullptr || encodes_opened(codec, *memory) ? 0 : memory->scratch_bytes();
}

EncodeResult encode(const PayloadCodec& codec, const Context& ctx, TensorView grad, Memory* memory,
                    const Dither& dither, std::span<std::byte> scratch, std::span<std::byte> out) {
  const JointCodec::Part part{grad, memory};
  const Ready ready(codec, {&part, 1}, {&dither, 1}, scratch);
  return codec.encode(ctx, grad, memory, out);
}

EncodeResult encode(const PayloadCodec& codec, const Context& ctx,
                    std::span<const JointCodec::Part> parts, std::span<const Dither> dithers,
                    std::span<std::byte> scratch, std::span<std::byte> out) {
  const Ready ready(codec, parts, dithers, scratch);
  return codec.joint()->encode_joint(ctx, parts, out);
}

}  // namespace thinwire
