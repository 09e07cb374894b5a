#include "tests/support/ranks.h"

#include <exception>
#include <thread>
#include <utility>

#include "comm/loopback/loopback_communicator.h"

namespace thinwire::testing {

Ranks thread_ranks(std::string label, int size,
                   std::function<std::function<std::unique_ptr<Communicator>(int)>()> make_group) {
  Ranks ranks;
  ranks.label = std::move(label);
  ranks.size = size;
  ranks.run = [size, make_group = std::move(make_group)](const RankWork& work) {
    const auto make = make_group();
    std::vector<std::exception_ptr> errors(static_cast<std::size_t>(size));
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        std::unique_ptr<Communicator> comm;
        try {
          comm = make(rank);
          work(*comm);
        } catch (...) {
          errors[static_cast<std::size_t>(rank)] = std::current_exception();
          if (comm) {
            comm->abort();  // the others must not wait for this rank
          }
        }
      });
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (const std::exception_ptr& error : errors) {
      if (error) {
        std::rethrow_exception(error);
      }
    }
  };
  return ranks;
}

std::vector<Ranks> loopback_ranks() {
  std::vector<Ranks> all;
  for (const int size : {1, 2, 3, 4, 7}) {
    all.push_back(thread_ranks("loopback", size, [size] {
      auto group = std::make_shared<LoopbackGroup>(size);
      return [group](int rank) { return group->communicator(rank); };
    }));
  }
  return all;
}

}  // namespace thinwire::testing
