#include "compressors/topk/topk.h"

#include <hwy/cache_control.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/workspace.h"
#include "compressors/topk/topk_carried.h"
#include "compressors/topk/topk_index.h"
#include "compressors/topk/topk_sample.h"
#include "compressors/topk/topk_selection.h"
#include "compressors/topk/topk_values.h"

namespace thinwire {
namespace {

// Mode; gap parameter, bitmap flag and kind of values in one byte; 32-bit count.
constexpr std::size_t kHeaderBytes = 6;
// Of the first three kinds of values; the next three have the next mode.
constexpr auto kFirstMode = static_cast<std::uint8_t>(BodyMode::kFamily);
constexpr std::uint32_t kKindsAMode = 3;
constexpr std::uint32_t kParameterMask = 0x1F;
constexpr std::uint32_t kBitmapFlag = 0x20;
constexpr int kValuesShift = 6;
// Entries that are decoded at a time, into arrays on the stack.
constexpr std::size_t kBatch = kTopKBlock;
// Bodies that are summed in one pass over the sum, and the elements of a range of that pass: 8 KiB.
constexpr std::size_t kTogether = 8;
constexpr std::size_t kSumElements = 2048;
constexpr std::size_t kLineBytes = 64;

// The state kept in Memory: a topk::Carried, and the gradient's L2 norm without its loss scale.
constexpr std::size_t kStateFloats = 4;

// Of the L2 norm, in fp32 and finite.
float norm_of(double squares, float loss_scale) {
  return static_cast<float>(
      std::min(std::sqrt(squares) / double{loss_scale}, double{std::numeric_limits<float>::max()}));
}

std::string momentum_text(const TopKMomentum& momentum) {
  std::string text = ",momentum=" + number_text(momentum.factor);
  if (momentum.nesterov) text += ",nesterov";
  if (momentum.clip > 0) text += ",clip=" + number_text(momentum.clip);
  if (momentum.clip_norm == TopKClipNorm::kLast) text += ",clip_norm=last";
  return text;
}

class TopKCodec final : public PayloadCodec, public JointCodec {
 public:
  explicit TopKCodec(const TopKOptions& options) : options_(options) {}

  std::string name() const override {
    std::string text = "topk:" + (options_.k > 0 ? "k=" + std::to_string(options_.k)
                                                 : number_text(options_.density));
    if (options_.values != TopKValues::kF32) {
      text += ",values=";
      text += kTopKValuesWords[static_cast<std::size_t>(options_.values)];
    }
    if (options_.select != TopKSelect::kExact) {
      text += ",select=";
      text += kTopKSelectWords[static_cast<std::size_t>(options_.select)];
    }
    if (options_.chunk > 0) text += ",chunk=" + std::to_string(options_.chunk);
    if (options_.scope == TopKScope::kBucket) text += ",scope=bucket";
    if (options_.momentum) text += momentum_text(*options_.momentum);
    return text;
  }

  Traits traits() const override {
    return {.sparse = true,
            .exact_sum = options_.values == TopKValues::kF32,
            .granularity = 0,
            .splits = splits(),
            .opened_residual = !options_.momentum && options_.chunk == 0};
  }

  std::size_t slot_bytes(std::int64_t n) const override;
  std::size_t workspace_bytes(std::int64_t n) const override;
  MemoryNeeds memory_needs(std::int64_t n) const override;
  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override;
  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override;
  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override;
  void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies, float weight,
           std::span<float> out) const override;

  const JointCodec* joint() const override {
    return options_.scope == TopKScope::kBucket ? this : nullptr;
  }
  std::size_t joint_workspace_bytes(std::int64_t n, std::size_t parts) const override;
  EncodeResult encode_joint(const Context& ctx, std::span<const Part> parts,
                            std::span<std::byte> out) const override;
  void sum_joint(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                 float weight, std::span<const std::span<float>> outs) const override;

 private:
  // k of n elements that are selected from together, in [1, n]; 0 for n = 0.
  std::int64_t keep_together(std::int64_t n) const;
  // Entries of an n-element tensor.
  std::int64_t keep(std::int64_t n) const;
  // A count is not shared out; a momentum would be applied to owners' sums again; a bucket's
  // entries compete with those of all its ranges.
  bool splits() const {
    return options_.k == 0 && !options_.momentum && options_.scope == TopKScope::kLayer;
  }
  // How many of n elements are selected together, and how.
  topk::Choice choice(std::int64_t n) const;
  // Drops the smallest entries that the slot has no room for.
  TopKIndexCoding fit(std::int64_t n, std::size_t slot, topk::Candidates& entries) const;
  // The scales of values begin at the magnitude of bits `low`.
  std::size_t write_body(std::int64_t n, const TopKIndexCoding& coding, std::uint32_t low,
                         const topk::Candidates& entries, std::span<std::byte> out) const;
  EncodeResult finish(std::int64_t n, std::size_t slot, topk::CarriedPass pass,
                      topk::Selection& selection, std::span<std::byte> out) const;
  // Bytes for the indices of `count` entries.
  std::size_t room(std::size_t slot, std::size_t count) const;

