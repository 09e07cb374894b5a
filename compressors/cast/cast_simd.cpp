#include "compressors/cast/cast_kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "compressors/cast/cast_simd.cpp"
#include <hwy/foreach_target.h>
// After foreach_target.h.
#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include "compressors/cast/cast_reference.h"
#include "compressors/core/codec_support.h"
#include "compressors/core/convert-inl.h"

HWY_BEFORE_NAMESPACE();
namespace thinwire {
namespace HWY_NAMESPACE {

template <DType kType>
HWY_INLINE VU32 code_bits(VF32 v) {
  return kType == DType::kBF16 ? bf16_bits<true>(v) : fp16_bits<true>(v);
}
template <DType kType>
HWY_INLINE VF32 code_value(VU32 bits) {
  return kType == DType::kBF16 ? float_from_bf16_bits(bits) : float_from_fp16_bits(bits);
}

// Whole vectors of [0, n); returns how many elements were done.
template <DType kType, typename T>
HWY_NOINLINE std::int64_t encode_vectors(const CastEncode& args, T* grad, bool stream,
                                         bool& finite) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  const VF32 decay = hn::Set(F32(), args.decay);
  auto largest = hn::Zero(I32());
  std::int64_t i = 0;
  for (; i + lanes <= args.grad.elements; i += lanes) {
    const float* residual = args.residual == nullptr ? nullptr : args.residual + i;
    const VF32 v = load_sum(grad + i, residual, decay);
    largest = hn::Max(largest, magnitude_bits(v));
    const VU32 bits = code_bits<kType>(v);
    store_bits16(bits, args.codes + 2 * i);
    if (args.next != nullptr) {
      const VF32 rest = hn::Sub(v, code_value<kType>(bits));
      if (stream) {
        hn::Stream(rest, F32(), args.next + i);
      } else {
        hn::StoreU(rest, F32(), args.next + i);
      }
    }
  }
  if (stream) hwy::FlushStream();
  finite = hn::AllTrue(I32(), hn::Lt(largest, hn::Set(I32(), static_cast<int>(kInfBits32))));
  return i;
}

template <DType kType>
bool encode_typed(const CastEncode& args) {
  const bool stream = writes_past_caches(args.grad, args.residual, args.next);
  return visit(args.grad, [&](auto* grad) {
    bool finite = true;
    const std::int64_t done = encode_vectors<kType>(args, grad, stream, finite);
    CastEncode tail = after(args, done);
    tail.codes += 2 * done;
    return cast_encode_reference(tail) && finite;
  });
}

bool encode(const CastEncode& args) {
  return args.type == DType::kBF16 ? encode_typed<DType::kBF16>(args)
                                   : encode_typed<DType::kF16>(args);
}

template <DType kType>
void decode_typed(const std::byte* codes, TensorView out) {
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(F32()));
  std::int64_t i = 0;
  visit(out, [&](auto* values) {
    for (; i + lanes <= out.elements; i += lanes) {
      store_float(code_value<kType>(load_bits16(codes + 2 * i)), values + i);
    }
  });
  cast_decode_reference(codes + 2 * i, kType, out.slice(i, out.elements));
}

void decode(const std::byte* codes, DType type, TensorView out) {
  if (type == DType::kBF16) {
    decode_typed<DType::kBF16>(codes, out);
  } else {
    decode_typed<DType::kF16>(codes, out);
  }
}

template <DType kType>
void accumulate_typed(const std::byte* codes, float weight, float* out, std::int64_t n) {
  const F32 df;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(df));
  const VF32 scale = hn::Set(df, weight);
  std::int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const VF32 product = hn::Mul(scale, code_value<kType>(load_bits16(codes + 2 * i)));
    hn::StoreU(hn::Add(hn::LoadU(df, out + i), product), df, out + i);
  }
  cast_accumulate_reference(codes + 2 * i, kType, weight, out + i, n - i);
}

void accumulate(const std::byte* codes, DType type, float weight, float* out, std::int64_t n) {
  if (type == DType::kBF16) {
    accumulate_typed<DType::kBF16>(codes, weight, out, n);
  } else {
    accumulate_typed<DType::kF16>(codes, weight, out, n);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace thinwire
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace thinwire {

HWY_EXPORT(encode);
HWY_EXPORT(decode);
HWY_EXPORT(accumulate);

bool cast_encode(const CastEncode& args) { return HWY_DYNAMIC_DISPATCH(encode)(args); }
void cast_decode(const std::byte* codes, DType type, TensorView out) {
  HWY_DYNAMIC_DISPATCH(decode)(codes, type, out);
}
void cast_accumulate(const std::byte* codes, DType type, float weight, float* out, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(accumulate)(codes, type, weight, out, n);
}

}  // namespace thinwire
#endif  // HWY_ONCE
