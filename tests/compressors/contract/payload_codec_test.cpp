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
          {.spec = "topk:0.05,values=q4", .least_sent = 0.045},
          {.spec = "topk:0.05,values=q2", .least_sent = 0.04},
          {.spec = "topk:0.05,values=ternary", .least_sent = 0.04},
          {.spec = "topk:0.05,select=sampled", .least_sent = 0.03},
          {.spec = "topk:0.05,chunk=64", .least_sent = 0.045},
          {.spec = "topk:k=64,values=q2,chunk=4096", .block = 4096, .least_sent = 0.01},
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
  // Each kind; one of them with its rotation, and rotation with the largest block.
  cases.push_back({.spec = "q4,kind=maxmin", .block = 256, .fp64 = true, .least_sent = 0.9});
  cases.push_back({.spec = "q4,kind=qsgd", .block = 256, .fp64 = true});
  cases.push_back({.spec = "q2,kind=terngrad", .block = 256, .fp64 = true, .random = true});
  cases.push_back({.spec = "q4,kind=natural,block=64", .block = 64, .fp64 = true});
  cases.push_back({.spec = "q8,kind=mx", .block = 256, .fp64 = true, .least_sent = 0.99});
  cases.push_back(
      {.spec = "q6,kind=mx,element=e3m2", .block = 32, .fp64 = true, .least_sent = 0.9});
  cases.push_back({.spec = "q4,kind=mx,stochastic", .block = 256, .fp64 = true});
  cases.push_back(
      {.spec = "q4,rotate", .block = 1024, .fp64 = true, .least_sent = 0.9, .random = true});
  cases.push_back({.spec = "q3,kind=natural,block=4096,rotate", .block = 4096, .fp64 = true});
  return cases;
}

std::vector<ContractCase> fedzips() {
  // Values that are all equal arrive whole: the density's share of them. Of normal ones kept whole,
  // two clusters send the mean magnitude of each sign, 2 / pi of the squares, and more clusters
  // more.
  return {{.spec = "fedzip:0.01", .least_sent = 0.0099, .large = true},
          {.spec = "fedzip:0.1,k=6", .least_sent = 0.099},
          {.spec = "fedzip:0.25,k=33", .least_sent = 0.2499},
          {.spec = "fedzip:0.0001,k=256", .least_sent = 1e-5},
          {.spec = "fedzip:0.6,k=5", .least_sent = 0.59},
          {.spec = "fedzip:1", .least_sent = 0.6},
          {.spec = "fedzip:1,k=256", .least_sent = 0.99}};
}

std::vector<ContractCase> losslesses() {
  return {{.spec = "lossless", .least_sent = 1, .large = true}};
}

std::vector<ContractCase> onebits() {
  // scale=l1 sends ||v||_1^2 / (m ||v||_2^2) of the squares: of normal values 0.64, of those one in
  // ten 0.064. scale=l2 promises nothing: where few values make up the norm, it sends too much.
  return {{.spec = "onebit", .fp64 = true, .large = true, .one_scale = true},
          {.spec = "onebit,scale=l1", .fp64 = true, .least_sent = 0.05, .one_scale = true},
          {.spec = "onebit,block=64", .fp64 = true},
          {.spec = "onebit,block=256,scale=l1", .block = 256, .fp64 = true, .least_sent = 0.05},
          {.spec = "onebit,block=4096", .block = 4096, .fp64 = true}};
}

std::vector<ContractCase> lowranks() {
  // The squares sent are those of the subspace found: all of a matrix of equal values.
  return {{.spec = "lowrank:1", .least_sent = 0.005, .one_scale = true},
          {.spec = "lowrank:6", .least_sent = 0.03, .large = true, .one_scale = true}};
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
INSTANTIATE_TEST_SUITE_P(Fedzip, PayloadCodecContract, testing::ValuesIn(fedzips()));
INSTANTIATE_TEST_SUITE_P(Quantize, PayloadCodecContract, testing::ValuesIn(quantisers()));
INSTANTIATE_TEST_SUITE_P(Lossless, PayloadCodecContract, testing::ValuesIn(losslesses()));
INSTANTIATE_TEST_SUITE_P(OneBit, PayloadCodecContract, testing::ValuesIn(onebits()));
INSTANTIATE_TEST_SUITE_P(Dct, PayloadCodecContract, testing::ValuesIn(dcts()));
INSTANTIATE_TEST_SUITE_P(LowRank, PayloadCodecContract, testing::ValuesIn(lowranks()));

}  // namespace
}  // namespace thinwire
