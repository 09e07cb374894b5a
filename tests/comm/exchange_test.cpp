#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>

#include "comm/loopback/loopback_communicator.h"
#include "compressors/core/error.h"
#include "compressors/core/payload.h"
#include "compressors/core/random.h"
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
    const int transfers = c.collective == Collective::kSparse ? 1 : 2;
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

// The layers of a sparse message: three of topk:k=50,scope=bucket among others.
struct MixedBucket {
  std::vector<std::string> specs = {"topk:k=50,scope=bucket",
                                    "none",
                                    "topk:0.05",
                                    "topk:k=50,scope=bucket",
                                    "topk:0.02,values=q8,scope=bucket",
                                    "topk:k=50,scope=bucket"};
  std::vector<std::int64_t> sizes = {3001, 40, 500, 77, 900, 2000};
  std::vector<std::size_t> joint = {0, 3, 5};

  std::vector<Codec> codecs;
  std::vector<std::vector<float>> grads;
  PlainMemoryStore memories{true};
  std::unique_ptr<Exchange> exchange;

  MixedBucket(Communicator& comm, bool names_nonfinite = false) {
    static constexpr std::array kNames = {"a", "b", "c", "d", "e", "f"};
    std::vector<ExchangeLayer> layers;
    codecs.reserve(specs.size());
    for (std::size_t i = 0; i < specs.size(); ++i) {
      codecs.push_back(make_codec(specs[i]));
      ExchangeLayer& layer = layers.emplace_back();
      layer.name = kNames[i];
      layer.elements = sizes[i];
      layer.key_hash = i + 1;
      layer.payload = codecs[i].payload.get();
      layer.names_nonfinite = names_nonfinite;
      grads.emplace_back(static_cast<std::size_t>(sizes[i]));
    }
    exchange = make_sparse_exchange(comm, layers, memories);
  }

  void fill(std::uint64_t step, int rank) {
    for (std::size_t l = 0; l < grads.size(); ++l) {
      const RandomStream stream = random_stream(l + 1, step, rank);
      for (std::size_t i = 0; i < grads[l].size(); ++i) {
        const auto word = static_cast<std::int32_t>(random_block(stream, i)[0]);
        grads[l][i] = static_cast<float>(word) * 0x1p-31F * (l == 3 ? 8.0F : 1.0F);
      }
    }
  }

  std::vector<std::uint8_t> reduce(std::uint64_t step, float weight) {
    std::vector<Gradient> gradients;
    for (std::vector<float>& grad : grads) gradients.push_back({view(grad), view(grad)});
    exchange->start(step, weight, gradients)->wait(soon());
    const auto flags = exchange->finish();
    return {flags.begin(), flags.end()};
  }
};

