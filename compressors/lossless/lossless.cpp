#include "compressors/lossless/lossless.h"

#include <hwy/cache_control.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "compressors/core/codec_support.h"
#include "compressors/core/workspace.h"
#include "compressors/lossless/lossless_kernels.h"

namespace thinwire {
namespace {

using namespace lossless;

constexpr auto kMode = static_cast<std::uint8_t>(BodyMode::kFamily) + 32;
constexpr std::size_t kHeaderBytes = 2;  // mode, dtype

// How a chunk's symbols are sent (FORMAT.md).
enum class Symbols : std::uint8_t { kPlain = 0, kCoded = 1, kOne = 2 };
constexpr std::size_t kSizesBytes = kStreams * sizeof(std::uint16_t);
static_assert(kChunk / kStreams * kMaxLength / 8 <= 0xFFFF);

std::size_t chunk_elements(std::int64_t n) { return static_cast<std::size_t>(std::min(n, kChunk)); }

// Bytes that the lengths of symbols [first, last] take, a nibble each.
std::size_t length_bytes(std::size_t first, std::size_t last) { return (last - first) / 2 + 1; }

// One pass over the bytes of a body; CorruptPayload where they end too early.
class Reader {
 public:
  Reader(const Context& ctx, std::span<const std::byte> bytes) : ctx_(ctx), bytes_(bytes) {}

  std::span<const std::byte> take(std::size_t size) {
    if (size > bytes_.size()) {
      fail_corrupt(ctx_, "lossless body that ends " + std::to_string(size - bytes_.size()) +
                             " bytes too early");
    }
    const auto taken = bytes_.first(size);
    bytes_ = bytes_.subspan(size);
    return taken;
  }
  std::uint8_t byte() { return std::to_integer<std::uint8_t>(take(1)[0]); }

 private:
  const Context& ctx_;
  std::span<const std::byte> bytes_;
};

// Encodes one chunk after the other to `out`.
class Writer {
 public:
  Writer(std::byte* out, std::span<std::uint8_t> scratch) : out_(out), scratch_(scratch) {}

  void chunk(TensorView values);
  std::byte* end() const { return out_; }
  bool finite() const { return finite_; }

 private:
  bool coded(std::span<const std::uint8_t> symbols, const std::array<Counts, kStreams>& counts,
             const Counts& all, std::size_t first, std::size_t last);

