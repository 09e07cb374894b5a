#include "compressors/topk/topk.h"

#include <hwy/cache_control.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/convert.h"
#include "compressors/core/random.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/workspace.h"
#include "compressors/topk/topk_index.h"
#include "compressors/topk/topk_kernels.h"
#include "compressors/topk/topk_sample.h"
#include "compressors/topk/topk_values.h"

namespace thinwire {
namespace {

using topk::Candidates;
using topk::kChunkElements;

// Mode; gap parameter, bitmap flag and kind of values in one byte; 32-bit count.
constexpr std::size_t kHeaderBytes = 6;
// Of the first three kinds of values; the next three have the next mode.
constexpr auto kFirstMode = static_cast<std::uint8_t>(BodyMode::kFamily);
constexpr std::uint32_t kKindsAMode = 3;
constexpr std::uint32_t kParameterMask = 0x1F;
constexpr std::uint32_t kBitmapFlag = 0x20;
constexpr int kValuesShift = 6;
constexpr std::int64_t kMaxElements = (std::int64_t{1} << 32) - 1;
// Entries that are decoded at a time, into arrays on the stack.
constexpr std::size_t kBatch = kTopKBlock;
// Bodies that are summed in one pass over the sum, and the elements of a range of that pass: 8 KiB.
constexpr std::size_t kTogether = 8;
constexpr std::size_t kSumElements = 2048;
constexpr std::size_t kLineBytes = 64;
// Of the least magnitude kept in a chunk: as many again are above it where values are normal, so
// that the next chunk seldom has fewer than it keeps.
constexpr float kNextGuess = 0.9F;
// Sampled selection is content with this share of k.
constexpr double kLeastShare = 0.8;
// Below this the residual is likely still in the cache at the next step; stores around the cache
// pay once three such arrays no longer fit into a core's share of it, unless the residual takes the
// gradient's place, whose lines are there anyway.
constexpr std::int64_t kStreamingElements = std::int64_t{1} << 20;

void check_dtype(const Context& ctx, DType dtype) {
  if (dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16) return;
  fail_argument(ctx, "topk of a tensor of dtype " + std::string(name(dtype)) +
                         ", expected fp32, bf16 or fp16\nhint: send this tensor with codec none");
}

class TopKCodec final : public PayloadCodec {
 public:
  explicit TopKCodec(const TopKOptions& options) : options_(options) {}

  std::string name() const override {
    std::string text = "topk:" + (options_.k > 0 ? "k=" + std::to_string(options_.k)
                                                 : number_text(options_.density));
    if (options_.values != TopKValues::kF32) {
      text += ",values=";
      text += kTopKValuesWords[static_cast<std::size_t>(options_.values)];
    }
    if (options_.select == TopKSelect::kSampled) text += ",select=sampled";
    if (options_.chunk > 0) text += ",chunk=" + std::to_string(options_.chunk);
    return text;
  }

  Traits traits() const override {
    return {.sparse = true, .exact_sum = options_.values == TopKValues::kF32, .granularity = 0};
  }

  std::size_t slot_bytes(std::int64_t n) const override;
  std::size_t workspace_bytes(std::int64_t n) const override;
  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override;
  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override;
  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override;
  void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies, float weight,
           std::span<float> out) const override;

 private:
  // k of n elements that are selected from together, in [1, n]; 0 for n = 0.
  std::int64_t keep_together(std::int64_t n) const;
  // Entries of an n-element tensor.
  std::int64_t keep(std::int64_t n) const;
  topk::ScanSummary select(const Context& ctx, const topk::Scan& scan,
                           Candidates& candidates) const;
  topk::ScanSummary select_by_chunk(const topk::Scan& scan, Candidates& candidates) const;
  // Drops the smallest candidates that the slot has no room for.
  TopKIndexCoding fit(std::int64_t n, Candidates& candidates) const;
  std::size_t write_body(std::int64_t n, const TopKIndexCoding& coding, const Candidates& entries,
                         std::span<std::byte> out) const;
  class Entries;

  std::uint32_t kind() const { return static_cast<std::uint32_t>(options_.values); }
  std::uint8_t mode() const { return static_cast<std::uint8_t>(kFirstMode + kind() / kKindsAMode); }

