#include "compressors/topk/topk_selection.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/random.h"
#include "compressors/topk/topk_sample.h"

namespace thinwire::topk {
namespace {

constexpr std::int64_t kMaxElements = (std::int64_t{1} << 32) - 1;
// Of the least magnitude kept in a chunk: as many again are above it where values are normal, so
// that the next chunk seldom has fewer than it keeps.
constexpr float kNextGuess = 0.9F;

// Candidates: about 1.4 keep pass the estimated threshold, so that 2 keep are seldom exceeded.
std::size_t candidate_capacity(std::int64_t n, std::int64_t keep) {
  const auto room = static_cast<std::size_t>(2 * keep) + 2 * kChunkElements;
  return std::min(room, static_cast<std::size_t>(n) + kChunkElements);
}

std::size_t array_size(std::int64_t n, std::int64_t keep) {
  return std::max(candidate_capacity(n, keep), sample_capacity(n, keep));
}

// The scan of what an earlier one has stored or would have.
Scan stored(const Scan& first) {
  if (first.next == nullptr) return first;
  return {.grad = first.next, .count = first.count, .first = first.first};
}

// For all but zeros, of what an earlier scan has stored or would have.
void scan_again(const Scan& first, Candidates& c) {
  c.count = 0;
  c.threshold = 1;
  scan(stored(first), c);
}

// One pass, and a second over what is stored by now if the sample misled.
ScanSummary select_together(const Context& ctx, const Scan& first, bool sampled, Candidates& c) {
  const auto enough = sampled ? enough_entries(c.keep) : c.keep;
  c.threshold = estimate_threshold(first, c, sampled ? 1.0 : 3.0,
                                   random_stream(ctx.key_hash, ctx.step, ctx.sender));
  const ScanSummary summary = scan(first, c);
  const bool finite = summary.magnitude < kInfinityBits;
  if (finite && c.count < enough && !c.was_cut && c.threshold > 1) scan_again(first, c);
  if (finite && c.count > c.keep) keep_largest(c);
  return summary;
}

// The mark that `scan` would lead to, or kFamily; nothing is stored.
BodyMode look_ahead_of(const Scan& first) {
  Candidates none{.capacity = static_cast<std::size_t>(first.count) + kChunkElements,
                  .threshold = kMagnitudeMask + 1};
  Scan looking = first;
  looking.next = nullptr;
  looking.momentum.next = nullptr;
  looking.squares = nullptr;
  const ScanSummary summary = scan(looking, none);
  if (summary.magnitude >= kInfinityBits) return BodyMode::kNonFinite;
  return summary.gradient_nonzero ? BodyMode::kFamily : BodyMode::kEmpty;
}

// A chunk's threshold is guessed from the chunk before.
ScanSummary select_by_chunk(const Scan& whole, const Choice& choice, Candidates& c) {
  ScanSummary summary;
  std::uint32_t guess = 1;
  for (std::int64_t begin = 0; begin < whole.count; begin += choice.chunk) {
    const Scan part = part_of(whole, begin, std::min(begin + choice.chunk, whole.count));
    const std::int64_t keep =
        part.count == choice.chunk ? choice.keep_in_chunk : choice.keep_in_last;
    Candidates of_chunk{.index = c.index + c.count,
                        .value = c.value + c.count,
                        .capacity = c.capacity - c.count,
                        .keep = static_cast<std::size_t>(keep),
                        .threshold = guess};
    const ScanSummary found = scan(part, of_chunk);
    summary.add(found);
    if (found.magnitude >= kInfinityBits) return summary;
    if (of_chunk.count < of_chunk.keep && guess > 1) scan_again(part, of_chunk);
    if (of_chunk.count > of_chunk.keep) keep_largest(of_chunk);
    guess = part_of_least(of_chunk, kNextGuess);
    c.count += of_chunk.count;
  }
  return summary;
}

}  // namespace

void check_size(std::string_view family, std::int64_t n) {
  if (n < 0 || n > kMaxElements) {
    throw InvalidArgument(std::string(family) + ": a tensor of " + std::to_string(n) +
                          " elements, expected at most " + std::to_string(kMaxElements) +
                          "\nhint: encode ranges of the tensor one by one");
  }
}

std::int64_t keep_count(std::string_view family, std::int64_t n, double wanted) {
  check_size(family, n);
  if (n == 0) return 0;
  return std::clamp<std::int64_t>(std::llround(wanted), 1, n);
}

void check_dtype(const Context& ctx, std::string_view family, DType dtype) {
  if (dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16) return;
  fail_argument(ctx, std::string(family) + " of a tensor of dtype " + std::string(name(dtype)) +
                         ", expected fp32, bf16 or fp16\nhint: send this tensor with codec none");
}

std::size_t selection_bytes(std::int64_t n, std::int64_t keep) {
  const std::size_t size = array_size(n, keep);
  return Workspace::bytes_for<std::uint32_t>(size) + Workspace::bytes_for<float>(size);
}

std::size_t enough_entries(std::size_t keep) {
  return static_cast<std::size_t>(std::ceil(kLeastShare * static_cast<double>(keep)));
}

Selection prepare(TensorView grad, Memory* memory, const Momentum* momentum, std::int64_t keep,
                  Workspace& workspace) {
  const std::int64_t n = grad.elements;
  if (n == 0) return {.mode = BodyMode::kEmpty};
  Selection selection{.scan = {.grad = grad.data, .dtype = grad.dtype, .count = n}};
  Scan& scan = selection.scan;
  if (memory != nullptr) {
    scan.residual = memory->current().data();
    scan.decay = memory->decay();
  }
  if (momentum != nullptr) scan.momentum = *momentum;
  if (memory != nullptr && !memory->transactional()) {
    // In place: what must leave the memory unwritten has to be found before it is written.
    selection.mode = momentum == nullptr ? look_ahead(grad, memory) : look_ahead_of(scan);
    if (selection.mode != BodyMode::kFamily) return selection;
  }
  const std::size_t size = array_size(n, keep);
  selection.entries = {.index = workspace.take<std::uint32_t>(size).data(),
                       .value = workspace.take<float>(size).data(),
                       .capacity = candidate_capacity(n, keep),
                       .keep = static_cast<std::size_t>(keep)};
  if (memory == nullptr) return selection;
  scan.next = memory->next().data();
  scan.streaming = writes_past_caches(grad, scan.residual, scan.next);
  if (momentum != nullptr) {
    scan.momentum.next = memory->next_velocity().data();
    scan.momentum.streaming = writes_past_caches(grad, scan.momentum.velocity, scan.momentum.next);
  }
  return selection;
}

void select(const Context& ctx, const Choice& choice, Selection& selection) {
  selection.summary = choice.chunk > 0
                          ? select_by_chunk(selection.scan, choice, selection.entries)
                          : select_together(ctx, selection.scan, choice.sampled, selection.entries);
}

void select_again(const Context& ctx, Selection& selection) {
  selection.entries.count = 0;
  selection.entries.was_cut = false;
  select_together(ctx, stored(selection.scan), true, selection.entries);
}

void settle(Memory* memory, Selection& selection) {
  const bool nonfinite = selection.summary.magnitude >= kInfinityBits;
  if (!nonfinite && selection.summary.gradient_nonzero) return;
  if (memory != nullptr) memory->rollback();
  selection.mode = nonfinite ? BodyMode::kNonFinite : BodyMode::kEmpty;
}

Selection select_largest(const Context& ctx, TensorView grad, Memory* memory, const Choice& choice,
                         Workspace& workspace) {
  Selection selection = prepare(grad, memory, nullptr, choice.keep, workspace);
  if (selection.mode != BodyMode::kFamily) return selection;
  select(ctx, choice, selection);
  settle(memory, selection);
  return selection;
}

}  // namespace thinwire::topk
