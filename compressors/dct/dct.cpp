#include "compressors/dct/dct.h"

#include <algorithm>
#include <bit>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/workspace.h"
#include "compressors/dct/dct_kernels.h"

namespace thinwire {
namespace {

constexpr auto kMode = static_cast<std::uint8_t>(static_cast<int>(BodyMode::kFamily) + 48);

// Elements of a sum that all bodies add to before the next are touched: 32 KiB.
constexpr std::int64_t kSumElements = 8192;

class DctCodec final : public PayloadCodec {
 public:
  explicit DctCodec(const DctOptions& options)
      : shape_{static_cast<int>(options.tile), static_cast<int>(options.keep), options.values} {}

  std::string name() const override {
    const DctOptions defaults;
    std::string text = "dct:" + std::to_string(shape_.keep);
    if (shape_.tile != defaults.tile) text += ",tile=" + std::to_string(shape_.tile);
    if (shape_.values == DctValues::kF32) text += ",values=fp32";
    if (shape_.values == DctValues::kQ8) text += ",values=q8";
    return text;
  }
  // Not sparse: few coefficients, but each touches its whole tile. Re-encoding the sum costs two
  // payloads a rank whatever the number of ranks, an allgather one less than there are ranks.
  Traits traits() const override { return {.granularity = shape_.tile}; }
  std::size_t slot_bytes(std::int64_t n) const override {
    return 1 + static_cast<std::size_t>(dct_bytes(shape_, n));
  }
  std::size_t workspace_bytes(std::int64_t n) const override {
    return Workspace::bytes_for<float>(dct_scratch_floats(shape_, n));
  }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    const std::size_t slot = slot_bytes(grad.elements);
    check_encode(ctx, grad, memory, out, slot);
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    DctEncode args{.grad = grad,
                   .records = out.data() + 1,
                   .shape = shape_,
                   .scratch = scratch(ctx, grad.elements)};
    out[0] = std::byte{kMode};
    lend_memory(memory, args);
    return finish_encode(dct_encode(args), slot, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, kMode, out)) return;
    check_length(ctx, *this, body, out.elements);
    if (!dct_decode(body.data() + 1, shape_, scratch(ctx, out.elements), out)) fail_record(ctx);
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, kMode, out)) return;
    const auto n = static_cast<std::int64_t>(out.size());
    check_length(ctx, *this, body, n);
    add_records(ctx, body.data() + 1, weight, out);
  }

  void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies, float weight,
           std::span<float> out) const override {
    const bool plain = std::all_of(bodies.begin(), bodies.end(), [](auto body) {
      return !body.empty() && body[0] == std::byte{kMode};
    });
    if (!plain) return PayloadCodec::sum(ctx, bodies, weight, out);
    check_device(ctx);
    const auto n = static_cast<std::int64_t>(out.size());
    const auto for_each_body = [&](auto&& f) {
      Context of_sender = ctx;
      of_sender.sender = 0;
      for (const auto body : bodies) {
        f(of_sender, body);
        ++of_sender.sender;
      }
    };
    for_each_body(
        [&](const Context& of_sender, auto body) { check_length(of_sender, *this, body, n); });
    const std::int64_t step = std::max<std::int64_t>(kSumElements, kDctTogether * shape_.tile);
    for (std::int64_t begin = 0; begin < n; begin += step) {
      const auto range = out.subspan(static_cast<std::size_t>(begin),
                                     static_cast<std::size_t>(std::min(step, n - begin)));
      std::fill(range.begin(), range.end(), 0.0F);
      const std::int64_t at = 1 + dct_bytes(shape_, begin);
      for_each_body([&](const Context& of_sender, auto body) {
        add_records(of_sender, body.data() + at, weight, range);
      });
    }
  }

 private:
  void add_records(const Context& ctx, const std::byte* records, float weight,
                   std::span<float> out) const {
    const auto n = static_cast<std::int64_t>(out.size());
    if (!dct_accumulate(records, shape_, scratch(ctx, n), weight, out.data(), n)) fail_record(ctx);
  }
  float* scratch(const Context& ctx, std::int64_t n) const {
    return Workspace(ctx.workspace).take<float>(dct_scratch_floats(shape_, n)).data();
  }
  [[noreturn]] void fail_record(const Context& ctx) const {
    fail_corrupt(ctx, name() + " body with positions or coefficients that no sender writes" +
                          "\nhint: all ranks need the same policy and version");
  }

  DctShape shape_;
};

}  // namespace

std::shared_ptr<const PayloadCodec> make_dct_codec(const DctOptions& options) {
  if (options.tile < kMinDctTile || options.tile > kMaxDctTile ||
      !std::has_single_bit(static_cast<std::uint64_t>(options.tile))) {
    throw InvalidArgument("dct of tiles of " + std::to_string(options.tile) +
                          " elements: expected a power of two in [" + std::to_string(kMinDctTile) +
                          ", " + std::to_string(kMaxDctTile) + "]");
  }
  if (options.keep < 1 || options.keep > options.tile) {
    throw InvalidArgument("dct of " + std::to_string(options.keep) +
                          " coefficients a tile: expected 1 to " + std::to_string(options.tile));
  }
  return std::make_shared<DctCodec>(options);
}

}  // namespace thinwire