  TopKOptions options_;
};

std::int64_t TopKCodec::keep(std::int64_t n) const {
  if (n < 0 || n > kMaxElements) {
    throw InvalidArgument("topk: a tensor of " + std::to_string(n) +
                          " elements, expected at most " + std::to_string(kMaxElements) +
                          "\nhint: encode ranges of the tensor one by one");
  }
  if (options_.chunk == 0) return keep_together(n);
  return n / options_.chunk * keep_together(options_.chunk) + keep_together(n % options_.chunk);
}

std::int64_t TopKCodec::keep_together(std::int64_t n) const {
  if (n == 0) return 0;
  const std::int64_t wanted =
      options_.k > 0 ? options_.k : std::llround(options_.density * static_cast<double>(n));
  return std::clamp<std::int64_t>(wanted, 1, n);
}

std::size_t TopKCodec::slot_bytes(std::int64_t n) const {
  const std::int64_t k = keep(n);
  if (k == 0) return 1;
  return kHeaderBytes + topk_value_bytes(options_.values, static_cast<std::size_t>(k)) +
         plan_topk_indices(n, k);
}

// Candidates: about 1.4 k pass the estimated threshold, so that 2 k are seldom exceeded.
std::size_t candidate_capacity(std::int64_t n, std::int64_t k) {
  const auto room = static_cast<std::size_t>(2 * k) + 2 * kChunkElements;
  return std::min(room, static_cast<std::size_t>(n) + kChunkElements);
}

std::size_t TopKCodec::workspace_bytes(std::int64_t n) const {
  const std::int64_t k = keep(n);
  if (k == 0) return 0;
  const std::size_t room = std::max(candidate_capacity(n, k), topk::sample_capacity(n, k));
  return Workspace::bytes_for<std::uint32_t>(room) + Workspace::bytes_for<float>(room);
}

// The scan, for all but zeros, of what an earlier scan has stored or would have.
topk::ScanSummary scan_again(const topk::Scan& scan, Candidates& c) {
  c.count = 0;
  c.threshold = 1;
  topk::Scan again = scan;
  if (scan.next != nullptr) {
    again.grad = scan.next;
    again.dtype = DType::kF32;
    again.residual = nullptr;
    again.next = nullptr;
    again.streaming = false;
  }
  return topk::scan(again, c);
}

// One pass, and a second over what is stored by now if the sample misled.
topk::ScanSummary TopKCodec::select(const Context& ctx, const topk::Scan& scan,
                                    Candidates& c) const {
  if (options_.chunk > 0) return select_by_chunk(scan, c);
  const double share = options_.select == TopKSelect::kSampled ? kLeastShare : 1.0;
  const auto enough = static_cast<std::size_t>(std::ceil(share * static_cast<double>(c.keep)));
  c.threshold =
      topk::estimate_threshold(scan, c, options_.select == TopKSelect::kSampled ? 1.0 : 3.0,
                               random_stream(ctx.key_hash, ctx.step, ctx.sender));
  const topk::ScanSummary summary = topk::scan(scan, c);
  const bool finite = summary.magnitude < topk::kInfinityBits;
  if (finite && c.count < enough && !c.was_cut && c.threshold > 1) scan_again(scan, c);
  if (finite && c.count > c.keep) topk::keep_largest(c);
  return summary;
}

// A chunk's threshold is guessed from the chunk before.
topk::ScanSummary TopKCodec::select_by_chunk(const topk::Scan& scan, Candidates& c) const {
  topk::ScanSummary summary;
  std::uint32_t guess = 1;
  for (std::int64_t begin = 0; begin < scan.count; begin += options_.chunk) {
    topk::Scan part = scan;
    part.count = std::min(options_.chunk, scan.count - begin);
    part.first = static_cast<std::uint32_t>(begin);
    part.grad = static_cast<const char*>(scan.grad) +
                begin * static_cast<std::int64_t>(size_bytes(scan.dtype));
    if (scan.residual != nullptr) part.residual = scan.residual + begin;
    if (scan.next != nullptr) part.next = scan.next + begin;
    Candidates of_chunk{.index = c.index + c.count,
                        .value = c.value + c.count,
                        .capacity = c.capacity - c.count,
                        .keep = static_cast<std::size_t>(keep_together(part.count)),
                        .threshold = guess};
    const topk::ScanSummary found = topk::scan(part, of_chunk);
    summary.magnitude = std::max(summary.magnitude, found.magnitude);
    summary.gradient_nonzero = summary.gradient_nonzero || found.gradient_nonzero;
    if (found.magnitude >= topk::kInfinityBits) return summary;
    if (of_chunk.count < of_chunk.keep && guess > 1) scan_again(part, of_chunk);
    if (of_chunk.count > of_chunk.keep) topk::keep_largest(of_chunk);
    guess = topk::part_of_least(of_chunk, kNextGuess);
    c.count += of_chunk.count;
  }
  return summary;
}

EncodeResult TopKCodec::encode(const Context& ctx, TensorView grad, Memory* memory,
                               std::span<std::byte> out) const {
  const std::int64_t n = grad.elements;
  check_encode(ctx, grad, memory, out, slot_bytes(n));
  check_dtype(ctx, grad.dtype);
  if (n == 0) return write_mark(BodyMode::kEmpty, out);
  if (memory != nullptr && !memory->transactional()) {
    const BodyMode mode = look_ahead(grad, memory);
    if (mode != BodyMode::kFamily) return write_mark(mode, out);
  }

  const std::int64_t k = keep(n);
  Workspace workspace(ctx.workspace);
  const std::size_t room = std::max(candidate_capacity(n, k), topk::sample_capacity(n, k));
  const auto index = workspace.take<std::uint32_t>(room);
  const auto value = workspace.take<float>(room);
  Candidates candidates{.index = index.data(),
                        .value = value.data(),
                        .capacity = candidate_capacity(n, k),
                        .keep = static_cast<std::size_t>(k)};
  topk::Scan scan{.grad = grad.data, .dtype = grad.dtype, .count = n};
  if (memory != nullptr) {
    scan.residual = memory->current().data();
    scan.decay = memory->decay();
    scan.next = memory->next().data();
    scan.streaming = memory->transactional() && n >= kStreamingElements && scan.next != grad.data;
  }
  const topk::ScanSummary summary = select(ctx, scan, candidates);
  const bool nonfinite = summary.magnitude >= topk::kInfinityBits;
  if (nonfinite || !summary.gradient_nonzero) {
    if (memory != nullptr) memory->rollback();
    return write_mark(nonfinite ? BodyMode::kNonFinite : BodyMode::kEmpty, out);
  }
  constexpr std::uint32_t kSpan = std::uint32_t{kTopKQ8Octaves} << 23;
  if (options_.values == TopKValues::kQ8 && summary.magnitude > kSpan) {
    topk::drop_below(candidates, summary.magnitude - kSpan);
  }
  const TopKIndexCoding coding = fit(n, candidates);
  EncodeResult result;
  result.bytes = write_body(n, coding, candidates, out);
  if (memory != nullptr) {
    topk::scatter(index.first(candidates.count), value.first(candidates.count), scan.next);
  }
  return result;
}

TopKIndexCoding TopKCodec::fit(std::int64_t n, Candidates& c) const {
  const std::size_t slot = slot_bytes(n) - kHeaderBytes;
  for (;;) {
    const TopKIndexCoding coding = choose_topk_coding(n, {c.index, c.count});
    const std::size_t room = slot - topk_value_bytes(options_.values, c.count);
    if (coding.bytes() <= room) return coding;
    const std::uint64_t excess = coding.bits - 8 * room;
    const auto saved = static_cast<std::uint64_t>(std::max(coding.parameter, 1));
    const std::uint64_t dropped = (excess + saved - 1) / saved;
    c.keep = c.count - std::min<std::size_t>(c.count, dropped);
    if (c.keep == 0) {
      c.count = 0;
    } else {
      topk::keep_largest(c);
    }
  }
}

std::size_t TopKCodec::write_body(std::int64_t n, const TopKIndexCoding& coding,
                                  const Candidates& entries, std::span<std::byte> out) const {
  const auto count = static_cast<std::uint32_t>(entries.count);
  out[0] = static_cast<std::byte>(mode());
  out[1] = static_cast<std::byte>(static_cast<std::uint32_t>(coding.parameter) |
                                  (coding.bitmap ? kBitmapFlag : 0) |
                                  kind() % kKindsAMode << kValuesShift);
  std::memcpy(out.data() + 2, &count, sizeof count);
  const std::size_t value_bytes = topk_value_bytes(options_.values, entries.count);
  write_topk_values(options_.values, {entries.value, entries.count},
                    out.subspan(kHeaderBytes, value_bytes));
  write_topk_indices(coding, n, {entries.index, entries.count},
                     out.subspan(kHeaderBytes + value_bytes));
  return kHeaderBytes + value_bytes + coding.bytes();
}

// The entries of one body, a batch at a time, in index order.
class TopKCodec::Entries {
 public:
  // body: of the codec's mode. CorruptPayload here and in next() for what cannot be a body of n
  // elements.
  Entries(const TopKCodec& codec, const Context& ctx, std::span<const std::byte> body,
          std::int64_t n);

