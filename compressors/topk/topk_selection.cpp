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

// Candidates: of a sampled choice about 1.2 keep pass the estimated threshold. Of an exact one up
// to 3 keep do, where the sample has few hits: so few entries that two chunks hold them.
std::size_t candidate_capacity(std::int64_t n, std::int64_t keep) {
  const auto room = static_cast<std::size_t>(2 * keep) + 2 * kChunkElements;
  return std::min(room, static_cast<std::size_t>(n) + kChunkElements);
}

std::size_t array_size(std::int64_t n, std::int64_t keep) {
  return std::max(candidate_capacity(n, keep), sample_capacity(n, keep));
}

// The scan of what an earlier one has stored or would have. An opened residual has it rounded.
Scan stored(const Scan& first) {
  if (first.opened.current != nullptr) {
    Scan again = first;
    again.opened.next = nullptr;
    return again;
  }
  if (first.next == nullptr) return first;
  return {.grad = first.next, .count = first.count, .first = first.first};
}

// For all but zeros, of what earlier scans have stored or would have.
void scan_again(std::span<const Scan> parts, Candidates& c) {
  c.count = 0;
  c.threshold = 1;
  for (const Scan& part : parts) scan(stored(part), c);
}

// One pass over n elements, and a second over what the first has stored, or would have, if the
// sample misled.
ScanSummary select_together(const Context& ctx, std::span<const Scan> parts, std::int64_t n,
                            bool sampled, Candidates& c) {
  const auto enough = sampled ? enough_entries(c.keep) : c.keep;
  c.threshold =
      estimate_threshold(parts, n, c, sampled, random_stream(ctx.key_hash, ctx.step, ctx.sender));
  ScanSummary summary;
  for (const Scan& part : parts) summary.add(scan(part, c));
  const bool finite = summary.magnitude < kInfinityBits;
  if (finite && c.count < enough && !c.was_cut && c.threshold > 1) scan_again(parts, c);
  if (finite && c.count > c.keep) keep_largest(c);
  return summary;
}

// The mark that `scan` would lead to, or kFamily; nothing is stored.
BodyMode look_ahead_of(const Scan& first) {
  Candidates none{.capacity = static_cast<std::size_t>(first.count) + kChunkElements,
                  .threshold = kMagnitudeMask + 1};
  Scan looking = first;
  looking.next = nullptr;
  looking.opened.next = nullptr;
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
    if (of_chunk.count < of_chunk.keep && guess > 1) scan_again({&part, 1}, of_chunk);
    if (of_chunk.count > of_chunk.keep) keep_largest(of_chunk);
    guess = part_of_least(of_chunk, kNextGuess);
    c.count += of_chunk.count;
  }
  return summary;
}

