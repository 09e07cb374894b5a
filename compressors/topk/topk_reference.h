// Top-k by a full sort, one element and one bit at a time: the oracle that the tests hold the fast
// codec to, byte for byte. Allocates; thread-safe.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "compressors/topk/topk.h"

namespace thinwire {

struct TopKReference {
  std::vector<std::byte> body;
  std::vector<float> residual;  // v - decoded; empty where the memory stays unwritten
};

// `residual` may be empty: v = grad. Selection is exact whatever options.select says.
TopKReference encode_topk_reference(const TopKOptions& options, std::span<const float> grad,
                                    std::span<const float> residual, float decay);

}  // namespace thinwire