  // False after the last batch.
  bool next();
  std::span<const std::uint32_t> indices() const { return std::span(indices_).first(size_); }
  std::span<const float> values() const { return std::span(values_).first(size_); }
  // Adds the entries of [begin, begin + range.size()) to `range`; ranges come one after the other.
  void add_to(std::span<float> range, std::size_t begin, float weight);

 private:
  Context ctx_;
  TopKValues kind_;
  std::size_t count_ = 0;
  std::size_t read_ = 0;
  std::size_t size_ = 0;   // of the batch
  std::size_t added_ = 0;  // of the batch
  std::span<const std::byte> section_;
  std::optional<TopKIndexReader> reader_;
  std::array<std::uint32_t, kBatch> indices_;
  std::array<float, kBatch> values_;
};

TopKCodec::Entries::Entries(const TopKCodec& codec, const Context& ctx,
                            std::span<const std::byte> body, std::int64_t n)
    : ctx_(ctx), kind_(codec.options_.values) {
  if (body.size() < kHeaderBytes) {
    fail_corrupt(ctx, "a topk body of " + std::to_string(body.size()) +
                          " bytes, expected at least " + std::to_string(kHeaderBytes));
  }
  const auto layout = std::to_integer<std::uint32_t>(body[1]);
  if (layout >> kValuesShift != codec.kind() % kKindsAMode) {
    fail_corrupt(ctx, "a topk body with other values than " + codec.name() +
                          " sends\nhint: all ranks need the same policy and version");
  }
  std::uint32_t count = 0;
  std::memcpy(&count, body.data() + 2, sizeof count);
  if (static_cast<std::int64_t>(count) > codec.keep(n)) {
    fail_corrupt(ctx, "a topk body of " + std::to_string(count) + " entries, expected at most " +
                          std::to_string(codec.keep(n)));
  }
  count_ = count;
  const std::size_t value_bytes = topk_value_bytes(kind_, count);
  if (body.size() - kHeaderBytes < value_bytes) {
    fail_corrupt(ctx, "a topk body of " + std::to_string(body.size()) + " bytes, too short for " +
                          std::to_string(count) + " entries");
  }
  section_ = body.subspan(kHeaderBytes, value_bytes);
  try {
    reader_.emplace((layout & kBitmapFlag) != 0, static_cast<int>(layout & kParameterMask), n,
                    count, body.subspan(kHeaderBytes + value_bytes));
  } catch (const CorruptPayload& error) {
    fail_corrupt(ctx, error.what());
  }
}

bool TopKCodec::Entries::next() {
  size_ = 0;
  added_ = 0;
  if (read_ == count_) return false;
  try {
    size_ = reader_->next(indices_);
    read_topk_values(kind_, section_, count_, read_, std::span(values_).first(size_));
  } catch (const CorruptPayload& error) {
    fail_corrupt(ctx_, error.what());
  }
  read_ += size_;
  return true;
}

void TopKCodec::Entries::add_to(std::span<float> range, std::size_t begin, float weight) {
  for (;;) {
    std::size_t at = added_;
    for (; at < size_ && indices_[at] - begin < range.size(); ++at) {
      const float scaled = weight * values_[at];
      range[indices_[at] - begin] += scaled;
    }
    added_ = at;
    if (at < size_ || !next()) return;
  }
}

void TopKCodec::decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const {
  check_dtype(ctx, out.dtype);
  if (decode_mark(ctx, body, mode(), out)) return;
  fill_zero(out);
  Entries entries(*this, ctx, body, out.elements);
  while (entries.next()) {
    const auto indices = entries.indices();
    const auto values = entries.values();
    if (out.dtype == DType::kF32) {
      topk::scatter(indices, values, static_cast<float*>(out.data));
      continue;
    }
    auto* to = static_cast<std::uint16_t*>(out.data);
    for (std::size_t i = 0; i < indices.size(); ++i) {
      to[indices[i]] =
          out.dtype == DType::kBF16 ? to_bf16(values[i]).bits : to_fp16(values[i]).bits;
    }
  }
}

void TopKCodec::accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                           std::span<float> out) const {
  if (accumulate_mark(ctx, body, mode(), out)) return;
  Entries entries(*this, ctx, body, static_cast<std::int64_t>(out.size()));
  while (entries.next()) {
    topk::scatter_add(entries.indices(), entries.values(), weight, out.data());
  }
}

