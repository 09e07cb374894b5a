// Internal: the front half of every codec that sends the entries of largest magnitude: checks, v to
// the memory, the entries in index order. Thread-safe on disjoint memory; nothing is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "compressors/core/codec.h"
#include "compressors/core/workspace.h"
#include "compressors/topk/topk_kernels.h"

namespace thinwire::topk {

// InvalidArgument, naming the family, unless n is in [0, 2^32).
void check_size(std::string_view family, std::int64_t n);

// `wanted` rounded, in [1, n]; 0 for n = 0. Checks the size.
std::int64_t keep_count(std::string_view family, std::int64_t n, double wanted);

// InvalidArgument, naming the family, for other dtypes than fp32, bf16 and fp16.
void check_dtype(const Context& ctx, std::string_view family, DType dtype);

// How many entries of v = grad + decay * residual, and from where.
struct Choice {
  std::int64_t keep = 0;  // in all
  // All that pass an estimated threshold, between 0.8 keep and keep of them; not in chunks.
  bool sampled = false;
  // The largest of every so many elements, the last ones perhaps fewer; 0: of the tensor.
  std::int64_t chunk = 0;
  std::int64_t keep_in_chunk = 0;
  std::int64_t keep_in_last = 0;
};

struct Selection {
  BodyMode mode = BodyMode::kFamily;  // or the mark to send: then the memory is unwritten
  Candidates entries = {};            // in the workspace, ascending by index, none is zero
  std::uint32_t magnitude = 0;        // bits of the largest |v|
  float* next = nullptr;              // memory.next(), which holds v; null without a memory
};

// Bytes that select_largest takes from the workspace.
std::size_t selection_bytes(std::int64_t n, std::int64_t keep);

// The largest magnitudes of v, ties to the lowest index; v goes to the memory.
Selection select_largest(const Context& ctx, TensorView grad, Memory* memory, const Choice& choice,
                         Workspace& workspace);

}  // namespace thinwire::topk
