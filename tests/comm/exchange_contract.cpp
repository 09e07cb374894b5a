#include "tests/comm/exchange_contract.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "compressors/core/context.h"
#include "compressors/core/convert.h"
#include "compressors/core/error.h"
#include "compressors/core/random.h"

namespace thinwire::testing {

std::ostream& operator<<(std::ostream& out, const ExchangeCase& c) {
  return out << c.spec << " over " << c.ranks;
}

namespace {

const char* collective_name(Collective collective) {
  switch (collective) {
    case Collective::kDense:
      return "dense";
    case Collective::kSparse:
      return "sparse";
    case Collective::kSplit:
      return "split";
    case Collective::kRequantising:
      return "requantising";
    case Collective::kLinear:
      return "linear";
  }
  return "unknown";
}

}  // namespace

std::string exchange_name(const ::testing::TestParamInfo<ExchangeCase>& info) {
  std::string name = info.param.spec + "_" + collective_name(info.param.collective) + "_" +
                     info.param.ranks.label + std::to_string(info.param.ranks.size);
  std::replace_if(
      name.begin(), name.end(), [](char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

std::vector<ExchangeCase> exchange_cases(const std::vector<Ranks>& ranks, Selection selection) {
  using Kinds = std::vector<std::pair<std::string, Collective>>;
  const Kinds every = {
      {"none", Collective::kDense},
      {"none", Collective::kSparse},
      {"bf16", Collective::kRequantising},
      {"fp16", Collective::kRequantising},
      {"bf16", Collective::kSparse},
      {"lossless", Collective::kRequantising},
      {"lossless", Collective::kSparse},
      {"topk:0.01", Collective::kSparse},
      {"topk:0.05,values=q8", Collective::kSparse},
      {"topk:0.02,values=bf16,select=sampled", Collective::kSparse},
      {"topk:0.02,values=q8,scope=bucket", Collective::kSparse},
      {"topk:0.02,values=q8,scope=bucket,memory=bf16", Collective::kSparse},
      {"q8", Collective::kSparse},
      {"topk:0.3", Collective::kRequantising},
      {"topk:0.02", Collective::kSplit},
      {"topk:0.02,memory=bf16", Collective::kSplit},
      {"topk:0.3,values=bf16,select=sampled", Collective::kSplit},
      {"topk:0.05,values=q8,select=carried", Collective::kSplit},
      {"topk:0.2,values=q4,chunk=64", Collective::kSplit},
      {"q4", Collective::kRequantising},
      {"onebit", Collective::kRequantising},
      {"q8,block=64,stochastic", Collective::kRequantising},
      {"q1", Collective::kRequantising},
      {"dct:16", Collective::kRequantising},
      {"lowrank:2", Collective::kRequantising},
      {"randmask:0.1", Collective::kLinear},
      {"powersgd:2", Collective::kLinear},
      {"powersgd:3,rounds=1", Collective::kLinear},
      {"galore:2,refresh=2", Collective::kLinear},
      {"dctcols:2,refresh=2", Collective::kLinear},
  };
  const Kinds one_each = {
      {"none", Collective::kDense},
      {"topk:0.05,values=q8", Collective::kSparse},
      {"topk:0.05,values=q8", Collective::kSplit},
      {"q4", Collective::kRequantising},
      {"powersgd:2", Collective::kLinear},
  };
  std::vector<ExchangeCase> cases;
  for (const Ranks& group : ranks) {
    for (const auto& [spec, collective] : selection == Selection::kEveryCodec ? every : one_each) {
      cases.push_back({group, spec, collective});
    }
  }
  return cases;
}

namespace {

std::vector<float> residual_of(const Memory& memory) {
  std::vector<float> values(static_cast<std::size_t>(memory.elements()));
  memory.read(values);
  return values;
}

}  // namespace

Memory* PlainMemoryStore::memory(std::string_view name, std::int64_t begin, std::int64_t end,
                                 MemoryRole role) {
  if (!enabled_) {
    return nullptr;
  }
  auto& memory = memories_[{std::string(name), role, begin, end}];
  if (!memory) {
    memory = std::make_unique<Memory>(
        end - begin, MemoryOptions{.storage = storage_, .needs = needs_[std::string(name)]});
  }
  return memory.get();
}

void PlainMemoryStore::commit() {
  for (auto& [key, memory] : memories_) {
    memory->commit();
  }
}

void PlainMemoryStore::rollback() {
  for (auto& [key, memory] : memories_) {
    memory->rollback();
  }
}

std::vector<double> PlainMemoryStore::residual(std::string_view name, std::int64_t elements,
                                               MemoryRole role) const {
  std::vector<double> values(static_cast<std::size_t>(elements));
  for (const auto& [key, memory] : memories_) {
    if (std::get<0>(key) == name && std::get<1>(key) == role) {
      const std::vector<float> residual = residual_of(*memory);
      std::copy(residual.begin(), residual.end(), values.begin() + std::get<2>(key));
    }
  }
  return values;
}

std::vector<float> PlainMemoryStore::all() const {
  std::vector<float> values;
  for (const auto& [key, memory] : memories_) {
    const std::vector<float> residual = residual_of(*memory);
    for (const auto part :
         {std::span<const float>(residual), memory->velocity(), memory->state()}) {
      values.insert(values.end(), part.begin(), part.end());
    }
  }
  return values;
}

namespace {

// Each size as a product of two, the first the largest divisor up to its root.
std::vector<std::array<std::int64_t, 2>> matrices(const std::vector<std::int64_t>& sizes) {
  std::vector<std::array<std::int64_t, 2>> shapes;
  for (const std::int64_t n : sizes) {
    std::int64_t rows = 1;
    for (std::int64_t k = 2; k * k <= n; ++k) {
      if (n % k == 0) rows = k;
    }
    shapes.push_back({rows, n / rows});
  }
  return shapes;
}

}  // namespace

Model::Model(Communicator& comm, const ExchangeCase& c, const std::vector<std::int64_t>& sizes,
             DType dtype, bool adjacent)
    : comm_(comm),
      codec_(make_codec(c.spec)),
      shapes_(matrices(sizes)),
      memories_(codec_.options.error_feedback &&
                    ((codec_.payload && !codec_.payload->traits().lossless) || codec_.linear),
                codec_.options.storage) {
  // A gap between gradients, unless they are to lie one behind the other as in a bucket.
  const std::size_t gap = adjacent ? 0 : 64;
  std::size_t total = 0;
  for (const std::int64_t n : sizes) {
    total += static_cast<std::size_t>(n) * size_bytes(dtype) + gap;
    names_.push_back("layer" + std::to_string(names_.size()));
  }
  bytes_.resize(total);
  std::size_t at = 0;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    grads_.push_back({bytes_.data() + at, sizes[i], dtype});
    at += grads_[i].bytes() + gap;
    ExchangeLayer layer;
    layer.name = names_[i];
    layer.shape = shapes_[i];
    layer.elements = sizes[i];
    layer.dtype = dtype;
    layer.key_hash = Key{.parameter = names_[i], .begin = 0, .end = sizes[i]}.hash();
    layer.payload = codec_.payload.get();
    layer.linear = codec_.linear.get();
    if (c.collective == Collective::kSplit) {
      layer.split_ranges = split_ranges(*codec_.payload, sizes[i], comm.size());
    }
    layers_.push_back(layer);
    if (codec_.linear) memories_.set_needs(names_[i], codec_.linear->memory_needs(shapes_[i]));
    if (codec_.payload) memories_.set_needs(names_[i], codec_.payload->memory_needs(sizes[i]));
  }
  switch (c.collective) {
    case Collective::kDense:
      exchange_ = make_dense_exchange(comm, layers_);
      break;
    case Collective::kSparse:
      exchange_ = make_sparse_exchange(comm, layers_, memories_);
      break;
    case Collective::kSplit:
    case Collective::kRequantising:
      exchange_ = make_requantising_exchange(comm, layers_, memories_);
      break;
    case Collective::kLinear:
      exchange_ = make_linear_exchange(comm, layers_, memories_);
      break;
  }
}

void Model::set(std::size_t layer, std::int64_t element, float value) {
  const auto i = static_cast<std::size_t>(element);
  switch (layers_[layer].dtype) {
    case DType::kF32:
      static_cast<float*>(grads_[layer].data)[i] = value;
      return;
    case DType::kBF16:
      static_cast<BF16*>(grads_[layer].data)[i] = to_bf16(value);
      return;
    case DType::kF16:
      static_cast<FP16*>(grads_[layer].data)[i] = to_fp16(value);
      return;
    case DType::kF64:
      static_cast<double*>(grads_[layer].data)[i] = static_cast<double>(value);
      return;
    case DType::kOther:
      break;
  }
}

std::vector<double> Model::values(std::size_t layer) const {
  std::vector<double> values(static_cast<std::size_t>(layers_[layer].elements));
  for (std::size_t i = 0; i < values.size(); ++i) {
    switch (layers_[layer].dtype) {
      case DType::kF32:
        values[i] = static_cast<double>(static_cast<const float*>(grads_[layer].data)[i]);
        break;
      case DType::kBF16:
        values[i] = static_cast<double>(to_float(static_cast<const BF16*>(grads_[layer].data)[i]));
        break;
      case DType::kF16:
        values[i] = static_cast<double>(to_float(static_cast<const FP16*>(grads_[layer].data)[i]));
        break;
      case DType::kF64:
        values[i] = static_cast<const double*>(grads_[layer].data)[i];
        break;
      case DType::kOther:
        break;
    }
  }
  return values;
}

std::vector<double> Model::residual(std::size_t layer, MemoryRole role) const {
  return memories_.residual(names_[layer], layers_[layer].elements, role);
}

void Model::fill(std::uint64_t step) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const RandomStream stream = random_stream(layers_[l].key_hash, step, comm_.rank());
    std::array<std::uint32_t, 4> words{};
    for (std::int64_t i = 0; i < layers_[l].elements; ++i) {
      if (i % 4 == 0) words = random_block(stream, static_cast<std::uint64_t>(i / 4));
      const std::uint32_t word = words[static_cast<std::size_t>(i % 4)];
      // Heavy tails, as gradients have: a uniform value times a power of two in [2^-6, 2].
      const float uniform = static_cast<float>(static_cast<std::int32_t>(word)) * 0x1p-31F;
      set(l, i, std::ldexp(uniform, 1 - static_cast<int>(word % 8)));
    }
  }
}

void Model::fill_integers(std::uint64_t step) {
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    for (std::int64_t i = 0; i < layers_[l].elements; ++i) {
      const auto k = static_cast<std::int64_t>(step) + static_cast<std::int64_t>(l) + i;
      set(l, i, static_cast<float>(k % 5 - 2 + comm_.rank()));
    }
  }
}

