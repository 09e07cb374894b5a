#include "compressors/cast/cast.h"

#include "compressors/cast/cast_kernels.h"
#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

// FORMAT.md: the first of the two modes of casts.
constexpr auto kFirstMode = static_cast<std::uint8_t>(BodyMode::kFamily) + 8;

class CastCodec final : public PayloadCodec {
 public:
  explicit CastCodec(DType dtype) : dtype_(dtype) {}

  std::string name() const override { return std::string(thinwire::name(dtype_)); }
  Traits traits() const override { return {}; }
  std::size_t slot_bytes(std::int64_t n) const override {
    return 1 + 2 * static_cast<std::size_t>(n);
  }
  std::size_t workspace_bytes(std::int64_t) const override { return 0; }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    const std::size_t slot = slot_bytes(grad.elements);
    check_encode(ctx, grad, memory, out, slot);
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    out[0] = std::byte{mode()};
    CastEncode args{.grad = grad, .codes = out.data() + 1, .type = dtype_};
    lend_memory(memory, args);
    return finish_encode(cast_encode(args), slot, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, mode(), out)) return;
    check_length(ctx, *this, body, out.elements);
    cast_decode(body.data() + 1, dtype_, out);
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, mode(), out)) return;
    const auto n = static_cast<std::int64_t>(out.size());
    check_length(ctx, *this, body, n);
    cast_accumulate(body.data() + 1, dtype_, weight, out.data(), n);
  }

 private:
  std::uint8_t mode() const {
    return static_cast<std::uint8_t>(kFirstMode + (dtype_ == DType::kBF16 ? 0 : 1));
  }

  DType dtype_;
};

}  // namespace

std::shared_ptr<const PayloadCodec> make_cast_codec(DType dtype) {
  if (dtype != DType::kBF16 && dtype != DType::kF16) {
    throw InvalidArgument("cast to " + std::string(name(dtype)) + ": expected bf16 or fp16");
  }
  return std::make_shared<CastCodec>(dtype);
}

}  // namespace thinwire
