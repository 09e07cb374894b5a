#include "compressors/core/payload.h"

#include <bit>
#include <cstring>
#include <string>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

static_assert(std::endian::native == std::endian::little, "payloads are little-endian");

// Byte offsets, FORMAT.md.
constexpr std::size_t kMagicAt = 0;
constexpr std::size_t kVersionAt = 4;
constexpr std::size_t kCodecAt = 5;
constexpr std::size_t kFlagsAt = 6;
constexpr std::size_t kElementsAt = 8;
constexpr std::size_t kChecksumAt = 16;

template <typename T>
T load(std::span<const std::byte> bytes, std::size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof(T));
  return value;
}

template <typename T>
void store(std::span<std::byte> bytes, std::size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof(T));
}

// The 16 header bytes before the checksum seed the hash of what follows it, so that a change
// anywhere in the message changes the checksum.
std::uint64_t checksum(std::span<const std::byte> message) {
  const std::uint64_t seed = XXH3_64bits(message.data(), kChecksumAt);
  const auto bodies = message.subspan(kPayloadHeaderBytes);
  return XXH3_64bits_withSeed(bodies.data(), bodies.size(), seed);
}

[[noreturn]] void corrupt(int sender, const std::string& what) {
  throw CorruptPayload("message of rank " + std::to_string(sender) + ": " + what);
}

std::string hex(std::uint64_t value) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text = "0x";
  for (int shift = 60; shift >= 0; shift -= 4) text += kDigits[(value >> shift) & 15];
  return text;
}

}  // namespace

void seal_payload(const PayloadHeader& header, std::span<std::byte> message) {
  if (message.size() < kPayloadHeaderBytes) {
    throw InvalidArgument("message of " + std::to_string(message.size()) + " bytes, expected " +
                          std::to_string(kPayloadHeaderBytes) + " or more");
  }
  store(message, kMagicAt, kPayloadMagic);
  store(message, kVersionAt, kPayloadVersion);
  store(message, kCodecAt, header.codec_id);
  store(message, kFlagsAt, header.flags);
  store(message, kElementsAt, header.elements);
  store(message, kChecksumAt, checksum(message));
}

PayloadHeader open_payload(std::span<const std::byte> message, std::uint64_t expected_elements,
                           int sender) {
  if (message.size() < kPayloadHeaderBytes) {
    corrupt(sender, std::to_string(message.size()) + " bytes, expected a header of " +
                        std::to_string(kPayloadHeaderBytes));
  }
  const auto magic = load<std::uint32_t>(message, kMagicAt);
  if (magic != kPayloadMagic) {
    corrupt(sender, "magic " + hex(magic) + ", expected " + hex(kPayloadMagic));
  }
  const auto version = load<std::uint8_t>(message, kVersionAt);
  if (version != kPayloadVersion) {
    corrupt(sender, "payload version " + std::to_string(version) + ", expected " +
                        std::to_string(kPayloadVersion) +
                        "\nhint: run the same thinwire on all ranks");
  }
  const auto expected_sum = load<std::uint64_t>(message, kChecksumAt);
  const std::uint64_t sum = checksum(message);
  if (sum != expected_sum) {
    corrupt(sender, "checksum " + hex(sum) + ", expected " + hex(expected_sum) +
                        ": the bytes changed on their way");
  }
  const PayloadHeader header{.codec_id = load<std::uint8_t>(message, kCodecAt),
                             .flags = load<std::uint16_t>(message, kFlagsAt),
                             .elements = load<std::uint64_t>(message, kElementsAt)};
  if (header.elements != expected_elements) {
    corrupt(sender, std::to_string(header.elements) + " elements, expected " +
                        std::to_string(expected_elements));
  }
  return header;
}

}  // namespace thinwire