std::unique_ptr<Transfer> Model::start(std::uint64_t step, float weight) {
  std::vector<Gradient> gradients;
  if (step % 3 == 0) {
    for (const TensorView& grad : grads_) gradients.push_back({.source = grad, .mean = grad});
    return exchange_->start(step, weight, gradients);
  }
  const auto sources = std::make_shared<std::vector<std::byte>>(bytes_);
  std::fill(bytes_.begin(), bytes_.end(), std::byte{0xFF});
  for (const TensorView& grad : grads_) {
    TensorView source = grad;
    source.data = sources->data() + (static_cast<std::byte*>(grad.data) - bytes_.data());
    gradients.push_back({.source = source, .mean = grad});
    if (step % 3 == 2) gradients.back().owner = sources;
  }
  return exchange_->start(step, weight, gradients);
}

std::vector<std::uint8_t> Model::reduce(std::uint64_t step, float weight) {
  std::unique_ptr<Transfer> transfer = start(step, weight);
  for (int t = 1; t < exchange_->transfers(); ++t) {
    transfer->wait(soon());
    transfer = exchange_->next();
  }
  transfer->wait(soon());
  const auto flags = exchange_->finish();
  return {flags.begin(), flags.end()};
}

namespace {

std::vector<std::vector<std::int64_t>> layer_tables(int ranks) {
  const std::int64_t p = ranks;
  return {{0},
          {1},
          {p - 1, p, p + 1},
          {5, 0, 1, 64, 3, 127, 2, 33, 1, 9, 257, 31},
          {2503},
          {1024 * p, 9001, 2 * p + 1}};
}

float mean_weight(const Communicator& comm) { return 1.0F / static_cast<float>(comm.size()); }

// The sum over ranks of one vector of doubles a rank, in fp64.
std::vector<double> sum_over_ranks(Communicator& comm, const std::vector<double>& mine) {
  const std::vector<std::byte> bytes = gather_bytes(comm, std::as_bytes(std::span(mine)));
  std::vector<double> all(bytes.size() / sizeof(double));
  if (!all.empty()) std::memcpy(all.data(), bytes.data(), bytes.size());
  std::vector<double> sum(mine.size());
  for (std::size_t r = 0; r < static_cast<std::size_t>(comm.size()); ++r) {
    for (std::size_t i = 0; i < sum.size(); ++i) {
      sum[i] += all[r * sum.size() + i];
    }
  }
  return sum;
}

// What is pending in one layer before or after a step: signed, for the law, and in magnitude, for
// the bound on its roundings.
struct Pending {
  std::vector<double> value;
  std::vector<double> magnitude;
};

Pending pending(const Model& model, std::size_t layer, double weight, bool with_gradient) {
  const std::vector<double> gradient = model.values(layer);
  const std::vector<double> worker = model.residual(layer, MemoryRole::kWorker);
  const std::vector<double> owner = model.residual(layer, MemoryRole::kOwner);
  Pending p{std::vector<double>(gradient.size()), std::vector<double>(gradient.size())};
  for (std::size_t i = 0; i < gradient.size(); ++i) {
    const double g = with_gradient ? gradient[i] : 0.0;
    p.value[i] = weight * (g + worker[i]) + owner[i];
    p.magnitude[i] = weight * (std::abs(g) + std::abs(worker[i])) + std::abs(owner[i]);
  }
  return p;
}

// Half a unit in the last place of the dtype's final rounding, relative and absolute.
double relative_rounding(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-24;
}
// Of a residual, which is rounded up or down.
double kept_rounding(ResidualStorage storage) {
  return storage == ResidualStorage::kBF16 ? 0x1p-7 : 0;
}
double absolute_rounding(DType dtype) { return dtype == DType::kF16 ? 0x1p-25 : 0x1p-140; }

void append(std::vector<double>& to, const std::vector<double>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

// One step; checks replicas and conservation: what was pending (weighted gradients and residuals,
// owners' residuals) is the result and what is pending now.
void expect_lawful_step(Communicator& comm, Model& model, std::uint64_t step, DType dtype) {
  const float weight = mean_weight(comm);
  model.fill(step);
  Pending before;
  for (std::size_t l = 0; l < model.layers(); ++l) {
    const Pending p = pending(model, l, static_cast<double>(weight), true);
    append(before.value, p.value);
    append(before.magnitude, p.magnitude);
  }
  const std::vector<std::uint8_t> flags = model.reduce(step, weight);
  EXPECT_EQ(std::count(flags.begin(), flags.end(), 0), static_cast<int>(model.layers()));
  model.memories().commit();
  ASSERT_TRUE(same_on_all_ranks(comm, model.bytes())) << "replicas differ at step " << step;
  Pending after;
  std::vector<double> result;
  for (std::size_t l = 0; l < model.layers(); ++l) {
    const Pending p = pending(model, l, static_cast<double>(weight), false);
    append(after.value, p.value);
    append(after.magnitude, p.magnitude);
    append(result, model.values(l));
  }
  const std::vector<double> in = sum_over_ranks(comm, before.value);
  const std::vector<double> out = sum_over_ranks(comm, after.value);
  const std::vector<double> scale_in = sum_over_ranks(comm, before.magnitude);
  const std::vector<double> scale_out = sum_over_ranks(comm, after.magnitude);
  // Some ten fp32 roundings a rank of numbers of the size of the terms (residual sums, products,
  // decoded values, running sums), and the rounding of the result into its dtype.
  const double roundings = 10 * 0x1p-24 * (comm.size() + 2);
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < result.size(); ++i) {
    const double bound = roundings * (scale_in[i] + scale_out[i] + std::abs(result[i])) +
                         kept_rounding(model.storage()) * scale_out[i] +
                         relative_rounding(dtype) * std::abs(result[i]) * 1.001 +
                         absolute_rounding(dtype);
    const double error = std::abs(in[i] - out[i] - result[i]);
    if (!(error <= bound) && wrong++ == 0) {
      ADD_FAILURE() << "element " << i << " at step " << step << ": " << in[i] << " went in, "
                    << result[i] << " came out, " << out[i] << " is kept; lost " << error
                    << ", roundings explain " << bound;
    }
  }
  EXPECT_EQ(wrong, 0U);
}

}  // namespace

