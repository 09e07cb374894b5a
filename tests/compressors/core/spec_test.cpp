#include "compressors/core/spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

template <typename E>
std::string message_of(const std::string& spec) {
  try {
    make_codec(spec);
  } catch (const E& error) {
    return error.what();
  }
  ADD_FAILURE() << "no such error for \"" << spec << "\"";
  return {};
}

TEST(Spec, NoneHasNoCodec) {
  const Codec codec = make_codec("none");
  EXPECT_TRUE(codec.is_none());
  EXPECT_EQ(codec.spec, "none");
  EXPECT_EQ(codec.family_id, 0);
}

TEST(Spec, CanonicalTextIsStableAndLeavesDefaultsOut) {
  const std::pair<const char*, const char*> cases[] = {
      {"bf16", "bf16"},
      {" fp16 ", "fp16"},
      {"bf16,ef=on,memory=fp32,decay=1,start=0,nonfinite=propagate,transactional=on", "bf16"},
      {"onebit,scale=l2", "onebit"},
      {"onebit, scale=l1, block=128", "onebit,block=128,scale=l1"},
      {"q4,kind=maxabs,rotate=off", "q4"},
      {"q4,rotate,stochastic,kind=maxmin,block=512", "q4,kind=maxmin,block=512,stochastic,rotate"},
      {"q4,kind=qsgd,stochastic", "q4,kind=qsgd"},
      {"q6,kind=mx,block=32,element=e2m3", "q6,kind=mx"},
      {"q8,element=e5m2,kind=mx,block=64", "q8,kind=mx,element=e5m2,block=64"},
      {"bf16, nonfinite = error ,start=10,decay=0.50,ef=off,transactional=off",
       "bf16,ef=off,transactional=off,decay=0.5,start=10,nonfinite=error"},
  };
  for (const auto& [text, canonical] : cases) {
    EXPECT_EQ(make_codec(text).spec, canonical) << text;
    EXPECT_EQ(make_codec(canonical).spec, canonical);
  }
}

TEST(Spec, CommonOptionsAreRead) {
  const Codec codec =
      make_codec("bf16,ef=off,transactional=off,decay=0.9,start=25,nonfinite=skip-step");
  EXPECT_FALSE(codec.options.error_feedback);
  EXPECT_FALSE(codec.options.transactional);
  EXPECT_EQ(codec.options.decay, 0.9F);
  EXPECT_EQ(codec.options.start_step, 25U);
  EXPECT_EQ(codec.options.nonfinite, NonFinite::kSkipStep);
}

// Text, the marked column and its width, and the spelling the message must offer.
struct Bad {
  const char* text;
  std::size_t column;
  std::size_t width;
  const char* offered;
};

class BadSpec : public testing::TestWithParam<Bad> {};

TEST_P(BadSpec, ShowsThePlaceAndTheNearestSpelling) {
  const Bad& bad = GetParam();
  const std::string message = message_of<PolicyError>(bad.text);
  EXPECT_THAT(message, HasSubstr("policy \"" + std::string(bad.text) + "\""));
  const std::string mark = "\n  " + std::string(bad.text) + "\n  " + std::string(bad.column, ' ') +
                           std::string(bad.width, '^') + "\nhint: ";
  EXPECT_THAT(message, HasSubstr(mark));
  EXPECT_THAT(message, HasSubstr("did you mean \"" + std::string(bad.offered) + "\"?"));
}

