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

// What a choice of `keep` entries by a threshold is content with: 0.8 keep.
inline constexpr double kLeastShare = 0.8;
std::size_t enough_entries(std::size_t keep);

struct Selection {
  BodyMode mode = BodyMode::kFamily;  // or the mark to send: then the memory is unwritten
  Candidates entries = {};            // in the workspace, ascending by index, none is zero
  Scan scan = {};                     // of the tensor; `next` is memory.next(), which holds v
  ScanSummary summary = {};
};

// Bytes that a selection takes from the workspace.
std::size_t selection_bytes(std::int64_t n, std::int64_t keep);

// The largest magnitudes of v, ties to the lowest index; v goes to the memory.
Selection select_largest(const Context& ctx, TensorView grad, Memory* memory, const Choice& choice,
                         Workspace& workspace);

// The same in steps. Before the pass: marks that can be told already, and the scan to be done. The
// velocity of `momentum` is the memory's; null: no momentum correction.
Selection prepare(TensorView grad, Memory* memory, const Momentum* momentum, std::int64_t keep,
                  Workspace& workspace);
// The pass.
void select(const Context& ctx, const Choice& choice, Selection& selection);
// A pass over what is stored by now: as with choice.sampled, and nothing is stored again.
void select_again(const Context& ctx, Selection& selection);
// After the pass: sets the mode; with a mark the memory rolls back.
void settle(Memory* memory, Selection& selection);

}  // namespace thinwire::topk
