#include "compressors/fedzip/fedzip.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>

#include "compressors/core/codec_support.h"
#include "compressors/core/spec_text.h"
#include "compressors/core/workspace.h"
#include "compressors/fedzip/fedzip_clusters.h"
#include "compressors/fedzip/fedzip_labels.h"
#include "compressors/topk/topk_index.h"
#include "compressors/topk/topk_sample.h"
#include "compressors/topk/topk_selection.h"

namespace thinwire {
namespace {

// Mode; gap parameter, bitmap flag and code of the labels in one byte; 32-bit count of labels;
// clusters - 1.
constexpr std::size_t kHeaderBytes = 7;
constexpr std::uint8_t kMode = 56;
constexpr std::uint32_t kParameterMask = 0x1F;
constexpr std::uint32_t kBitmapFlag = 0x20;
constexpr int kCodeShift = 6;
// Entries that are decoded at a time, into arrays on the stack.
constexpr std::size_t kBatch = 256;
// A body that exceeds its slot is tried again with so much less than would fit at its own ratio.
constexpr double kShrink = 0.995;

// From half of the elements on, a label for every element, zeros among them, takes less than
// positions: both take 1.5 n bits at density 1/2 and k = 3.
bool is_dense(std::int64_t n, std::int64_t entries) { return 2 * entries > n; }

class FedzipCodec final : public PayloadCodec {
 public:
  explicit FedzipCodec(const FedzipOptions& options) : options_(options) {}

  std::string name() const override {
    std::string text = "fedzip:" + number_text(options_.density);
    if (options_.clusters != FedzipOptions().clusters) {
      text += ",k=" + std::to_string(options_.clusters);
    }
    return text;
  }

  Traits traits() const override { return {.sparse = true, .granularity = 0}; }

  std::size_t slot_bytes(std::int64_t n) const override;
  std::size_t workspace_bytes(std::int64_t n) const override;
  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override;
  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override;
  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override;

 private:
  // Entries of an n-element tensor, in [1, n]; 0 for n = 0.
  std::int64_t keep(std::int64_t n) const {
    return topk::keep_count("fedzip", n, options_.density * static_cast<double>(n));
  }
  // Labels of a body at most.
  std::size_t most_labels(std::int64_t n) const {
    return static_cast<std::size_t>(is_dense(n, keep(n)) ? n : keep(n));
  }
  std::size_t most_clusters() const { return static_cast<std::size_t>(options_.clusters - 1); }
  class Entries;