INSTANTIATE_TEST_SUITE_P(
    , BadSpec,
    testing::Values(
        Bad{"tokp:0.01", 0, 4, "topk:0.01"}, Bad{"TopK:0.01", 0, 4, "topk:0.01"},
        Bad{"bf61", 0, 4, "bf16"}, Bad{"q9", 0, 2, "q8"}, Bad{"q16", 0, 3, "q8"},
        Bad{"q0", 0, 2, "q1"}, Bad{"randomask:0.1", 0, 9, "randmask:0.1"},
        Bad{"topk", 0, 4, "topk:0.01"}, Bad{"topk=0.01", 4, 1, "topk:0.01"},
        Bad{"topk:0.01,vales=q8", 10, 5, "topk:0.01,values=q8"},
        Bad{"topk:0.01,values=q9", 17, 2, "topk:0.01,values=q8"},
        Bad{"topk:0.01,values=ternery", 17, 7, "topk:0.01,values=ternary"},
        Bad{"topk:0.01,select=exacd", 17, 5, "topk:0.01,select=exact"},
        Bad{"topk:1.5", 5, 3, "topk:1"}, Bad{"topk:0", 5, 1, "topk:0.01"},
        Bad{"topk:-1", 5, 2, "topk:0.01"}, Bad{"topk:1%", 5, 2, "topk:0.01"},
        Bad{"topk:nan", 5, 3, "topk:0.01"}, Bad{"topk:k=0", 7, 1, "topk:k=1"},
        Bad{"topk:k=x", 7, 1, "topk:k=1"}, Bad{"topk:0.1,chunk=1", 15, 1, "topk:0.1,chunk=64"},
        Bad{"topk:0.1,select=sampled,chunk=64", 16, 7, "topk:0.1,select=exact,chunk=64"},
        Bad{"topk:0.1,select=carried,chunk=64", 16, 7, "topk:0.1,select=exact,chunk=64"},
        Bad{"topk:0.1,scope=buckets", 15, 7, "topk:0.1,scope=bucket"},
        Bad{"topk:0.1,scop=bucket", 9, 4, "topk:0.1,scope=bucket"},
        Bad{"topk:0.1,select=sampled,scope=bucket", 16, 7, "topk:0.1,select=exact,scope=bucket"},
        Bad{"topk:0.1,scope=bucket,select=carried", 29, 7, "topk:0.1,scope=bucket,select=exact"},
        Bad{"topk:0.1,momentum=1", 18, 1, "topk:0.1,momentum=0.9"},
        Bad{"topk:0.1,momentum=-1", 18, 2, "topk:0.1,momentum=0"},
        Bad{"topk:0.1,momentum=x", 18, 1, "topk:0.1,momentum=0.9"},
        Bad{"topk:0.1,momentum", 9, 8, "topk:0.1,momentum=0.9"},
        Bad{"topk:0.1,momentum=0.9,clip=0", 27, 1, "topk:0.1,momentum=0.9,clip=1"},
        Bad{"topk:0.1,momentum=0.9,clip=inf", 27, 3, "topk:0.1,momentum=0.9,clip=1"},
        Bad{"topk:0.1,momentum=0.9,clip=1,clip_norm=lost", 39, 4,
            "topk:0.1,momentum=0.9,clip=1,clip_norm=last"},
        Bad{"topk:0.1,momentum=0.9,ef=off", 25, 3, "topk:0.1,momentum=0.9,ef=on"},
        Bad{"q4,block=100", 9, 3, "q4,block=128"}, Bad{"q4,block=1", 9, 1, "q4,block=64"},
        Bad{"q4,block=99999999999999999999", 9, 20, "q4,block=4096"}, Bad{"q4:3", 2, 2, "q4"},
        Bad{"bf16,ef=of", 8, 2, "bf16,ef=off"}, Bad{"bf16,decay=2", 11, 1, "bf16,decay=1"},
        Bad{"bf16,start=-5", 11, 2, "bf16,start=0"},
        Bad{"bf16,nonfinite=skip", 15, 4, "bf16,nonfinite=skip-step"}));

INSTANTIATE_TEST_SUITE_P(
    Quantize, BadSpec,
    testing::Values(Bad{"q4,kind=qsdg", 8, 4, "q4,kind=qsgd"},
                    Bad{"q4,kind=terngrad", 0, 2, "q2,kind=terngrad"},
                    Bad{"q1,kind=qsgd", 0, 2, "q2,kind=qsgd"},
                    Bad{"q1,kind=natural", 0, 2, "q2,kind=natural"},
                    Bad{"q3,kind=mx", 0, 2, "q4,kind=mx"}, Bad{"q5,kind=mx", 0, 2, "q6,kind=mx"},
                    Bad{"q7,kind=mx", 0, 2, "q8,kind=mx"},
                    Bad{"q8,kind=mx,element=e2m1", 19, 4, "q8,kind=mx,element=e4m3"},
                    Bad{"q8,kind=mx,block=48", 17, 2, "q8,kind=mx,block=64"},
                    Bad{"q8,kind=mx,block=512", 17, 3, "q8,kind=mx,block=256"},
                    Bad{"q4,kind=qsgd,stochastic=off", 24, 3, "q4,kind=qsgd,stochastic=on"},
                    Bad{"q4,block=192,rotate", 9, 3, "q4,block=256,rotate"},
                    Bad{"q4,block=320,rotate", 9, 3, "q4,block=256,rotate"}));

TEST(Spec, ElementsBelongToMx) {
  EXPECT_THAT(message_of<PolicyError>("q8,element=e4m3"), HasSubstr("add kind=mx"));
}

