// c10d groups for the contract suites: ranks as threads that meet in a store in memory, over TCP on
// the loopback interface. No header of torch, which takes half a minute to compile.
#pragma once

#include <vector>

#include "tests/support/ranks.h"

namespace thinwire::testing {

// Over the Gloo inside torch.
std::vector<Ranks> c10d_gloo_ranks(const std::vector<int>& sizes);

// Over a backend that offers no more than any does.
std::vector<Ranks> c10d_other_ranks(const std::vector<int>& sizes);

}  // namespace thinwire::testing
