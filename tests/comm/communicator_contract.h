// The contract of comm/communicator.h as tests, instantiated by every transport:
// INSTANTIATE_TEST_SUITE_P(NAME, CommunicatorContract, ValuesIn(ranks), ranks_name).
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "tests/support/ranks.h"

namespace thinwire::testing {

class CommunicatorContract : public ::testing::TestWithParam<Ranks> {};

inline std::string ranks_name(const ::testing::TestParamInfo<Ranks>& info) {
  return info.param.label + std::to_string(info.param.size);
}

}  // namespace thinwire::testing