TEST_P(ExchangeContract, ReplicasAreIdenticalAndNothingIsLost) {
  const ExchangeCase& c = GetParam();
  c.ranks.run([&](Communicator& comm) {
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      for (const auto& sizes : layer_tables(comm.size())) {
        SCOPED_TRACE(std::string(name(dtype)) + ", first layer of " + std::to_string(sizes[0]));
        Model model(comm, c, sizes, dtype);
        for (std::uint64_t step = 0; step < 3; ++step) {
          expect_lawful_step(comm, model, step, dtype);
        }
      }
    }
  });
}

TEST_P(ExchangeContract, UncodedIntegersSumExactly) {
  const ExchangeCase& c = GetParam();
  if (c.spec != "none") {
    return;  // a law of the raw path alone
  }
  c.ranks.run([&](Communicator& comm) {
    std::vector<DType> dtypes = {DType::kF32, DType::kBF16, DType::kF16};
    if (c.collective == Collective::kDense) {
      dtypes.push_back(DType::kF64);
    }
    for (const DType dtype : dtypes) {
      for (const bool adjacent : {false, true}) {
        Model model(comm, c, {3, 0, 1000, 1, 129}, dtype, adjacent);
        for (std::uint64_t step = 0; step < 3; ++step) {
          model.fill_integers(step);
          std::vector<double> expected;
          for (std::size_t l = 0; l < model.layers(); ++l) {
            append(expected, model.values(l));
          }
          expected = sum_over_ranks(comm, expected);
          model.reduce(step, 1.0F);
          std::vector<double> got;
          for (std::size_t l = 0; l < model.layers(); ++l) {
            append(got, model.values(l));
          }
          EXPECT_EQ(got, expected) << name(dtype) << (adjacent ? ", adjacent" : "");
        }
      }
    }
  });
}

