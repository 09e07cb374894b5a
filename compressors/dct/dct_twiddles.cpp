#include <algorithm>
#include <array>
#include <numbers>

#include "compressors/core/convert.h"
#include "compressors/dct/dct_angles.h"
#include "compressors/dct/dct_kernels.h"

namespace thinwire {
namespace {

constexpr std::size_t kPairs = kMaxDctTile / 2 - 1;

struct Table {
  std::array<float, kPairs> cos{};
  std::array<float, kPairs> sin{};
};

constexpr Table make_table() {
  Table table;
  std::size_t at = 0;
  for (int n = 2; n <= kMaxDctTile / 2; n *= 2) {
    for (int j = 0; j < n / 2; ++j) {
      const double angle = (2 * j + 1) * std::numbers::pi / (4 * n);
      table.cos[at] = static_cast<float>(dct_cosine(angle));
      table.sin[at] = static_cast<float>(dct_sine(angle));
      ++at;
    }
  }
  return table;
}

constexpr Table kTable = make_table();

}  // namespace

DctTwiddles dct_twiddles(int n) {
  const std::size_t first = static_cast<std::size_t>(n) / 2 - 1;
  return {kTable.cos.data() + first, kTable.sin.data() + first};
}

DctScale dct_q8_scale(std::uint32_t largest) {
  const auto magnitude = std::bit_cast<float>(largest);
  if (magnitude < 0x1p-100F) return {};
  const BF16 rounded = to_bf16(magnitude / 127);
  const float scale = to_float(rounded);
  return {rounded.bits, scale, 1 / scale};
}

std::int64_t dct_bytes(const DctShape& shape, std::int64_t n) {
  const std::int64_t tiles = n / shape.tile;
  std::int64_t bytes = tiles * shape.record_bytes();
  for_each_dct_run(shape, n - tiles * shape.tile, [&](const DctShape& run, std::int64_t, int) {
    bytes += run.record_bytes();
    return true;
  });
  return bytes;
}

std::size_t dct_scratch_floats(const DctShape& shape, std::int64_t n) {
  const auto tile = std::min(static_cast<std::uint64_t>(shape.tile),
                             std::bit_floor(static_cast<std::uint64_t>(n)));
  return 3 * kDctTogether * static_cast<std::size_t>(tile);
}

}  // namespace thinwire
