#include "tests/compressors/contract/payload_codec_contract.h"

namespace thinwire {
namespace {

std::vector<ContractCase> casts() {
  // Round to nearest with 8 and 11 bits: an element's error is below 2^-8 of it.
  return {{.spec = "bf16", .fp64 = true, .least_sent = 0.9999, .large = true},
          {.spec = "fp16", .fp64 = true, .least_sent = 0.9999}};
}

std::vector<ContractCase> topks() {
  // Sends the k largest: at least k / n of the squares, exactly that where all are equal. 8-bit
  // values and sampled thresholds give up some of it.
  return {{.spec = "topk:0.01", .least_sent = 0.0099, .large = true},
          {.spec = "topk:0.25", .least_sent = 0.2499},
          {.spec = "topk:1", .least_sent = 1},
          {.spec = "topk:k=1", .least_sent = 1e-5},
          {.spec = "topk:0.05,values=bf16", .least_sent = 0.049},
          {.spec = "topk:0.05,values=q8", .least_sent = 0.045},
          {.spec = "topk:0.05,select=sampled", .least_sent = 0.03},
          {.spec = "topk:0.05,values=q8,select=sampled", .least_sent = 0.03, .large = true}};
}

std::vector<ContractCase> quantisers() {
  std::vector<ContractCase> cases;
  for (int bits = 1; bits <= 8; ++bits) {
    const std::string family = "q" + std::to_string(bits);
    // Nearest: what is sent of normal values grows with the bits; 1 bit of sparse ones sends their
    // mean only.
    cases.push_back({.spec = family,
                     .block = 256,
                     .fp64 = true,
                     .least_sent = bits < 4 ? 0.05 : 0.9,
                     .large = bits == 4});
    cases.push_back({.spec = family + ",block=64,stochastic", .block = 64, .fp64 = true});
  }
  cases.push_back({.spec = "q4,block=4096", .block = 4096, .fp64 = true, .least_sent = 0.9});
  return cases;
}

std::vector<ContractCase> dcts() {
  // Sends at least keep / tile of the squares of every tile, less what rounding takes: 2^-16 of a
  // bf16's square, and with 8 bits a quarter of (1 / 127)^2 of the largest for each one kept.
  return {{.spec = "dct:32", .fp64 = true, .least_sent = 0.4999, .large = true},
          {.spec = "dct:1,tile=8", .block = 8, .fp64 = true, .least_sent = 0.1249},
          {.spec = "dct:8,tile=8,values=fp32", .block = 8, .fp64 = true, .least_sent = 0.99999},
          {.spec = "dct:7,tile=32", .block = 32, .fp64 = true, .least_sent = 0.2187},
          {.spec = "dct:5,tile=64,values=fp32", .fp64 = true, .least_sent = 0.0781},
          {.spec = "dct:32,values=q8", .fp64 = true, .least_sent = 0.499},
          {.spec = "dct:200,tile=512,values=q8", .block = 512, .fp64 = true, .least_sent = 0.387},
          {.spec = "dct:25,tile=1024", .block = 1024, .fp64 = true, .least_sent = 0.0243}};
}

INSTANTIATE_TEST_SUITE_P(Cast, PayloadCodecContract, testing::ValuesIn(casts()));
INSTANTIATE_TEST_SUITE_P(TopK, PayloadCodecContract, testing::ValuesIn(topks()));
INSTANTIATE_TEST_SUITE_P(Quantize, PayloadCodecContract, testing::ValuesIn(quantisers()));
INSTANTIATE_TEST_SUITE_P(Dct, PayloadCodecContract, testing::ValuesIn(dcts()));

}  // namespace
}  // namespace thinwire
