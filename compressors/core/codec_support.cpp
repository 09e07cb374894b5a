#include "compressors/core/codec_support.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

namespace thinwire {
namespace {

// Elements looked at between two early exits.
constexpr std::int64_t kScanElements = 4096;

// Bits that hold the magnitude of T.
template <typename T>
auto magnitude(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<std::uint32_t>(x) & ~kSignBit32;
  } else if constexpr (std::is_same_v<T, double>) {
    return std::bit_cast<std::uint64_t>(x) & ~(std::uint64_t{1} << 63);
  } else {
    return static_cast<std::uint32_t>(x.bits & 0x7FFFU);
  }
}

template <typename T>
bool all_zero_of(const T* values, std::int64_t n) {
  for (std::int64_t begin = 0; begin < n; begin += kScanElements) {
    const std::int64_t end = std::min(n, begin + kScanElements);
    decltype(magnitude(T{})) any = 0;
    for (std::int64_t i = begin; i < end; ++i) any |= magnitude(values[i]);
    if (any != 0) return false;
  }
  return true;
}

template <typename T>
bool all_finite_of(const T* grad, const float* residual, float decay, std::int64_t n) {
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    float v = to_float(grad[i]);
    if (residual != nullptr) v += decay * residual[i];
    largest = std::max(largest, magnitude(v));
  }
  return largest < kInfBits32;
}

std::string prefix(const Context& ctx) {
  // A negative sender stands for all ranks.
  std::string text = ctx.sender < 0 ? "all ranks" : "rank " + std::to_string(ctx.sender);
  if (!ctx.parameter.empty()) text += ", tensor \"" + std::string(ctx.parameter) + "\"";
  return text + ": ";
}

BodyMode read_mode(const Context& ctx, std::span<const std::byte> body, std::uint8_t family_mode) {
  if (body.empty()) fail_corrupt(ctx, "empty body, expected a mode byte");
  const auto mode = std::to_integer<std::uint8_t>(body[0]);
  if (mode == static_cast<std::uint8_t>(BodyMode::kEmpty)) return BodyMode::kEmpty;
  if (mode == static_cast<std::uint8_t>(BodyMode::kNonFinite)) return BodyMode::kNonFinite;
  if (mode == family_mode) return BodyMode::kFamily;
  fail_corrupt(ctx, "body of mode " + std::to_string(mode) + ", expected " +
                        std::to_string(family_mode) +
                        "\nhint: all ranks need the same policy and version");
}

}  // namespace

void PayloadCodec::sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                       float weight, std::span<float> out) const {
  std::fill(out.begin(), out.end(), 0.0F);
  Context of_sender = ctx;
  of_sender.sender = 0;
  for (const std::span<const std::byte> body : bodies) {
    accumulate(of_sender, body, weight, out);
    ++of_sender.sender;
  }
}

void fail_argument(const Context& ctx, const std::string& what) {
  throw InvalidArgument(prefix(ctx) + what);
}

void fail_corrupt(const Context& ctx, const std::string& what) {
  throw CorruptPayload(prefix(ctx) + what);
}

void check_device(const Context& ctx) {
  if (ctx.device != Device::kCpu) {
    throw NotAvailable(prefix(ctx) +
                       "device memory is not in this version\nhint: copy the tensor to the host");
  }
}

void check_encode(const Context& ctx, TensorView grad, const Memory* memory,
                  std::span<std::byte> out, std::size_t slot_bytes) {
  check_device(ctx);
  if (grad.elements < 0 || (grad.data == nullptr && grad.elements > 0)) {
    fail_argument(ctx, "gradient of " + std::to_string(grad.elements) + " elements at no address");
  }
  if (grad.dtype == DType::kOther) {
    fail_argument(ctx, "gradient of an integer or complex dtype, expected fp32, bf16 or fp16");
  }
  if (memory != nullptr && memory->elements() != grad.elements) {
    fail_argument(ctx, "memory of " + std::to_string(memory->elements()) +
                           " elements, expected the gradient's " + std::to_string(grad.elements));
  }
  if (out.size() < slot_bytes) {
    fail_argument(ctx, "output of " + std::to_string(out.size()) + " bytes, expected " +
                           std::to_string(slot_bytes) + "\nhint: ask slot_bytes(n)");
  }
}

