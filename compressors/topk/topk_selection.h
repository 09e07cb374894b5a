// Internal: the front half of every codec that sends the entries of largest magnitude, of a tensor
// or of several as one: checks, v to the memories, the entries in index order. Thread-safe on
// disjoint memory; nothing is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
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
  // The largest of every so many elements of a single tensor, the last ones perhaps fewer; 0: of
  // all.
  std::int64_t chunk = 0;
  std::int64_t keep_in_chunk = 0;
  std::int64_t keep_in_last = 0;
};

// What a choice of `keep` entries by a threshold is content with: 0.8 keep.
inline constexpr double kLeastShare = 0.8;
std::size_t enough_entries(std::size_t keep);

struct Selection {
  BodyMode mode = BodyMode::kFamily;  // or the mark to send: then no memory is written
  std::int64_t elements = 0;          // of all tensors
  Candidates entries = {};            // in the workspace, ascending by index, none is zero
  // In the workspace, one a tensor; `next` is memory.next(), which holds v, or
  // opened.next is memory.opened_next(), which holds v rounded. Of no elements where
  // the gradient of one of several is all zero.
  std::span<Scan> parts = {};
  ScanSummary summary = {};

  // Of a single tensor.
  Scan& whole() const { return parts.front(); }
};

// Bytes that a selection from so many tensors of n elements in all takes from the workspace.
std::size_t selection_bytes(std::int64_t n, std::int64_t keep, std::size_t tensors = 1);

// The largest magnitudes of v, ties to the lowest index; v goes to the memories.
Selection select_largest(const Context& ctx, std::span<const JointCodec::Part> tensors,
                         const Choice& choice, Workspace& workspace);

// The same in steps. Before the pass: marks that can be told already, and the scans to be done. The
// velocity of `momentum`, which goes with a single tensor, is the memory's; null: no momentum
// correction.
Selection prepare(std::span<const JointCodec::Part> tensors, const Momentum* momentum,
                  std::int64_t keep, Workspace& workspace);
// The pass.
void select(const Context& ctx, const Choice& choice, Selection& selection);
// A pass over what the first has stored of a single tensor, or rounded: as with choice.sampled, and
// nothing is stored again.
void select_again(const Context& ctx, Selection& selection);
// After the pass: sets the mode; with a mark the memories roll back.
void settle(std::span<const JointCodec::Part> tensors, Selection& selection);
// Writes values[i] to the place of entry i in its memory, if there is one; rounded where that is
// open.
void scatter_to_memories(const Selection& selection, std::span<const float> values);

}  // namespace thinwire::topk
