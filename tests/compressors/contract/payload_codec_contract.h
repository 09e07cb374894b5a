// The contract of PayloadCodec as one suite: laws and hostile input. A family instantiates it with
// its specs:  INSTANTIATE_TEST_SUITE_P(Cast, PayloadCodecContract, testing::Values(...));
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compressors/core/spec.h"
#include "tests/support/patterns.h"

namespace thinwire {

struct ContractCase {
  std::string spec;
  // Elements at whose multiples the codec's encoding changes shape.
  std::int64_t block = 64;
  bool fp64 = false;  // takes fp64 gradients
  // Smallest share of ||v||^2 that encode must send of a tensor that is one value everywhere or
  // normal; 0 where nothing is promised (stochastic rounding).
  double least_sent = 0;
  bool large = false;  // run the ten-million-element law, too
  // One scale goes by all that is encoded: a range alone has another than inside the whole.
  bool one_scale = false;
  // Random numbers go by all that is encoded: a range alone draws others.
  bool random = false;
};
void PrintTo(const ContractCase& test, std::ostream* out);

// One encode with everything that could go wrong around it watched.
struct EncodeOutcome {
  EncodeResult result;
  bool zero = false;            // every gradient element is
  std::vector<std::byte> body;  // result.bytes of them
  std::vector<float> v;         // grad + decay * residual in fp32, two roundings
  std::vector<float> residual;  // memory.next(), when written
};

class PayloadCodecContract : public testing::TestWithParam<ContractCase> {
 protected:
  struct Call {
    DType dtype = DType::kF32;
    int threads = 1;
    std::int64_t shift = 0;      // elements by which the gradient is off its alignment
    std::int64_t out_shift = 0;  // bytes
    bool give = false;           // the gradient's memory to the residual
    std::uint64_t step = 3;
    std::int32_t sender = 1;
  };
  // Fails the test when encode writes outside its buffers or beyond result.bytes.
  EncodeOutcome encode(const std::vector<float>& grad, Memory* memory, const Call& call) const;
  EncodeOutcome encode(const std::vector<float>& grad, Memory* memory) const {
    return encode(grad, memory, Call());
  }

  // Decodes from a heap copy of exactly body.size() bytes; fails on writes outside `out`.
  Array decode(const std::vector<std::byte>& body, std::int64_t n, DType dtype) const;
  std::vector<float> decode(const std::vector<std::byte>& body, std::int64_t n) const {
    return decode(body, n, DType::kF32).values();
  }
  std::vector<float> accumulate(const std::vector<std::byte>& body, float weight,
                                std::vector<float> sum) const;
  std::vector<float> sum(const std::vector<std::vector<std::byte>>& bodies, float weight,
                         std::int64_t n) const;
  // Decode and accumulate of bytes that may be anything: a valid result or CorruptPayload.
  void expect_decoded_or_refused(const std::vector<std::byte>& body, std::int64_t n) const;

  std::vector<std::int64_t> sizes() const;
  std::vector<DType> dtypes() const;

  const ContractCase& test_ = GetParam();
  const Codec made_ = make_codec(GetParam().spec);
  const PayloadCodec& codec_ = *made_.payload;
};

}  // namespace thinwire
