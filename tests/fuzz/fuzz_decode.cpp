// Every decoder on any bytes: byte 0 picks the codec, bytes 1 and 2 the element count, the rest is
// the body. A decode either works or throws CorruptPayload; what it accepts, accumulate and
// sum accept too.
#include <array>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "compressors/core/spec.h"

namespace {

using thinwire::Codec;

const std::vector<Codec>& codecs() {
  static const std::vector<Codec> all = [] {
    std::vector<Codec> made;
    // The corpus names codecs by their place: new ones last.
    for (const char* spec : {"bf16",
                             "fp16",
                             "topk:0.01",
                             "topk:0.5",
                             "topk:1",
                             "topk:0.1,values=bf16",
                             "topk:0.1,values=q8",
                             "q1",
                             "q2",
                             "q3",
                             "q4",
                             "q5",
                             "q6",
                             "q7",
                             "q8",
                             "q4,block=64",
                             "topk:0.1,values=q4",
                             "topk:0.1,values=q2",
                             "topk:0.1,values=ternary",
                             "fedzip:0.1",
                             "fedzip:0.4,k=6",
                             "fedzip:1,k=40",
                             "lossless",
                             "onebit",
                             "onebit,block=64",
                             "dct:32",
                             "dct:8,values=q8",
                             "dct:3,tile=16,values=fp32",
                             "dct:16,tile=16",
                             "q4,kind=maxmin",
                             "q4,kind=qsgd",
                             "q2,kind=terngrad",
                             "q4,kind=natural",
                             "q8,kind=mx",
                             "q6,kind=mx,element=e3m2",
                             "q4,kind=mx",
                             "q4,rotate",
                             "q3,kind=maxmin,rotate",
                             "lowrank:3"}) {
      made.push_back(thinwire::make_codec(spec));
    }
    return made;
  }();
  return all;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 3) return 0;
  const auto& codec = *codecs()[data[0] % codecs().size()].payload;
  const std::int64_t n = data[1] + 256 * (data[2] % 32);
  const std::vector<std::byte> body(reinterpret_cast<const std::byte*>(data + 3),
                                    reinterpret_cast<const std::byte*>(data + size));
  const std::size_t scratch_bytes = codec.workspace_bytes(n);
  void* scratch = std::aligned_alloc(64, (scratch_bytes + 127) / 64 * 64);
  const thinwire::Context ctx{.workspace = {static_cast<std::byte*>(scratch), scratch_bytes}};
  std::vector<float> out(static_cast<std::size_t>(n));
  bool decoded = true;
  try {
    codec.decode(ctx, body, thinwire::view(out));
  } catch (const thinwire::CorruptPayload&) {
    decoded = false;
  }
  bool added = true;
  try {
    codec.accumulate(ctx, body, 0.5F, out);
  } catch (const thinwire::CorruptPayload&) {
    added = false;
  }
  const std::span<const std::byte> view_of_body(body);
  const std::array bodies = {view_of_body, view_of_body};
  bool summed = true;
  try {
    codec.sum(ctx, bodies, 0.5F, out);
  } catch (const thinwire::CorruptPayload&) {
    summed = false;
  }
  std::free(scratch);
  if (decoded != added || added != summed) std::abort();
  return 0;
}