// Range by range in the L1 cache, where all bodies add their entries, and from there to `out`,
// which is written once for kTogether bodies, whole cache lines at a time.
void TopKCodec::sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                    float weight, std::span<float> out) const {
  const auto own = static_cast<std::byte>(mode());
  const bool plain =
      std::all_of(bodies.begin(), bodies.end(), [own](std::span<const std::byte> body) {
        return !body.empty() &&
               (body[0] == own || body[0] == static_cast<std::byte>(BodyMode::kEmpty));
      });
  if (!plain) return PayloadCodec::sum(ctx, bodies, weight, out);
  check_device(ctx);
  const bool streaming = out.size() >= static_cast<std::size_t>(kStreamingElements);
  const std::size_t past_line = reinterpret_cast<std::uintptr_t>(out.data()) % kLineBytes;
  alignas(kLineBytes) std::array<float, kSumElements> storage = {};
  Context of_sender = ctx;
  for (std::size_t first = 0; first == 0 || first < bodies.size(); first += kTogether) {
    std::array<std::optional<Entries>, kTogether> entries;
    const std::size_t last = std::min(first + kTogether, bodies.size());
    for (std::size_t i = first; i < last; ++i) {
      if (bodies[i][0] == static_cast<std::byte>(BodyMode::kEmpty)) continue;
      of_sender.sender = static_cast<std::int32_t>(i);
      entries[i - first].emplace(*this, of_sender, bodies[i],
                                 static_cast<std::int64_t>(out.size()));
    }
    // All ranges but the first begin a cache line.
    std::size_t size = kSumElements - past_line / sizeof(float);
    for (std::size_t begin = 0; begin < out.size(); begin += size, size = kSumElements) {
      size = std::min(size, out.size() - begin);
      const std::span<float> range = std::span(storage).first(size);
      const std::span<float> place = out.subspan(begin, size);
      if (first > 0) std::copy(place.begin(), place.end(), range.begin());
      for (std::optional<Entries>& sender : entries) {
        if (sender) sender->add_to(range, begin, weight);
      }
      topk::move_out(range, place.data(), streaming);
    }
  }
  if (streaming) hwy::FlushStream();
}

}  // namespace

std::shared_ptr<const PayloadCodec> make_topk_codec(const TopKOptions& options) {
  const bool by_density = options.density != 0;
  if (by_density == (options.k != 0)) {
    throw InvalidArgument("topk: expected either a density or a count k, got " +
                          std::string(by_density ? "both" : "neither"));
  }
  if (by_density && !(options.density > 0 && options.density <= 1)) {
    throw InvalidArgument("topk: density " + number_text(options.density) +
                          ", expected more than 0 and at most 1");
  }
  if (options.chunk != 0 && (options.chunk < kMinTopKChunk || options.chunk > kMaxTopKChunk)) {
    throw InvalidArgument("topk: chunk = " + std::to_string(options.chunk) + ", expected 0 or " +
                          std::to_string(kMinTopKChunk) + " to " + std::to_string(kMaxTopKChunk));
  }
  if (options.chunk != 0 && options.select == TopKSelect::kSampled) {
    throw InvalidArgument("topk: a chunk's selection is exact, expected no select=sampled");
  }
  if (options.k < 0) {
    throw InvalidArgument("topk: k = " + std::to_string(options.k) + ", expected 1 or more");
  }
  return std::make_shared<TopKCodec>(options);
}

}  // namespace thinwire
