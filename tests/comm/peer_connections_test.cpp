#include "comm/asio/peer_connections.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/write.hpp>
#include <cstdlib>
#include <exception>
#include <functional>
#include <random>
#include <sstream>
#include <thread>

namespace thinwire::testing {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;
using Receipt = PeerConnections::Receipt;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr const char* kHost = "127.0.0.1";

Deadline soon() { return Clock::now() + seconds(60); }

// What `act` threw, or "".
std::string error_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const TransportError& error) {
    return error.what();
  }
  return "";
}

// Connected ranks, each on a thread of its own. `meet` waits for all of them.
using Meet = std::function<void()>;
using RankTest = std::function<void(int rank, PeerConnections& peers, const Meet& meet)>;

void run(int size, const RankTest& test, std::size_t room_bytes = 0) {
  std::barrier<> barrier(size);
  std::vector<std::string> addresses(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      PeerConnections peers(rank, size, kHost, room_bytes);
      addresses[static_cast<std::size_t>(rank)] = peers.address();
      barrier.arrive_and_wait();
      try {
        peers.connect(addresses, soon());
        test(rank, peers, [&] { barrier.arrive_and_wait(); });
      } catch (const std::exception& error) {
        ADD_FAILURE() << "rank " << rank << ": " << error.what();
        peers.abort();
        barrier.arrive_and_drop();
        return;
      }
      barrier.arrive_and_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Where nothing may come elsewhere.
void take(PeerConnections& peers, int peer, std::vector<std::byte>& in, Receipt& receipt) {
  peers.receive(peer, in, receipt, [] { ADD_FAILURE() << "only announced"; });
}

// What `from` sends to `to` as its block `number`.
std::vector<std::byte> block(int from, int to, int number, std::size_t size) {
  std::mt19937 random(static_cast<unsigned>(from * 1000 + to * 100 + number));
  std::vector<std::byte> bytes(size);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

TEST(PeerConnections, BlocksArriveInOrderBetweenAllRanks) {
  static constexpr std::size_t kSizes[] = {1, 0, 7, 65536, 8, 1000, 40000, 3};
  for (const int size : {1, 2, 3, 7}) {
    run(size, [size](int rank, PeerConnections& peers, const Meet&) {
      int number = 0;
      for (const std::size_t bytes : kSizes) {
        std::vector<std::vector<std::byte>> in(static_cast<std::size_t>(size));
        std::vector<Receipt> receipts(static_cast<std::size_t>(size));
        for (int peer = 0; peer < size; ++peer) {
          if (peer == rank) continue;
          const auto p = static_cast<std::size_t>(peer);
          in[p].resize(bytes);
          take(peers, peer, in[p], receipts[p]);
          EXPECT_TRUE(peers.send(peer, block(rank, peer, number, bytes)));
        }
        for (int peer = 0; peer < size; ++peer) {
          if (peer == rank) continue;
          const auto p = static_cast<std::size_t>(peer);
          peers.wait(receipts[p], soon());
          EXPECT_EQ(receipts[p], Receipt::kHere);
          EXPECT_TRUE(in[p] == block(peer, rank, number, bytes));
        }
        ++number;
      }
    });
  }
}

// Nobody reads: sends never wait; what finds no room is announced, in its turn.
TEST(PeerConnections, WhatHasNoRoomIsAnnounced) {
  constexpr std::size_t kBytes = 20'000;
  constexpr int kMost = 10'000;
  std::vector<bool> sent;
  run(2, [&](int rank, PeerConnections& peers, const Meet& meet) {
    if (rank == 0) {
      while (static_cast<int>(sent.size()) < kMost && (sent.empty() || sent.back())) {
        const int number = static_cast<int>(sent.size());
        sent.push_back(peers.send(1, block(0, 1, number, kBytes)));
      }
      EXPECT_GT(sent.size(), 1U);
      EXPECT_FALSE(sent.back());
      EXPECT_TRUE(peers.flushed());
    }
    meet();
    if (rank == 1) {
      for (std::size_t i = 0; i < sent.size(); ++i) {
        std::vector<std::byte> in(kBytes);
        Receipt receipt{};
        bool elsewhere = false;
        peers.receive(0, in, receipt, [&elsewhere] { elsewhere = true; });
        peers.wait(receipt, soon());
        EXPECT_EQ(receipt, sent[i] ? Receipt::kHere : Receipt::kElsewhere) << i;
        EXPECT_EQ(elsewhere, !sent[i]);
        if (sent[i]) {
          EXPECT_TRUE(in == block(0, 1, static_cast<int>(i), kBytes)) << i;
        }
      }
    }
    meet();
    if (rank == 0) {
      EXPECT_TRUE(peers.send(1, block(0, 1, 0, kBytes)));
    }
  });
}

// The system holds less than is said: a write is cut and goes on later, before all that follows.
TEST(PeerConnections, WritesThatAreCutGoOn) {
  constexpr std::size_t kMany = 40'000'000;
  const auto test = [](int rank, PeerConnections& peers, const Meet& meet) {
    if (rank == 0) {
      EXPECT_TRUE(peers.send(1, block(0, 1, 0, kMany)));
      EXPECT_FALSE(peers.flushed());
      EXPECT_FALSE(peers.send(1, block(0, 1, 1, 7)));
      EXPECT_THAT(error_of([&] { peers.flush(Clock::now() + milliseconds(20)); }),
                  HasSubstr("deadline"));
    }
    meet();
    if (rank == 0) {
      peers.flush(soon());
      EXPECT_TRUE(peers.flushed());
      EXPECT_TRUE(peers.send(1, block(0, 1, 2, 7)));
      return;
    }
    std::vector<std::byte> many(kMany);
    std::vector<std::byte> few(7);
    Receipt receipt{};
    take(peers, 0, many, receipt);
    peers.wait(receipt, soon());
    EXPECT_TRUE(many == block(0, 1, 0, kMany));
    bool elsewhere = false;
    peers.receive(0, few, receipt, [&elsewhere] { elsewhere = true; });
    peers.wait(receipt, soon());
    EXPECT_TRUE(elsewhere);
    take(peers, 0, few, receipt);
    peers.wait(receipt, soon());
    EXPECT_TRUE(few == block(0, 1, 2, 7));
  };
  run(2, test, 2 * kMany);
}

TEST(PeerConnections, PollTakesWhatHasCome) {
  run(2, [](int rank, PeerConnections& peers, const Meet& meet) {
    std::vector<std::byte> in(100);
    Receipt receipt{};
    if (rank == 1) {
      take(peers, 0, in, receipt);
      peers.poll();
      EXPECT_EQ(receipt, Receipt::kPending);
    }
    meet();
    if (rank == 0) {
      peers.send(1, block(0, 1, 0, 100));
      return;
    }
    for (const Deadline end = soon(); receipt == Receipt::kPending && Clock::now() < end;) {
      peers.poll();
      std::this_thread::yield();
    }
    EXPECT_TRUE(in == block(0, 1, 0, 100));
  });
}

TEST(PeerConnections, AnotherSizeThanExpectedIsAnError) {
  run(2, [](int rank, PeerConnections& peers, const Meet&) {
    if (rank == 0) {
      peers.send(1, block(0, 1, 0, 12));
      return;
    }
    std::vector<std::byte> in(13);
    Receipt receipt{};
    take(peers, 0, in, receipt);
    EXPECT_EQ(error_of([&] { peers.wait(receipt, soon()); }),
              "rank 0 sent block 0 of 12 bytes where rank 1 expected block 0 of 13");
  });
}

TEST(PeerConnections, TheDeadlineEndsAWait) {
  run(2, [](int rank, PeerConnections& peers, const Meet&) {
    if (rank == 0) return;
    std::vector<std::byte> in(1);
    Receipt receipt{};
    take(peers, 0, in, receipt);
    EXPECT_THAT(error_of([&] { peers.wait(receipt, Clock::now() + milliseconds(20)); }),
                "nothing came of rank 0 before the deadline");
  });
}

TEST(PeerConnections, AbortEndsWaitsHereAndAtPeers) {
  run(3, [](int rank, PeerConnections& peers, const Meet& meet) {
    const int peer = rank == 0 ? 1 : 0;
    std::vector<std::byte> in(1);
    Receipt receipt{};
    take(peers, peer, in, receipt);
    meet();
    std::thread other([&] {
      if (rank != 0) return;
      std::this_thread::sleep_for(milliseconds(20));
      peers.abort();
      peers.abort();
    });
    const std::string error = error_of([&] { peers.wait(receipt, soon()); });
    if (rank == 0) {
      EXPECT_THAT(error, AnyOf(HasSubstr("shut"), HasSubstr("closed its connection")));
    } else {
      EXPECT_THAT(error, HasSubstr("rank 0 closed its connection"));
    }
    EXPECT_EQ(receipt, Receipt::kPending);
    EXPECT_TRUE(rank == 0 || peers.failed(peer));
    other.join();
    peers.abort();
    EXPECT_THAT(error_of([&] { peers.send(peer, in); }), HasSubstr("shut"));
    peers.poll();
  });
}

// Who does not know the word is sent away, whatever he sends, and does not take a rank's place.
TEST(PeerConnections, StrangersAreSentAway) {
  PeerConnections zero(0, 2, kHost);
  PeerConnections one(1, 2, kHost);
  const std::vector<std::string> addresses{zero.address(), one.address()};
  std::istringstream address(zero.address());
  std::string host;
  unsigned short port = 0;
  std::string word;
  address >> host >> port >> word;
  boost::asio::io_context io;
  std::vector<boost::asio::ip::tcp::socket> strangers;
  for (const std::string& hello :
       {std::string("GET / HTTP/1.1\r\nHost: a\r\n\r\n"), std::string(20, '\0'),
        std::string("short"), word + std::string(4, '\0'), word + "\2" + std::string(3, '\0')}) {
    strangers.emplace_back(io);
    strangers.back().connect({boost::asio::ip::make_address(host), port});
    boost::asio::write(strangers.back(), boost::asio::buffer(hello));
    if (hello.size() < 20) strangers.back().close();
  }
  std::thread other([&] { one.connect(addresses, soon()); });
  zero.connect(addresses, soon());
  other.join();
  for (boost::asio::ip::tcp::socket& stranger : strangers) {
    if (!stranger.is_open()) continue;
    char answer = 0;
    boost::system::error_code error;
    stranger.read_some(boost::asio::buffer(&answer, 1), error);
    EXPECT_TRUE(error) << "was not sent away";
  }
  zero.send(1, block(0, 1, 0, 9));
  std::vector<std::byte> in(9);
  Receipt receipt{};
  take(one, 0, in, receipt);
  one.wait(receipt, soon());
  EXPECT_TRUE(in == block(0, 1, 0, 9));
}

TEST(PeerConnections, WhoDoesNotComeIsNamed) {
  PeerConnections zero(0, 3, kHost);
  const std::string own = zero.address();
  const auto shortly = [] { return Clock::now() + milliseconds(50); };
  EXPECT_THAT(error_of([&] {
                zero.connect({own, own, own}, shortly());
              }),
              HasSubstr("rank 0 waited in vain for the connection of rank 1, 2"));
  // A port that is taken, where nobody listens.
  boost::asio::io_context io;
  const boost::asio::ip::tcp::socket taken(io, {boost::asio::ip::make_address(kHost), 0});
  const std::string closed = std::string(kHost) + ' ' +
                             std::to_string(taken.local_endpoint().port()) + " 0123456789abcdef";
  PeerConnections one(1, 2, kHost);
  EXPECT_THAT(error_of([&] {
                one.connect({closed, one.address()}, shortly());
              }),
              HasSubstr("rank 1 cannot connect to rank 0 at 127.0.0.1: "));
  EXPECT_THAT(error_of([&] {
                one.connect({"nonsense", one.address()}, shortly());
              }),
              HasSubstr("got \"nonsense\""));
  EXPECT_THROW(one.connect({}, shortly()), InvalidArgument);
}

TEST(PeerConnections, RefusesAddressesOfOtherHosts) {
  EXPECT_THAT(error_of([] { PeerConnections(2, 3, "198.18.0.77"); }),
              HasSubstr("rank 2 cannot listen at 198.18.0.77"));
}

TEST(PeerHost, IsThatOfTheInterfaceWhichGlooIsTold) {
  const char* before = std::getenv("GLOO_SOCKET_IFNAME");
  const std::string kept = before == nullptr ? "" : before;
  ::setenv("GLOO_SOCKET_IFNAME", "lo,eth7", 1);
  EXPECT_EQ(default_peer_host(), "127.0.0.1");
  ::setenv("GLOO_SOCKET_IFNAME", "eth777", 1);
  EXPECT_THAT(error_of([] { default_peer_host(); }), HasSubstr("'eth777'"));
  ::unsetenv("GLOO_SOCKET_IFNAME");
  EXPECT_NO_THROW(PeerConnections(0, 2, default_peer_host()));
  if (before != nullptr) ::setenv("GLOO_SOCKET_IFNAME", kept.c_str(), 1);
}

}  // namespace
}  // namespace thinwire::testing
