// Payloads and sizes in git: an encoder or a format that changes the bytes fails here, and a change
// of size is seen in review. To write them anew:  golden_test --update
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
                                  "topk:0.1,values=q4",
                                  "topk:0.1,values=q2",
                                  "topk:0.1,values=ternary",
                                  "topk:0.9",
                                  "topk:0.1,chunk=64",
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
                                  "q4,kind=maxmin",
                                  "q4,kind=qsgd",
                                  "q2,kind=terngrad",
                                  "q4,kind=natural",
                                  "q8,kind=mx",
                                  "q8,kind=mx,element=e5m2",
                                  "q6,kind=mx",
                                  "q6,kind=mx,element=e3m2",
                                  "q4,kind=mx",
                                  "q4,rotate",
                                  "q3,kind=maxmin,block=64,stochastic,rotate",
                                  "fedzip:0.1",
                                  "fedzip:0.4,k=6",
                                  "fedzip:0.95",
                                  "fedzip:1,k=6",
                                  "fedzip:1,k=40",
                                  "lossless",
                                  "onebit",
                                  "onebit,block=64,scale=l1",
                                  "dct:32",
                                  "dct:8,values=q8",
                                  "dct:3,tile=16,values=fp32",
                                  "lowrank:2"};

std::string path(const std::string& spec) {
  std::string file = spec;
  for (char& c : file) {
    if (c == ':' || c == ',' || c == '=') c = '_';
  }
  return std::string(TW_GOLDEN_FOLDER) + "/" + file + ".bin";
}

// The body of one step, behind kPayloadHeaderBytes of room.
std::vector<std::byte> encode_message(const Codec& codec, Pattern pattern, std::int64_t n,
                                      std::uint64_t step, Memory* memory) {
  std::vector<std::byte> scratch_bytes(codec.payload->workspace_bytes(n) + 64);
  void* aligned = scratch_bytes.data();
  std::size_t space = scratch_bytes.size();
  std::align(64, space - 64, aligned, space);
  Array grad(DType::kF32, make_values(pattern, n, step));
  std::vector<std::byte> message(kPayloadHeaderBytes + codec.payload->slot_bytes(n));
  const Context ctx{.workspace = {static_cast<std::byte*>(aligned), space},
                    .step = step,
                    .sender = 2,
                    .key_hash = 1};
  const auto result = codec.payload->encode(ctx, grad.view(), memory,
                                            std::span(message).subspan(kPayloadHeaderBytes));
  message.resize(kPayloadHeaderBytes + result.bytes);
  return message;
}

// A sealed message with one body: the third step's, so that residuals play their part.
std::vector<std::byte> make_message(const std::string& spec) {
  const Codec codec = make_codec(spec);
  Memory memory(kElements);
  std::vector<std::byte> message;
  for (std::uint64_t step = 0; step < 3; ++step) {
    message = encode_message(codec, Pattern::kNormal, kElements, step, &memory);
    memory.commit();
  }
  seal_payload({.codec_id = codec.family_id, .elements = kElements}, message);
  return message;
}

std::string make_sizes() {
  std::string table = "codec,elements,values,slot_bytes,body_bytes\n";
  for (const char* spec : kSpecs) {
    const Codec codec = make_codec(spec);
    for (const std::int64_t n : {1, 1000, 100'000}) {
      for (const Pattern pattern : {Pattern::kNormal, Pattern::kSparse}) {
        const std::vector<std::byte> message = encode_message(codec, pattern, n, 0, nullptr);
        // The spec in quotes: it may hold commas.
        table += '"' + std::string(spec) + "\"," + std::to_string(n) + "," + name(pattern) + "," +
                 std::to_string(codec.payload->slot_bytes(n)) + "," +
                 std::to_string(message.size() - kPayloadHeaderBytes) + "\n";
      }
    }
  }
  return table;
}

std::string read_file(const std::string& name) {
  std::ifstream file(name, std::ios::binary);
  EXPECT_TRUE(file) << name;
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::string& name, const void* data, std::size_t size) {
  std::ofstream(name, std::ios::binary)
      .write(static_cast<const char*>(data), static_cast<std::streamsize>(size));
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, BytesAreThoseInGit) {
  const std::string spec = GetParam();
  const auto message = make_message(spec);
  if (g_update) write_file(path(spec), message.data(), message.size());
  const std::string golden = read_file(path(spec));
  ASSERT_EQ(message.size(), golden.size());
  EXPECT_EQ(std::memcmp(message.data(), golden.data(), golden.size()), 0)
      << spec << ": bytes changed within payload version " << int{kPayloadVersion};
  EXPECT_EQ(open_payload(message, kElements, 2).codec_id, make_codec(spec).family_id);
}

TEST(GoldenSizes, AreThoseInGit) {
  const std::string sizes = make_sizes();
  const std::string file = std::string(TW_GOLDEN_FOLDER) + "/sizes.csv";
  if (g_update) write_file(file, sizes.data(), sizes.size());
  EXPECT_EQ(sizes, read_file(file));
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
