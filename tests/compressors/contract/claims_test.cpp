// A few bytes that claim to be a tensor of up to 2^60 elements: every family refuses
// them, and touches none of the memory that such a tensor would take.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstdint>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "compressors/core/payload.h"
#include "compressors/core/spec.h"
#include "compressors/families.h"

namespace thinwire {
namespace {

constexpr std::int64_t kClaims[] = {std::int64_t{1} << 31, std::int64_t{1} << 32,
                                    (std::int64_t{1} << 40) + 1, std::int64_t{1} << 60};
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
constexpr std::int64_t kMostGrowthBytes = std::int64_t{1} << 20;
#else  // what was freed stays with the sanitizer
constexpr std::int64_t kMostGrowthBytes = std::int64_t{1} << 28;
#endif

// Address space without memory: whoever reads or writes there is killed.
class Nowhere {
 public:
  Nowhere()
      : data_(
            mmap(nullptr, kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~Nowhere() { munmap(data_, kBytes); }
  Nowhere(const Nowhere&) = delete;
  Nowhere& operator=(const Nowhere&) = delete;
  TensorView tensor(std::int64_t n) const { return {data_, n, DType::kF32}; }
  std::span<float> floats(std::int64_t n) const {
    return {static_cast<float*>(data_), static_cast<std::size_t>(n)};
  }
  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(data_), kBytes}; }

 private:
  static constexpr std::size_t kBytes = std::size_t{1} << 36;
  void* data_;
};

// Memory that this process holds now; exact, unlike the counters of /proc/self/statm.
std::int64_t resident_bytes() {
  std::ifstream file("/proc/self/smaps_rollup");
  for (std::string word; file >> word;) {
    std::int64_t kib = 0;
    if (word == "Rss:" && file >> kib) return 1024 * kib;
  }
  throw std::runtime_error("no Rss in /proc/self/smaps_rollup");
}

// One a word of every family.
std::vector<std::string> specs() {
  std::vector<std::string> all;
  for (const Family* family : families()) {
    if (!make_codec(family->sample).payload) continue;
    if (!family->main.empty()) all.emplace_back(family->sample);
    if (family->main.empty()) all.insert(all.end(), family->words.begin(), family->words.end());
  }
  return all;
}

class Claims : public testing::TestWithParam<std::string> {
 protected:
  // A body of the codec: that of a tensor of kSmall elements.
  std::vector<std::byte> small_body() const {
    std::vector<float> values(kSmall, 0.5F);
    const std::size_t size = codec_.payload->workspace_bytes(kSmall);
    std::vector<std::byte> workspace(size + 64);
    void* begin = workspace.data();
    std::size_t space = workspace.size();
    std::align(64, size, begin, space);
    std::vector<std::byte> body(codec_.payload->slot_bytes(kSmall));
    const Context ctx{.workspace = {static_cast<std::byte*>(begin), size}};
    body.resize(codec_.payload->encode(ctx, view(values), nullptr, body).bytes);
    return body;
  }

  // The claims that come as far as a decoder: a receiver asks for the slot first, which a
  // codec with 32-bit positions refuses for more elements. For fewer a short sparse body is sound.
  std::vector<std::int64_t> claims() const {
    std::vector<std::int64_t> all;
    for (const std::int64_t n : kClaims) {
      try {
        (void)codec_.payload->slot_bytes(n);
        if (!codec_.payload->traits().sparse) all.push_back(n);
      } catch (const InvalidArgument&) {
        EXPECT_GE(n, std::int64_t{1} << 32);
      }
    }
    return all;
  }

  void expect_refused(std::span<const std::byte> body, std::int64_t n) const {
    SCOPED_TRACE(testing::Message() << n << " elements, a body of " << body.size() << " bytes");
    EXPECT_THROW(codec_.payload->decode(ctx_, body, nowhere_.tensor(n)), CorruptPayload);
    EXPECT_THROW(codec_.payload->accumulate(ctx_, body, 1, nowhere_.floats(n)), CorruptPayload);
  }

  static constexpr std::int64_t kSmall = 100;
  const Codec codec_ = make_codec(GetParam());
  const Nowhere nowhere_;
  const Context ctx_{.workspace = nowhere_.bytes()};
};

TEST_P(Claims, TinyBodiesAreRefused) {
  const std::vector<std::byte> good = small_body();
  const std::vector<std::int64_t> claims = this->claims();
  std::mt19937_64 engine(60);
  const std::int64_t before = resident_bytes();
  for (const std::int64_t n : claims) {
    expect_refused({}, n);
    for (std::size_t size = 1; size <= good.size(); ++size) {
      expect_refused(std::span(good).first(size), n);
      std::vector<std::byte> body(size, std::byte{0});
      body[0] = good[0];
      expect_refused(body, n);
      std::fill(body.begin() + 1, body.end(), std::byte{0xFF});
      expect_refused(body, n);
      for (std::size_t i = 1; i < size; ++i) body[i] = static_cast<std::byte>(engine());
      expect_refused(body, n);
    }
  }
  EXPECT_LT(resident_bytes() - before, kMostGrowthBytes);
}

TEST_P(Claims, SoundMessagesOfTinyBodiesAreRefused) {
  const std::vector<std::byte> body = small_body();
  std::vector<std::byte> message(kPayloadHeaderBytes);
  message.insert(message.end(), body.begin(), body.end());
  const std::vector<std::int64_t> claims = this->claims();
  const std::int64_t before = resident_bytes();
  for (const std::int64_t n : kClaims) {
    const auto claimed = static_cast<std::uint64_t>(n);
    seal_payload({.codec_id = codec_.family_id, .elements = claimed}, message);
    EXPECT_THROW(open_payload(message, kSmall, 0), CorruptPayload);
    EXPECT_EQ(open_payload(message, claimed, 0).elements, claimed);
  }
  for (const std::int64_t n : claims) {
    expect_refused(std::span<const std::byte>(message).subspan(kPayloadHeaderBytes), n);
  }
  EXPECT_LT(resident_bytes() - before, kMostGrowthBytes);
}

std::string name_of(const testing::TestParamInfo<std::string>& info) {
  return info.param.substr(0, info.param.find(':'));
}

INSTANTIATE_TEST_SUITE_P(EveryFamily, Claims, testing::ValuesIn(specs()), name_of);

}  // namespace
}  // namespace thinwire
