#include "tests/support/patterns.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

constexpr std::byte kGuard{0xA5};

template <typename T>
T round_finite(float x) {
  if constexpr (std::is_same_v<T, BF16>) {
    return to_bf16_saturated(x);
  } else if constexpr (std::is_same_v<T, FP16>) {
    return to_fp16_saturated(x);
  } else {
    return from_float<T>(x);
  }
}

}  // namespace

std::string name(Pattern pattern) {
  constexpr const char* kNames[] = {"normal", "zero",     "equal", "sparse",
                                    "spike",  "denormal", "huge",  "alternating"};
  return kNames[static_cast<int>(pattern)];
}

std::vector<float> make_values(Pattern pattern, std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 engine(seed * 1000003 + static_cast<std::uint64_t>(pattern));
  // Built from the engine's bits: the standard distributions differ between libraries.
  const auto uniform = [&] { return static_cast<float>(engine() >> 40) * 0x1p-24F; };
  const auto normal = [&] { return uniform() + uniform() + uniform() + uniform() - 2.0F; };
  std::vector<float> values(static_cast<std::size_t>(n));
  for (std::size_t i = 0; i < values.size(); ++i) {
    float& v = values[i];
    switch (pattern) {
      case Pattern::kNormal:
        v = 0.01F * normal();
        break;
      case Pattern::kZero:
        v = (engine() & 1) != 0 ? 0.0F : -0.0F;
        break;
      case Pattern::kEqual:
        v = 0.37F;
        break;
      case Pattern::kSparse:
        v = engine() % 10 == 0 ? normal() : 0.0F;
        break;
      case Pattern::kSpike:
        v = i == values.size() / 2 ? 1e4F : 0.01F * normal();
        break;
      case Pattern::kDenormal:
        v = engine() % 3 == 0 ? 0.0F : normal() * std::numeric_limits<float>::min();
        break;
      case Pattern::kHuge:
        v = engine() % 5 == 0 ? std::copysign(std::numeric_limits<float>::max(), normal())
                              : 0.5F * normal() * 1.5e38F;
        break;
      case Pattern::kAlternating:
        v = (i % 2 == 0 ? 1.0F : -1.0F) * (1.0F + static_cast<float>(engine() % 4) * 0x1p-20F);
        break;
    }
  }
  return values;
}

Array::Array(DType dtype, std::int64_t n, std::int64_t shift)
    : dtype_(dtype), n_(n), storage_(2 * kGuardBytes + 64, kGuard) {
  const std::size_t shift_bytes = static_cast<std::size_t>(shift) * size_bytes(dtype);
  const std::size_t bytes = static_cast<std::size_t>(n) * size_bytes(dtype);
  storage_.assign(storage_.size() + bytes + shift_bytes, kGuard);
  const auto address = reinterpret_cast<std::uintptr_t>(storage_.data()) + kGuardBytes;
  offset_ = kGuardBytes + (64 - address % 64) % 64 + shift_bytes;
}

Array::Array(DType dtype, const std::vector<float>& values, std::int64_t shift)
    : Array(dtype, static_cast<std::int64_t>(values.size()), shift) {
  visit(view(), [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    for (std::size_t i = 0; i < values.size(); ++i) out[i] = round_finite<T>(values[i]);
  });
}

std::byte* Array::begin() { return storage_.data() + offset_; }
const std::byte* Array::begin() const { return storage_.data() + offset_; }

TensorView Array::view() { return {begin(), n_, dtype_}; }

std::vector<float> Array::values() const {
  std::vector<float> values(static_cast<std::size_t>(n_));
  const TensorView source{const_cast<std::byte*>(begin()), n_, dtype_};
  visit(source, [&](const auto* in) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = to_float(in[i]);
  });
  return values;
}

std::vector<std::byte> Array::bytes() const {
  return {begin(), begin() + static_cast<std::size_t>(n_) * size_bytes(dtype_)};
}

bool Array::guards_intact() const {
  const std::byte* end = begin() + static_cast<std::size_t>(n_) * size_bytes(dtype_);
  const auto is_guard = [](std::byte b) { return b == kGuard; };
  return std::all_of(storage_.data(), begin(), is_guard) &&
         std::all_of(end, storage_.data() + storage_.size(), is_guard);
}

void Array::set(std::int64_t i, float x) {
  visit(view(), [&](auto* out) {
    using T = std::remove_pointer_t<decltype(out)>;
    out[i] = from_float<T>(x);
  });
}

}  // namespace thinwire
