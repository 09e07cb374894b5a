#include "tests/support/ranks.h"

#include <cstring>
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

Deadline soon() { return Clock::now() + std::chrono::seconds(60); }

std::vector<std::byte> gather_bytes(Communicator& comm, std::span<const std::byte> mine) {
  std::vector<std::byte> all(mine.size() * static_cast<std::size_t>(comm.size()));
  comm.allgather(mine, all)->wait(soon());
  return all;
}

bool same_on_all_ranks(Communicator& comm, std::span<const std::byte> mine) {
  const std::vector<std::byte> all = gather_bytes(comm, mine);
  for (int rank = 0; rank < comm.size(); ++rank) {
    if (!mine.empty() && std::memcmp(all.data() + static_cast<std::size_t>(rank) * mine.size(),
                                     mine.data(), mine.size()) != 0) {
      return false;
    }
  }
  return true;
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
