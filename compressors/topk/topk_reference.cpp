#include "compressors/topk/topk_reference.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

namespace thinwire {
namespace {

std::uint32_t magnitude_bits(float value) { return std::bit_cast<std::uint32_t>(std::fabs(value)); }

// Appends bits to bytes, the first one lowest.
class Bits {
 public:
  explicit Bits(std::vector<std::byte>& bytes) : bytes_(bytes) {}
  void put(bool bit) {
    if (used_ % 8 == 0) bytes_.push_back(std::byte{0});
    if (bit) bytes_.back() |= static_cast<std::byte>(1U << (used_ % 8));
    ++used_;
  }

 private:
  std::vector<std::byte>& bytes_;
  std::size_t used_ = 0;
};

void put_bytes(std::vector<std::byte>& bytes, std::uint64_t value, int count) {
  for (int i = 0; i < count; ++i) bytes.push_back(static_cast<std::byte>(value >> (8 * i)));
}

std::vector<std::uint32_t> select(std::span<const float> v, std::size_t k) {
  std::vector<std::uint32_t> order(v.size());
  std::iota(order.begin(), order.end(), 0U);
  std::stable_sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return std::fabs(v[a]) > std::fabs(v[b]);
  });
  order.resize(std::min(k, order.size()));
  std::erase_if(order, [&](std::uint32_t i) { return v[i] == 0.0F; });
  std::sort(order.begin(), order.end());
  return order;
}

void put_bf16(std::vector<std::byte>& body, std::vector<float>& values) {
  for (float& value : values) {
    // The two neighbours that keep 8 significant bits, the nearer one, the even one at a tie.
    const std::uint32_t down = std::bit_cast<std::uint32_t>(value) & 0xFFFF0000;
    std::uint32_t chosen = down;
    const std::uint32_t rest = std::bit_cast<std::uint32_t>(value) & 0xFFFF;
    if (rest > 0x8000 || (rest == 0x8000 && (down & 0x10000) != 0)) chosen = down + 0x10000;
    if (!std::isfinite(std::bit_cast<float>(chosen))) chosen = down;
    put_bytes(body, chosen >> 16, 2);
    value = std::bit_cast<float>(chosen);
  }
}

void put_q8(std::vector<std::byte>& body, std::vector<float>& values) {
  std::uint32_t low = std::numeric_limits<std::uint32_t>::max();
  for (const float value : values) low = std::min(low, magnitude_bits(value));
  put_bytes(body, low, 4);
  std::vector<std::uint32_t> ends;
  for (std::size_t first = 0; first < values.size(); first += 256) {
    std::uint32_t most = 0;
    for (std::size_t i = first; i < std::min(first + 256, values.size()); ++i) {
      most = std::max(most, magnitude_bits(values[i]));
    }
    const std::uint32_t end = std::min((most + 0xFFFF) / 0x10000, 0x7F7FU);
    put_bytes(body, end, 2);
    ends.push_back(std::max(end * 0x10000, low));
  }
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint64_t range = ends[i / 256] - low;
    std::uint64_t step = 0;
    if (range > 0) {
      const double steps_per_bit = 127.0 / static_cast<double>(range);
      step = static_cast<std::uint64_t>(
          std::floor(static_cast<double>(magnitude_bits(values[i]) - low) * steps_per_bit + 0.5));
      step = std::min<std::uint64_t>(step, 127);
    }
    const bool negative = std::signbit(values[i]);
    put_bytes(body, (negative ? 128 : 0) + step, 1);
    const float decoded =
        std::bit_cast<float>(static_cast<std::uint32_t>(low + (range * step + 63) / 127));
    values[i] = negative ? -decoded : decoded;
  }
}

void put_indices(std::vector<std::byte>& body, std::span<const std::uint32_t> indices,
                 std::size_t n, bool bitmap, int parameter) {
  Bits bits(body);
  if (bitmap) {
    for (std::uint32_t i = 0; i < n; ++i) {
      bits.put(std::binary_search(indices.begin(), indices.end(), i));
    }
    return;
  }
  std::uint64_t lowest = 0;
  for (const std::uint32_t index : indices) {
    const std::uint64_t gap = index - lowest;
    for (std::uint64_t i = 0; i < gap >> parameter; ++i) bits.put(false);
    bits.put(true);
    for (int i = 0; i < parameter; ++i) bits.put((gap >> i & 1) != 0);
    lowest = std::uint64_t{index} + 1;
  }
}

}  // namespace

TopKReference encode_topk_reference(const TopKOptions& options, std::span<const float> grad,
                                    std::span<const float> residual, float decay) {
  const std::size_t n = grad.size();
  std::vector<float> v(grad.begin(), grad.end());
  for (std::size_t i = 0; i < residual.size(); ++i) {
    const float kept = decay * residual[i];
    v[i] += kept;
  }
  const auto one_byte = [](BodyMode mode) {
    return TopKReference{.body = {static_cast<std::byte>(mode)}, .residual = {}};
  };
  if (!std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); })) {
    return one_byte(BodyMode::kNonFinite);
  }
  if (std::all_of(grad.begin(), grad.end(), [](float x) { return x == 0.0F; })) {
    return one_byte(BodyMode::kEmpty);
  }
  const double wanted = options.k > 0 ? static_cast<double>(options.k)
                                      : std::round(options.density * static_cast<double>(n));
  const auto k = static_cast<std::size_t>(std::clamp(wanted, 1.0, static_cast<double>(n)));
  std::vector<std::uint32_t> indices = select(v, k);
  if (options.values == TopKValues::kQ8) {
    std::uint32_t most = 0;
    for (const float x : v) most = std::max(most, magnitude_bits(x));
    // Bits of a magnitude count 2^23 an octave.
    std::erase_if(indices,
                  [&](std::uint32_t i) { return most - magnitude_bits(v[i]) > 126U * (1U << 23); });
  }

  // The smallest worst case: a bitmap, or the first of the best gap parameters.
  bool bitmap = !indices.empty();
  int parameter = 0;
  std::uint64_t best = n;
  for (int b = 0; b < 32 && !indices.empty(); ++b) {
    const std::uint64_t bits =
        indices.size() * static_cast<std::uint64_t>(b + 1) + ((n - indices.size()) >> b);
    if (bits < best) {
      best = bits;
      bitmap = false;
      parameter = b;
    }
  }
  TopKReference result;
  const auto values_mode = static_cast<unsigned>(options.values);
  put_bytes(result.body, 16, 1);
  put_bytes(result.body, static_cast<unsigned>(parameter) + (bitmap ? 32 : 0) + 64 * values_mode,
            1);
  put_bytes(result.body, indices.size(), 4);
  std::vector<float> values;
  for (const std::uint32_t i : indices) values.push_back(v[i]);
  if (!values.empty()) {
    if (options.values == TopKValues::kF32) {
      for (const float x : values) put_bytes(result.body, std::bit_cast<std::uint32_t>(x), 4);
    } else if (options.values == TopKValues::kBF16) {
      put_bf16(result.body, values);
    } else {
      put_q8(result.body, values);
    }
    put_indices(result.body, indices, n, bitmap, parameter);
  }
  result.residual = v;
  for (std::size_t i = 0; i < indices.size(); ++i) result.residual[indices[i]] -= values[i];
  return result;
}

}  // namespace thinwire