TEST_P(ExchangeContract, NonfiniteGradientsAreFlaggedOnAllRanks) {
  const ExchangeCase& c = GetParam();
  const std::vector<std::int64_t> sizes = {40, 1000, 7, 2000};
  const Codec codec = make_codec(c.spec);
  const bool joint = codec.payload && codec.payload->joint() != nullptr;
  const std::uint8_t others = joint && c.collective == Collective::kSparse ? 1 : 0;
  c.ranks.run([&](Communicator& comm) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      for (const float poison :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
            -std::numeric_limits<float>::infinity()}) {
        Model model(comm, c, sizes, dtype);
        expect_lawful_step(comm, model, 0, dtype);
        const std::vector<float> committed = model.memories().all();
        model.fill(1);
        if (comm.rank() == comm.size() - 1) {
          model.set(1, 999, poison);
          model.set(2, 0, poison);
        }
        const std::vector<std::uint8_t> flags = model.reduce(1, mean_weight(comm));
        EXPECT_EQ(flags, (std::vector<std::uint8_t>{others, 1, 1, others}))
            << "rank " << comm.rank();
        for (const std::size_t l : {1U, 2U}) {
          const std::vector<double> values = model.values(l);
          EXPECT_TRUE(
              std::all_of(values.begin(), values.end(), [](double x) { return std::isnan(x); }));
        }
        for (const std::size_t l : {0U, 3U}) {
          const std::vector<double> values = model.values(l);
          EXPECT_EQ(
              std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); }),
              others == 0);
        }
        EXPECT_TRUE(same_on_all_ranks(comm, model.bytes()));
        model.memories().rollback();
        EXPECT_EQ(model.memories().all(), committed);
        expect_lawful_step(comm, model, 1, dtype);
      }
    }
  });
}