  std::byte* out_;
  std::span<std::uint8_t> scratch_;  // symbols of a chunk
  bool finite_ = true;
};

void Writer::chunk(TensorView values) {
  const auto n = static_cast<std::size_t>(values.elements);
  const auto symbols = scratch_.first(n);
  split(values, out_, symbols.data());
  out_ += raw_bytes(values.dtype, values.elements);
  std::array<Counts, kStreams> counts{};
  count_symbols(symbols, counts);
  Counts all{};
  for (const Counts& of_stream : counts) {
    for (std::size_t s = 0; s < kSymbols; ++s) all[s] += of_stream[s];
  }
  std::size_t first = 0;
  std::size_t last = kSymbols - 1;
  while (all[first] == 0) ++first;
  while (all[last] == 0) --last;
  finite_ = finite_ && last < first_nonfinite(values.dtype);
  if (first == last) {
    *out_++ = static_cast<std::byte>(Symbols::kOne);
    *out_++ = static_cast<std::byte>(first);
  } else if (!coded(symbols, counts, all, first, last)) {
    *out_++ = static_cast<std::byte>(Symbols::kPlain);
    std::memcpy(out_, symbols.data(), n);
    out_ += n;
  }
}

// Writes the symbols as codes unless that takes more bytes than they have.
bool Writer::coded(std::span<const std::uint8_t> symbols,
                   const std::array<Counts, kStreams>& counts, const Counts& all, std::size_t first,
                   std::size_t last) {
  const Lengths lengths = code_lengths(all);
  Streams sizes{};
  for (std::size_t s = 0; s < kStreams; ++s) {
    std::size_t bits = 0;
    for (std::size_t symbol = first; symbol <= last; ++symbol) {
      bits += std::size_t{counts[s][symbol]} * lengths[symbol];
    }
    sizes[s] = (bits + 7) / 8;
  }
  const std::size_t code = 2 + length_bytes(first, last) + kSizesBytes;
  const std::size_t total = std::accumulate(sizes.begin(), sizes.end(), code);
  if (total >= symbols.size()) return false;

  *out_++ = static_cast<std::byte>(Symbols::kCoded);
  *out_++ = static_cast<std::byte>(first);
  *out_++ = static_cast<std::byte>(last);
  for (std::size_t s = first; s <= last; s += 2) {
    const int above = s < last ? lengths[s + 1] : 0;
    *out_++ = static_cast<std::byte>(lengths[s] | above << 4);
  }
  for (const std::size_t size : sizes) {
    const auto bytes = static_cast<std::uint16_t>(size);
    std::memcpy(out_, &bytes, sizeof(bytes));
    out_ += sizeof(bytes);
  }
  encode_streams(symbols, make_codes(lengths), sizes, out_);
  out_ += total - code;
  return true;
}

// Reads a chunk's symbols to `scratch`, or finds them in the body. `table` is scratch, too.
const std::uint8_t* read_symbols(const Context& ctx, Reader& in, std::span<std::uint8_t> scratch,
                                 DecodeTable& table) {
  switch (static_cast<Symbols>(in.byte())) {
    case Symbols::kPlain:
      return reinterpret_cast<const std::uint8_t*>(in.take(scratch.size()).data());
    case Symbols::kOne:
      std::fill(scratch.begin(), scratch.end(), in.byte());
      return scratch.data();
    case Symbols::kCoded:
      break;
    default:
      fail_corrupt(ctx, "lossless body with a chunk of no known kind");
  }
  const std::size_t first = in.byte();
  const std::size_t last = in.byte();
  if (first > last) fail_corrupt(ctx, "lossless body whose code has no symbols");
  const auto nibbles = in.take(length_bytes(first, last));
  Lengths lengths{};
  for (std::size_t s = first; s <= last; ++s) {
    const auto pair = std::to_integer<std::uint8_t>(nibbles[(s - first) / 2]);
    lengths[s] = (s - first) % 2 == 0 ? pair & 0xF : pair >> 4;
  }
  if (!is_complete(lengths)) fail_corrupt(ctx, "lossless body whose lengths are no prefix code");
  fill_decode_table(lengths, table);
  extend_decode_table(table);
  const auto size_field = in.take(kSizesBytes);
  Streams sizes{};
  for (std::size_t s = 0; s < kStreams; ++s) {
    std::uint16_t bytes = 0;
    std::memcpy(&bytes, size_field.data() + s * sizeof(bytes), sizeof(bytes));
    sizes[s] = bytes;
  }
  const auto streams = in.take(std::accumulate(sizes.begin(), sizes.end(), std::size_t{0}));
  if (!decode_streams(streams.data(), sizes, table, scratch)) {
    fail_corrupt(ctx, "lossless body with a stream that is too short or too long");
  }
  return scratch.data();
}

// Calls use(begin, size, dtype, raw parts, symbols) for every chunk of an n-element body.
template <typename F>
void for_each_chunk(const Context& ctx, std::span<const std::byte> body, std::int64_t n, F&& use) {
  Reader in(ctx, body.subspan(1));
  const std::uint8_t code = in.byte();
  if (code > static_cast<std::uint8_t>(DType::kF16)) {
    fail_corrupt(ctx, "lossless body of dtype " + std::to_string(code) +
                          ", expected 0 (fp32), 1 (bf16) or 2 (fp16)");
  }
  const auto type = static_cast<DType>(code);
  const auto scratch = Workspace(ctx.workspace).take<std::uint8_t>(chunk_elements(n));
  DecodeTable table;
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    const std::int64_t size = std::min(kChunk, n - begin);
    const auto raw = in.take(static_cast<std::size_t>(raw_bytes(type, size)));
    const std::uint8_t* symbols =
        read_symbols(ctx, in, scratch.first(static_cast<std::size_t>(size)), table);
    use(begin, size, type, raw.data(), symbols);
  }
}

class LosslessCodec final : public PayloadCodec {
 public:
  std::string name() const override { return "lossless"; }
  Traits traits() const override {
    return {.lossless = true, .exact_sum = true, .granularity = kChunk};
  }
  std::size_t slot_bytes(std::int64_t n) const override {
    const std::int64_t chunks = (n + kChunk - 1) / kChunk;
    return kHeaderBytes + static_cast<std::size_t>(chunks) +
           static_cast<std::size_t>(n) * sizeof(float);
  }
  std::size_t workspace_bytes(std::int64_t n) const override {
    return Workspace::bytes_for<std::uint8_t>(chunk_elements(n)) +
           Workspace::bytes_for<float>(chunk_elements(n));
  }

  EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                      std::span<std::byte> out) const override {
    check_encode(ctx, grad, memory, out, slot_bytes(grad.elements));
    if (grad.dtype == DType::kF64) {
      fail_argument(ctx,
                    "gradient of fp64, expected fp32, bf16 or fp16\nhint: the codec none sends "
                    "fp64 as it is");
    }
    const BodyMode mark = look_ahead(grad, memory);
    if (mark != BodyMode::kFamily) return write_mark(mark, out);
    out[0] = std::byte{kMode};
    out[1] = static_cast<std::byte>(memory == nullptr ? grad.dtype : DType::kF32);
    Workspace workspace(ctx.workspace);
    Writer writer(out.data() + kHeaderBytes,
                  workspace.take<std::uint8_t>(chunk_elements(grad.elements)));
    if (memory == nullptr) {
      for (std::int64_t begin = 0; begin < grad.elements; begin += kChunk) {
        writer.chunk(grad.slice(begin, std::min(begin + kChunk, grad.elements)));
      }
    } else {
      encode_sum(grad, *memory, workspace.take<float>(chunk_elements(grad.elements)), writer);
    }
    const auto bytes = static_cast<std::size_t>(writer.end() - out.data());
    // Without a memory the values went out as they are.
    if (memory == nullptr) return {.bytes = bytes, .nonfinite = !writer.finite()};
    return finish_encode(writer.finite(), bytes, memory, out);
  }

  void decode(const Context& ctx, std::span<const std::byte> body, TensorView out) const override {
    if (decode_mark(ctx, body, kMode, out)) return;
    const bool past_caches =
        out.bytes() >= kStreamBytes && reinterpret_cast<std::uintptr_t>(out.data) % 64 == 0;
    for_each_chunk(ctx, body, out.elements,
                   [&](std::int64_t begin, std::int64_t size, DType type, const std::byte* raw,
                       const std::uint8_t* symbols) {
                     join(type, raw, symbols, out.slice(begin, begin + size), past_caches);
                   });
    if (past_caches) hwy::FlushStream();
  }

  void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                  std::span<float> out) const override {
    if (accumulate_mark(ctx, body, kMode, out)) return;
    for_each_chunk(ctx, body, static_cast<std::int64_t>(out.size()),
                   [&](std::int64_t begin, std::int64_t size, DType type, const std::byte* raw,
                       const std::uint8_t* symbols) {
                     lossless::accumulate(type, raw, symbols, weight, out.data() + begin, size);
                   });
  }

 private:
  // v chunk by chunk through `v`; all of it is sent, so that nothing is left.
  static void encode_sum(TensorView grad, Memory& memory, std::span<float> v, Writer& writer) {
    const float* residual = memory.current().data();
    float* next = memory.next().data();
    for (std::int64_t begin = 0; begin < grad.elements; begin += kChunk) {
      const std::int64_t end = std::min(begin + kChunk, grad.elements);
      const auto values = v.first(static_cast<std::size_t>(end - begin));
      add_residual(grad.slice(begin, end), residual + begin, memory.decay(), values.data());
      std::fill(next + begin, next + end, 0.0F);
      writer.chunk(view(values));
    }
  }
};

}  // namespace

std::shared_ptr<const PayloadCodec> make_lossless_codec() {
  return std::make_shared<LosslessCodec>();
}

}  // namespace thinwire
