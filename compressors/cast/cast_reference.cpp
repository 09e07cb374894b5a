#include "compressors/cast/cast_reference.h"

#include <cstring>
#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

float read_code(const std::byte* codes, DType type, std::int64_t i) {
  std::uint16_t bits = 0;
  std::memcpy(&bits, codes + 2 * i, sizeof(bits));
  return type == DType::kBF16 ? to_float(BF16{bits}) : to_float(FP16{bits});
}

}  // namespace

bool cast_encode_reference(const CastEncode& args) {
  bool finite = true;
  visit(args.grad, [&](auto* grad) {
    for (std::int64_t i = 0; i < args.grad.elements; ++i) {
      float v = to_float(grad[i]);
      if (args.residual != nullptr) v += args.decay * args.residual[i];
      finite = finite && is_finite(v);
      const std::uint16_t bits =
          args.type == DType::kBF16 ? to_bf16_saturated(v).bits : to_fp16_saturated(v).bits;
      std::memcpy(args.codes + 2 * i, &bits, sizeof(bits));
      if (args.next != nullptr) args.next[i] = v - read_code(args.codes, args.type, i);
    }
  });
  return finite;
}

void cast_decode_reference(const std::byte* codes, DType type, TensorView out) {
  visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    for (std::int64_t i = 0; i < out.elements; ++i) {
      values[i] = from_float<T>(read_code(codes, type, i));
    }
  });
}

void cast_accumulate_reference(const std::byte* codes, DType type, float weight, float* out,
                               std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) out[i] += weight * read_code(codes, type, i);
}

}  // namespace thinwire