// Finite gradients whose sum fp16 cannot hold.
TEST_P(ExchangeContract, SumsBeyondTheDtypeAreFlaggedOnAllRanks) {
  const ExchangeCase& c = GetParam();
  c.ranks.run([&](Communicator& comm) {
    Model model(comm, c, {300, 7}, DType::kF16);
    model.fill(0);
    for (std::int64_t i = 0; i < 300; ++i) {
      model.set(0, i, 60000.0F);
    }
    const std::vector<std::uint8_t> flags = model.reduce(0, 1.0F);
    // The codec fp16 sends its largest value, and the owner keeps the rest. Half a power iteration
    // from a random basis brings a part of the sum.
    const bool beyond = comm.size() > 1 && c.spec != "fp16" && c.spec != "powersgd:3,rounds=1";
    EXPECT_EQ(flags, (std::vector<std::uint8_t>{beyond ? std::uint8_t{1} : std::uint8_t{0}, 0}));
    const std::vector<double> values = model.values(0);
    EXPECT_EQ(std::all_of(values.begin(), values.end(), [](double x) { return std::isnan(x); }),
              beyond);
    EXPECT_TRUE(same_on_all_ranks(comm, model.bytes()));
  });
}

// An unused parameter: nothing is sent for it, its residual stays, and what others hold comes out.
TEST_P(ExchangeContract, ZeroGradientsKeepTheirResidual) {
  const ExchangeCase& c = GetParam();
  c.ranks.run([&](Communicator& comm) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      Model model(comm, c, {500, 3000}, dtype);
      expect_lawful_step(comm, model, 0, dtype);
      model.fill(1);
      for (std::int64_t i = 0; i < 3000; ++i) {
        model.set(1, i, 0.0F);
      }
      const std::vector<double> kept = model.residual(1, MemoryRole::kWorker);
      model.reduce(1, mean_weight(comm));
      model.memories().commit();
      EXPECT_TRUE(same_on_all_ranks(comm, model.bytes()));
      if (c.collective != Collective::kDense && c.collective != Collective::kLinear) {
        EXPECT_EQ(model.residual(1, MemoryRole::kWorker), kept);
      }
      if (c.collective == Collective::kSparse) {
        EXPECT_EQ(model.values(1), std::vector<double>(3000, 0.0));
      }
      expect_lawful_step(comm, model, 2, dtype);
    }
  });
}

