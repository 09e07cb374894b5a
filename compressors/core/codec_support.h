// What every codec's encode and decode do around their kernels: preconditions, one-byte bodies,
// zero and NaN fills, dispatch on dtype. Pure functions, thread-safe; nothing allocates unless it
// throws.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <type_traits>

#include "compressors/core/codec.h"
#include "compressors/core/convert.h"

namespace thinwire {

// Residuals of at least this many bytes are written past the caches: by the time the next step
// reads them, the rest of the model has passed through. Measured on layers of 16 MiB that come
// round cold: 1.3 times as fast for q4, 1.9 times for bf16.
inline constexpr std::size_t kStreamBytes = std::size_t{4} << 20;

// InvalidArgument, naming ctx.parameter, when the call breaks a precondition of PayloadCodec.
// NotAvailable for device memory.
void check_encode(const Context& ctx, TensorView grad, const Memory* memory,
                  std::span<std::byte> out, std::size_t slot_bytes);
void check_device(const Context& ctx);
[[noreturn]] void fail_argument(const Context& ctx, const std::string& what);
[[noreturn]] void fail_corrupt(const Context& ctx, const std::string& what);

// CorruptPayload when the body is shorter than the codec's slot for n elements: for families whose
// bodies fill their slots.
void check_length(const Context& ctx, const PayloadCodec& codec, std::span<const std::byte> body,
                  std::int64_t n);

// Every element is +0 or -0. Stops at the first that is not.
bool all_zero(TensorView tensor);
// Every v = grad + decay * residual is finite.
bool all_finite(TensorView grad, const Memory* memory);

struct PlacedValue {
  std::int64_t index = 0;
  float value = 0;
};
// The first v = grad + decay * residual that is NaN or Inf. For error messages: allocates.
std::optional<PlacedValue> first_nonfinite(TensorView grad, const Memory* memory);

void fill_zero(TensorView tensor);
void fill_nan(TensorView tensor);
void fill_nan(std::span<float> values);

// Writes the one-byte body of `mode`.
EncodeResult write_mark(BodyMode mode, std::span<std::byte> out);
// True when `body` is a one-byte mark, after filling `out` accordingly. CorruptPayload when the
// body is empty or its mode is neither a mark nor `family_mode`.
bool decode_mark(const Context& ctx, std::span<const std::byte> body, std::uint8_t family_mode,
                 TensorView out);
// The same for accumulate: NaN everywhere, or nothing added.
bool accumulate_mark(const Context& ctx, std::span<const std::byte> body, std::uint8_t family_mode,
                     std::span<float> out);

// Looks before the pass that writes memory: the mark to send, or kFamily. A memory of one
// generation is written in place, so nonfinite values must be found before anything is written.
BodyMode look_ahead(TensorView grad, const Memory* memory);

// Points a kernel's `residual`, `decay` and `next` at the memory, when there is one.
template <typename KernelArgs>
void lend_memory(Memory* memory, KernelArgs& args) {
  if (memory == nullptr) return;
  args.residual = memory->current().data();
  args.decay = memory->decay();
  args.next = memory->next().data();
}
// The end of an encode whose kernel wrote a whole slot and memory, unless v was not finite: then a
// mark goes out and the memory rolls back.
EncodeResult finish_encode(bool finite, std::size_t slot_bytes, Memory* memory,
                           std::span<std::byte> out);
// A kernel's arguments for the elements from `done` on; pointers of the family's own are to move
// yet.
template <typename KernelArgs>
KernelArgs after(KernelArgs args, std::int64_t done) {
  args.grad = args.grad.slice(done, args.grad.elements);
  if (args.residual != nullptr) args.residual += done;
  if (args.next != nullptr) args.next += done;
  return args;
}
// Whether a residual of so many elements is gone from the caches by the next step.
inline bool outlasts_caches(std::int64_t elements) {
  return static_cast<std::size_t>(elements) * sizeof(float) >= kStreamBytes;
}
// Whether a kernel writes its residuals past the caches: not where it writes over what it has just
// read.
inline bool writes_past_caches(TensorView grad, const float* residual, const float* next) {
  return next != nullptr && next != residual && next != grad.data && outlasts_caches(grad.elements);
}

// Calls f with a typed pointer to the tensor's data; InvalidArgument for other dtypes.
template <typename F>
decltype(auto) visit(TensorView tensor, F&& f) {
  switch (tensor.dtype) {
    case DType::kF32:
      return f(static_cast<float*>(tensor.data));
    case DType::kBF16:
      return f(static_cast<BF16*>(tensor.data));
    case DType::kF16:
      return f(static_cast<FP16*>(tensor.data));
    case DType::kF64:
      return f(static_cast<double*>(tensor.data));
    case DType::kOther:
      break;
  }
  throw InvalidArgument("tensor of dtype " + std::string(name(tensor.dtype)) +
                        ": expected fp32, bf16, fp16 or fp64");
}

}  // namespace thinwire
