// The header check on any bytes, as they are and sealed: what seal_payload sealed must open.
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "compressors/core/error.h"
#include "compressors/core/payload.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  std::vector<std::byte> message(bytes, bytes + size);
  try {
    thinwire::open_payload(message, size, 0);
  } catch (const thinwire::CorruptPayload&) {
  }
  if (size < thinwire::kPayloadHeaderBytes) return 0;
  thinwire::seal_payload({.codec_id = data[0], .flags = data[1], .elements = size}, message);
  if (thinwire::open_payload(message, size, 0).codec_id != data[0]) std::abort();
  return 0;
}
