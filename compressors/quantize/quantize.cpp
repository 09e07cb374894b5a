#include "compressors/quantize/quantize.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <optional>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/quantize/quantize_kernels.h"

namespace thinwire {
namespace {

// FORMAT.md: the eight modes of kMaxAbs without rotation, by bits; those of all else, by kind.
constexpr int kFirstMode = static_cast<int>(BodyMode::kFamily) + 16;
constexpr int kFirstKindMode = static_cast<int>(BodyMode::kFamily) + 56;

// Elements of a sum that all bodies add to before the next are touched: 32 KiB.
constexpr std::int64_t kSumElements = 8192;

std::string word(QuantizeKind kind) {
  return std::string(kQuantizeKindWords[static_cast<std::size_t>(kind)]);
}

class QuantizeCodec final : public PayloadCodec {
 public:
  explicit QuantizeCodec(const QuantizeOptions& options)
      : shape_{options.kind, options.bits, options.element, options.block, options.rotate},
        stochastic_(options.stochastic) {}

  std::string name() const override;
  // Random numbers go by the position in what is encoded: a range then gives other bytes of the
  // same distribution. TernGrad is unbiased but for what it clips.
  Traits traits() const override {
    return {.unbiased = stochastic_ && shape_.kind != QuantizeKind::kTernGrad,
            .granularity = shape_.unit()};
  }
  std::size_t slot_bytes(std::int64_t n) const override {
    return prefix_bytes() + static_cast<std::size_t>(shape_.bytes(n));
  }
  std::size_t workspace_bytes(std::int64_t) const override { return 0; }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    const std::size_t slot = slot_bytes(grad.elements);
    check_encode(ctx, grad, memory, out, slot);
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    const RandomStream random = random_stream(ctx.key_hash, ctx.step, ctx.sender);
    std::optional<QuantizeRotation> rotation;
    out[0] = std::byte{mode()};
    if (!is_plain()) out[1] = description();
    if (shape_.rotate) {
      rotation.emplace(random.key, shape_.unit());
      std::memcpy(out.data() + 2, &random.key, sizeof random.key);
    }
    QuantizeEncode args{.grad = grad,
                        .records = out.data() + prefix_bytes(),
                        .shape = shape_,
                        .stochastic = stochastic_,
                        .random = random,
                        .rotation = rotation ? &*rotation : nullptr};
    lend_memory(memory, args);
    return finish_encode(quantize_encode(args), slot, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, mode(), out)) return;
    check_body(ctx, body, out.elements);
    std::optional<QuantizeRotation> rotation;
    if (!quantize_decode(body.data() + prefix_bytes(), shape_, read_rotation(body, rotation),
                         out)) {
      fail_scale(ctx);
    }
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, mode(), out)) return;
    check_body(ctx, body, static_cast<std::int64_t>(out.size()));
    std::optional<QuantizeRotation> rotation;
    add_records(ctx, body.data() + prefix_bytes(), read_rotation(body, rotation), weight, out);
  }

  void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies, float weight,
           std::span<float> out) const override;

 private:
  bool is_plain() const { return shape_.kind == QuantizeKind::kMaxAbs && !shape_.rotate; }
  std::uint8_t mode() const {
    const int mode =
        is_plain() ? kFirstMode + shape_.bits - 1 : kFirstKindMode + static_cast<int>(shape_.kind);
    return static_cast<std::uint8_t>(mode);
  }
  // The second byte.
  std::byte description() const {
    return static_cast<std::byte>((shape_.bits - 1) | (shape_.rotate ? 8 : 0) |
                                  static_cast<int>(shape_.element) << 4);
  }
  // Bytes before the records.
  std::size_t prefix_bytes() const {
    if (is_plain()) return 1;
    return shape_.rotate ? 2 + sizeof(std::uint64_t) : 2;
  }

  void check_body(const Context& ctx, std::span<const std::byte> body, std::int64_t n) const {
    check_length(ctx, *this, body, n);
    if (is_plain() || body[1] == description()) return;
    fail_corrupt(ctx, name() + " body of other bits or elements" +
                          "\nhint: all ranks need the same policy and version");
  }
  // Keeps what `rotation` holds when it is the body's.
  const QuantizeRotation* read_rotation(std::span<const std::byte> body,
                                        std::optional<QuantizeRotation>& rotation) const {
    if (!shape_.rotate) return nullptr;
    std::uint64_t seed = 0;
    std::memcpy(&seed, body.data() + 2, sizeof seed);
    if (!rotation || rotation->seed != seed) rotation.emplace(seed, shape_.unit());
    return &*rotation;
  }
  void add_records(const Context& ctx, const std::byte* records, const QuantizeRotation* rotation,
                   float weight, std::span<float> out) const {
    const auto n = static_cast<std::int64_t>(out.size());
    if (!quantize_accumulate(records, shape_, rotation, weight, out.data(), n)) fail_scale(ctx);
  }
  [[noreturn]] void fail_scale(const Context& ctx) const {
    fail_corrupt(ctx, name() +
                          " body with a scale that no sender writes: negative, NaN, Inf or "
                          "out of range");
  }

  QuantizeShape shape_;
  bool stochastic_;
};

