#include "compressors/adaptive/error_curves_reference.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "compressors/quantize/quantize_scales.h"

namespace thinwire {

void block_errors_reference(const float* values, std::size_t blocks, BlockErrors* out) {
  for (; blocks > 0; --blocks, values += kErrorBlock, ++out) {
    out->largest = 0;
    for (std::int64_t i = 0; i < kErrorBlock; ++i) {
      out->largest = std::max(out->largest, std::bit_cast<std::uint32_t>(std::fabs(values[i])));
    }
    const float largest = std::bit_cast<float>(out->largest);
    if (out->largest >= kInfBits32 || largest < kQuantizeTiny) continue;
    // Sum of f(v, inverse of a step), for so many levels.
    const auto sum = [&](int levels, auto&& f) {
      const float inverse = static_cast<float>(levels) / largest;
      float lanes[kQuantizeLanes] = {};
      for (std::int64_t i = 0; i < kErrorBlock; ++i) {
        lanes[i % kQuantizeLanes] += f(values[i], inverse);
      }
      return quantize_add_lanes(lanes);
    };
    out->magnitudes = sum(1, [](float v, float inverse) { return std::fabs(v * inverse); });
    out->squares = sum(1, [](float v, float inverse) {
      const float x = v * inverse;
      return x * x;
    });
    out->bf16 = sum(1, [](float v, float inverse) {
      const float error = (v - to_float(to_bf16_saturated(v))) * inverse;
      return error * error;
    });
    for (std::size_t j = 0; j < out->rounding.size(); ++j) {
      const int levels = quantize_levels(kErrorLeastBits + static_cast<int>(j));
      out->rounding[j] = sum(levels, [](float v, float inverse) {
        const float x = v * inverse;
        const float error = x - ((x + kQuantizeMagic) - kQuantizeMagic);
        return error * error;
      });
    }
  }
}

}  // namespace thinwire
