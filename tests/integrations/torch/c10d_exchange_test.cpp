#include <gtest/gtest.h>

#include "tests/comm/exchange_contract.h"
#include "tests/support/c10d_ranks.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(C10d, ExchangeContract,
                         ::testing::ValuesIn(exchange_cases(c10d_gloo_ranks({1, 2, 3, 4, 7}),
                                                            Selection::kOneACollective)),
                         exchange_name);
INSTANTIATE_TEST_SUITE_P(C10dOther, ExchangeContract,
                         ::testing::ValuesIn(exchange_cases(c10d_other_ranks({2}),
                                                            Selection::kOneACollective)),
                         exchange_name);

}  // namespace thinwire::testing