void check_length(const Context& ctx, const PayloadCodec& codec, std::span<const std::byte> body,
                  std::int64_t n) {
  const std::size_t slot = codec.slot_bytes(n);
  if (body.size() >= slot) return;
  fail_corrupt(ctx, codec.name() + " body of " + std::to_string(body.size()) + " bytes, expected " +
                        std::to_string(slot) + " for " + std::to_string(n) + " elements");
}

bool all_zero(TensorView tensor) {
  return visit(tensor, [&](const auto* values) { return all_zero_of(values, tensor.elements); });
}

bool all_finite(TensorView grad, const Memory* memory) {
  const float* residual = memory == nullptr ? nullptr : memory->current().data();
  const float decay = memory == nullptr ? 1.0F : memory->decay();
  return visit(grad, [&](const auto* values) {
    return all_finite_of(values, residual, decay, grad.elements);
  });
}

std::optional<PlacedValue> first_nonfinite(TensorView grad, const Memory* memory) {
  std::vector<float> residual(memory == nullptr ? 0 : static_cast<std::size_t>(grad.elements));
  if (memory != nullptr) memory->read(residual);
  return visit(grad, [&](const auto* values) -> std::optional<PlacedValue> {
    for (std::int64_t i = 0; i < grad.elements; ++i) {
      float v = to_float(values[i]);
      if (memory != nullptr) v += memory->decay() * residual[static_cast<std::size_t>(i)];
      if (!std::isfinite(v)) return PlacedValue{.index = i, .value = v};
    }
    return std::nullopt;
  });
}

void fill_zero(TensorView tensor) {
  visit(tensor, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    std::fill_n(values, tensor.elements, T{});
  });
}

void fill_nan(TensorView tensor) {
  visit(tensor, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    std::fill_n(values, tensor.elements, from_float<T>(std::numeric_limits<float>::quiet_NaN()));
  });
}

void fill_nan(std::span<float> values) {
  std::fill(values.begin(), values.end(), std::numeric_limits<float>::quiet_NaN());
}

EncodeResult write_mark(BodyMode mode, std::span<std::byte> out) {
  out[0] = static_cast<std::byte>(mode);
  return {.bytes = 1, .nonfinite = mode == BodyMode::kNonFinite, .empty = mode == BodyMode::kEmpty};
}

EncodeResult finish_encode(bool finite, std::size_t slot_bytes, Memory* memory,
                           std::span<std::byte> out) {
  if (finite) return {.bytes = slot_bytes};
  if (memory != nullptr) memory->rollback();
  return write_mark(BodyMode::kNonFinite, out);
}

bool decode_mark(const Context& ctx, std::span<const std::byte> body, std::uint8_t family_mode,
                 TensorView out) {
  check_device(ctx);
  const BodyMode mode = read_mode(ctx, body, family_mode);
  if (mode == BodyMode::kEmpty) fill_zero(out);
  if (mode == BodyMode::kNonFinite) fill_nan(out);
  return mode != BodyMode::kFamily;
}

bool accumulate_mark(const Context& ctx, std::span<const std::byte> body, std::uint8_t family_mode,
                     std::span<float> out) {
  check_device(ctx);
  const BodyMode mode = read_mode(ctx, body, family_mode);
  if (mode == BodyMode::kNonFinite) fill_nan(out);
  return mode != BodyMode::kFamily;
}

BodyMode look_ahead(TensorView grad, const Memory* memory) {
  if (grad.elements == 0) return BodyMode::kEmpty;
  if (memory == nullptr) return BodyMode::kFamily;
  if (all_zero(grad)) return BodyMode::kEmpty;
  if (!memory->transactional() && !all_finite(grad, memory)) return BodyMode::kNonFinite;
  return BodyMode::kFamily;
}

}  // namespace thinwire
