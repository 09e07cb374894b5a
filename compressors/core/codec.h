// The two kinds of codec. Codecs are immutable after construction and safe to call from several
// threads at once; all state is the caller's (gradient, Memory, workspace, round state). No call
// allocates, synchronises with a device, prints, or touches the network.
//
// PayloadCodec: one shot, any receiver can decode. LinearCodec: what it sends may be averaged by
// the transport's own allreduce, in rounds. JointCodec: what a PayloadCodec is as well where
// several tensors make one payload.
//
// Same input, key, step and sender give the same bytes on every thread count and SIMD target;
// decode and accumulate give the same floats on every SIMD target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "compressors/core/context.h"
#include "compressors/core/error.h"
#include "compressors/core/memory.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

struct Traits {
  bool lossless = false;   // decode(encode(x)) is x bit for bit; reducers give it no memory
  bool unbiased = false;   // E[decode(encode(x))] = x without error feedback
  bool sparse = false;     // a payload touches few positions: allgather it
  bool exact_sum = false;  // accumulate adds the sender's values without rounding them first
  // Ranges of a tensor that begin at multiples of this may be encoded alone, and then give the same
  // bytes as inside the whole, unless random numbers or one scale go by all that is encoded.
  // 0: only the whole tensor.
  std::int64_t granularity = 1;
  // sparse: ranges of a tensor may go to owners, who sum what they get and encode it again
  // (split-reduce). Each range sends its share of what the whole would, chosen within the range.
  bool splits = false;
  // encode takes a residual that is stored as bf16 as it is (Memory::open).
  bool opened_residual = false;
};

struct EncodeResult {
  std::size_t bytes = 0;   // written to `out`, <= slot_bytes(n)
  bool nonfinite = false;  // NaN or Inf in the gradient: the body says so, memory stays unwritten
  bool empty = false;      // every gradient element was zero: nothing sent, memory stays unwritten
};

class JointCodec;

class PayloadCodec {
 public:
  virtual ~PayloadCodec() = default;

  // Canonical spec, e.g. "topk:0.01,values=q8". Changes when the bytes change.
  virtual std::string name() const = 0;
  virtual Traits traits() const = 0;

  // The planned size in bytes of the body of an n-element tensor. A body never exceeds it; what
  // does not fit, smallest values first, stays in the residual.
  virtual std::size_t slot_bytes(std::int64_t n) const = 0;
  // Scratch that encode, decode or accumulate of n elements may need, in bytes.
  virtual std::size_t workspace_bytes(std::int64_t n) const = 0;
  // What encode of n elements keeps beside the residual. A Memory without it is as one never
  // written.
  virtual MemoryNeeds memory_needs(std::int64_t /*n*/) const { return {}; }

  // Encodes v = grad + decay * residual into `out` (at least slot_bytes(n) long) and writes the new
  // residual v - decode(body) to memory.next(), fused; rounded to memory.opened_next() where that
  // is open. `memory` may be null: v = grad, and the error is lost. grad: fp32, bf16, fp16 (fp64
  // where the family says so); it is only read. `out` beyond result.bytes is untouched. NaN/Inf in
  // v: a one-byte body, result.nonfinite, memory unwritten; only a lossless codec without memory
  // sends them as they are and sets result.nonfinite all the same. All-zero grad with a memory: a
  // one-byte body, result.empty, memory unwritten.
  virtual EncodeResult encode(const Context& ctx, TensorView grad, Memory* memory,
                              std::span<std::byte> out) const = 0;

  // Decodes exactly out.elements values; every element of `out` is written, rounded once to
  // out.dtype. A nonfinite body gives NaN everywhere, an empty one zeros. Any bytes are accepted:
  // CorruptPayload when they are no body of that many elements. Trailing bytes are not looked at.
  // Bounded: O(n) time, no allocation.
  virtual void decode(const Context& ctx, std::span<const std::byte> body,
                      TensorView out) const = 0;