// What can be told of a tensor before the pass, or kFamily. With `look_ahead` the pass must not
// find NaN or Inf.
BodyMode mark_of(const JointCodec::Part& tensor, const Scan& part, bool only, bool look_ahead) {
  if (part.count == 0) return BodyMode::kEmpty;
  if (part.momentum.velocity != nullptr) {
    return look_ahead ? look_ahead_of(part) : BodyMode::kFamily;
  }
  if (look_ahead && part.opened.current != nullptr) return look_ahead_of(part);
  const bool zeros_count = tensor.memory == nullptr || (only && !look_ahead);
  if (!zeros_count && all_zero(tensor.grad)) return BodyMode::kEmpty;
  const bool finite = !look_ahead || all_finite(tensor.grad, tensor.memory);
  return finite ? BodyMode::kFamily : BodyMode::kNonFinite;
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

std::size_t selection_bytes(std::int64_t n, std::int64_t keep, std::size_t tensors) {
  const std::size_t size = array_size(n, keep);
  return Workspace::bytes_for<Scan>(tensors) + Workspace::bytes_for<std::uint32_t>(size) +
         Workspace::bytes_for<float>(size);
}

std::size_t enough_entries(std::size_t keep) {
  return static_cast<std::size_t>(std::ceil(kLeastShare * static_cast<double>(keep)));
}

Selection prepare(std::span<const JointCodec::Part> tensors, const Momentum* momentum,
                  std::int64_t keep, Workspace& workspace) {
  Selection selection{.mode = BodyMode::kEmpty};
  for (const JointCodec::Part& tensor : tensors) selection.elements += tensor.grad.elements;
  if (selection.elements == 0) return selection;
  // In place: what must leave memories unwritten has to be found before any is written.
  const bool in_place = std::any_of(tensors.begin(), tensors.end(), [](const auto& tensor) {
    return tensor.memory != nullptr && !tensor.memory->transactional();
  });
  selection.parts = workspace.take<Scan>(tensors.size());
  std::int64_t first = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& [grad, memory] = tensors[i];
    Scan& part = selection.parts[i];
    part = {.grad = grad.data,
            .dtype = grad.dtype,
            .count = grad.elements,
            .first = static_cast<std::uint32_t>(first)};
    first += grad.elements;
    if (memory != nullptr) {
      part.decay = memory->decay();
      if (memory->is_open()) {
        part.opened = {.current = memory->opened_current().data(), .dither = memory->dither()};
      } else {
        part.residual = memory->current().data();
      }
    }
    if (momentum != nullptr) part.momentum = *momentum;
    const BodyMode mark = mark_of(tensors[i], part, tensors.size() == 1, in_place);
    if (mark == BodyMode::kEmpty) part.count = 0;
    if (mark != BodyMode::kEmpty) selection.mode = mark;
    if (mark == BodyMode::kNonFinite) return selection;
  }
  if (selection.mode != BodyMode::kFamily) return selection;
  const std::size_t size = array_size(selection.elements, keep);
  selection.entries = {.index = workspace.take<std::uint32_t>(size).data(),
                       .value = workspace.take<float>(size).data(),
                       .capacity = candidate_capacity(selection.elements, keep),
                       .keep = static_cast<std::size_t>(keep)};
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const auto& [grad, memory] = tensors[i];
    Scan& part = selection.parts[i];
    if (memory == nullptr || part.count == 0) continue;
    if (memory->is_open()) {
      part.opened.next = memory->opened_next().data();
      part.streaming = outlasts_caches(grad.elements);
    } else {
      part.next = memory->next().data();
      part.streaming = writes_past_caches(grad, part.residual, part.next);
    }
    if (momentum == nullptr) continue;
    Momentum& own = part.momentum;
    own.next = memory->next_velocity().data();
    own.streaming = writes_past_caches(grad, own.velocity, own.next);
  }
  return selection;
}

void select(const Context& ctx, const Choice& choice, Selection& selection) {
  Candidates& entries = selection.entries;
  selection.summary = choice.chunk > 0 ? select_by_chunk(selection.whole(), choice, entries)
                                       : select_together(ctx, selection.parts, selection.elements,
                                                         choice.sampled, entries);
}

void select_again(const Context& ctx, Selection& selection) {
  selection.entries.count = 0;
  selection.entries.was_cut = false;
  const Scan again = stored(selection.whole());
  select_together(ctx, {&again, 1}, selection.elements, true, selection.entries);
}

void settle(std::span<const JointCodec::Part> tensors, Selection& selection) {
  const bool nonfinite = selection.summary.magnitude >= kInfinityBits;
  if (!nonfinite && selection.summary.gradient_nonzero) return;
  for (const auto& [grad, memory] : tensors) {
    if (memory != nullptr) memory->rollback();
  }
  selection.mode = nonfinite ? BodyMode::kNonFinite : BodyMode::kEmpty;
}

void scatter_to_memories(const Selection& selection, std::span<const float> values) {
  const std::span<const std::uint32_t> indices(selection.entries.index, values.size());
  std::size_t begin = 0;
  for (const Scan& part : selection.parts) {
    const std::uint64_t last = std::uint64_t{part.first} + static_cast<std::uint64_t>(part.count);
    const auto after =
        std::lower_bound(indices.begin() + static_cast<std::ptrdiff_t>(begin), indices.end(), last);
    const auto size = static_cast<std::size_t>(after - indices.begin()) - begin;
    const auto of_part = indices.subspan(begin, size);
    if (part.opened.next != nullptr) {
      scatter(of_part, values.subspan(begin, size), part.first, part.opened);
    } else if (part.next != nullptr) {
      scatter(of_part, values.subspan(begin, size), part.first, part.next);
    }
    begin += size;
  }
}

Selection select_largest(const Context& ctx, std::span<const JointCodec::Part> tensors,
                         const Choice& choice, Workspace& workspace) {
  Selection selection = prepare(tensors, nullptr, choice.keep, workspace);
  if (selection.mode != BodyMode::kFamily) return selection;
  select(ctx, choice, selection);
  settle(tensors, selection);
  return selection;
}

}  // namespace thinwire::topk
