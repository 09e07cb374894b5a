// One rank of the scale simulation (cluster/scale/README.md). Every exchange reduces one bucket of
// gradients over comm/mpi's communicator, on SimGrid's network; computing takes no time there.
//
//   scale_simulation MODE LATENCY_US BYTES_PER_SECOND
//
// MODE whole: every rank encodes, exchanges and decodes, and all must hold the same bits. MODE
// transfers: what one rank's exchange would send is sent by all, over memory that all share. Rank 0
// prints a line a method, by tabs: its name, simulated and predicted seconds, bytes that a rank
// sends.
#include <mpi.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "cluster/scale/transfers.h"
#include "comm/collective_cost.h"
#include "comm/exchange.h"
#include "comm/mpi/mpi_communicator.h"
#include "compressors/core/context.h"
#include "compressors/core/random.h"
#include "compressors/core/spec.h"

namespace {

// Of all ranks, which run in this one process: what transfers go over; null where each has its own.
std::byte* shared_memory = nullptr;

}  // namespace

// SMPI's own nonblocking collectives send all messages at once, and a poll for their end takes
// simulated time. An exchange is alone on the network here, so that its transfers may as well be
// SMPI's blocking ones, whose algorithms smpirun chooses: those of comm/collective_cost.h.
extern "C" {

int MPI_Iallreduce(const void* in, void* out, int count, MPI_Datatype type, MPI_Op op,
                   MPI_Comm comm, MPI_Request* request) {
  *request = MPI_REQUEST_NULL;
  // In place SMPI would copy the tensor first, once a rank.
  return MPI_Allreduce(shared_memory != nullptr ? out : in, out, count, type, op, comm);
}

int MPI_Iallgather(const void* in, int in_count, MPI_Datatype in_type, void* out, int out_count,
                   MPI_Datatype out_type, MPI_Comm comm, MPI_Request* request) {
  *request = MPI_REQUEST_NULL;
  return MPI_Allgather(in, in_count, in_type, out, out_count, out_type, comm);
}

int MPI_Ialltoall(const void* in, int in_count, MPI_Datatype in_type, void* out, int out_count,
                  MPI_Datatype out_type, MPI_Comm comm, MPI_Request* request) {
  *request = MPI_REQUEST_NULL;
  return MPI_Alltoall(in, in_count, in_type, out, out_count, out_type, comm);
}

// Of requests that are done: SMPI 3.32 leaves the flag alone where the status is ignored.
int MPI_Test(MPI_Request* /*request*/, int* flag, MPI_Status* /*status*/) {
  *flag = 1;
  return MPI_SUCCESS;
}

// SMPI says "single": a process has one thread. No two of ours call it at a time.
int MPI_Query_thread(int* provided) {
  *provided = MPI_THREAD_MULTIPLE;
  return MPI_SUCCESS;
}

}  // extern "C"

namespace thinwire {

namespace {

using Predict = double (*)(const Link&, int, double);
using Transfers = std::vector<RecordedTransfer>;

struct Method {
  const char* name;
  const char* spec;
  bool split = false;
  Predict predict = requantising_seconds;
};

constexpr std::array kMethods = {
    Method{"dense", "none", false, dense_seconds},
    Method{"topk:0.01 allgather", "topk:0.01,ef=off", false, sparse_seconds},
    Method{"topk:0.01 split-reduce", "topk:0.01,ef=off", true},
    Method{"topk:0.001 allgather", "topk:0.001,ef=off", false, sparse_seconds},
    Method{"topk:0.001 split-reduce", "topk:0.001,ef=off", true},
    Method{"q8", "q8,ef=off"},
    Method{"q4", "q4,ef=off"},
};

// The last layers of ResNet-50, 24.8 MiB: the first full bucket that PyTorch's DDP reduces.
constexpr std::array<std::array<std::int64_t, 2>, 4> kShapes = {
    {{1000, 2048}, {2048, 512}, {512, 4608}, {512, 2048}}};
constexpr std::array kNames = {"fc", "layer4.2.conv3", "layer4.2.conv2", "layer4.2.conv1"};

class NoMemories final : public MemoryStore {
 public:
  Memory* memory(std::string_view, std::int64_t, std::int64_t, MemoryRole) override {
    return nullptr;
  }
};

// One rank's gradients, and the exchange of one method over them.
class Bucket {
 public:
  Bucket(const Method& method, Communicator& comm) : codec_(make_codec(method.spec)) {
    std::vector<ExchangeLayer> layers;
    for (std::size_t i = 0; i < kShapes.size(); ++i) {
      ExchangeLayer& layer = layers.emplace_back();
      layer.name = kNames[i];
      layer.shape = kShapes[i];
      layer.elements = kShapes[i][0] * kShapes[i][1];
      layer.key_hash = Key{.parameter = kNames[i], .begin = 0, .end = layer.elements}.hash();
      layer.payload = codec_.payload.get();
      if (method.split) {
        layer.split_ranges = split_ranges(*codec_.payload, layer.elements, comm.size());
      }
      values_.emplace_back(static_cast<std::size_t>(layer.elements));
    }
    NoMemories none;
    if (codec_.is_none()) {
      exchange_ = make_dense_exchange(comm, layers);
    } else if (codec_.payload->traits().sparse && !method.split) {
      exchange_ = make_sparse_exchange(comm, layers, none);
    } else {
      exchange_ = make_requantising_exchange(comm, layers, none);
    }
    for (std::vector<float>& values : values_) {
      const TensorView all = view(values);
      gradients_.push_back({.source = all, .mean = all});
    }
  }

