#include "compressors/core/payload.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

std::vector<std::byte> message(std::size_t body_bytes) {
  std::vector<std::byte> bytes(kPayloadHeaderBytes + body_bytes);
  for (std::size_t i = 0; i < body_bytes; ++i) {
    bytes[kPayloadHeaderBytes + i] = static_cast<std::byte>(i * 7 + 1);
  }
  seal_payload({.codec_id = 3, .flags = kFlagNonFinite, .elements = 1234567}, bytes);
  return bytes;
}

TEST(Payload, OpensWhatWasSealed) {
  for (const std::size_t body : {0, 1, 7, 240, 5000}) {
    const PayloadHeader header = open_payload(message(body), 1234567, 0);
    EXPECT_EQ(header.codec_id, 3);
    EXPECT_EQ(header.flags, kFlagNonFinite);
    EXPECT_EQ(header.elements, 1234567U);
  }
}

TEST(Payload, EveryBitFlipIsCaught) {
  for (const std::size_t body : {0, 1, 63}) {
    const auto good = message(body);
    for (std::size_t bit = 0; bit < 8 * good.size(); ++bit) {
      auto bad = good;
      bad[bit / 8] ^= static_cast<std::byte>(1 << (bit % 8));
      EXPECT_THROW(open_payload(bad, 1234567, 0), CorruptPayload)
          << "bit " << bit << " of a message with a body of " << body << " bytes";
    }
  }
}

TEST(Payload, EveryTruncationAndExtensionIsCaught) {
  const auto good = message(40);
  for (std::size_t size = 0; size < good.size(); ++size) {
    const std::vector<std::byte> bad(good.begin(), good.begin() + static_cast<long>(size));
    EXPECT_THROW(open_payload(bad, 1234567, 0), CorruptPayload) << size << " bytes";
  }
  auto longer = good;
  longer.push_back(std::byte{0});
  EXPECT_THROW(open_payload(longer, 1234567, 0), CorruptPayload);
}

TEST(Payload, WrongElementCountNamesRankExpectedAndGot) {
  try {
    open_payload(message(3), 99, 5);
    FAIL() << "expected CorruptPayload";
  } catch (const CorruptPayload& error) {
    EXPECT_THAT(error.what(),
                testing::AllOf(testing::HasSubstr("rank 5"), testing::HasSubstr("1234567 elements"),
                               testing::HasSubstr("expected 99")));
  }
}

TEST(Payload, RefusesToSealLessThanAHeader) {
  std::vector<std::byte> bytes(kPayloadHeaderBytes - 1);
  EXPECT_THROW(seal_payload({}, bytes), InvalidArgument);
}

// FORMAT.md's worked example: the bytes must never change within a version.
TEST(Payload, HeaderBytesAreThoseOfTheFormat) {
  std::vector<std::byte> bytes(kPayloadHeaderBytes);
  seal_payload({.codec_id = 4, .flags = 0, .elements = 0x0102030405060708}, bytes);
  const std::vector<int> expected = {'T', 'W', 'R', '1', 1, 4, 0, 0, 8, 7, 6, 5, 4, 3, 2, 1};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(std::to_integer<int>(bytes[i]), expected[i]) << "byte " << i;
  }
}

}  // namespace
}  // namespace thinwire
