// The contract of comm/communicator.h as tests, instantiated by every transport:
// INSTANTIATE_TEST_SUITE_P(NAME, CommunicatorContract, ValuesIn(ranks), ranks_name).
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tests/support/ranks.h"

namespace thinwire::testing {

class CommunicatorContract : public ::testing::TestWithParam<Ranks> {};

inline std::string ranks_name(const ::testing::TestParamInfo<Ranks>& info) {
  return info.param.label + std::to_string(info.param.size);
}

// Long enough for 7 ranks on a loaded machine; only failures ever wait for it.
Deadline soon();

// Every rank's bytes, in rank order.
std::vector<std::byte> gather_bytes(Communicator& comm, std::span<const std::byte> mine);

// Whether all ranks hold the same bytes.
bool same_on_all_ranks(Communicator& comm, std::span<const std::byte> mine);

}  // namespace thinwire::testing
