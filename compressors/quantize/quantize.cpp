#include "compressors/quantize/quantize.h"

#include "compressors/core/codec_support.h"
#include "compressors/quantize/quantize_kernels.h"

namespace thinwire {
namespace {

// FORMAT.md: the first of the eight modes of quantisers.
constexpr int kFirstMode = static_cast<int>(BodyMode::kFamily) + 16;

class QuantizeCodec final : public PayloadCodec {
 public:
  explicit QuantizeCodec(const QuantizeOptions& options) : options_(options) {}

  std::string name() const override {
    const QuantizeOptions defaults;
    std::string text = "q" + std::to_string(options_.bits);
    if (options_.block != defaults.block) text += ",block=" + std::to_string(options_.block);
    if (options_.stochastic) text += ",stochastic";
    return text;
  }
  // Stochastic rounding draws by position in what is encoded: a range then gives other bytes of
  // the same distribution.
  Traits traits() const override {
    return {.unbiased = options_.stochastic, .granularity = options_.block};
  }
  std::size_t slot_bytes(std::int64_t n) const override {
    return 1 + static_cast<std::size_t>(quantize_bytes(options_.bits, options_.block, n));
  }
  std::size_t workspace_bytes(std::int64_t) const override { return 0; }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    const std::size_t slot = slot_bytes(grad.elements);
    check_encode(ctx, grad, memory, out, slot);
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    out[0] = std::byte{mode()};
    QuantizeEncode args{.grad = grad,
                        .blocks = out.data() + 1,
                        .bits = options_.bits,
                        .block = options_.block,
                        .stochastic = options_.stochastic,
                        .random = random_stream(ctx.key_hash, ctx.step, ctx.sender)};
    lend_memory(memory, args);
    return finish_encode(quantize_encode(args), slot, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, mode(), out)) return;
    check_length(ctx, *this, body, out.elements);
    if (!quantize_decode(body.data() + 1, options_.bits, options_.block, out)) fail_scale(ctx);
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, mode(), out)) return;
    const auto n = static_cast<std::int64_t>(out.size());
    check_length(ctx, *this, body, n);
    if (!quantize_accumulate(body.data() + 1, options_.bits, options_.block, weight, out.data(),
                             n)) {
      fail_scale(ctx);
    }
  }

 private:
  std::uint8_t mode() const { return static_cast<std::uint8_t>(kFirstMode + options_.bits - 1); }

  [[noreturn]] void fail_scale(const Context& ctx) const {
    fail_corrupt(ctx, name() + " body with a scale that is negative, NaN or Inf");
  }

  QuantizeOptions options_;
};

}  // namespace

std::shared_ptr<const PayloadCodec> make_quantize_codec(const QuantizeOptions& options) {
  if (options.bits < 1 || options.bits > 8) {
    throw InvalidArgument("quantiser of " + std::to_string(options.bits) +
                          " bits: expected 1 to 8");
  }
  if (options.block < kMinQuantizeBlock || options.block > kMaxQuantizeBlock ||
      options.block % kQuantizeBlockStep != 0) {
    throw InvalidArgument(
        "quantiser of blocks of " + std::to_string(options.block) +
        " elements: expected a multiple of " + std::to_string(kQuantizeBlockStep) + " in [" +
        std::to_string(kMinQuantizeBlock) + ", " + std::to_string(kMaxQuantizeBlock) + "]");
  }
  return std::make_shared<QuantizeCodec>(options);
}

}  // namespace thinwire