  struct State {
    topk::Carried carried = {};
    float norm = 0;
  };
  bool carries() const { return options_.select == TopKSelect::kCarried; }
  bool clips_by_last() const {
    return options_.momentum && options_.momentum->clip_norm == TopKClipNorm::kLast;
  }
  State read_state(const Memory* memory) const;
  void check_velocity(const Context& ctx, const Memory* memory) const;
  // The velocity, and the factor that clips the gradient.
  topk::Momentum momentum_of(const Context& ctx, TensorView grad, const Memory& memory,
                             float last_norm) const;
  class Entries;

  std::uint32_t kind() const { return static_cast<std::uint32_t>(options_.values); }
  std::uint8_t mode() const { return static_cast<std::uint8_t>(kFirstMode + kind() / kKindsAMode); }

  TopKOptions options_;
};

std::int64_t TopKCodec::keep(std::int64_t n) const {
  if (options_.chunk == 0) return keep_together(n);
  topk::check_size("topk", n);
  return n / options_.chunk * keep_together(options_.chunk) + keep_together(n % options_.chunk);
}

std::int64_t TopKCodec::keep_together(std::int64_t n) const {
  return topk::keep_count(
      "topk", n,
      options_.k > 0 ? static_cast<double>(options_.k) : options_.density * static_cast<double>(n));
}

std::size_t TopKCodec::slot_bytes(std::int64_t n) const {
  const std::int64_t k = keep(n);
  if (k == 0) return 1;
  return kHeaderBytes + topk_value_bytes(options_.values, static_cast<std::size_t>(k)) +
         plan_topk_indices(n, k);
}

std::size_t TopKCodec::workspace_bytes(std::int64_t n) const { return joint_workspace_bytes(n, 1); }

std::size_t TopKCodec::joint_workspace_bytes(std::int64_t n, std::size_t parts) const {
  const std::int64_t k = keep(n);
  return k == 0 ? 0 : topk::selection_bytes(n, k, parts);
}

topk::Choice TopKCodec::choice(std::int64_t n) const {
  topk::Choice choice{.keep = keep(n), .sampled = options_.select != TopKSelect::kExact};
  if (options_.chunk > 0) {
    choice.chunk = options_.chunk;
    choice.keep_in_chunk = keep_together(options_.chunk);
    choice.keep_in_last = keep_together(n % options_.chunk);
  }
  return choice;
}

MemoryNeeds TopKCodec::memory_needs(std::int64_t /*n*/) const {
  return {.velocity = options_.momentum.has_value(),
          .state = carries() || clips_by_last() ? std::int64_t{kStateFloats} : 0};
}

EncodeResult TopKCodec::encode(const Context& ctx, TensorView grad, Memory* memory,
                               std::span<std::byte> out) const {
  const std::int64_t n = grad.elements;
  const std::size_t slot = slot_bytes(n);
  check_encode(ctx, grad, memory, out, slot);
  topk::check_dtype(ctx, "topk", grad.dtype);
  if (options_.momentum) check_velocity(ctx, memory);
  Workspace workspace(ctx.workspace);
  const State before = read_state(memory);
  double squares = 0;
  topk::Momentum momentum;
  if (options_.momentum && n > 0) momentum = momentum_of(ctx, grad, *memory, before.norm);
  const Part tensor{grad, memory};
  topk::Selection selection =
      topk::prepare({&tensor, 1}, options_.momentum ? &momentum : nullptr, keep(n), workspace);
  if (selection.mode != BodyMode::kFamily) return write_mark(selection.mode, out);
  if (clips_by_last()) selection.whole().squares = &squares;

  const double aim = topk::carried_aim(n, keep(n));
  const std::uint32_t least =
      carries() ? topk::carried_threshold(ctx, before.carried, aim, selection) : 1;
  topk::CarriedPass pass;
  if (least > 1) {
    pass = topk::select_carried(ctx, least, options_.values, selection);
  } else {
    topk::select(ctx, choice(n), selection);
  }
  topk::settle({&tensor, 1}, selection);
  if (selection.mode != BodyMode::kFamily) return write_mark(selection.mode, out);
  topk::Candidates& entries = selection.entries;
  if (memory != nullptr && memory->next_state().size() == kStateFloats) {
    const std::uint32_t reached = pass.settled ? pass.least : topk::part_of_least(entries, 1.0F);
    const topk::Carried carried = topk::carry(before.carried, entries, reached, aim);
    const std::array after = {carried.threshold, carried.ideal, carried.trend,
                              norm_of(squares, ctx.loss_scale)};
    std::copy(after.begin(), after.end(), memory->next_state().begin());
  }
  return finish(n, slot, pass, selection, out);
}

EncodeResult TopKCodec::encode_joint(const Context& ctx, std::span<const Part> parts,
                                     std::span<std::byte> out) const {
  std::int64_t n = 0;
  for (const Part& part : parts) n += part.grad.elements;
  const std::size_t slot = slot_bytes(n);
  for (const auto& [grad, memory] : parts) {
    check_encode(ctx, grad, memory, out, slot);
    topk::check_dtype(ctx, "topk", grad.dtype);
  }
  Workspace workspace(ctx.workspace);
  topk::Selection selection = topk::select_largest(ctx, parts, choice(n), workspace);
  if (selection.mode != BodyMode::kFamily) return write_mark(selection.mode, out);
  return finish(n, slot, {}, selection, out);
}

// Writes the body, and what is not sent of the entries to the memories.
EncodeResult TopKCodec::finish(std::int64_t n, std::size_t slot, topk::CarriedPass pass,
                               topk::Selection& selection, std::span<std::byte> out) const {
  topk::Candidates& entries = selection.entries;
  TopKIndexCoding coding;
  if (pass.settled) {
    coding = choose_topk_coding(n, {entries.index, entries.count});
    if (coding.bytes() > room(slot, entries.count)) topk::restore_rounded(pass, selection);
  }
  std::uint32_t low = pass.least;
  if (!pass.settled) {
    constexpr std::uint32_t kSpan = std::uint32_t{kTopKQ8Octaves} << 23;
    if (options_.values == TopKValues::kQ8 && selection.summary.magnitude > kSpan) {
      topk::drop_below(entries, selection.summary.magnitude - kSpan);
    }
    coding = fit(n, slot, entries);
    low = least_magnitude({entries.value, entries.count});
  }
  EncodeResult result;
  result.bytes = write_body(n, coding, low, entries, out);
  const std::span<float> missing(entries.value, entries.count);
  if (pass.rounded == 0) topk::scatter_to_memories(selection, missing);
  if (options_.momentum) {
    std::fill(missing.begin(), missing.end(), 0.0F);
    topk::scatter({entries.index, entries.count}, missing, 0, selection.whole().momentum.next);
  }
  return result;
}

void TopKCodec::check_velocity(const Context& ctx, const Memory* memory) const {
  if (memory != nullptr &&
      memory->velocity().size() == static_cast<std::size_t>(memory->elements())) {
    return;
  }
  fail_argument(
      ctx, name() +
               (memory == nullptr ? " without a memory" : " with a memory that keeps no velocity") +
               ", expected one with a velocity\nhint: make the memory with the codec's "
               "memory_needs(n), and leave ef=on");
}

TopKCodec::State TopKCodec::read_state(const Memory* memory) const {
  if (memory == nullptr || memory->state().size() != kStateFloats) return {};
  const std::span<const float> state = memory->state();
  return {.carried = {.threshold = state[0], .ideal = state[1], .trend = state[2]},
          .norm = state[3]};
}

topk::Momentum TopKCodec::momentum_of(const Context& ctx, TensorView grad, const Memory& memory,
                                      float last_norm) const {
  const TopKMomentum& options = *options_.momentum;
  topk::Momentum momentum{.velocity = memory.velocity().data(),
                          .factor = static_cast<float>(options.factor),
                          .nesterov = options.nesterov};
  if (options.clip > 0) {
    const double norm = clips_by_last() && last_norm > 0
                            ? double{last_norm} * double{ctx.loss_scale}
                            : std::sqrt(topk::sum_of_squares(grad.data, grad.dtype, grad.elements));
    const double most =
        options.clip * double{ctx.loss_scale} / std::sqrt(static_cast<double>(ctx.world_size));
    // Not so where the norm is NaN, which the pass will find.
    if (norm > most) momentum.scale = static_cast<float>(most / norm);
  }
  return momentum;
}

std::size_t TopKCodec::room(std::size_t slot, std::size_t count) const {
  return slot - kHeaderBytes - topk_value_bytes(options_.values, count);
}

TopKIndexCoding TopKCodec::fit(std::int64_t n, std::size_t slot, topk::Candidates& c) const {
  for (;;) {
    const TopKIndexCoding coding = choose_topk_coding(n, {c.index, c.count});
    const std::size_t bytes = room(slot, c.count);
    if (coding.bytes() <= bytes) return coding;
    const std::uint64_t excess = coding.bits - 8 * bytes;
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

std::size_t TopKCodec::write_body(std::int64_t n, const TopKIndexCoding& coding, std::uint32_t low,
                                  const topk::Candidates& entries, std::span<std::byte> out) const {
  const auto count = static_cast<std::uint32_t>(entries.count);
  out[0] = static_cast<std::byte>(mode());
  out[1] = static_cast<std::byte>(static_cast<std::uint32_t>(coding.parameter) |
                                  (coding.bitmap ? kBitmapFlag : 0) |
                                  kind() % kKindsAMode << kValuesShift);
  std::memcpy(out.data() + 2, &count, sizeof count);
  const std::size_t value_bytes = topk_value_bytes(options_.values, entries.count);
  write_topk_values(options_.values, low, {entries.value, entries.count},
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
  topk::check_dtype(ctx, "topk", out.dtype);
  if (decode_mark(ctx, body, mode(), out)) return;
  Entries entries(*this, ctx, body, out.elements);
  fill_zero(out);
  while (entries.next()) topk::scatter(entries.indices(), entries.values(), out);
}

void TopKCodec::accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                           std::span<float> out) const {
  if (accumulate_mark(ctx, body, mode(), out)) return;
  Entries entries(*this, ctx, body, static_cast<std::int64_t>(out.size()));
  while (entries.next()) {
    topk::scatter_add(entries.indices(), entries.values(), weight, out.data());
  }
}

void TopKCodec::sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                    float weight, std::span<float> out) const {
  sum_joint(ctx, bodies, weight, {&out, 1});
}

// Range by range in the L1 cache, where all bodies add their entries, and from there to the outs,
// which are written once for kTogether bodies, whole cache lines at a time.
void TopKCodec::sum_joint(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                          float weight, std::span<const std::span<float>> outs) const {
  check_device(ctx);
  std::size_t n = 0;
  for (const std::span<float> out : outs) n += out.size();
  const bool streaming = n * sizeof(float) >= kStreamBytes;
  alignas(kLineBytes) std::array<float, kSumElements> storage = {};
  bool nonfinite = false;
  Context of_sender = ctx;
  for (std::size_t first = 0; first == 0 || first < bodies.size(); first += kTogether) {
    std::array<std::optional<Entries>, kTogether> entries;
    const std::size_t last = std::min(first + kTogether, bodies.size());
    for (std::size_t i = first; i < last; ++i) {
      of_sender.sender = static_cast<std::int32_t>(i);
      if (accumulate_mark(of_sender, bodies[i], mode(), {})) {
        nonfinite |= bodies[i][0] == static_cast<std::byte>(BodyMode::kNonFinite);
      } else {
        entries[i - first].emplace(*this, of_sender, bodies[i], static_cast<std::int64_t>(n));
      }
    }
    std::size_t done = 0;
    for (const std::span<float> out : outs) {
      const std::size_t past_line = reinterpret_cast<std::uintptr_t>(out.data()) % kLineBytes;
      // All ranges of an out but the first begin a cache line.
      std::size_t size = kSumElements - past_line / sizeof(float);
      for (std::size_t begin = 0; begin < out.size(); begin += size, size = kSumElements) {
        size = std::min(size, out.size() - begin);
        const std::span<float> range = std::span(storage).first(size);
        const std::span<float> place = out.subspan(begin, size);
        if (first > 0) std::copy(place.begin(), place.end(), range.begin());
        for (std::optional<Entries>& sender : entries) {
          if (sender) sender->add_to(range, done + begin, weight);
        }
        topk::move_out(range, place.data(), streaming);
      }
      done += out.size();
    }
  }
  if (streaming) hwy::FlushStream();
  for (const std::span<float> out : outs) {
    if (nonfinite) fill_nan(out);
  }
}

void check_momentum(const TopKMomentum& momentum) {
  if (!(momentum.factor >= 0 && momentum.factor < 1)) {
    throw InvalidArgument("topk: momentum " + number_text(momentum.factor) +
                          ", expected 0 or more and less than 1");
  }
  if (!(momentum.clip >= 0 && std::isfinite(momentum.clip))) {
    throw InvalidArgument("topk: clip " + number_text(momentum.clip) +
                          ", expected a norm above 0, or 0 for none");
  }
  if (momentum.clip == 0 && momentum.clip_norm != TopKClipNorm::kTensor) {
    throw InvalidArgument("topk: a clip_norm without clip");
  }
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
  if (options.chunk != 0 && options.select != TopKSelect::kExact) {
    throw InvalidArgument("topk: a chunk's selection is exact, expected no other select");
  }
  if (options.k < 0) {
    throw InvalidArgument("topk: k = " + std::to_string(options.k) + ", expected 1 or more");
  }
  if (options.scope == TopKScope::kBucket &&
      (options.select != TopKSelect::kExact || options.chunk != 0 || options.momentum)) {
    throw InvalidArgument(
        "topk: a bucket's selection is exact, expected no other select, no chunk, no momentum");
  }
  if (options.momentum) check_momentum(*options.momentum);
  return std::make_shared<TopKCodec>(options);
}

}  // namespace thinwire