  FedzipOptions options_;
};

std::size_t FedzipCodec::slot_bytes(std::int64_t n) const {
  const std::int64_t k = keep(n);
  if (k == 0) return 1;
  std::size_t clusters = std::min(most_clusters(), static_cast<std::size_t>(k));
  std::size_t position_bytes = 0;
  if (is_dense(n, k)) {
    ++clusters;
  } else {
    position_bytes = plan_topk_indices(n, k);
  }
  return kHeaderBytes + clusters * sizeof(float) + label_slot_bytes(most_labels(n), clusters) +
         position_bytes;
}

std::size_t FedzipCodec::workspace_bytes(std::int64_t n) const {
  const std::int64_t k = keep(n);
  if (k == 0) return 0;
  const std::size_t labels = most_labels(n);
  return topk::selection_bytes(n, k) +
         Workspace::bytes_for<std::uint8_t>(static_cast<std::size_t>(k)) +
         Workspace::bytes_for<std::uint8_t>(labels) +
         Workspace::bytes_for<std::byte>(label_scratch_bytes(labels)) + cluster_scratch_bytes();
}

// One attempt at a body: the parts whose sizes are known before any is written.
struct Draft {
  FedzipClusters clusters;
  std::span<std::uint8_t> label_of_entry;
  std::span<const std::uint8_t> labels;  // of the entries, or of all elements
  LabelPlan label_plan;
  TopKIndexCoding positions;
  std::size_t bytes = 0;
};

// Scratch of an encode.
struct Room {
  std::span<std::uint8_t> of_entries;
  std::span<std::uint8_t> of_elements;
  std::span<std::byte> stream;
  Workspace rest;
};

Draft draft_body(std::int64_t n, const topk::Candidates& entries, std::size_t most_clusters,
                 const Room& room) {
  const std::span<const std::uint32_t> indices(entries.index, entries.count);
  Draft draft;
  draft.label_of_entry = room.of_entries.first(entries.count);
  draft.clusters = cluster_values({entries.value, entries.count}, most_clusters, room.rest,
                                  draft.label_of_entry);
  FedzipClusters& clusters = draft.clusters;
  draft.labels = draft.label_of_entry;
  if (entries.count == 0) {
    draft.bytes = kHeaderBytes - 1;
    return draft;
  }
  if (is_dense(n, static_cast<std::int64_t>(entries.count))) {
    const auto all = room.of_elements.first(static_cast<std::size_t>(n));
    std::fill(all.begin(), all.end(), static_cast<std::uint8_t>(clusters.size));
    for (std::size_t i = 0; i < indices.size(); ++i) all[indices[i]] = draft.label_of_entry[i];
    draft.labels = all;
    if (all.size() > entries.count) {
      clusters.centroid[clusters.size] = 0;
      clusters.count[clusters.size] = static_cast<std::uint32_t>(all.size() - entries.count);
      ++clusters.size;
    }
  } else {
    draft.positions = choose_topk_coding(n, indices);
  }
  draft.label_plan =
      plan_labels(draft.labels, std::span<const std::uint32_t>(clusters.count).first(clusters.size),
                  room.stream);
  draft.bytes = kHeaderBytes + clusters.size * sizeof(float) + draft.label_plan.bytes +
                draft.positions.bytes();
  return draft;
}

void write_body(const Draft& draft, std::int64_t n, std::span<const std::uint32_t> indices,
                std::span<std::byte> out) {
  const FedzipClusters& clusters = draft.clusters;
  const auto count = static_cast<std::uint32_t>(draft.labels.size());
  out[0] = static_cast<std::byte>(kMode);
  out[1] = static_cast<std::byte>(static_cast<std::uint32_t>(draft.positions.parameter) |
                                  (draft.positions.bitmap ? kBitmapFlag : 0) |
                                  static_cast<std::uint32_t>(draft.label_plan.code) << kCodeShift);
  std::memcpy(out.data() + 2, &count, sizeof count);
  if (count == 0) return;
  out[kHeaderBytes - 1] = static_cast<std::byte>(clusters.size - 1);
  std::byte* to = out.data() + kHeaderBytes;
  std::memcpy(to, clusters.centroid.data(), clusters.size * sizeof(float));
  to += clusters.size * sizeof(float);
  write_labels(draft.label_plan, draft.labels, clusters.size, to);
  to += draft.label_plan.bytes;
  if (draft.labels.size() == static_cast<std::size_t>(n)) return;
  write_topk_indices(draft.positions, n, indices, {to, out.data() + draft.bytes});
}

EncodeResult FedzipCodec::encode(const Context& ctx, TensorView grad, Memory* memory,
                                 std::span<std::byte> out) const {
  const std::int64_t n = grad.elements;
  const std::size_t slot = slot_bytes(n);
  check_encode(ctx, grad, memory, out, slot);
  topk::check_dtype(ctx, "fedzip", grad.dtype);
  Workspace workspace(ctx.workspace);
  const JointCodec::Part tensor{grad, memory};
  topk::Selection selection = topk::select_largest(ctx, {&tensor, 1}, {.keep = keep(n)}, workspace);
  if (selection.mode != BodyMode::kFamily) return write_mark(selection.mode, out);
  topk::Candidates& entries = selection.entries;
  const auto of_entries = workspace.take<std::uint8_t>(entries.keep);
  const auto of_elements = workspace.take<std::uint8_t>(most_labels(n));
  const auto stream = workspace.take<std::byte>(label_scratch_bytes(most_labels(n)));
  const Room room{of_entries, of_elements, stream, workspace};
  Draft draft = draft_body(n, entries, most_clusters(), room);
  while (draft.bytes > slot) {
    const double share = kShrink * static_cast<double>(slot) / static_cast<double>(draft.bytes);
    // One entry always fits.
    entries.keep = std::max<std::size_t>(
        1, static_cast<std::size_t>(share * static_cast<double>(entries.count)));
    topk::keep_largest(entries);
    draft = draft_body(n, entries, most_clusters(), room);
  }
  const std::span<const std::uint32_t> indices(entries.index, entries.count);
  write_body(draft, n, indices, out);
  if (memory != nullptr) {
    const std::span<float> values(entries.value, entries.count);
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] -= draft.clusters.centroid[draft.label_of_entry[i]];
    }
    topk::scatter_to_memories(selection, values);
  }
  return {.bytes = draft.bytes};
}

// The entries of one body, a batch at a time, in index order.
class FedzipCodec::Entries {
 public:
  // body: of kMode. CorruptPayload here and in next() for what cannot be a body of n elements.
  Entries(const FedzipCodec& codec, const Context& ctx, std::span<const std::byte> body,
          std::int64_t n);

  // False after the last batch.
  bool next();
  std::span<const std::uint32_t> indices() const { return std::span(indices_).first(size_); }
  std::span<const float> values() const { return std::span(values_).first(size_); }

 private:
  void read_centroids(std::span<const std::byte> bytes);

  const Context& ctx_;
  std::size_t count_ = 0;  // labels
  std::size_t read_ = 0;
  std::size_t size_ = 0;  // of the batch
  std::optional<LabelReader> labels_;
  std::optional<TopKIndexReader> positions_;  // none where every element has a label
  std::array<float, kFedzipMostClusters> centroids_;
  std::array<std::uint32_t, kBatch> indices_;
  std::array<float, kBatch> values_;
};

