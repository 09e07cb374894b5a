#include "comm/collectives/kernels.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "compressors/core/convert.h"
#include "compressors/core/error.h"

namespace thinwire::collectives {

namespace {

template <typename T>
void widen(const T* in, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = to_float(in[i]);
  }
}

template <typename T>
bool scale_values(T* data, std::int64_t n, T factor) {
  // |x| <= max is false for NaN and Inf alike.
  constexpr T kMax = std::numeric_limits<T>::max();
  bool finite = true;
  for (std::int64_t i = 0; i < n; ++i) {
    const T x = data[i] * factor;
    data[i] = x;
    finite &= x <= kMax && x >= -kMax;
  }
  return !finite;
}

template <typename T>
bool any_nonfinite(const T* data, std::int64_t n) {
  constexpr T kMax = std::numeric_limits<T>::max();
  bool finite = true;
  for (std::int64_t i = 0; i < n; ++i) {
    finite &= data[i] <= kMax && data[i] >= -kMax;
  }
  return !finite;
}

bool any_nonfinite_u16(const std::uint16_t* data, std::int64_t n, std::uint16_t exponent) {
  bool nonfinite = false;
  for (std::int64_t i = 0; i < n; ++i) {
    nonfinite |= (data[i] & exponent) == exponent;
  }
  return nonfinite;
}

[[noreturn]] void refuse(DType dtype) {
  throw InvalidArgument("fp32, bf16, fp16 or fp64 expected, got " + std::string(name(dtype)));
}

}  // namespace

void load_f32(TensorView in, std::span<float> out) {
  switch (in.dtype) {
    case DType::kF32:
      if (in.elements > 0) {
        std::memcpy(out.data(), in.data, in.bytes());
      }
      return;
    case DType::kBF16:
      widen(static_cast<const BF16*>(in.data), out);
      return;
    case DType::kF16:
      widen(static_cast<const FP16*>(in.data), out);
      return;
    case DType::kF64:
    case DType::kOther:
      break;
  }
  refuse(in.dtype);
}

void store_f32(std::span<const float> in, TensorView out) {
  const auto n = static_cast<std::size_t>(out.elements);
  switch (out.dtype) {
    case DType::kF32:
      if (n > 0) {
        std::memcpy(out.data, in.data(), out.bytes());
      }
      return;
    case DType::kBF16:
      std::transform(in.begin(), in.begin() + out.elements, static_cast<BF16*>(out.data), to_bf16);
      return;
    case DType::kF16:
      std::transform(in.begin(), in.begin() + out.elements, static_cast<FP16*>(out.data), to_fp16);
      return;
    case DType::kF64:
      std::copy_n(in.begin(), n, static_cast<double*>(out.data));
      return;
    case DType::kOther:
      break;
  }
  refuse(out.dtype);
}

bool scale(TensorView data, float factor) {
  switch (data.dtype) {
    case DType::kF32:
      return scale_values(static_cast<float*>(data.data), data.elements, factor);
    case DType::kF64:
      return scale_values(static_cast<double*>(data.data), data.elements,
                          static_cast<double>(factor));
    case DType::kBF16:
    case DType::kF16:
    case DType::kOther:
      break;
  }
  refuse(data.dtype);
}

bool has_nonfinite(TensorView data) {
  switch (data.dtype) {
    case DType::kF32:
      return any_nonfinite(static_cast<const float*>(data.data), data.elements);
    case DType::kF64:
      return any_nonfinite(static_cast<const double*>(data.data), data.elements);
    case DType::kBF16:
      return any_nonfinite_u16(static_cast<const std::uint16_t*>(data.data), data.elements, 0x7F80);
    case DType::kF16:
      return any_nonfinite_u16(static_cast<const std::uint16_t*>(data.data), data.elements, 0x7C00);
    case DType::kOther:
      break;
  }
  refuse(data.dtype);
}

bool overflowed(TensorView stored) { return stored.dtype == DType::kF16 && has_nonfinite(stored); }

bool sum_scaled(const std::byte* first, std::size_t stride_bytes, int count, float factor,
                std::span<float> out) {
  constexpr std::size_t kBlock = 2048;  // the sums of a block stay in the L1 cache
  bool nonfinite = false;
  for (std::size_t begin = 0; begin < out.size(); begin += kBlock) {
    const std::size_t n = std::min(kBlock, out.size() - begin);
    float* sum = out.data() + begin;
    for (int r = 0; r < count; ++r) {
      const auto* raw =
          reinterpret_cast<const float*>(first + static_cast<std::size_t>(r) * stride_bytes) +
          begin;
      if (r == 0) {
        for (std::size_t i = 0; i < n; ++i) {
          sum[i] = raw[i] * factor;
        }
      } else {
        for (std::size_t i = 0; i < n; ++i) {
          sum[i] += raw[i] * factor;
        }
      }
    }
    nonfinite |= any_nonfinite(sum, static_cast<std::int64_t>(n));
  }
  return nonfinite;
}

}  // namespace thinwire::collectives
