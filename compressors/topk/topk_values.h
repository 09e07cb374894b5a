// Values of a sparse selection as bytes: fp32, bf16, or 1 to 8 bits. Layout in FORMAT.md, "topk".
// Pure functions, thread-safe; the caller owns all memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/topk/topk.h"

namespace thinwire {

// Entries that share an upper end of a scale; 16 bits for it are 1/16 bit an entry.
inline constexpr std::size_t kTopKBlock = 256;

// Octaves that the 8-bit scale may span: half a step is then at most half an octave, and
// value - decoded is exact. Smaller values, relative to the largest, stay at the sender.
inline constexpr int kTopKQ8Octaves = 126;

std::size_t topk_value_bytes(TopKValues kind, std::size_t count);

// Bits of the least magnitude.
std::uint32_t least_magnitude(std::span<const float> values);

// Writes the finite, non-zero `values` (kQ8: at most kTopKQ8Octaves apart) to `out`
// (topk_value_bytes long). The scales of kQ8, kQ4 and kQ2 begin at `low`, bits of a magnitude that
// none is below (kQ8: nor kTopKQ8Octaves above). Leaves in `values`
// what the receiver will miss of each: value - decoded, rounded once (exact for kF32, kBF16 and
// kQ8). All together they are shorter than the values in the Euclidean norm; but for kTernary each
// one is at most its value.
void write_topk_values(TopKValues kind, std::uint32_t low, std::span<float> values,
                       std::span<std::byte> out);

// Leaves in the values of one block, at most kTopKBlock from a multiple of it on, what
// write_topk_values would. Not for kTernary, whose values are rounded by all of them.
void round_topk_block(TopKValues kind, std::uint32_t low, std::span<float> block);

// Values [first, first + out.size()) of a section of `count`; `first` and, but for the last call,
// out.size() are multiples of kTopKBlock. `section` has topk_value_bytes(kind, count) bytes.
// CorruptPayload where a value is not finite.
void read_topk_values(TopKValues kind, std::span<const std::byte> section, std::size_t count,
                      std::size_t first, std::span<float> out);

}  // namespace thinwire
