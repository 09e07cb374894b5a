#include "compressors/core/aligned_buffer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace thinwire {
namespace {

TEST(AlignedBuffer, IsAlignedAndZeroed) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{63}, std::size_t{1} << 20U}) {
    const AlignedBuffer buffer(bytes);
    EXPECT_EQ(buffer.size(), bytes);
    EXPECT_EQ(buffer.bytes().size(), bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.bytes().data()) % 64, 0U);
    EXPECT_TRUE(std::all_of(buffer.bytes().begin(), buffer.bytes().end(),
                            [](std::byte b) { return b == std::byte{0}; }));
  }
}

TEST(AlignedBuffer, MayBeEmptyAndMoves) {
  EXPECT_TRUE(AlignedBuffer().bytes().empty());
  EXPECT_TRUE(AlignedBuffer(0).bytes().empty());
  AlignedBuffer first = AlignedBuffer::uninitialized(8);
  first.floats(2)[1] = 3;
  const AlignedBuffer second = std::move(first);
  EXPECT_EQ(second.floats(2)[1], 3);
  EXPECT_TRUE(first.bytes().empty());  // NOLINT(bugprone-use-after-move)
}

}  // namespace
}  // namespace thinwire
