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
// Sampled selection is content with this share of the entries.
constexpr double kLeastShare = 0.8;
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

// The scan, for all but zeros, of what an earlier scan has stored or would have.
void scan_again(const Scan& first, Candidates& c) {
  c.count = 0;
  c.threshold = 1;
  Scan again = first;
  if (first.next != nullptr) {
    again.grad = first.next;
    again.dtype = DType::kF32;
    again.residual = nullptr;
    again.next = nullptr;
    again.streaming = false;
  }
  scan(again, c);
}

// One pass, and a second over what is stored by now if the sample misled.
ScanSummary select(const Context& ctx, const Scan& first, bool sampled, Candidates& c) {
  const double share = sampled ? kLeastShare : 1.0;
  const auto enough = static_cast<std::size_t>(std::ceil(share * static_cast<double>(c.keep)));
  c.threshold = estimate_threshold(first, c, sampled ? 1.0 : 3.0,
                                   random_stream(ctx.key_hash, ctx.step, ctx.sender));
  const ScanSummary summary = scan(first, c);
  const bool finite = summary.magnitude < kInfinityBits;
  if (finite && c.count < enough && !c.was_cut && c.threshold > 1) scan_again(first, c);
  if (finite && c.count > c.keep) keep_largest(c);
  return summary;
}

// A chunk's threshold is guessed from the chunk before.
ScanSummary select_by_chunk(const Scan& whole, const Choice& choice, Candidates& c) {
  ScanSummary summary;
  std::uint32_t guess = 1;
  for (std::int64_t begin = 0; begin < whole.count; begin += choice.chunk) {
    Scan part = whole;
    part.count = std::min(choice.chunk, whole.count - begin);
    part.first = static_cast<std::uint32_t>(begin);
    part.grad = static_cast<const char*>(whole.grad) +
                begin * static_cast<std::int64_t>(size_bytes(whole.dtype));
    if (whole.residual != nullptr) part.residual = whole.residual + begin;
    if (whole.next != nullptr) part.next = whole.next + begin;
    const std::int64_t keep =
        part.count == choice.chunk ? choice.keep_in_chunk : choice.keep_in_last;
    Candidates of_chunk{.index = c.index + c.count,
                        .value = c.value + c.count,
                        .capacity = c.capacity - c.count,
                        .keep = static_cast<std::size_t>(keep),
                        .threshold = guess};
    const ScanSummary found = scan(part, of_chunk);
    summary.magnitude = std::max(summary.magnitude, found.magnitude);
    summary.gradient_nonzero = summary.gradient_nonzero || found.gradient_nonzero;
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

Selection select_largest(const Context& ctx, TensorView grad, Memory* memory, const Choice& choice,
                         Workspace& workspace) {
  const std::int64_t n = grad.elements;
  if (n == 0) return {.mode = BodyMode::kEmpty};
  if (memory != nullptr && !memory->transactional()) {
    const BodyMode mode = look_ahead(grad, memory);
    if (mode != BodyMode::kFamily) return {.mode = mode};
  }
  const std::size_t size = array_size(n, choice.keep);
  Selection selection{.entries = {.index = workspace.take<std::uint32_t>(size).data(),
                                  .value = workspace.take<float>(size).data(),
                                  .capacity = candidate_capacity(n, choice.keep),
                                  .keep = static_cast<std::size_t>(choice.keep)}};
  Scan scan{.grad = grad.data, .dtype = grad.dtype, .count = n};
  if (memory != nullptr) {
    scan.residual = memory->current().data();
    scan.decay = memory->decay();
    scan.next = memory->next().data();
    scan.streaming = writes_past_caches(grad, scan.residual, scan.next);
  }
  const ScanSummary summary = choice.chunk > 0
                                  ? select_by_chunk(scan, choice, selection.entries)
                                  : select(ctx, scan, choice.sampled, selection.entries);
  const bool nonfinite = summary.magnitude >= kInfinityBits;
  if (nonfinite || !summary.gradient_nonzero) {
    if (memory != nullptr) memory->rollback();
    return {.mode = nonfinite ? BodyMode::kNonFinite : BodyMode::kEmpty};
  }
  selection.magnitude = summary.magnitude;
  selection.next = scan.next;
  return selection;
}

}  // namespace thinwire::topk
