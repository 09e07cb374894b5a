#include <gtest/gtest.h>

#include <atomic>
#include <cstring>

#include "comm/loopback/loopback_communicator.h"
#include "compressors/core/error.h"
#include "compressors/core/payload.h"
#include "tests/comm/exchange_contract.h"

namespace thinwire::testing {

INSTANTIATE_TEST_SUITE_P(Loopback, ExchangeContract,
                         ::testing::ValuesIn(exchange_cases(loopback_ranks())), exchange_name);

namespace {

// A bit that flips between two ranks: the receiver names the sender, whatever transfer it was.
TEST(Exchange, DamagedBytesNameTheirSender) {
  constexpr int kSize = 3;
  constexpr int kSender = 1;
  for (const ExchangeCase& c : exchange_cases(loopback_ranks())) {
    if (c.ranks.size != kSize || c.collective == Collective::kDense ||
        c.collective == Collective::kLinear) {
      continue;  // summed by the transport: there is no message to check
    }
    const int transfers = c.collective == Collective::kRequantising ? 2 : 1;
    for (int damaged = 0; damaged < transfers; ++damaged) {
      for (const std::size_t bit : {3U, 100U, 8 * 30U}) {
        SCOPED_TRACE(c.spec + ", transfer " + std::to_string(damaged) + ", bit " +
                     std::to_string(bit));
        auto group = std::make_shared<LoopbackGroup>(kSize);
        std::atomic<int> seen{0};
        group->tamper([&](int sender, int receiver, std::span<std::byte> bytes) {
          // Two deliveries from the sender a transfer; both of the chosen one are damaged.
          if (sender == kSender && seen++ / (kSize - 1) == damaged) {
            EXPECT_NE(receiver, kSender);
            bytes[bit / 8] ^= static_cast<std::byte>(1U << (bit % 8));
          }
        });
        const Ranks ranks = thread_ranks(
            "loopback", kSize, [&] { return [&](int rank) { return group->communicator(rank); }; });
        std::atomic<int> named{0};
        ranks.run([&](Communicator& comm) {
          Model model(comm, c, {500, 60}, DType::kF32);
          model.fill(0);
          try {
            model.reduce(0, 1.0F / kSize);
            EXPECT_EQ(comm.rank(), kSender) << "damaged bytes were used";
          } catch (const CorruptPayload& error) {
            const std::string text = error.what();
            EXPECT_NE(text.find("rank " + std::to_string(kSender)), std::string::npos) << text;
            ++named;
            comm.abort();
          } catch (const TransportError&) {
            // the receivers stopped before this rank's next transfer
          }
        });
        EXPECT_GE(named, 1);
      }
    }
  }
}

// A body that no encoder wrote, under a good checksum: rank and layer are named.
TEST(Exchange, BodiesThatCannotBeDecodedNameSenderAndLayer) {
  constexpr int kSize = 2;
  constexpr int kSender = 1;
  for (const ExchangeCase& c : exchange_cases(loopback_ranks())) {
    if (c.ranks.size != kSize || c.spec == "none" || c.collective == Collective::kLinear) {
      continue;  // no bodies
    }
    SCOPED_TRACE(c.spec);
    auto group = std::make_shared<LoopbackGroup>(kSize);
    group->tamper([&](int sender, int /*receiver*/, std::span<std::byte> message) {
      if (sender == kSender) {
        PayloadHeader header;
        std::memcpy(&header.elements, message.data() + 8, sizeof(header.elements));
        message[kPayloadHeaderBytes] = std::byte{0xF7};  // no mode of any family
        seal_payload(header, message);
      }
    });
    const Ranks ranks = thread_ranks(
        "loopback", kSize, [&] { return [&](int rank) { return group->communicator(rank); }; });
    bool named = false;
    ranks.run([&](Communicator& comm) {
      Model model(comm, c, {3000}, DType::kF32);
      model.fill(0);
      try {
        model.reduce(0, 1.0F / kSize);
        EXPECT_EQ(comm.rank(), kSender) << "a damaged body was used";
      } catch (const CorruptPayload& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find("rank " + std::to_string(kSender)), std::string::npos) << text;
        EXPECT_NE(text.find("layer0"), std::string::npos) << text;
        named = comm.rank() != kSender;
        comm.abort();
      } catch (const TransportError&) {
        EXPECT_EQ(comm.rank(), kSender);
      }
    });
    EXPECT_TRUE(named);
  }
}

}  // namespace

}  // namespace thinwire::testing