  void fill(int rank) {
    for (std::size_t l = 0; l < values_.size(); ++l) {
      const RandomStream stream = random_stream(l, 0, rank);
      for (std::size_t i = 0; i < values_[l].size(); i += 4) {
        const auto words = random_block(stream, i / 4);
        for (std::size_t j = 0; j < 4; ++j) {
          values_[l][i + j] = static_cast<float>(static_cast<std::int32_t>(words[j])) * 0x1p-31F;
        }
      }
    }
  }

  // Up to the last transfer.
  void send() {
    const Deadline deadline = Clock::now() + std::chrono::hours(1);
    exchange_->start(0, 1.0F, gradients_)->wait(deadline);
    for (int t = 1; t < exchange_->transfers(); ++t) exchange_->next()->wait(deadline);
  }
  void finish() { exchange_->finish(); }

  std::uint64_t hash() const {
    std::uint64_t hash = 0;
    for (const std::vector<float>& values : values_) {
      for (const float value : values)
        hash = hash * 0x9E3779B97F4A7C15U + std::bit_cast<std::uint32_t>(value);
    }
    return hash;
  }

 private:
  Codec codec_;
  std::vector<std::vector<float>> values_;
  std::vector<Gradient> gradients_;
  std::unique_ptr<Exchange> exchange_;
};

// What rank 0 would send, known to all.
Transfers transfers_of(const Method& method, const Communicator& comm) {
  Transfers log;
  if (comm.rank() == 0) {
    const auto recorder = make_recorder(comm.size(), log);
    Bucket(method, *recorder).send();
  }
  std::uint64_t count = log.size();
  MPI_Bcast(&count, 1, MPI_UINT64_T, 0, MPI_COMM_WORLD);
  log.resize(count);
  MPI_Bcast(log.data(), static_cast<int>(count * sizeof(RecordedTransfer)), MPI_BYTE, 0,
            MPI_COMM_WORLD);
  return log;
}

// The longest of all ranks, which begin together.
template <typename Work>
double simulated_seconds(Work&& work) {
  MPI_Barrier(MPI_COMM_WORLD);
  const double began = MPI_Wtime();
  work();
  double mine = MPI_Wtime() - began;
  double longest = 0;
  MPI_Allreduce(&mine, &longest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return longest;
}

double run_whole(const Method& method, Communicator& comm) {
  Bucket bucket(method, comm);
  bucket.fill(comm.rank());
  const double seconds = simulated_seconds([&] { bucket.send(); });
  bucket.finish();
  const std::uint64_t mine = bucket.hash();
  std::uint64_t ends[2] = {mine, ~mine};
  std::uint64_t least[2] = {};
  MPI_Allreduce(ends, least, 2, MPI_UINT64_T, MPI_MIN, MPI_COMM_WORLD);
  if (least[0] != ~least[1]) {
    throw Error("rank " + std::to_string(comm.rank()) + ", " + method.name +
                ": other bits than on other ranks");
  }
  return seconds;
}

double run_transfers(const Transfers& transfers, Communicator& comm) {
  return simulated_seconds([&] {
    for (const RecordedTransfer& transfer : transfers) {
      replay(comm, transfer, {shared_memory, memory_bytes(transfer, comm.size())});
    }
  });
}

// Bytes that a rank sends by the algorithms of comm/collective_cost.h.
double sent_bytes(const Transfers& transfers, int ranks) {
  double bytes = 0;
  for (const RecordedTransfer& transfer : transfers) {
    const double messages = transfer.verb == RecordedTransfer::Verb::kAllreduce
                                ? 2.0 * (ranks - 1) / ranks
                                : ranks - 1.0;
    bytes += messages * static_cast<double>(transfer.bytes);
  }
  return bytes;
}

void simulate(Communicator& comm, bool whole, const Link& link) {
  std::vector<Transfers> sent;
  std::size_t bytes = 0;
  for (const Method& method : kMethods) {
    for (const RecordedTransfer& transfer : sent.emplace_back(transfers_of(method, comm))) {
      bytes = std::max(bytes, memory_bytes(transfer, comm.size()));
    }
  }
  if (!whole && shared_memory == nullptr) {
    shared_memory = static_cast<std::byte*>(SMPI_SHARED_MALLOC(bytes));
  }
  for (std::size_t i = 0; i < kMethods.size(); ++i) {
    const Method& method = kMethods[i];
    const double simulated = whole ? run_whole(method, comm) : run_transfers(sent[i], comm);
    if (comm.rank() == 0) {
      const double predicted =
          method.predict(link, comm.size(), static_cast<double>(sent[i].front().bytes));
      std::printf("%s\t%.9f\t%.9f\t%.0f\n", method.name, simulated, predicted,
                  sent_bytes(sent[i], comm.size()));
    }
  }
}

}  // namespace

}  // namespace thinwire

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  try {
    if (argc != 4) {
      throw thinwire::InvalidArgument("expected MODE LATENCY_US BYTES_PER_SECOND");
    }
    const thinwire::Link link = {.latency_seconds = std::atof(argv[2]) * 1e-6,
                                 .bytes_per_second = std::atof(argv[3])};
    const auto comm = thinwire::make_mpi_communicator(MPI_COMM_WORLD);
    thinwire::simulate(*comm, std::string_view(argv[1]) == "whole", link);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "scale_simulation: %s\n", error.what());
    MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  }
  MPI_Finalize();
  return EXIT_SUCCESS;
}
