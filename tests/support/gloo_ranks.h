// Gloo groups for the contract suites: ranks as threads that meet in a store in memory, over TCP on
// the loopback interface.
#pragma once

#include <gloo/rendezvous/hash_store.h>

#include <vector>

#include "comm/gloo/gloo_communicator.h"
#include "tests/support/ranks.h"

namespace thinwire::testing {

inline std::vector<Ranks> gloo_thread_ranks() {
  std::vector<Ranks> all;
  for (const int size : {1, 2, 3, 4, 7}) {
    all.push_back(thread_ranks("gloo", size, [size] {
      auto store = std::make_shared<gloo::rendezvous::HashStore>();
      return [size, store](int rank) {
        return make_gloo_communicator(rank, size, store, {.hostname = "127.0.0.1"});
      };
    }));
  }
  return all;
}

}  // namespace thinwire::testing
