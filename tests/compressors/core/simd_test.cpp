#include "compressors/core/simd.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

TEST(Simd, LimitChoosesTheTargetAndIsLifted) {
  const auto targets = simd_targets();
  ASSERT_FALSE(targets.empty());
  for (const std::string& target : targets) {
    set_simd_limit(target);
    EXPECT_EQ(simd_target(), target);
  }
  set_simd_limit("");
  EXPECT_EQ(simd_target(), targets.front());
  EXPECT_EQ(simd_targets(), targets);
}

TEST(Simd, UnknownTargetNamesTheKnownOnes) {
  try {
    set_simd_limit("avx9");
    FAIL() << "expected InvalidArgument";
  } catch (const InvalidArgument& error) {
    EXPECT_THAT(error.what(), testing::HasSubstr("\"avx9\""));
    EXPECT_THAT(error.what(), testing::HasSubstr(simd_targets().back()));
  }
}

}  // namespace
}  // namespace thinwire
