// The spec parser on any text: a codec whose canonical text reads back as itself, PolicyError or
// NotAvailable.
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "compressors/core/error.h"
#include "compressors/core/spec.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  thinwire::Codec codec;
  try {
    codec = thinwire::make_codec({reinterpret_cast<const char*>(data), size});
  } catch (const thinwire::PolicyError&) {
    return 0;
  } catch (const thinwire::NotAvailable&) {
    return 0;
  }
  if (thinwire::make_codec(codec.spec).spec != codec.spec) std::abort();
  return 0;
}
