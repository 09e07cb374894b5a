#include "compressors/core/spelling.h"

#include <gtest/gtest.h>

#include <string_view>
#include <vector>

namespace thinwire {
namespace {

using Words = std::vector<std::string_view>;

TEST(SpellingDistance, CountsHalfSteps) {
  EXPECT_EQ(spelling_distance("", ""), 0U);
  EXPECT_EQ(spelling_distance("topk", "topk"), 0U);
  EXPECT_EQ(spelling_distance("tokp", "topk"), 2U);
  EXPECT_EQ(spelling_distance("TOPK", "topk"), 4U);
  EXPECT_EQ(spelling_distance("", "abc"), 6U);
  EXPECT_EQ(spelling_distance("abc", ""), 6U);
  EXPECT_EQ(spelling_distance("kitten", "sitting"), 6U);
}

TEST(NearestSpellings, RanksByDistanceAndKeepsTheOrderOfEquals) {
  const Words words = {"name", "dims", "policy", "dins"};
  EXPECT_EQ(nearest_spelling("polcy", words), "policy");
  EXPECT_EQ(nearest_spellings("dms", words, 3), (Words{"dims", "dins", "name"}));
  EXPECT_EQ(nearest_spellings("dits", words, 2), (Words{"dims", "dins"}));
  EXPECT_EQ(nearest_spellings("dits", words, 9).size(), words.size());
  EXPECT_TRUE(nearest_spellings("dits", words, 0).empty());
}

TEST(Join, PutsCommasBetween) {
  EXPECT_EQ(join(Words{}), "");
  EXPECT_EQ(join(Words{"a"}), "a");
  EXPECT_EQ(join(Words{"a", "b", "c"}), "a, b, c");
}

}  // namespace
}  // namespace thinwire
