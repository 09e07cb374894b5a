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

// One scale of `width` bits: a step and the bits of the magnitude that it stands for.
struct Step {
  std::uint64_t step;
  std::uint64_t magnitude;
};

Step step_of(int width, std::uint32_t bits, std::uint32_t low, std::uint64_t range) {
  const double offset = bits - low;
  if (width == 8) {
    const double steps_per_bit = range == 0 ? 0 : 127.0 / static_cast<double>(range);
    const auto step = static_cast<std::uint64_t>(std::floor(offset * steps_per_bit + 0.5));
    return {std::min<std::uint64_t>(step, 127),
            low + (range * std::min<std::uint64_t>(step, 127) + 63) / 127};
  }
  const std::uint64_t bins = std::uint64_t{1} << (width - 1);
  const double bins_per_bit =
      range == 0 ? 0 : static_cast<double>(bins) / static_cast<double>(range);
  const std::uint64_t bin =
      std::min(static_cast<std::uint64_t>(std::floor(offset * bins_per_bit)), bins - 1);
  const std::uint64_t begin = low + range / bins * bin;
  const float most = 1.5F * std::bit_cast<float>(static_cast<std::uint32_t>(begin));
  return {bin, std::min<std::uint64_t>(begin + range / (2 * bins), magnitude_bits(most))};
}

void put_scaled(std::vector<std::byte>& body, std::vector<float>& values, std::uint32_t low,
                int width) {
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
  Bits bits(body);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Step step = step_of(width, magnitude_bits(values[i]), low, ends[i / 256] - low);
    const bool negative = std::signbit(values[i]);
    for (int bit = 0; bit < width - 1; ++bit) bits.put((step.step >> bit & 1) != 0);
    bits.put(negative);
    const float decoded = std::bit_cast<float>(static_cast<std::uint32_t>(step.magnitude));
    values[i] = negative ? -decoded : decoded;
  }
}

void put_ternary(std::vector<std::byte>& body, std::vector<float>& values) {
  double sum = 0;
  for (const float value : values) sum += std::fabs(static_cast<double>(value));
  const auto mean = static_cast<float>(sum / static_cast<double>(values.size()));
  put_bytes(body, std::bit_cast<std::uint32_t>(mean), 4);
  Bits bits(body);
  for (float& value : values) {
    bits.put(std::signbit(value));
    value = std::signbit(value) ? -mean : mean;
  }
}

// The scales begin at the magnitude of bits `low`.
void put_values(TopKValues kind, std::uint32_t low, std::vector<std::byte>& body,
                std::vector<float>& values) {
  switch (kind) {
    case TopKValues::kF32:
      for (const float x : values) put_bytes(body, std::bit_cast<std::uint32_t>(x), 4);
      return;
    case TopKValues::kBF16:
      return put_bf16(body, values);
    case TopKValues::kQ8:
      return put_scaled(body, values, low, 8);
    case TopKValues::kQ4:
      return put_scaled(body, values, low, 4);
    case TopKValues::kQ2:
      return put_scaled(body, values, low, 2);
    case TopKValues::kTernary:
      return put_ternary(body, values);
  }
}

struct Coding {
  bool bitmap = false;
  int parameter = 0;
  std::uint64_t bits = 0;
};

std::uint64_t gap_bits(std::span<const std::uint32_t> indices, int b) {
  std::uint64_t bits = 0;
  std::uint64_t lowest = 0;
  for (const std::uint32_t index : indices) {
    const std::uint64_t gap = index - lowest;
    bits += gap >> b < 24 ? (gap >> b) + 1 + static_cast<std::uint64_t>(b) : 24 + 1 + 32;
    lowest = std::uint64_t{index} + 1;
  }
  return bits;
}