// Two buckets on one communicator, the second encoded while the first is on the wire.
TEST_P(ExchangeContract, ExchangesOverlap) {
  const ExchangeCase& c = GetParam();
  c.ranks.run([&](Communicator& comm) {
    Model first(comm, c, {3000, 5}, DType::kF32);
    Model second(comm, c, {17, 900}, DType::kF32);
    Model alone(comm, c, {3000, 5}, DType::kF32);
    for (std::uint64_t step = 0; step < 2; ++step) {
      first.fill(step);
      second.fill(step);
      alone.fill(step);
      auto a = first.start(step, mean_weight(comm));
      auto b = second.start(step, mean_weight(comm));
      const int transfers = first.exchange().transfers();
      for (int t = 1; t < transfers; ++t) {
        a->wait(soon());
        a = first.exchange().next();
        b->wait(soon());
        b = second.exchange().next();
      }
      b->wait(soon());
      second.exchange().finish();
      a->wait(soon());
      first.exchange().finish();
      alone.reduce(step, mean_weight(comm));
      EXPECT_TRUE(std::ranges::equal(first.bytes(), alone.bytes()));
      EXPECT_TRUE(same_on_all_ranks(comm, second.bytes()));
      first.memories().commit();
      second.memories().commit();
      alone.memories().commit();
    }
  });
}

TEST_P(ExchangeContract, RefusesOtherTensorsThanPlanned) {
  const ExchangeCase& c = GetParam();
  c.ranks.run([&](Communicator& comm) {
    Model model(comm, c, {10, 20}, DType::kF32);
    std::vector<Gradient> grads;
    for (const TensorView& grad : model.grads()) grads.push_back({grad, grad});
    grads[1].source.elements = 19;
    try {
      model.exchange().start(0, 1.0F, grads);
      ADD_FAILURE() << "a gradient of 19 elements was taken for one of 20";
    } catch (const InvalidArgument& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("layer1"), std::string::npos) << text;
      EXPECT_NE(text.find("rank " + std::to_string(comm.rank())), std::string::npos) << text;
      EXPECT_NE(text.find("20"), std::string::npos) << text;
      EXPECT_NE(text.find("19"), std::string::npos) << text;
    }
    EXPECT_THROW(model.exchange().start(0, 1.0F, std::span(grads).first(1)), InvalidArgument);
  });
}

}  // namespace thinwire::testing
