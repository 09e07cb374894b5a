// The contract of comm/exchange.h as tests, instantiated by every transport for every codec:
// INSTANTIATE_TEST_SUITE_P(NAME, ExchangeContract, ValuesIn(exchange_cases(ranks)), exchange_name).
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "comm/exchange.h"
#include "compressors/core/spec.h"
#include "tests/support/ranks.h"

namespace thinwire::testing {

enum class Collective { kDense, kSparse, kSplit, kRequantising, kLinear };

struct ExchangeCase {
  Ranks ranks;
  std::string spec;
  Collective collective = Collective::kDense;
};

std::ostream& operator<<(std::ostream& out, const ExchangeCase& c);
std::string exchange_name(const ::testing::TestParamInfo<ExchangeCase>& info);

enum class Selection {
  kEveryCodec,      // over the collectives that carry it
  kOneACollective,  // where the transport is slow: the exchanges are the same on all
};
std::vector<ExchangeCase> exchange_cases(const std::vector<Ranks>& ranks,
                                         Selection selection = Selection::kEveryCodec);

class ExchangeContract : public ::testing::TestWithParam<ExchangeCase> {};

// Memories by (layer, range, role).
class PlainMemoryStore final : public MemoryStore {
 public:
  explicit PlainMemoryStore(bool enabled, ResidualStorage storage = ResidualStorage::kFP32)
      : enabled_(enabled), storage_(storage) {}

  // What the memories of a layer keep beside the residual; before their first use.
  void set_needs(const std::string& name, MemoryNeeds needs) { needs_[name] = needs; }
  Memory* memory(std::string_view name, std::int64_t begin, std::int64_t end,
                 MemoryRole role) override;
  void commit();
  void rollback();
  // Committed residuals of a layer's memories of one role; zeros where there is none.
  std::vector<double> residual(std::string_view name, std::int64_t elements, MemoryRole role) const;
  // All that is committed, one memory after the other.
  std::vector<float> all() const;

 private:
  bool enabled_;
  ResidualStorage storage_;
  std::map<std::string, MemoryNeeds> needs_;
  std::map<std::tuple<std::string, MemoryRole, std::int64_t, std::int64_t>, std::unique_ptr<Memory>>
      memories_;
};

// A layer table of given sizes with gradients of one dtype, and the exchange of one codec over it.
class Model {
 public:
  Model(Communicator& comm, const ExchangeCase& c, const std::vector<std::int64_t>& sizes,
        DType dtype, bool adjacent = false);

  // Gradients that are a function of (step, rank, layer, element), of about unit size.
  void fill(std::uint64_t step);
  // Small integers, alike; layer sums over ranks are exact in every dtype.
  void fill_integers(std::uint64_t step);
  // start ... finish. Returns finish()'s flags.
  // Starts a reduction: from the gradients, from a copy that is gone when start returns, from a
  // copy that is given away, in turn.
  std::unique_ptr<Transfer> start(std::uint64_t step, float weight);
  std::vector<std::uint8_t> reduce(std::uint64_t step, float weight);

  std::size_t layers() const { return layers_.size(); }
  std::int64_t elements(std::size_t layer) const { return layers_[layer].elements; }
  std::vector<double> values(std::size_t layer) const;
  void set(std::size_t layer, std::int64_t element, float value);
  std::vector<double> residual(std::size_t layer, MemoryRole role) const;
  std::span<const std::byte> bytes() const { return bytes_; }
  PlainMemoryStore& memories() { return memories_; }
  ResidualStorage storage() const { return codec_.options.storage; }
  Exchange& exchange() { return *exchange_; }
  std::span<const TensorView> grads() const { return grads_; }

 private:
  Communicator& comm_;
  Codec codec_;
  std::vector<std::string> names_;
  std::vector<std::array<std::int64_t, 2>> shapes_;  // as square as may be
  std::vector<ExchangeLayer> layers_;
  std::vector<std::byte> bytes_;
  std::vector<TensorView> grads_;
  PlainMemoryStore memories_;
  std::unique_ptr<Exchange> exchange_;
};

}  // namespace thinwire::testing