// From log2(n / m) down while the gaps do not get longer, up while they get shorter; or a bitmap.
Coding shortest_coding(std::span<const std::uint32_t> indices, std::size_t n) {
  if (indices.empty()) return {};
  int b = 0;
  while (n / indices.size() >> (b + 1) != 0) ++b;
  while (b > 0 && gap_bits(indices, b - 1) <= gap_bits(indices, b)) --b;
  while (b < 31 && gap_bits(indices, b + 1) < gap_bits(indices, b)) ++b;
  const std::uint64_t bits = gap_bits(indices, b);
  if (n <= bits) return {.bitmap = true, .parameter = 0, .bits = n};
  return {.bitmap = false, .parameter = b, .bits = bits};
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
    const std::uint64_t quotient = std::min<std::uint64_t>(gap >> parameter, 24);
    for (std::uint64_t i = 0; i < quotient; ++i) bits.put(false);
    bits.put(true);
    for (int i = 0; i < (quotient == 24 ? 32 : parameter); ++i) bits.put((gap >> i & 1) != 0);
    lowest = std::uint64_t{index} + 1;
  }
}

// By chunks of 4096: element i of one in lane i mod 16, lanes added in halves, chunks in order.
double sum_of_squares(std::span<const float> x, double sum) {
  for (std::size_t begin = 0; begin < x.size(); begin += 4096) {
    double lanes[16] = {};
    for (std::size_t i = begin; i < std::min(begin + 4096, x.size()); ++i) {
      lanes[(i - begin) % 16] += double{x[i]} * x[i];
    }
    for (std::size_t half = 8; half > 0; half /= 2) {
      for (std::size_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    }
    sum += lanes[0];
  }
  return sum;
}

// What stands in for the gradient; u becomes the new velocity.
std::vector<float> correct(const TopKMomentum& momentum, const TopKReferenceInput& input,
                           std::vector<float>& u) {
  const auto m = static_cast<float>(momentum.factor);
  float scale = 1;
  if (momentum.clip > 0) {
    const bool last = momentum.clip_norm == TopKClipNorm::kLast && input.last_norm > 0;
    const double scaled = double{input.loss_scale};
    const double norm = last ? input.last_norm * scaled : std::sqrt(sum_of_squares(input.grad, 0));
    const double most = momentum.clip * scaled / std::sqrt(static_cast<double>(input.world_size));
    if (norm > most) scale = static_cast<float>(most / norm);
  }
  std::vector<float> corrected(input.grad.begin(), input.grad.end());
  u.assign(input.velocity.begin(), input.velocity.end());
  for (std::size_t i = 0; i < u.size(); ++i) {
    const float g = scale * input.grad[i];
    if (momentum.nesterov) {
      const float sum = u[i] + g;
      u[i] = m * sum;
      corrected[i] = u[i] + g;
    } else {
      const float slowed = m * u[i];
      u[i] = slowed + g;
      corrected[i] = u[i];
    }
  }
  return corrected;
}

// The k largest of every chunk, or of the tensor.
std::vector<std::uint32_t> select_largest(const TopKOptions& options, std::span<const float> v) {
  std::vector<std::uint32_t> indices;
  const std::size_t chunk = options.chunk > 0 ? static_cast<std::size_t>(options.chunk) : v.size();
  for (std::size_t begin = 0; begin < v.size(); begin += chunk) {
    const auto part = v.subspan(begin, std::min(chunk, v.size() - begin));
    const auto size = static_cast<double>(part.size());
    const double wanted =
        options.k > 0 ? static_cast<double>(options.k) : std::round(options.density * size);
    for (const std::uint32_t i :
         select(part, static_cast<std::size_t>(std::clamp(wanted, 1.0, size)))) {
      indices.push_back(static_cast<std::uint32_t>(begin) + i);
    }
  }
  return indices;
}

constexpr std::uint32_t kSpan = 126U * (1U << 23);  // bits of a magnitude count 2^23 an octave

std::uint32_t largest(std::span<const float> v) {
  std::uint32_t most = 0;
  for (const float x : v) most = std::max(most, magnitude_bits(x));
  return most;
}

// Those that pass the carried threshold, where they are 0.8 k to k; low: what the scales begin at.
std::vector<std::uint32_t> select_any(const TopKOptions& options, std::span<const float> v,
                                      std::uint32_t threshold, std::uint32_t& low) {
  std::vector<std::uint32_t> indices = select_largest(options, v);
  const std::uint32_t most = largest(v);
  if (options.select == TopKSelect::kCarried && threshold > 0) {
    // indices are the k largest: fewer only where the rest is zero.
    const auto n = static_cast<double>(v.size());
    const double wanted =
        options.k > 0 ? static_cast<double>(options.k) : std::round(options.density * n);
    const auto k = static_cast<std::size_t>(std::clamp(wanted, 1.0, n));
    std::vector<std::uint32_t> passing;
    for (std::uint32_t i = 0; i < v.size(); ++i) {
      if (magnitude_bits(v[i]) >= threshold) passing.push_back(i);
    }
    if (passing.size() <= k &&
        static_cast<double>(passing.size()) >= 0.8 * static_cast<double>(k)) {
      indices = passing;
      if (options.values != TopKValues::kQ8 || most <= threshold + kSpan) low = threshold;
    }
  }
  if (options.values == TopKValues::kQ8 && low == 0) {
    std::erase_if(indices, [&](std::uint32_t i) { return most - magnitude_bits(v[i]) > kSpan; });
  }
  return indices;
}

}  // namespace

