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

void run(int size, const RankTest& test) {
  std::barrier<> barrier(size);
  std::vector<std::string> addresses(static_cast<std::size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      PeerConnections peers(rank, size, kHost);
      addresses[static_cast<std::size_t>(rank)] = peers.address();
      barrier.arrive_and_wait();
      peers.connect(addresses, soon());
      test(rank, peers, [&] { barrier.arrive_and_wait(); });
      barrier.arrive_and_wait();
    });
  }
  for (std::thread& thread : threads) thread.join();
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
          peers.receive(peer, in[p], receipts[p]);
          EXPECT_TRUE(peers.send(peer, block(rank, peer, number, bytes)));
        }
        for (int peer = 0; peer < size; ++peer) {
          if (peer == rank) continue;
          const auto p = static_cast<std::size_t>(peer);
          peers.wait(peer, receipts[p], soon());
          EXPECT_EQ(receipts[p], Receipt::kHere);
          EXPECT_EQ(in[p], block(peer, rank, number, bytes));
        }
        ++number;
      }
    });
  }
}

// Nobody reads: sends never wait; what finds no room is announced, in its turn.
TEST(PeerConnections, WhatHasNoRoomIsAnnounced) {
  constexpr int kBlocks = 200;
  constexpr std::size_t kBytes = 20'000;
  std::vector<bool> sent;
  run(2, [&](int rank, PeerConnections& peers, const Meet& meet) {
    if (rank == 0) {
      for (int i = 0; i < kBlocks; ++i) sent.push_back(peers.send(1, block(0, 1, i, kBytes)));
      EXPECT_TRUE(sent.front());
      EXPECT_FALSE(sent.back());
    }
    meet();
    if (rank == 1) {
      for (int i = 0; i < kBlocks; ++i) {
        std::vector<std::byte> in(kBytes);
        Receipt receipt{};
        peers.receive(0, in, receipt);
        peers.wait(0, receipt, soon());
        const bool here = sent[static_cast<std::size_t>(i)];
        ASSERT_EQ(receipt, here ? Receipt::kHere : Receipt::kElsewhere) << i;
        if (here) {
          ASSERT_EQ(in, block(0, 1, i, kBytes)) << i;
        }
      }
    }
    meet();
    if (rank == 0) {
      EXPECT_TRUE(peers.send(1, block(0, 1, kBlocks, kBytes)));
    }
  });
}

TEST(PeerConnections, PollTakesWhatHasCome) {
  run(2, [](int rank, PeerConnections& peers, const Meet& meet) {
    std::vector<std::byte> in(100);
    Receipt receipt{};
    if (rank == 1) {
      peers.receive(0, in, receipt);
      peers.poll();
      EXPECT_EQ(receipt, Receipt::kPending);
    }
    meet();
    if (rank == 0) {
      peers.send(1, block(0, 1, 0, 100));
      return;
    }
    while (receipt == Receipt::kPending) {
      peers.poll();
      std::this_thread::yield();
    }
    EXPECT_EQ(in, block(0, 1, 0, 100));
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
    peers.receive(0, in, receipt);
    EXPECT_EQ(error_of([&] { peers.wait(0, receipt, soon()); }),
              "rank 0 sent block 0 of 12 bytes where rank 1 expected block 0 of 13");
  });
}

TEST(PeerConnections, TheDeadlineEndsAWait) {
  run(2, [](int rank, PeerConnections& peers, const Meet&) {
    if (rank == 0) return;
    std::vector<std::byte> in(1);
    Receipt receipt{};
    peers.receive(0, in, receipt);
    EXPECT_THAT(error_of([&] { peers.wait(0, receipt, Clock::now() + milliseconds(20)); }),
                HasSubstr("deadline"));
  });
}

TEST(PeerConnections, AbortEndsWaitsHereAndAtPeers) {
  run(3, [](int rank, PeerConnections& peers, const Meet& meet) {
    const int peer = rank == 0 ? 1 : 0;
    std::vector<std::byte> in(1);
    Receipt receipt{};
    peers.receive(peer, in, receipt);
    meet();
    std::thread other([&] {
      if (rank != 0) return;
      std::this_thread::sleep_for(milliseconds(20));
      peers.abort();
      peers.abort();
    });
    EXPECT_THAT(error_of([&] { peers.wait(peer, receipt, soon()); }),
                rank == 0 ? HasSubstr("") : HasSubstr("rank 0 closed its connection"));
    EXPECT_EQ(receipt, Receipt::kPending);
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
  address >> host >> port;
  boost::asio::io_context io;
  std::vector<boost::asio::ip::tcp::socket> strangers;
  for (const std::string& hello : {std::string("GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
                                   std::string(20, '\0'), std::string("short")}) {
    strangers.emplace_back(io);
    strangers.back().connect({boost::asio::ip::make_address(host), port});
    boost::asio::write(strangers.back(), boost::asio::buffer(hello));
    if (hello.size() < 20) strangers.back().close();
  }
  std::thread other([&] { one.connect(addresses, soon()); });
  zero.connect(addresses, soon());
  other.join();
  zero.send(1, block(0, 1, 0, 9));
  std::vector<std::byte> in(9);
  Receipt receipt{};
  one.receive(0, in, receipt);
  one.wait(0, receipt, soon());
  EXPECT_EQ(in, block(0, 1, 0, 9));
}

TEST(PeerConnections, WhoDoesNotComeIsNamed) {
  PeerConnections zero(0, 3, kHost);
  const std::string own = zero.address();
  const auto shortly = [] { return Clock::now() + milliseconds(50); };
  EXPECT_THAT(error_of([&] {
                zero.connect({own, own, own}, shortly());
              }),
              HasSubstr("rank 0 waited in vain for rank 1, 2 to connect"));
  std::string closed;
  {
    const PeerConnections gone(0, 2, kHost);
    closed = gone.address();
  }
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
