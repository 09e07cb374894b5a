#include "compressors/onebit/onebit_reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "compressors/core/codec_support.h"

namespace thinwire {
namespace {

// [begin, end) in elements.
struct Run {
  std::int64_t begin;
  std::int64_t end;
};

std::vector<float> read_values(const OneBitEncode& args) {
  std::vector<float> values(static_cast<std::size_t>(args.grad.elements));
  visit(args.grad, [&](const auto* grad) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = to_float(grad[i]);
      if (args.residual != nullptr) values[i] += args.decay * args.residual[i];
    }
  });
  return values;
}

// Longest runs of zeros in [begin, end) that contain eight whole bytes of sign bits.
std::vector<Run> find_runs(const std::vector<float>& values, std::int64_t begin, std::int64_t end) {
  std::vector<Run> runs;
  const auto from = values.begin();
  for (std::int64_t i = begin; i < end; ++i) {
    const auto stop = std::find_if(from + i, from + end, [](float v) { return v != 0; });
    const std::int64_t run_end = stop - from;
    if (run_end / 8 - (i + 7) / 8 >= 8) runs.push_back({i, run_end});
    i = std::max(i, run_end);
  }
  return runs;
}

std::vector<bool> find_masked(const std::vector<Run>& runs, std::int64_t n) {
  std::vector<bool> masked(static_cast<std::size_t>(n));
  for (const Run& run : runs) {
    for (std::int64_t i = run.begin; i < run.end; ++i) masked[static_cast<std::size_t>(i)] = true;
  }
  return masked;
}

float scale_of(OneBitScale kind, const std::vector<float>& values, const std::vector<bool>& masked,
               std::int64_t begin, std::int64_t end) {
  double lanes[kOneBitLanes] = {};
  std::int64_t sent = 0;
  for (std::int64_t i = begin; i < end; ++i) {
    const auto v = static_cast<double>(values[static_cast<std::size_t>(i)]);
    lanes[(i - begin) % kOneBitLanes] += kind == OneBitScale::kL2 ? v * v : std::fabs(v);
    sent += masked[static_cast<std::size_t>(i)] ? 0 : 1;
  }
  return onebit_scale(kind, onebit_total(lanes), sent);
}

void write_links(const std::vector<Run>& runs, std::int64_t n, std::byte* first, std::byte* signs) {
  const auto put = [](std::int64_t number, std::byte* to) {
    const auto word = static_cast<std::uint32_t>(number);
    std::memcpy(to, &word, sizeof(word));
  };
  put(runs.empty() ? n : runs.front().begin, first);
  for (std::size_t r = 0; r < runs.size(); ++r) {
    std::byte* link = signs + (runs[r].begin + 7) / 8;
    put(runs[r].end - runs[r].begin, link);
    put((r + 1 < runs.size() ? runs[r + 1].begin : n) - runs[r].end, link + 4);
  }
}

// Calls f(index in the tensor, decoded value).
template <typename F>
void for_each_value(const OneBitBody& body, std::int64_t block, std::int64_t n, F&& f) {
  const auto get = [](const std::byte* from) {
    std::uint32_t word = 0;
    std::memcpy(&word, from, sizeof(word));
    return static_cast<std::int64_t>(word);
  };
  std::vector<Run> runs;
  for (std::int64_t begin = body.first_run; begin < n;) {
    const std::byte* link = body.signs + (begin + 7) / 8;
    runs.push_back({begin, begin + get(link)});
    begin = runs.back().end + get(link + 4);
  }
  const std::vector<bool> masked = find_masked(runs, n);
  for (std::int64_t i = 0; i < n; ++i) {
    float scale = 0;
    std::memcpy(&scale, body.scales + kOneBitScaleBytes * (i / onebit_block(block, n)), 4);
    const bool negative = (std::to_integer<unsigned>(body.signs[i / 8]) >> i % 8 & 1) != 0;
    f(i, masked[static_cast<std::size_t>(i)] ? 0.0F : negative ? -scale : scale);
  }
}

}  // namespace

bool onebit_encode_reference(const OneBitEncode& args) {
  const std::vector<float> values = read_values(args);
  if (!std::all_of(values.begin(), values.end(), is_finite)) return false;
  const std::int64_t n = args.grad.elements;
  const std::int64_t block = onebit_block(args.block, n);
  std::byte* scales = args.body + kOneBitFirstBytes;
  std::byte* signs = scales + kOneBitScaleBytes * onebit_scales(args.block, n);
  std::vector<Run> runs;
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const auto of_block = find_runs(values, begin, std::min(begin + block, n));
    runs.insert(runs.end(), of_block.begin(), of_block.end());
  }
  const std::vector<bool> masked = find_masked(runs, n);
  std::fill_n(signs, (n + 7) / 8, std::byte{0});
  for (std::int64_t begin = 0; begin < n; begin += block) {
    const std::int64_t end = std::min(begin + block, n);
    const float scale = scale_of(args.scale, values, masked, begin, end);
    std::memcpy(scales + kOneBitScaleBytes * (begin / block), &scale, sizeof(scale));
    for (std::int64_t i = begin; i < end; ++i) {
      const float v = values[static_cast<std::size_t>(i)];
      if (v < 0) signs[i / 8] |= static_cast<std::byte>(1U << i % 8);
      if (args.next == nullptr) continue;
      const float sent = v < 0 ? -scale : scale;
      args.next[i] = masked[static_cast<std::size_t>(i)] ? 0.0F : v - sent;
    }
  }
  write_links(runs, n, args.body, signs);
  return true;
}

void onebit_decode_reference(const OneBitBody& body, std::int64_t block, TensorView out) {
  visit(out, [&](auto* values) {
    using T = std::remove_pointer_t<decltype(values)>;
    for_each_value(body, block, out.elements,
                   [&](std::int64_t i, float x) { values[i] = from_float<T>(x); });
  });
}

void onebit_accumulate_reference(const OneBitBody& body, std::int64_t block, float weight,
                                 std::span<float> out) {
  for_each_value(body, block, static_cast<std::int64_t>(out.size()),
                 [&](std::int64_t i, float x) { out[static_cast<std::size_t>(i)] += weight * x; });
}

}  // namespace thinwire