std::string QuantizeCodec::name() const {
  std::string text = "q" + std::to_string(shape_.bits);
  if (shape_.kind != QuantizeKind::kMaxAbs) {
    text += ",kind=" + word(shape_.kind);
  }
  if (shape_.kind == QuantizeKind::kMx && shape_.element != default_mx_element(shape_.bits)) {
    text += ",element=";
    text += kMxElementWords[static_cast<std::size_t>(shape_.element)];
  }
  if (shape_.block != default_quantize_block(shape_.kind)) {
    text += ",block=" + std::to_string(shape_.block);
  }
  if (stochastic_ && !always_stochastic(shape_.kind)) text += ",stochastic";
  if (shape_.rotate) text += ",rotate";
  return text;
}

void QuantizeCodec::sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                        float weight, std::span<float> out) const {
  const auto is = [](std::span<const std::byte> body, std::uint8_t mode) {
    return !body.empty() && body[0] == std::byte{mode};
  };
  constexpr auto kEmpty = static_cast<std::uint8_t>(BodyMode::kEmpty);
  const bool plain = std::all_of(bodies.begin(), bodies.end(), [&](std::span<const std::byte> b) {
    return is(b, mode()) || is(b, kEmpty);
  });
  if (!plain) return PayloadCodec::sum(ctx, bodies, weight, out);
  check_device(ctx);
  const auto for_each_body = [&](auto&& f) {
    Context of_sender = ctx;
    of_sender.sender = 0;
    for (const auto body : bodies) {
      if (!is(body, kEmpty)) f(of_sender, body);
      ++of_sender.sender;
    }
  };
  const auto n = static_cast<std::int64_t>(out.size());
  for_each_body([&](const Context& of_sender, auto body) { check_body(of_sender, body, n); });
  // Ranks share the rotation, so one is drawn as a rule.
  std::optional<QuantizeRotation> rotation;
  const std::int64_t step = kSumElements / shape_.unit() * shape_.unit();
  for (std::int64_t begin = 0; begin < n; begin += step) {
    const auto range = out.subspan(static_cast<std::size_t>(begin),
                                   static_cast<std::size_t>(std::min(step, n - begin)));
    std::fill(range.begin(), range.end(), 0.0F);
    const auto at = static_cast<std::ptrdiff_t>(prefix_bytes()) + shape_.bytes(begin);
    for_each_body([&](const Context& of_sender, auto body) {
      add_records(of_sender, body.data() + at, read_rotation(body, rotation), weight, range);
    });
  }
}

void check(const QuantizeOptions& options) {
  const std::string quantiser = "quantiser of " + std::to_string(options.bits) + " bits";
  const bool bits_fit = [&] {
    switch (options.kind) {
      case QuantizeKind::kMaxAbs:
      case QuantizeKind::kMaxMin:
        return options.bits >= 1 && options.bits <= 8;
      case QuantizeKind::kQsgd:
      case QuantizeKind::kNatural:
        return options.bits >= 2 && options.bits <= 8;
      case QuantizeKind::kTernGrad:
        return options.bits == 2;
      case QuantizeKind::kMx:
        return options.bits == mx_bits(options.element);
    }
    return false;
  }();
  if (!bits_fit) {
    throw InvalidArgument(quantiser + ", kind " + word(options.kind) +
                          ": expected 1 to 8 for maxabs and maxmin, 2 to 8 for qsgd and natural, 2 "
                          "for terngrad, those of the element for mx");
  }
  if (always_stochastic(options.kind) && !options.stochastic) {
    throw InvalidArgument(quantiser + ", kind " + word(options.kind) + ": expected stochastic");
  }
  const bool is_mx = options.kind == QuantizeKind::kMx;
  const bool power = std::has_single_bit(static_cast<std::uint64_t>(options.block));
  const bool fits =
      is_mx ? options.block >= kMinMxBlock && options.block <= kMaxMxBlock && power
            : options.block >= kMinQuantizeBlock && options.block <= kMaxQuantizeBlock &&
                  options.block % kQuantizeBlockStep == 0 && (power || !options.rotate);
  if (!fits) {
    throw InvalidArgument(quantiser + " in blocks of " + std::to_string(options.block) +
                          " elements: expected " +
                          (is_mx ? "a power of two in [32, 256]"
                                 : "a multiple of 64 in [64, 4096], a power of two with rotation"));
  }
}

}  // namespace

std::shared_ptr<const PayloadCodec> make_quantize_codec(const QuantizeOptions& options) {
  check(options);
  return std::make_shared<QuantizeCodec>(options);
}

}  // namespace thinwire
