// The Python frame: what thinwire.codec(...).encode() returns. Shape, dtype and codec spec before
// one message, so that decode needs nothing else (FORMAT.md, "Python frame"). Pure functions,
// thread-safe; the caller owns all memory. Little-endian:
//
//   0  u32  magic "TWF1"
//   4  u8   dtype (DType)
//   5  u8   kind of array: 0 numpy, 1 torch
//   6  u8   dimensions D, at most 32
//   7  u8   length S of the spec
//   8  u32  low half of XXH3-64 over the frame header with these four bytes zero
//   12 u64  extent of each dimension, D times
//      S bytes: the codec's canonical spec
//      the message: payload header and body, or the raw values where the spec is "none"
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "compressors/core/dtype.h"

namespace thinwire {

inline constexpr std::size_t kMaxFrameDimensions = 32;

struct FrameHeader {
  DType dtype = DType::kF32;
  std::uint8_t kind = 0;
  std::vector<std::int64_t> shape;
  std::string spec;
  std::int64_t elements = 0;      // product of the shape; set by read_frame
  std::size_t message_begin = 0;  // offset in the frame; set by read_frame
};

std::size_t frame_header_bytes(const FrameHeader& header);
// Fills out[0, frame_header_bytes). InvalidArgument: more than 32 dimensions, a spec over 255
// bytes.
void write_frame(const FrameHeader& header, std::span<std::byte> out);
// CorruptPayload for anything write_frame does not make, or more than `max_elements` elements.
FrameHeader read_frame(std::span<const std::byte> frame, std::int64_t max_elements);

}  // namespace thinwire