// Ok-Topk's bound (Li and Hoefler, PPoPP 2022): a rank sends no more than 6 k words, k the entries
// that it keeps, whatever the number of ranks; all headers included. An allgather sends (P - 1) k
// entries.
TEST(Exchange, SplitReduceSendsSixWordsAnEntryAtMost) {
  const std::vector<std::int64_t> sizes = {230'000, 115'000, 50'000, 4096, 1000, 64};
  std::int64_t entries = 0;
  for (const std::int64_t n : sizes) entries += std::max<std::int64_t>(1, (n + 50) / 100);
  for (const int size : {2, 4, 16, 64}) {
    auto group = std::make_shared<LoopbackGroup>(size);
    const Ranks ranks = thread_ranks(
        "loopback", size, [&] { return [&](int rank) { return group->communicator(rank); }; });
    ranks.run([&](Communicator& comm) {
      Model model(comm, {ranks, "topk:0.01,ef=off", Collective::kSplit}, sizes, DType::kF32);
      model.fill_integers(0);
      const std::uint64_t before = comm.sent_bytes();
      model.reduce(0, 1.0F / static_cast<float>(size));
      const double words = static_cast<double>(comm.sent_bytes() - before) / 4;
      if (comm.rank() == 0) {
        RecordProperty("words_an_entry_" + std::to_string(size),
                       std::to_string(words / static_cast<double>(entries)));
      }
      EXPECT_LE(words, 6.0 * static_cast<double>(entries)) << size << " ranks";
      EXPECT_TRUE(same_on_all_ranks(comm, model.bytes()));
    });
  }
}

// Without error feedback what workers and owners drop is gone: each range's mean has no more
// entries than one rank may send.
TEST(Exchange, SplitReduceWithoutErrorFeedbackSendsTheLargestOfTheSums) {
  constexpr std::int64_t kElements = 3000;
  for (const Ranks& ranks : loopback_ranks()) {
    ranks.run([&](Communicator& comm) {
      Model model(comm, {ranks, "topk:0.05,ef=off", Collective::kSplit}, {kElements}, DType::kF32);
      for (std::uint64_t step = 0; step < 3; ++step) {
        model.fill(step);
        model.reduce(step, 1.0F);
        EXPECT_TRUE(same_on_all_ranks(comm, model.bytes()));
        const std::vector<double> sum = model.values(0);
        const auto zeros = std::count(sum.begin(), sum.end(), 0.0);
        EXPECT_NEAR(static_cast<double>(kElements - zeros), 0.05 * kElements, comm.size());
        EXPECT_EQ(model.residual(0, MemoryRole::kWorker), std::vector<double>(kElements));
        EXPECT_EQ(model.residual(0, MemoryRole::kOwner), std::vector<double>(kElements));
      }
    });
  }
}

TEST(Exchange, RangesOfASplitAreFewerWhereTheirPayloadsWouldBeMostlyHeaders) {
  const Codec codec = make_codec("topk:0.01");
  EXPECT_EQ(split_ranges(*codec.payload, 0, 1024), 1);
  EXPECT_EQ(split_ranges(*codec.payload, 1, 1024), 1);
  EXPECT_EQ(split_ranges(*codec.payload, 10'000'000, 1024), 1024);
  const int ranges = split_ranges(*codec.payload, 100'000, 1024);
  EXPECT_GT(ranges, 50);
  EXPECT_LT(ranges, 125);  // of at least 8 entries
  for (const char* whole : {"topk:k=100", "topk:0.01,scope=bucket", "topk:0.01,momentum=0.9",
                            "fedzip:0.01", "q4", "lossless"}) {
    EXPECT_EQ(split_ranges(*make_codec(whole).payload, 100'000, 1024), 0) << whole;
  }
}

// The joint layers' means and residuals are those of one layer with all their elements.
TEST(Exchange, LayersOfOneScopeAreSelectedFromTogether) {
  constexpr float kWeight = 1.0F / 3;
  for (const Ranks& ranks : loopback_ranks()) {
    if (ranks.size != 3) continue;
    ranks.run([&](Communicator& comm) {
      MixedBucket bucket(comm);
      std::int64_t n = 0;
      for (const std::size_t l : bucket.joint) n += bucket.sizes[l];
      ExchangeLayer layer;
      layer.name = "whole";
      layer.elements = n;
      layer.payload = bucket.codecs[0].payload.get();
      PlainMemoryStore memories(true);
      const auto exchange = make_sparse_exchange(comm, {layer}, memories);
      for (std::uint64_t step = 0; step < 3; ++step) {
        bucket.fill(step, comm.rank());
        std::vector<float> whole;
        for (const std::size_t l : bucket.joint) {
          whole.insert(whole.end(), bucket.grads[l].begin(), bucket.grads[l].end());
        }
        EXPECT_EQ(bucket.reduce(step, kWeight), std::vector<std::uint8_t>(6));
        const std::vector<Gradient> gradient = {{view(whole), view(whole)}};
        exchange->start(step, kWeight, gradient)->wait(soon());
        exchange->finish();
        bucket.memories.commit();
        memories.commit();
        std::vector<float> means;
        std::vector<double> residuals;
        for (const std::size_t l : bucket.joint) {
          const std::vector<double> residual = bucket.memories.residual(
              std::string(1, static_cast<char>('a' + l)), bucket.sizes[l], MemoryRole::kWorker);
          means.insert(means.end(), bucket.grads[l].begin(), bucket.grads[l].end());
          residuals.insert(residuals.end(), residual.begin(), residual.end());
        }
        EXPECT_EQ(means, whole);
        EXPECT_EQ(residuals, memories.residual("whole", n, MemoryRole::kWorker));
        for (const std::vector<float>& mean : bucket.grads) {
          EXPECT_TRUE(same_on_all_ranks(comm, std::as_bytes(std::span(mean))));
        }
        EXPECT_LE(n - std::count(whole.begin(), whole.end(), 0.0F), 3 * 50);
      }
      const std::size_t slot = layer.payload->slot_bytes(n);
      std::size_t shares = 0;
      for (const std::size_t l : bucket.joint) shares += bucket.exchange->joint_bytes(l);
      EXPECT_NEAR(static_cast<double>(shares), static_cast<double>(slot), 2);
      for (const std::size_t l : {1U, 2U, 4U}) EXPECT_EQ(bucket.exchange->joint_bytes(l), 0U);
    });
  }
}

TEST(Exchange, NonfiniteValuesOfJointLayersAreNamedInTheirOwn) {
  for (const Ranks& ranks : loopback_ranks()) {
    if (ranks.size != 2) continue;
    ranks.run([&](Communicator& comm) {
      MixedBucket bucket(comm, true);
      bucket.fill(0, comm.rank());
      if (comm.rank() == 1) bucket.grads[3][5] = std::numeric_limits<float>::infinity();
      EXPECT_EQ(bucket.reduce(0, 0.5F), (std::vector<std::uint8_t>{1, 0, 0, 1, 0, 1}));
      for (const std::size_t l : bucket.joint) {
        const std::optional<NonFiniteFound> found = bucket.exchange->nonfinite_found(l);
        EXPECT_EQ(found.has_value(), comm.rank() == 1 && l == 3) << l;
        if (found) {
          EXPECT_EQ(found->index, 5);
          EXPECT_TRUE(found->own);
        }
      }
    });
  }
}

TEST(Exchange, JointLayersTooLargeTogetherAreRefusedByName) {
  const Codec codec = make_codec("topk:0.001,scope=bucket");
  for (const Ranks& ranks : loopback_ranks()) {
    if (ranks.size != 2) continue;
    ranks.run([&](Communicator& comm) {
      std::vector<ExchangeLayer> layers(3);
      for (std::size_t i = 0; i < layers.size(); ++i) {
        layers[i].name = std::array{"first", "second", "third"}[i];
        layers[i].elements = std::int64_t{1} << 31;
        layers[i].payload = codec.payload.get();
      }
      PlainMemoryStore memories(true);
      try {
        make_sparse_exchange(comm, layers, memories);
        ADD_FAILURE() << "layers of 3 * 2^31 elements were taken as one";
      } catch (const InvalidArgument& error) {
        const std::string text = error.what();
        for (const char* part : {"rank ", "first", "third", "3 layers", "6442450944", "hint: "}) {
          EXPECT_NE(text.find(part), std::string::npos) << part << ": " << text;
        }
      }
    });
  }
}

}  // namespace

}  // namespace thinwire::testing
