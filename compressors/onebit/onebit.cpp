#include "compressors/onebit/onebit.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include "compressors/core/codec_support.h"
#include "compressors/onebit/onebit_kernels.h"
#include "compressors/onebit/onebit_runs.h"

namespace thinwire {

OneBitBody::OneBitBody(const std::byte* body, std::int64_t block, std::int64_t n)
    : scales(body + kOneBitFirstBytes),
      signs(scales + kOneBitScaleBytes * onebit_scales(block, n)) {
  std::uint32_t first = 0;
  std::memcpy(&first, body, sizeof(first));
  first_run = first;
}

bool onebit_valid(const OneBitBody& body, std::int64_t block, std::int64_t n) {
  for (std::int64_t i = 0; i < onebit_scales(block, n); ++i) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, body.scales + kOneBitScaleBytes * i, sizeof(bits));
    if (bits >= kInfBits32) return false;
  }
  return onebit_runs_valid(body.signs, n, body.first_run);
}

namespace {

// FORMAT.md.
constexpr auto kMode = static_cast<std::uint8_t>(BodyMode::kFamily) + 24;
constexpr std::int64_t kMaxElements = (std::int64_t{1} << 32) - 1;

class OneBitCodec final : public PayloadCodec {
 public:
  explicit OneBitCodec(const OneBitOptions& options) : options_(options) {}

  std::string name() const override {
    std::string text = "onebit";
    if (options_.block != 0) text += ",block=" + std::to_string(options_.block);
    if (options_.scale == OneBitScale::kL1) text += ",scale=l1";
    return text;
  }
  // One scale for all: a range that is encoded alone has its own, as in 1-bit Adam, whose server
  // ranks scale their parts apart.
  Traits traits() const override {
    return {.granularity = options_.block == 0 ? kOneBitGroup : options_.block};
  }
  std::size_t slot_bytes(std::int64_t n) const override {
    if (n < 0 || n > kMaxElements) {
      throw InvalidArgument("onebit: a tensor of " + std::to_string(n) +
                            " elements, expected at most " + std::to_string(kMaxElements) +
                            "\nhint: encode ranges of the tensor one by one");
    }
    return 1 + static_cast<std::size_t>(onebit_bytes(options_.block, n));
  }
  std::size_t workspace_bytes(std::int64_t) const override { return 0; }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    const std::size_t slot = slot_bytes(grad.elements);
    check_encode(ctx, grad, memory, out, slot);
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    out[0] = std::byte{kMode};
    OneBitEncode args{
        .grad = grad, .body = out.data() + 1, .block = options_.block, .scale = options_.scale};
    lend_memory(memory, args);
    return finish_encode(onebit_encode(args), slot, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, kMode, out)) return;
    onebit_decode(open(ctx, body, out.elements), options_.block, out);
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, kMode, out)) return;
    const OneBitBody one = open(ctx, body, static_cast<std::int64_t>(out.size()));
    onebit_sum({&one, 1}, options_.block, weight, false, out);
  }

  void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies, float weight,
           std::span<float> out) const override;

 private:
  // The contents of a body of kMode.
  OneBitBody open(const Context& ctx, std::span<const std::byte> body, std::int64_t n) const {
    check_length(ctx, *this, body, n);
    const OneBitBody opened(body.data() + 1, options_.block, n);
    if (!onebit_valid(opened, options_.block, n)) {
      fail_corrupt(ctx, name() +
                            " body with a scale that is negative, NaN or Inf, or with masked runs "
                            "outside the tensor");
    }
    return opened;
  }

  OneBitOptions options_;
};

// A pass over the sum for each kOneBitTogether bodies.
void OneBitCodec::sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                      float weight, std::span<float> out) const {
  const auto is = [](std::span<const std::byte> body, std::uint8_t mode) {
    return !body.empty() && body[0] == std::byte{mode};
  };
  constexpr auto kEmpty = static_cast<std::uint8_t>(BodyMode::kEmpty);
  const bool plain = std::all_of(bodies.begin(), bodies.end(), [&](std::span<const std::byte> b) {
    return is(b, kMode) || is(b, kEmpty);
  });
  if (!plain) return PayloadCodec::sum(ctx, bodies, weight, out);
  check_device(ctx);
  std::array<OneBitBody, kOneBitTogether> opened;
  std::size_t count = 0;
  bool fresh = true;
  Context of_sender = ctx;
  for (std::size_t i = 0; i < bodies.size(); ++i) {
    if (is(bodies[i], kEmpty)) continue;
    if (count == opened.size()) {
      onebit_sum(opened, options_.block, weight, fresh, out);
      fresh = false;
      count = 0;
    }
    of_sender.sender = static_cast<std::int32_t>(i);
    opened[count++] = open(of_sender, bodies[i], static_cast<std::int64_t>(out.size()));
  }
  onebit_sum(std::span(opened).first(count), options_.block, weight, fresh, out);
}

}  // namespace

std::shared_ptr<const PayloadCodec> make_onebit_codec(const OneBitOptions& options) {
  const bool in_range = options.block >= kMinOneBitBlock && options.block <= kMaxOneBitBlock &&
                        options.block % kOneBitBlockStep == 0;
  if (options.block != 0 && !in_range) {
    throw InvalidArgument(
        "onebit with blocks of " + std::to_string(options.block) +
        " elements: expected 0, or a multiple of " + std::to_string(kOneBitBlockStep) + " in [" +
        std::to_string(kMinOneBitBlock) + ", " + std::to_string(kMaxOneBitBlock) + "]");
  }
  return std::make_shared<OneBitCodec>(options);
}

}  // namespace thinwire