INSTANTIATE_TEST_SUITE_P(Fedzip, BadSpec,
                         testing::Values(Bad{"fedzap:0.1", 0, 6, "fedzip:0.1"},
                                         Bad{"fedzip", 0, 6, "fedzip:0.01"},
                                         Bad{"fedzip:2", 7, 1, "fedzip:1"},
                                         Bad{"fedzip:k=3", 7, 3, "fedzip:0.01"},
                                         Bad{"fedzip:0.1,k=2", 13, 1, "fedzip:0.1,k=3"},
                                         Bad{"fedzip:0.1,k=257", 13, 3, "fedzip:0.1,k=256"}));

INSTANTIATE_TEST_SUITE_P(Lossless, BadSpec,
                         testing::Values(Bad{"losless", 0, 7, "lossless"},
                                         Bad{"lossless:1", 8, 2, "lossless"}));

INSTANTIATE_TEST_SUITE_P(OneBit, BadSpec,
                         testing::Values(Bad{"onebits", 0, 7, "onebit"},
                                         Bad{"onebit:8", 6, 2, "onebit"},
                                         Bad{"onebit,block=0", 13, 1, "onebit,block=64"},
                                         Bad{"onebit,block=1000", 13, 4, "onebit,block=1024"},
                                         Bad{"onebit,block=70000", 13, 5, "onebit,block=65536"},
                                         Bad{"onebit,scale=l3", 13, 2, "onebit,scale=l2"}));

INSTANTIATE_TEST_SUITE_P(Dct, BadSpec,
                         testing::Values(Bad{"dct", 0, 3, "dct:32"}, Bad{"dct:0", 4, 1, "dct:1"},
                                         Bad{"dct:65", 4, 2, "dct:64"}, Bad{"dct:x", 4, 1, "dct:1"},
                                         Bad{"dct:9,tile=8", 4, 1, "dct:8,tile=8"},
                                         Bad{"dct:8,tile=100", 11, 3, "dct:8,tile=128"},
                                         Bad{"dct:8,tile=5000", 11, 4, "dct:8,tile=4096"},
                                         Bad{"dct:8,tile=4", 11, 1, "dct:8,tile=8"},
                                         Bad{"dct:8,values=q9", 13, 2, "dct:8,values=q8"}));

INSTANTIATE_TEST_SUITE_P(
    LowRank, BadSpec,
    testing::Values(Bad{"powersgd", 0, 8, "powersgd:4"}, Bad{"powersdg:4", 0, 8, "powersgd:4"},
                    Bad{"powersgd:0", 9, 1, "powersgd:1"}, Bad{"powersgd:65", 9, 2, "powersgd:64"},
                    Bad{"powersgd:4,rounds=3", 18, 1, "powersgd:4,rounds=2"},
                    Bad{"powersgd:4,ef=off", 14, 3, "powersgd:4,ef=on"},
                    Bad{"powersgd:4,refresh=2", 11, 7, "powersgd:4,rounds=2"},
                    Bad{"galore", 0, 6, "galore:4"}, Bad{"galore:0", 7, 1, "galore:1"},
                    Bad{"galore:4,refresh=0", 17, 1, "galore:4,refresh=1"},
                    Bad{"galore:4,refresh=10001", 17, 5, "galore:4,refresh=10000"},
                    Bad{"lowrank", 0, 7, "lowrank:4"}, Bad{"lowrank:65", 8, 2, "lowrank:64"},
                    Bad{"galore:4,ef=off", 12, 3, "galore:4,ef=on"}));

INSTANTIATE_TEST_SUITE_P(
    DctCols, BadSpec,
    testing::Values(Bad{"dctcols", 0, 7, "dctcols:32"}, Bad{"dctcol:8", 0, 6, "dctcols:8"},
                    Bad{"dctcols:0", 8, 1, "dctcols:1"},
                    Bad{"dctcols:70000", 8, 5, "dctcols:65536"},
                    Bad{"dctcols:8,refresh=0", 18, 1, "dctcols:8,refresh=1"},
                    Bad{"dctcols:8,refresh=2,ef=off", 23, 3, "dctcols:8,refresh=2,ef=on"}));

TEST(Spec, BrokenGrammarShowsThePlace) {
  for (const char* text : {"", " ", ",", ":", "=", "topk:", "topk:,", "bf16,", "bf16,,ef=on",
                           "bf16,=on", "bf16,ef=", "bf16,ef=on,ef=off"}) {
    EXPECT_THAT(message_of<PolicyError>(text), HasSubstr("^")) << text;
  }
  EXPECT_THAT(message_of<PolicyError>(std::string(1000, 'q')), HasSubstr("1000 bytes"));
}

TEST(Spec, UnprintableBytesAreQuotedSafely) {
  const std::string message = message_of<PolicyError>("bf16\x01\xff,ef=on");
  for (const char c : message) EXPECT_TRUE(c == '\n' || (c >= 32 && c < 127)) << int{c};
}

