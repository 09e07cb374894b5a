// Payloads in git: an encoder or a format that changes the bytes fails here. To write them anew,
// after a change of kPayloadVersion:  golden_test --update
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "compressors/core/payload.h"
#include "compressors/core/spec.h"
#include "tests/support/patterns.h"

namespace thinwire {
namespace {

bool g_update = false;

constexpr std::int64_t kElements = 300;
constexpr const char* kSpecs[] = {"bf16",
                                  "fp16",
                                  "topk:0.1",
                                  "topk:0.1,values=bf16",
                                  "topk:0.1,values=q8",
                                  "topk:0.9",
                                  "q1",
                                  "q2",
                                  "q3",
                                  "q4",
                                  "q5",
                                  "q6",
                                  "q7",
                                  "q8",
                                  "q4,block=64,stochastic",
                                  "q1,stochastic",
                                  "dct:32",
                                  "dct:8,values=q8",
                                  "dct:3,tile=16,values=fp32"};

std::string path(const std::string& spec) {
  std::string file = spec;
  for (char& c : file) {
    if (c == ':' || c == ',' || c == '=') c = '_';
  }
  return std::string(TW_GOLDEN_FOLDER) + "/" + file + ".bin";
}

// A sealed message with one body: the third step's, so that residuals play their part.
std::vector<std::byte> make_message(const std::string& spec) {
  const Codec codec = make_codec(spec);
  std::vector<std::byte> scratch_bytes(codec.payload->workspace_bytes(kElements) + 64);
  void* aligned = scratch_bytes.data();
  std::size_t space = scratch_bytes.size();
  std::align(64, space - 64, aligned, space);
  const std::span<std::byte> scratch(static_cast<std::byte*>(aligned), space);
  Memory memory(kElements);
  std::vector<std::byte> message;
  for (std::uint64_t step = 0; step < 3; ++step) {
    Array grad(DType::kF32, make_values(Pattern::kNormal, kElements, step));
    message.assign(kPayloadHeaderBytes + codec.payload->slot_bytes(kElements), std::byte{0});
    const Context ctx{.workspace = scratch, .step = step, .sender = 2, .key_hash = 1};
    const auto result = codec.payload->encode(ctx, grad.view(), &memory,
                                              std::span(message).subspan(kPayloadHeaderBytes));
    message.resize(kPayloadHeaderBytes + result.bytes);
    memory.commit();
  }
  seal_payload({.codec_id = codec.family_id, .elements = kElements}, message);
  return message;
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, BytesAreThoseInGit) {
  const std::string spec = GetParam();
  const auto message = make_message(spec);
  if (g_update) {
    std::ofstream(path(spec), std::ios::binary)
        .write(reinterpret_cast<const char*>(message.data()),
               static_cast<std::streamsize>(message.size()));
  }
  std::ifstream file(path(spec), std::ios::binary);
  ASSERT_TRUE(file) << path(spec);
  const std::string golden((std::istreambuf_iterator<char>(file)), {});
  ASSERT_EQ(message.size(), golden.size());
  EXPECT_EQ(std::memcmp(message.data(), golden.data(), golden.size()), 0)
      << spec << ": bytes changed within payload version " << int{kPayloadVersion};
  EXPECT_EQ(open_payload(message, kElements, 2).codec_id, make_codec(spec).family_id);
}

INSTANTIATE_TEST_SUITE_P(Specs, Golden, testing::ValuesIn(kSpecs));

}  // namespace

void set_golden_update(bool update) { g_update = update; }

}  // namespace thinwire

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  thinwire::set_golden_update(argc > 1 && std::string(argv[1]) == "--update");
  return RUN_ALL_TESTS();
}
