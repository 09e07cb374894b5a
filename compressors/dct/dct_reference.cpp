#include "compressors/dct/dct_reference.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <type_traits>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

using Values = std::vector<float>;

// n^(1/2) times the orthonormal DCT-IV, which is its own transpose.
Values dct4(const Values& x) {
  const std::size_t n = x.size();
  if (n == 1) return x;
  const std::size_t half = n / 2;
  const DctTwiddles twiddles = dct_twiddles(static_cast<int>(n));
  Values a(half);
  Values b(half);
  for (std::size_t j = 0; j < half; ++j) {
    const float c = twiddles.cos[j];
    const float s = twiddles.sin[j];
    const float p = x[j];
    const float q = x[n - 1 - j];
    a[j] = c * p + s * q;
    b[j] = j % 2 == 0 ? c * q - s * p : s * p - c * q;
  }
  a = dct_forward_reference(a);
  b = dct_forward_reference(b);
  Values y(n);
  y[0] = kDctSqrt2 * a[0];
  y[n - 1] = -kDctSqrt2 * b[0];
  for (std::size_t k = 1; k < half; ++k) {
    y[2 * k - 1] = a[k] - b[half - k];
    y[2 * k] = a[k] + b[half - k];
  }
  return y;
}

void put_bits(std::byte* to, int at, int bits, std::uint32_t value) {
  for (int i = at; i < at + bits; ++i, value >>= 1) {
    if ((value & 1) != 0) to[i / 8] |= static_cast<std::byte>(1 << i % 8);
  }
}
std::uint32_t get_bits(const std::byte* from, int at, int bits) {
  std::uint32_t value = 0;
  for (int i = 0; i < bits; ++i) {
    const auto byte = std::to_integer<std::uint32_t>(from[(at + i) / 8]);
    value |= (byte >> (at + i) % 8 & 1U) << i;
  }
  return value;
}

std::uint32_t magnitude(float x) { return std::bit_cast<std::uint32_t>(x) & ~kSignBit32; }

// The positions of the largest, ascending; ties to the lowest.
std::vector<int> choose(const Values& coefficients, int keep) {
  std::vector<int> order(coefficients.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int i, int j) {
    return magnitude(coefficients[static_cast<std::size_t>(i)]) >
           magnitude(coefficients[static_cast<std::size_t>(j)]);
  });
  order.resize(static_cast<std::size_t>(keep));
  std::sort(order.begin(), order.end());
  return order;
}

void write_positions(const DctShape& shape, const std::vector<int>& positions, std::byte* out) {
  std::fill_n(out, shape.position_bytes(), std::byte{0});
  if (shape.keep == shape.tile) return;
  int at = 0;
  for (const int position : positions) {
    if (shape.bitmap()) {
      put_bits(out, position, 1, 1);
    } else {
      put_bits(out, at, shape.index_bits(), static_cast<std::uint32_t>(position));
      at += shape.index_bits();
    }
  }
}

void write_values(const DctShape& shape, const Values& values, std::byte* out) {
  std::uint32_t largest = 0;
  for (const float value : values) largest = std::max(largest, magnitude(value));
  const DctScale scale = dct_q8_scale(largest);
  if (shape.values == DctValues::kQ8) {
    std::memcpy(out, &scale.bits, sizeof scale.bits);
    out += sizeof scale.bits;
  }
  for (const float value : values) {
    if (shape.values == DctValues::kF32) {
      std::memcpy(out, &value, sizeof value);
      out += sizeof value;
    } else if (shape.values == DctValues::kBF16) {
      const BF16 rounded = to_bf16(value);
      std::memcpy(out, &rounded, sizeof rounded);
      out += sizeof rounded;
    } else {
      const float rounded = value * scale.inverse + kDctMagic;
      *out++ = static_cast<std::byte>(std::bit_cast<std::uint32_t>(rounded) & 0xFF);
    }
  }
}

// Coefficients of one tile; false when no encoder writes the record.
bool read_record(const DctShape& shape, const std::byte* in, Values& coefficients) {
  std::vector<int> positions;
  for (int i = 0; i < (shape.bitmap() || shape.keep == shape.tile ? shape.tile : shape.keep); ++i) {
    if (shape.keep == shape.tile || (shape.bitmap() && get_bits(in, i, 1) != 0)) {
      positions.push_back(i);
    } else if (!shape.bitmap()) {
      const int bits = shape.index_bits();
      const auto index = static_cast<int>(get_bits(in, i * bits, bits));
      if (!positions.empty() && index <= positions.back()) return false;
      positions.push_back(index);
    }
  }
  if (positions.size() != static_cast<std::size_t>(shape.keep)) return false;
  in += shape.position_bytes();
  BF16 scale{};
  if (shape.values == DctValues::kQ8) {
    std::memcpy(&scale, in, sizeof scale);
    in += sizeof scale;
    if (scale.bits >= kDctLimitBits >> 16) return false;
  }
  coefficients.assign(static_cast<std::size_t>(shape.tile), 0.0F);
  for (const int position : positions) {
    float value = 0;
    if (shape.values == DctValues::kF32) {
      std::memcpy(&value, in, sizeof value);
      in += sizeof value;
    } else if (shape.values == DctValues::kBF16) {
      BF16 rounded{};
      std::memcpy(&rounded, in, sizeof rounded);
      value = to_float(rounded);
      in += sizeof rounded;
    } else {
      const auto code = static_cast<std::int8_t>(std::to_integer<std::uint8_t>(*in++));
      value = static_cast<float>(code) * to_float(scale);
    }
    if (shape.values != DctValues::kQ8 && magnitude(value) >= kDctLimitBits) return false;
    coefficients[static_cast<std::size_t>(position)] = value;
  }
  return true;
}

