#include "integrations/torch/csrc/frame.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr std::uint32_t kMagic = 0x31465754;  // "TWF1"
constexpr std::size_t kFixedBytes = 12;
constexpr std::size_t kChecksumBegin = 8;
static_assert(std::endian::native == std::endian::little, "the frame is little-endian");

// `header` is at least kFixedBytes long; its checksum field counts as zero.
std::uint32_t checksum(std::span<const std::byte> header) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const std::uint32_t zero = 0;
  XXH3_64bits_update(&state, header.data(), kChecksumBegin);
  XXH3_64bits_update(&state, &zero, sizeof zero);
  const auto rest = header.subspan(kFixedBytes);
  XXH3_64bits_update(&state, rest.data(), rest.size());
  return static_cast<std::uint32_t>(XXH3_64bits_digest(&state));
}

[[noreturn]] void corrupt(const std::string& what) {
  throw CorruptPayload("frame: " + what +
                       "\nhint: pass the bytes of thinwire.codec(...).encode() unchanged");
}

}  // namespace

std::size_t frame_header_bytes(const FrameHeader& header) {
  return kFixedBytes + header.shape.size() * sizeof(std::uint64_t) + header.spec.size();
}

void write_frame(const FrameHeader& header, std::span<std::byte> out) {
  if (header.shape.size() > kMaxFrameDimensions || header.spec.size() > 255) {
    throw InvalidArgument(
        "expected at most 32 dimensions and a spec of at most 255 characters, got " +
        std::to_string(header.shape.size()) + " and " + std::to_string(header.spec.size()));
  }
  const std::size_t size = frame_header_bytes(header);
  std::byte* p = out.data();
  std::memset(p, 0, kFixedBytes);
  std::memcpy(p, &kMagic, sizeof kMagic);
  p[4] = static_cast<std::byte>(header.dtype);
  p[5] = static_cast<std::byte>(header.kind);
  p[6] = static_cast<std::byte>(header.shape.size());
  p[7] = static_cast<std::byte>(header.spec.size());
  std::byte* shape = p + kFixedBytes;
  if (!header.shape.empty()) {
    std::memcpy(shape, header.shape.data(), header.shape.size() * sizeof(std::int64_t));
  }
  std::memcpy(shape + header.shape.size() * sizeof(std::int64_t), header.spec.data(),
              header.spec.size());
  const std::uint32_t sum = checksum(out.first(size));
  std::memcpy(p + kChecksumBegin, &sum, sizeof sum);
}

FrameHeader read_frame(std::span<const std::byte> frame, std::int64_t max_elements) {
  if (frame.size() < kFixedBytes) {
    corrupt("expected at least 12 bytes, got " + std::to_string(frame.size()));
  }
  std::uint32_t magic = 0;
  std::memcpy(&magic, frame.data(), sizeof magic);
  if (magic != kMagic) {
    corrupt("it does not begin with TWF1");
  }
  FrameHeader header;
  const auto dtype = std::to_integer<std::uint8_t>(frame[4]);
  header.kind = std::to_integer<std::uint8_t>(frame[5]);
  const auto dimensions = std::to_integer<std::size_t>(frame[6]);
  const auto spec_bytes = std::to_integer<std::size_t>(frame[7]);
  const std::size_t size = kFixedBytes + dimensions * sizeof(std::int64_t) + spec_bytes;
  if (dimensions > kMaxFrameDimensions || size > frame.size()) {
    corrupt("its header is longer than the frame");
  }
  std::uint32_t sum = 0;
  std::memcpy(&sum, frame.data() + kChecksumBegin, sizeof sum);
  if (sum != checksum(frame.first(size))) {
    corrupt("checksum of the header is wrong");
  }
  if (dtype > static_cast<std::uint8_t>(DType::kF64) || header.kind > 1) {
    corrupt("unknown dtype or kind of array");
  }
  header.dtype = static_cast<DType>(dtype);
  header.shape.resize(dimensions);
  std::memcpy(header.shape.data(), frame.data() + kFixedBytes, dimensions * sizeof(std::int64_t));
  header.spec.assign(reinterpret_cast<const char*>(frame.data()) + size - spec_bytes, spec_bytes);
  if (std::any_of(header.spec.begin(), header.spec.end(),
                  [](char c) { return static_cast<unsigned char>(c) > 0x7F; })) {
    corrupt("its codec is not named in ASCII");
  }
  // An extent of 0 hides no impossible one beside it: the arrays' libraries multiply all others.
  auto bytes = static_cast<std::int64_t>(size_bytes(header.dtype));
  header.elements = 1;
  for (const std::int64_t extent : header.shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, std::max<std::int64_t>(extent, 1), &bytes)) {
      corrupt("impossible shape");
    }
    header.elements *= extent;
  }
  if (header.elements > max_elements) {
    corrupt(std::to_string(header.elements) +
            " elements are more than max_elements=" + std::to_string(max_elements));
  }
  header.message_begin = size;
  return header;
}

}  // namespace thinwire