  // out[i] += weight * decoded[i], fp32, one rounding for the product and one for the sum, never
  // contracted into an fma. Sparse codecs touch only the sent positions.
  virtual void accumulate(const Context& ctx, std::span<const std::byte> body, float weight,
                          std::span<float> out) const = 0;

  // out = the weighted sum of all bodies, body i being sender i's: bit for bit what accumulate of
  // one after the other adds to zeros, and every element is written. Errors name the sender.
  virtual void sum(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                   float weight, std::span<float> out) const;

  // Not null: tensors of codecs of this name() that travel together are encoded as one.
  virtual const JointCodec* joint() const { return nullptr; }
};

// Several tensors as one, part after part: its elements are theirs, counted through, n in all, and
// its body is one of PayloadCodec's for n elements, of slot_bytes(n) at most.
class JointCodec {
 public:
  virtual ~JointCodec() = default;

  struct Part {
    TensorView grad;
    Memory* memory = nullptr;  // of this part alone
  };

  // Scratch that encode_joint or sum_joint of so many parts may need, in bytes.
  virtual std::size_t joint_workspace_bytes(std::int64_t n, std::size_t parts) const = 0;

  // encode of the whole; the parts may differ in dtype and in how residuals are stored. NaN or Inf
  // in any of them: no memory is written. A part whose gradient is all zero, with a memory: that is
  // left unwritten, and nothing of the part is sent; result.empty where all are so.
  virtual EncodeResult encode_joint(const Context& ctx, std::span<const Part> parts,
                                    std::span<std::byte> out) const = 0;

  // sum of the whole, written to its parts.
  virtual void sum_joint(const Context& ctx, std::span<const std::span<const std::byte>> bodies,
                         float weight, std::span<const std::span<float>> outs) const = 0;
};

// First byte of every body, common to all families; family modes begin at kFamily.
enum class BodyMode : std::uint8_t { kEmpty = 0, kNonFinite = 1, kFamily = 16 };

class LinearCodec {
 public:
  virtual ~LinearCodec() = default;

  virtual std::string name() const = 0;
  virtual Traits traits() const = 0;

  // False where the rounds would carry as much as the tensor, or nearly: it is better sent dense.
  virtual bool gains(std::span<const std::int64_t> /*shape*/) const { return true; }

  // What goes on the wire depends on the step by its remainder modulo this.
  virtual std::int64_t period() const { return 1; }
  virtual int rounds(std::uint64_t step) const = 0;
  // fp32 elements that round `round` in [0, rounds(step)) of a step puts on the wire for a tensor
  // of `shape`.
  virtual std::int64_t round_elements(std::span<const std::int64_t> shape, int round,
                                      std::uint64_t step) const = 0;
  // Bytes of per-tensor state the caller keeps from project(0) to absorb(last), aligned to 64.
  virtual std::size_t round_state_bytes(std::span<const std::int64_t> shape) const = 0;
  // What a tensor of `shape` keeps from step to step beside the residual; the same on all ranks. A
  // Memory without it is as one never written.
  virtual MemoryNeeds memory_needs(std::span<const std::int64_t> /*shape*/) const { return {}; }

  struct Tensor {
    TensorView grad;                      // after the last absorb: the mean's reconstruction
    std::span<const std::int64_t> shape;  // product == grad.elements
    Memory* memory = nullptr;
    std::span<std::byte> round_state;  // round_state_bytes(shape)
  };

  // Writes the projection of v = grad + decay * residual (round 0) or of the state left by the last
  // absorb (later rounds) to `out`, round_elements long. Linear in v for fixed key and step; the
  // sender must not enter.
  virtual void project(const Context& ctx, int round, const Tensor& tensor,
                       std::span<float> out) const = 0;
  // `reduced` is the weighted mean of all ranks' projections, bit-identical on all ranks. The last
  // round writes the reconstruction M^ to tensor.grad, the same bits on all ranks, and
  // v - M^ to memory.next().
  virtual void absorb(const Context& ctx, int round, std::span<const float> reduced,
                      const Tensor& tensor) const = 0;
};

}  // namespace thinwire