FedzipCodec::Entries::Entries(const FedzipCodec& codec, const Context& ctx,
                              std::span<const std::byte> body, std::int64_t n)
    : ctx_(ctx) {
  if (body.size() < kHeaderBytes - 1) {
    fail_corrupt(ctx, "a fedzip body of " + std::to_string(body.size()) +
                          " bytes, expected at least " + std::to_string(kHeaderBytes - 1));
  }
  const auto layout = std::to_integer<std::uint32_t>(body[1]);
  std::uint32_t count = 0;
  std::memcpy(&count, body.data() + 2, sizeof count);
  if (count == 0) return;
  const bool dense = static_cast<std::int64_t>(count) == n && is_dense(n, codec.keep(n));
  if (static_cast<std::int64_t>(count) > codec.keep(n) && !dense) {
    fail_corrupt(ctx, "a fedzip body of " + std::to_string(count) + " labels, expected at most " +
                          std::to_string(codec.keep(n)));
  }
  count_ = count;
  const std::size_t clusters =
      body.size() < kHeaderBytes ? 0 : std::to_integer<std::size_t>(body[kHeaderBytes - 1]) + 1;
  const std::size_t most = codec.most_clusters() + (dense ? 1 : 0);
  const std::size_t head_bytes = kHeaderBytes + clusters * sizeof(float);
  if (clusters == 0 || clusters > most || body.size() < head_bytes) {
    fail_corrupt(ctx, "a fedzip body of " + std::to_string(body.size()) + " bytes and " +
                          std::to_string(clusters) + " clusters, expected at most " +
                          std::to_string(most));
  }
  std::memcpy(centroids_.data(), body.data() + kHeaderBytes, clusters * sizeof(float));
  if (!std::all_of(centroids_.begin(), centroids_.begin() + static_cast<std::ptrdiff_t>(clusters),
                   [](float centroid) { return is_finite(centroid); })) {
    fail_corrupt(ctx, "a fedzip body with a centroid that is not finite");
  }
  if (layout >> kCodeShift > static_cast<std::uint32_t>(LabelCode::kRans)) {
    fail_corrupt(ctx, "a fedzip body with labels in an unknown code");
  }
  try {
    const auto rest = body.subspan(head_bytes);
    labels_.emplace(static_cast<LabelCode>(layout >> kCodeShift), clusters, count, rest);
    if (!dense) {
      positions_.emplace((layout & kBitmapFlag) != 0, static_cast<int>(layout & kParameterMask), n,
                         count, rest.subspan(labels_->bytes()));
    }
  } catch (const CorruptPayload& error) {
    fail_corrupt(ctx, error.what());
  }
}

bool FedzipCodec::Entries::next() {
  size_ = 0;
  if (read_ == count_) return false;
  std::array<std::uint8_t, kBatch> storage;
  const auto labels = std::span(storage).first(std::min(kBatch, count_ - read_));
  try {
    labels_->next(labels);
    if (positions_) {
      positions_->next(std::span(indices_).first(labels.size()));
    }
  } catch (const CorruptPayload& error) {
    fail_corrupt(ctx_, error.what());
  }
  if (positions_) {
    for (std::size_t i = 0; i < labels.size(); ++i) values_[i] = centroids_[labels[i]];
    size_ = labels.size();
  } else {
    for (std::size_t i = 0; i < labels.size(); ++i) {
      values_[size_] = centroids_[labels[i]];
      indices_[size_] = static_cast<std::uint32_t>(read_ + i);
      if (values_[size_] != 0) ++size_;
    }
  }
  read_ += labels.size();
  return true;
}

void FedzipCodec::decode(const Context& ctx, std::span<const std::byte> body,
                         TensorView out) const {
  topk::check_dtype(ctx, "fedzip", out.dtype);
  if (decode_mark(ctx, body, kMode, out)) return;
  Entries entries(*this, ctx, body, out.elements);
  fill_zero(out);
  while (entries.next()) topk::scatter(entries.indices(), entries.values(), out);
}

void FedzipCodec::accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                             std::span<float> out) const {
  if (accumulate_mark(ctx, body, kMode, out)) return;
  Entries entries(*this, ctx, body, static_cast<std::int64_t>(out.size()));
  while (entries.next()) {
    topk::scatter_add(entries.indices(), entries.values(), weight, out.data());
  }
}

}  // namespace

std::shared_ptr<const PayloadCodec> make_fedzip_codec(const FedzipOptions& options) {
  if (!(options.density > 0 && options.density <= 1)) {
    throw InvalidArgument("fedzip: density " + number_text(options.density) +
                          ", expected more than 0 and at most 1");
  }
  if (options.clusters < kLeastFedzipClusters || options.clusters > kMostFedzipClusters) {
    throw InvalidArgument("fedzip: k = " + std::to_string(options.clusters) + ", expected " +
                          std::to_string(kLeastFedzipClusters) + " to " +
                          std::to_string(kMostFedzipClusters));
  }
  return std::make_shared<FedzipCodec>(options);
}

}  // namespace thinwire