TEST(Spec, MomentumCorrectionIsTopksAloneAndAWhole) {
  for (const char* text : {"q4,momentum=0.9", "bf16,nesterov", "onebit,clip=1",
                           "fedzip:0.1,clip_norm=last", "none,momentum=0.9"}) {
    const std::string message = message_of<PolicyError>(text);
    EXPECT_THAT(message, HasSubstr("momentum correction is topk's alone")) << text;
    EXPECT_THAT(message, HasSubstr("^")) << text;
  }
  for (const char* text : {"topk:0.1,nesterov", "topk:0.1,clip=1", "topk:0.1,clip_norm=last",
                           "topk:0.1,momentum=0.9,clip_norm=last"}) {
    const std::string message = message_of<PolicyError>(text);
    EXPECT_THAT(message, HasSubstr("without")) << text;
    EXPECT_THAT(message, HasSubstr("hint: ")) << text;
  }
  EXPECT_EQ(make_codec("topk:0.1,clip_norm=tensor,clip=2,nesterov=on,momentum=0.90").spec,
            "topk:0.1,momentum=0.9,nesterov,clip=2");
}

TEST(Spec, ScopeBucketIsTopksAloneAndSelectsFromWholeLayers) {
  for (const char* text :
       {"topk:0.1,chunk=64,scope=bucket", "topk:0.1,scope=bucket,momentum=0.9"}) {
    const std::string message = message_of<PolicyError>(text);
    EXPECT_THAT(message, HasSubstr("with scope=bucket")) << text;
    EXPECT_THAT(message, HasSubstr("^")) << text;
    EXPECT_THAT(message, HasSubstr("hint: ")) << text;
  }
  for (const char* text : {"q4,scope=bucket", "fedzip:0.1,scope=bucket", "dct:4,scope=bucket"}) {
    EXPECT_THAT(message_of<PolicyError>(text), HasSubstr("^")) << text;
  }
  EXPECT_EQ(make_codec("topk:0.1,scope=layer").spec, "topk:0.1");
  const Codec codec = make_codec("topk:k=100,scope=bucket,values=q8,memory=bf16");
  EXPECT_EQ(codec.spec, "topk:k=100,values=q8,scope=bucket,memory=bf16");
  EXPECT_NE(codec.payload->joint(), nullptr);
  const Codec warming = make_codec("topk:0.001,scope=bucket,warmup=8");
  EXPECT_EQ(warming.payload_at(0)->name(), "topk:0.25,scope=bucket");
}

TEST(Spec, WhatTheDesignHasAndThisVersionLacksIsNotAvailable) {
  for (const char* text : {"auto", "bf16,warmup=10"}) {
    const std::string message = message_of<NotAvailable>(text);
    EXPECT_THAT(message, HasSubstr("not in this version")) << text;
    EXPECT_THAT(message, HasSubstr("^")) << text;
    EXPECT_THAT(message, HasSubstr("hint: ")) << text;
  }
}

TEST(Warmup, TheDensityFallsInEqualStages) {
  const Codec codec = make_codec("topk:0.001,start=5,warmup=10");
  EXPECT_EQ(codec.spec, "topk:0.001,start=5,warmup=10");
  const auto sent = [&](std::uint64_t step) {
    const PayloadCodec* payload = codec.payload_at(step);
    return payload == nullptr ? "none" : payload->name();
  };
  std::vector<std::string> seen;
  std::vector<std::uint64_t> phases;
  for (std::uint64_t step = 0; step < 17; ++step) {
    if (seen.empty() || seen.back() != sent(step)) {
      seen.push_back(sent(step));
      phases.push_back(step);
    }
    EXPECT_EQ(codec.phase_at(step), phases.back());
  }
  EXPECT_THAT(seen, ElementsAre("none", "topk:0.25", "topk:0.0625", "topk:0.015625",
                                "topk:0.00390625", "topk:0.001"));
  EXPECT_THAT(phases, ElementsAre(0, 5, 7, 10, 12, 15));
  const Codec short_one = make_codec("topk:0.001,values=q8,warmup=1");
  EXPECT_EQ(short_one.payload_at(0)->name(), "topk:0.00390625,values=q8");
  EXPECT_EQ(short_one.payload_at(1)->name(), "topk:0.001,values=q8");
  EXPECT_EQ(make_codec("topk:0.5").payload_at(0)->name(), "topk:0.5");
  for (const char* bad : {"topk:0.25,warmup=8", "topk:k=10,warmup=8", "topk:0.1,warmup=-1"}) {
    EXPECT_THROW(make_codec(bad), PolicyError) << bad;
  }
}

}  // namespace
}  // namespace thinwire
