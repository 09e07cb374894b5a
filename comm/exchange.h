// Exchange: one group of a bucket's layers on its way through one collective. A small state
// machine so that the reducer can overlap the encode of one bucket with the wire time of another
// and still issue transfers in the same order on every rank. Buffers are allocated at construction
// or in the first start(); later start, next and finish allocate only the Transfer. One thread at a
// time.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "compressors/core/codec.h"
#include "compressors/core/memory.h"

namespace thinwire {

// A layer as the exchange sees it. Names and shapes outlive the exchange.
struct ExchangeLayer {
  std::string_view name;
  std::span<const std::int64_t> shape;
  std::int64_t elements = 0;
  DType dtype = DType::kF32;
  std::uint64_t key_hash = 0;             // of the whole layer's Key
  const PayloadCodec* payload = nullptr;  // one of the two, or neither: dense
  const LinearCodec* linear = nullptr;
  // Split-reduce: the number of ranges, from split_ranges(). 0: the codec's granularity decides.
  int split_ranges = 0;
  // nonfinite=error: the first NaN or Inf is looked for where there is one. The residual then never
  // takes the gradient's memory, in which it is looked for.
  bool names_nonfinite = false;
};

// Where memories live between steps: owned by the reducer, keyed by what they remember, so that
// they survive bucket rebuilds. Pointers stay valid while the plan does.
enum class MemoryRole : std::uint8_t { kWorker = 0, kOwner = 1 };
class MemoryStore {
 public:
  virtual ~MemoryStore() = default;
  // The memory of elements [begin, end) of layer `name`, made on first use; null when the layer's
  // policy says ef=off or its codec loses nothing.
  virtual Memory* memory(std::string_view name, std::int64_t begin, std::int64_t end,
                         MemoryRole role) = 0;
};

// The first NaN or Inf of a flagged layer, as far as this rank can tell.
struct NonFiniteFound {
  std::int64_t index = 0;
  float value = 0;
  bool own = false;  // in this rank's gradient plus residual; else in the sum over the ranks
};

// Where a layer's gradient is read, and where what comes of it is written: the same memory, or
// apart. Of one dtype and size.
struct Gradient {
  TensorView source;
  TensorView mean;
  // Owns the source's memory, where nobody else needs it any more: start() may overwrite it and
  // keep it as the residual.
  std::shared_ptr<void> owner = {};
  float loss_scale = 1;  // Context::loss_scale
};

class Exchange {
 public:
  virtual ~Exchange() = default;

  // Number of transfers from the last start() to the result, the same on all ranks: 1 for sparse, 1
  // for dense (2 where fp64 and other layers are mixed), 2 for requantising, rounds(step) for
  // linear.
  virtual int transfers() const = 0;

  // Encodes and starts the first transfer. grads[i] belongs to layer i; `weight` multiplies each
  // rank's contribution in the sum (1/P for a mean). Sources are borrowed until start() returns,
  // the places of the means until finish().
  virtual std::unique_ptr<Transfer> start(std::uint64_t step, float weight,
                                          std::span<const Gradient> grads) = 0;
  // After transfer t in [1, transfers()) - 1 is done: works on it and starts the next.
  virtual std::unique_ptr<Transfer> next() = 0;
  // After the last transfer is done: every mean is in place, the same bits on all ranks. Returns
  // per layer whether any rank had NaN/Inf in it (then that mean is all NaN).
  virtual std::span<const std::uint8_t> finish() = 0;

  // After finish(), of a layer with names_nonfinite; none unless the layer is flagged and this rank
  // can tell. What went through the transport's own allreduce is known by the sum.
  virtual std::optional<NonFiniteFound> nonfinite_found(std::size_t layer) const = 0;

  // The layer's share, by elements, of the bytes planned for a body that it has together with
  // others; 0 where it has none.
  virtual std::size_t joint_bytes(std::size_t /*layer*/) const { return 0; }

  // Buffers held, in bytes.
  virtual std::size_t buffer_bytes() const = 0;
};

// collectives/dense.cpp: the transport's own allreduce on one flat fp32 (fp64 for fp64 layers)
// buffer; the transport must promise identical bits.
std::unique_ptr<Exchange> make_dense_exchange(Communicator& comm,
                                              std::vector<ExchangeLayer> layers);
// collectives/sparse.cpp: all bodies in one message of slots, allgather, accumulate in rank order.
// Layers without a codec ride along as raw fp32 values. Layers whose codecs are joint() and of one
// name() have one body: NaN or Inf in any of them flags them all. InvalidArgument, naming the first
// and the last of them, where they are too large together.
std::unique_ptr<Exchange> make_sparse_exchange(Communicator& comm,
                                               std::vector<ExchangeLayer> layers,
                                               MemoryStore& memories);
// Whether n elements of a codec that is not sparse are better sent to all ranks as they are, with
// what goes there anyway, than to owners who sum them and send the sum: their bodies are so few
// bytes that they weigh less than two transfers more.
bool gathers(const PayloadCodec& codec, std::int64_t n, int ranks);
// collectives/requantising.cpp: each layer is cut into P ranges at multiples of the codec's
// granularity; ranges go to their owner, who sums in fp32 in rank order, re-encodes with its own
// residual and sends to all. Owner p of range i is (i + key_hash) mod P. With split_ranges it is
// the split-reduce of sparse codecs: a rank sends twice its own entries, however large P is.
std::unique_ptr<Exchange> make_requantising_exchange(Communicator& comm,
                                                     std::vector<ExchangeLayer> layers,
                                                     MemoryStore& memories);
// Into how many ranges split-reduce cuts a layer of n elements: P, or fewer where their payloads
// would be mostly headers. Memories are kept a range, so this must be asked with one codec, not
// with each of a warm-up. 0 where the codec cannot be split.
int split_ranges(const PayloadCodec& codec, std::int64_t n, int ranks);
// collectives/linear.cpp: the projections of all layers in one flat fp32 buffer a round, summed by
// the transport.
std::unique_ptr<Exchange> make_linear_exchange(Communicator& comm,
                                               std::vector<ExchangeLayer> layers,
                                               MemoryStore& memories);

}  // namespace thinwire
