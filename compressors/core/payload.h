// The header of a message: one for all the bodies it carries. 24 bytes, little-endian, FORMAT.md.
// Pure functions, thread-safe; the caller owns all memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace thinwire {

inline constexpr std::uint32_t kPayloadMagic = 0x31525754;  // "TWR1"
inline constexpr std::uint8_t kPayloadVersion = 1;
inline constexpr std::size_t kPayloadHeaderBytes = 24;

enum PayloadFlags : std::uint16_t {
  kFlagNonFinite = 1,  // a body of this message holds a nonfinite mark
};

struct PayloadHeader {
  std::uint8_t codec_id = 0;  // the family's id; 0 in messages of the collectives
  std::uint16_t flags = 0;
  std::uint64_t elements = 0;  // of all bodies together
};

// Fills message[0, 24): header and the XXH3-64 of message[24, end) mixed with the header fields.
// The whole span counts, slack between bodies included, so the caller zeroes slack.
void seal_payload(const PayloadHeader& header, std::span<std::byte> message);

// Checks magic, version, length, checksum and element count; CorruptPayload otherwise, naming
// `sender`. Returns the header.
PayloadHeader open_payload(std::span<const std::byte> message, std::uint64_t expected_elements,
                           int sender);

}  // namespace thinwire
