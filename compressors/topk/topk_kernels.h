// Internal: one pass over gradient and residual that updates the memory and collects the entries
// of large magnitude. Magnitudes are compared as the bits of |v| (an order on all floats, denormals
// included), so every target selects alike. Thread-safe on disjoint memory; nothing is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/convert.h"
#include "compressors/core/random.h"
#include "compressors/core/tensor_view.h"

namespace thinwire::topk {

// Elements that are scanned between two looks at the room left among the candidates: four pages of
// fp32, which stay in the L1 cache until the candidates among them are taken.
inline constexpr std::size_t kChunkElements = 4096;

inline constexpr std::uint32_t kMagnitudeMask = 0x7FFFFFFF;
inline constexpr std::uint32_t kInfinityBits = 0x7F800000;

// Entries with |v| >= the threshold seen so far, in index order.
struct Candidates {
  std::uint32_t* index = nullptr;  // capacity of each
  float* value = nullptr;
  std::size_t count = 0;
  std::size_t capacity = 0;  // at least keep + kChunkElements
  std::size_t keep = 0;      // when there is no room for another chunk: cut to the `keep` largest
  std::uint32_t threshold = 1;  // bits of the least |v| to take; 1: all but zeros. Raised by cuts.
  bool was_cut = false;
};

// Keeps the `keep` largest of the candidates, ties to the lowest index, order kept, and raises the
// threshold to what may still enter: only more than the least kept. Needs count >= keep > 0.
void keep_largest(Candidates& candidates);

// Keeps the candidates with magnitude bits above `least` and the first `ties` that equal it, order
// kept.
void compact(Candidates& candidates, std::uint32_t least, std::size_t ties);

// How many candidates' magnitude bits are at least `least`.
std::size_t count_from(const Candidates& candidates, std::uint32_t least);

// Bits of `share`, in (0, 1], of the least magnitude among the candidates; 1 where there is none.
std::uint32_t part_of_least(const Candidates& candidates, float share);

// Drops candidates with magnitude bits below `least`, order kept.
void drop_below(Candidates& candidates, std::uint32_t least);

// Momentum correction (Lin et al. 2018, section 3.1): u = factor * velocity + scale * grad stands
// in for the gradient; with nesterov u = factor * (velocity + scale * grad), and u + scale * grad
// does. Every product and every sum is rounded.
struct Momentum {
  const float* velocity = nullptr;  // null: the gradient is taken as it is
  float* next = nullptr;  // null: u is not stored; may be `velocity`, 64-byte aligned else
  float factor = 0;
  float scale = 1;
  bool nesterov = false;
  bool streaming = false;  // stores to `next` go around the caches
};

// A residual that is stored as bf16 (Memory::open), of a scan.
struct OpenedResidual {
  const BF16* current = nullptr;  // null: there is none
  BF16* next = nullptr;  // null: v is not stored; another memory than `current`, 64-byte aligned
  Dither dither = {};
  std::uint32_t element = 0;  // the first one's number in the residual, a multiple of 32
};

struct Scan {
  const void* grad = nullptr;
  DType dtype = DType::kF32;        // fp32, bf16, fp16
  const float* residual = nullptr;  // null: v = grad
  float decay = 1.0F;
  float* next = nullptr;       // null: v is not stored; may be `residual`, 64-byte aligned else
  OpenedResidual opened = {};  // instead of `residual` and `next`
  bool streaming = false;      // stores of v go around the caches, of bf16 on vectors of 16 lanes
  std::int64_t count = 0;      // elements
  std::uint32_t first = 0;     // index of the first one
  Momentum momentum = {};
  // What the squares of `grad`, a chunk's sum after the other, are added to; null: they are not.
  // Only with momentum.
  double* squares = nullptr;
};

// From element `begin` on.
OpenedResidual part_of(OpenedResidual opened, std::size_t begin);
// Elements [begin, end) of a scan.
Scan part_of(const Scan& scan, std::int64_t begin, std::int64_t end);

struct ScanSummary {
  std::uint32_t magnitude = 0;  // bits of the largest |v|; >= kInfinityBits: NaN or Inf
  bool gradient_nonzero = false;

  void add(const ScanSummary& part) {
    magnitude = magnitude < part.magnitude ? part.magnitude : magnitude;
    gradient_nonzero = gradient_nonzero || part.gradient_nonzero;
  }
};

// v = grad + decay * residual (the product rounded, then the sum), v to `next` or, each element
// rounded by its dither, to opened.next; candidates, not rounded, appended.
ScanSummary scan(const Scan& args, Candidates& candidates);

// Writes values[i] to next[indices[first + i] - args.first] for all entries from `first` on, those
// before it being written; ascending indices that `args` has scanned, with no residual that is
// open. Where it streams, whole cache lines are written, the rest of them computed again.
void patch(const Scan& args, std::span<const std::uint32_t> indices, std::size_t first,
           const float* values);

// The sum of the squares of `grad` in fp64, by chunks of kChunkElements: element i of one in lane i
// mod 16, lanes added in halves, chunks in order. The same on every target.
double sum_of_squares(const void* grad, DType dtype, std::int64_t count);

// Copies `range` to `to` and leaves zeros in it. streaming: whole cache lines of `to` are written
// around the caches; hwy::FlushStream() must follow the last one.
void move_out(std::span<float> range, float* to, bool streaming);

}  // namespace thinwire::topk