TopKReference encode_topk_reference(const TopKOptions& options, const TopKReferenceInput& input) {
  const std::size_t n = input.grad.size();
  TopKReference result;
  std::vector<float> v(input.grad.begin(), input.grad.end());
  if (options.momentum) v = correct(*options.momentum, input, result.velocity);
  for (std::size_t i = 0; i < input.residual.size(); ++i) {
    const float kept = input.decay * input.residual[i];
    v[i] += kept;
  }
  const auto one_byte = [](BodyMode mode) {
    TopKReference mark;
    mark.body = {static_cast<std::byte>(mode)};
    return mark;
  };
  if (!std::all_of(v.begin(), v.end(), [](float x) { return std::isfinite(x); })) {
    return one_byte(BodyMode::kNonFinite);
  }
  if (std::all_of(input.grad.begin(), input.grad.end(), [](float x) { return x == 0.0F; })) {
    return one_byte(BodyMode::kEmpty);
  }
  const std::size_t chunk = options.chunk > 0 ? static_cast<std::size_t>(options.chunk) : n;
  double squares = 0;
  for (std::size_t begin = 0; begin < n; begin += chunk) {
    squares = sum_of_squares(input.grad.subspan(begin, std::min(chunk, n - begin)), squares);
  }
  result.norm = static_cast<float>(std::min(std::sqrt(squares) / double{input.loss_scale},
                                            double{std::numeric_limits<float>::max()}));

  std::uint32_t low = 0;
  std::vector<std::uint32_t> indices = select_any(options, v, input.threshold, low);
  const auto kind = static_cast<unsigned>(options.values);
  std::vector<float> values;
  Coding coding;
  // The smallest entries go until the rest fits into the slot.
  const std::size_t slot = make_topk_codec(options)->slot_bytes(static_cast<std::int64_t>(n));
  for (;;) {
    values.clear();
    for (const std::uint32_t i : indices) values.push_back(v[i]);
    coding = shortest_coding(indices, n);
    std::vector<std::byte> section;
    std::uint32_t begin = low;
    if (begin == 0) {
      begin = std::numeric_limits<std::uint32_t>::max();
      for (const float value : values) begin = std::min(begin, magnitude_bits(value));
    }
    if (!values.empty()) put_values(options.values, begin, section, values);
    const std::uint64_t room = 8 * (slot - 6 - section.size());
    if ((coding.bits + 7) / 8 * 8 <= room) {
      put_bytes(result.body, 16 + kind / 3, 1);
      put_bytes(
          result.body,
          static_cast<unsigned>(coding.parameter) + (coding.bitmap ? 32 : 0) + 64 * (kind % 3), 1);
      put_bytes(result.body, indices.size(), 4);
      result.body.insert(result.body.end(), section.begin(), section.end());
      break;
    }
    low = 0;
    const auto saved = static_cast<std::uint64_t>(std::max(coding.parameter, 1));
    const std::uint64_t dropped = (coding.bits - room + saved - 1) / saved;
    std::vector<float> sent(n);
    for (const std::uint32_t i : indices) sent[i] = v[i];
    indices = select(sent, indices.size() - std::min<std::size_t>(indices.size(), dropped));
  }
  if (!values.empty()) put_indices(result.body, indices, n, coding.bitmap, coding.parameter);
  result.residual = v;
  for (std::size_t i = 0; i < indices.size(); ++i) {
    result.residual[indices[i]] -= values[i];
    if (options.momentum) result.velocity[indices[i]] = 0;
  }
  return result;
}

}  // namespace thinwire
