// Top-k by a full sort, one element and one bit at a time: the oracle that the tests hold the fast
// codec to, byte for byte. Allocates; thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "compressors/topk/topk.h"

namespace thinwire {

// What a step starts from.
struct TopKReferenceInput {
  std::span<const float> grad;
  std::span<const float> residual = {};  // may be empty: v = grad
  float decay = 1.0F;
  std::span<const float> velocity = {};  // with momentum correction
  std::uint32_t threshold = 0;           // bits of the carried one; 0: none
  float last_norm = 0;                   // of the last step's gradient, unscaled; 0: none
  float loss_scale = 1;
  int world_size = 1;
};

struct TopKReference {
  std::vector<std::byte> body;
  std::vector<float> residual;  // v - decoded; empty where the memory stays unwritten
  std::vector<float> velocity;  // the same with momentum correction
  float norm = 0;               // of the gradient
};

// Selection is exact where options.select says sampled, or carried and the threshold does not hold.
TopKReference encode_topk_reference(const TopKOptions& options, const TopKReferenceInput& input);

inline TopKReference encode_topk_reference(const TopKOptions& options, std::span<const float> grad,
                                           std::span<const float> residual, float decay) {
  return encode_topk_reference(options, {.grad = grad, .residual = residual, .decay = decay});
}

}  // namespace thinwire
