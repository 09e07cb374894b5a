#include <gtest/gtest.h>

#include "tests/comm/exchange_contract.h"
#include "tests/support/gloo_ranks.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(Gloo, ExchangeContract,
                         ::testing::ValuesIn(exchange_cases(gloo_thread_ranks(),
                                                            Selection::kOneACollective)),
                         exchange_name);

}  // namespace thinwire::testing