// Calls f(index in the tensor, decoded value).
template <typename F>
bool for_each_value(const std::byte* records, const DctShape& shape, std::int64_t n, F&& f) {
  return for_each_dct_run(shape, n, [&](const DctShape& run, std::int64_t begin, int tiles) {
    for (int t = 0; t < tiles; ++t) {
      Values coefficients;
      if (!read_record(run, records, coefficients)) return false;
      records += run.record_bytes();
      for (const float raw : dct_inverse_reference(coefficients)) {
        f(begin++, raw * dct_scale(run.tile));
      }
    }
    return true;
  });
}

}  // namespace

std::vector<float> dct_forward_reference(const Values& x) {
  const std::size_t n = x.size();
  if (n == 1) return x;
  Values sums(n / 2);
  Values differences(n / 2);
  for (std::size_t j = 0; j < n / 2; ++j) {
    sums[j] = x[j] + x[n - 1 - j];
    differences[j] = x[j] - x[n - 1 - j];
  }
  sums = dct_forward_reference(sums);
  differences = dct4(differences);
  Values y(n);
  for (std::size_t k = 0; k < n / 2; ++k) {
    y[2 * k] = sums[k];
    y[2 * k + 1] = differences[k];
  }
  return y;
}

std::vector<float> dct_inverse_reference(const Values& y) {
  const std::size_t n = y.size();
  if (n == 1) return y;
  Values sums(n / 2);
  Values differences(n / 2);
  for (std::size_t k = 0; k < n / 2; ++k) {
    sums[k] = y[2 * k];
    differences[k] = y[2 * k + 1];
  }
  sums = dct_inverse_reference(sums);
  differences = dct4(differences);
  Values x(n);
  for (std::size_t j = 0; j < n / 2; ++j) {
    x[j] = sums[j] + differences[j];
    x[n - 1 - j] = sums[j] - differences[j];
  }
  return x;
}

bool dct_encode_reference(const DctEncode& args) {
  const auto value = [&](const auto* grad, std::int64_t i) {
    float v = to_float(grad[i]);
    if (args.residual != nullptr) v += args.decay * args.residual[i];
    return v;
  };
  return visit(args.grad, [&](const auto* grad) {
    std::byte* out = args.records;
    return for_each_dct_run(
        args.shape, args.grad.elements, [&](const DctShape& run, std::int64_t begin, int tiles) {
          for (int t = 0; t < tiles; ++t, begin += run.tile, out += run.record_bytes()) {
            Values x(static_cast<std::size_t>(run.tile));
            for (std::int64_t i = 0; i < run.tile; ++i) {
              const float v = value(grad, begin + i);
              if (!is_finite(v)) return false;
              x[static_cast<std::size_t>(i)] =
                  std::clamp(v, -kDctClip, kDctClip) * dct_scale(run.tile);
            }
            const Values coefficients = dct_forward_reference(x);
            const std::vector<int> positions = choose(coefficients, run.keep);
            Values kept;
            for (const int p : positions) kept.push_back(coefficients[static_cast<std::size_t>(p)]);
            write_positions(run, positions, out);
            write_values(run, kept, out + run.position_bytes());
            if (args.next == nullptr) continue;
            Values sent;
            read_record(run, out, sent);
            const Values raw = dct_inverse_reference(sent);
            for (std::int64_t i = 0; i < run.tile; ++i) {
              const float decoded = raw[static_cast<std::size_t>(i)] * dct_scale(run.tile);
              args.next[begin + i] = value(grad, begin + i) - decoded;
            }
          }
          return true;
        });
  });
}

bool dct_decode_reference(const std::byte* records, const DctShape& shape, TensorView out) {
  return visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    return for_each_value(records, shape, out.elements,
                          [&](std::int64_t i, float x) { values[i] = from_float<T>(x); });
  });
}

bool dct_accumulate_reference(const std::byte* records, const DctShape& shape, float weight,
                              float* out, std::int64_t n) {
  return for_each_value(records, shape, n, [&](std::int64_t i, float x) { out[i] += weight * x; });
}

}  // namespace thinwire
