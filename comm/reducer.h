// GradientReducer: reduces the gradients of a layer table over a private group, compressed as the
// plan says. Owns the group, the memories and one communication thread; gradients stay the
// caller's and are borrowed from reduce() until the reduction is done. reduce(), stats() and the
// state calls may come from any thread, one at a time; every rank calls reduce() with the same
// buckets in the same order.
#pragma once

#include <chrono>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/communicator.h"
#include "comm/gradient_method.h"
#include "comm/policy.h"
#include "comm/reducer_state.h"
#include "comm/trace_options.h"

namespace thinwire {

struct ReducerOptions {
  std::string stream = "grad";  // Key::stream
  ReduceOp op = ReduceOp::kMean;
  std::chrono::milliseconds deadline{300'000};       // of every wait on a peer
  std::chrono::milliseconds roll_call_grace{3'000};  // after a failure
  // Uncompressed layers of a bucket join its sparse message, which saves a collective, while their
  // fp32 bytes * (P - 1) stay under this: about the wire time of one collective's latency. Those of
  // bf16 and fp16 travel in 16 bits, by a collective more, where their fp32 bytes are over it.
  std::size_t ride_along_bytes = 65'536;
  // Sparse layers are split-reduced where that is predicted to be faster on this link, from so many
  // ranks on: then k entries of a sum come out, where an allgather gives all of up to P k, and the
  // others stay with their owners for later steps. The same on all ranks, measured or not.
  Link link = {};
  int split_from_ranks = 16;
  // Where the transport cannot survive a lost peer (MPI): `report` gets the message of the
  // PeerLost, or of what else ends this rank's part; then `end_program` is called and should not
  // return (MPI_Abort). In the handshake both are called on the constructor's thread, later on a
  // thread of the reducer's, also when the transport hangs in a call. Without them PeerLost is
  // thrown as elsewhere, unless the transport hangs; late messages may then still be written to
  // the step's gradients, which must live until the program ends.
  std::function<void(const std::string&)> report = {};
  std::function<void()> end_program = {};
  // Of the steps of several ranks; one alone exchanges nothing, and its file is not touched. What
  // fails at the start is an InvalidArgument, later take_warnings() tells. Each rank's own choice.
  TraceOptions trace = {};
};

struct BucketLayer {
  std::size_t layer = 0;   // index in the layer table
  TensorView grad;         // gets the result; contiguous, the table's dtype and element count
  TensorView source = {};  // where the gradient is read, the same dtype and count; no data: `grad`
  // Owns the source's memory, which nobody else may need any more: it is overwritten, and kept as
  // the layer's residual, or let go of as soon as it has been read. None: the source is borrowed
  // as `grad` is, and only read.
  std::shared_ptr<void> owner = {};
};

struct Bucket {
  std::vector<BucketLayer> layers;
  // The step's last bucket: when it is done the step's memory commits, or rolls back when any rank
  // had NaN/Inf in any layer.
  bool last = true;
};

struct LayerStats {
  std::string name;
  std::int64_t elements = 0;
  std::string codec;   // canonical spec, "none" for dense
  std::string reason;  // why this codec
  // This rank's payload a step. Of one that layers of a bucket share (topk's scope=bucket): the
  // layer's share by elements at the last step; before the first one, as if it were alone.
  std::size_t slot_bytes = 0;
  double ratio = 1;  // fp32 bytes / slot bytes
  std::uint64_t nonfinite_steps = 0;
};

struct ReducerStats {
  std::uint64_t steps = 0;             // committed or rolled back
  std::uint64_t skipped_steps = 0;     // rolled back
  std::uint64_t wire_bytes = 0;        // sent by this rank, headers included
  std::uint64_t dense_wire_bytes = 0;  // what a ring allreduce of the same gradients as fp32 sends
  double ratio = 1;                    // dense_wire_bytes / wire_bytes
  double ratio_bf16 = 1;               // half of it
  std::size_t memory_bytes = 0;        // residuals, all generations
  std::size_t buffer_bytes = 0;        // messages and scratch
  double encode_seconds = 0;           // on the communication thread: start and next
  double decode_seconds = 0;           // finish
  double wait_seconds = 0;             // blocked on the wire
  std::vector<LayerStats> layers;
};

class Reduction {
 public:
  virtual ~Reduction() = default;
  // Blocks until every gradient of the bucket holds the result; rethrows PeerLost, CorruptPayload,
  // NonFiniteError, ... After an exception gradients of the step are unspecified and memory is at a
  // committed step.
  virtual void wait() = 0;
};

class GradientReducer {
 public:
  // Collective: all ranks exchange version, policy and layer table; MismatchError names the ranks
  // and the field that differ, with every rank's value.
  GradientReducer(std::unique_ptr<Communicator> comm, std::vector<Layer> layers, Policy policy,
                  ReducerOptions options = {});
  // Waits for reductions in flight (bounded by the deadline), ends the thread.
  ~GradientReducer();
  GradientReducer(const GradientReducer&) = delete;
  GradientReducer& operator=(const GradientReducer&) = delete;

  // Starts the reduction and returns at once. `done` (may be empty) is called on the
  // communication thread when the bucket's result is in place, with the error if there was one;
  // it must not call back into the reducer. Errors of use (unknown layer, wrong size or dtype, a
  // layer twice in a step) throw here, with rank and layer named.
  // World size 1: the result is the gradient (kMean, kSum alike), nothing is encoded; residuals
  // that restore() brought are added to it once.
  std::shared_ptr<Reduction> reduce(Bucket bucket,
                                    std::function<void(std::exception_ptr)> done = {});

  // Lets an optimizer say how gradients are reduced. Before the first step, once; kept until the
  // reducer ends. InvalidArgument otherwise; PolicyError when a layer's codec does not take the
  // method's options. MismatchError from the first reduction when ranks differ in its fields.
  void follow(std::shared_ptr<GradientMethod> method);
  // Goes on by another policy from the next step on: other densities each epoch, say. Between steps
  // only. Every rank calls it at the same place: another policy is a MismatchError of the next
  // reduction, but a rank that leaves the call out, or for which it throws, must end. start= and
  // warmup= count from the first step of all, not from here.
  //
  // Nothing pending is lost: a layer with another codec takes its residual along, what owners hold
  // included, to the rounding of its new memory; one that goes dense adds it to its gradient in the
  // next step that is not skipped, rounded to the gradient's type. PolicyError, with nothing
  // changed, as at construction, and where the method that is followed cannot go on so; the error
  // of an earlier step after that.
  void set_policy(Policy policy);
  // Multiplies this rank's memories, factors[i] those of layer i: what is reduced comes in another
  // unit from now on. Between steps only.
  void scale_memories(std::span<const float> factors);

  // Ends a step whose remaining buckets will not come: waits for what is in flight, then rolls its
  // memory back. Counts as a skipped step. Every rank must call it at the same place. Nothing when
  // no step is open.
  void abandon_step();

  // Finished so far: committed or rolled back.
  std::uint64_t steps() const;
  // The last finished step was rolled back (NaN/Inf somewhere, or abandoned); the same on every
  // rank.
  bool last_step_skipped() const;
  // New gradients come multiplied by `scale`: residuals are rescaled to match. Between steps only.
  void set_loss_scale(double scale);
  double loss_scale() const;

  ReducerStats stats() const;
  // The L2 norm of this rank's residual, one a layer; 0 where it has none. Between steps only.
  std::vector<double> residual_norms() const;
  std::shared_ptr<const Plan> plan() const;
  const std::vector<Layer>& layers() const;
  int rank() const;
  int size() const;
  ReduceOp op() const;
  // What the policy `auto` has decided since the last call, a line each: what it goes by, tries,
  // keeps or takes back, with the times and bytes that decided. The same on every rank.
  std::vector<std::string> take_decisions();
  // What went wrong on this rank beside the steps since the last call, a line each: the trace that
  // can be written no more.
  std::vector<std::string> take_warnings();
  // One paragraph for the log: what is compressed how, what goes dense and why, memory to be taken.
  std::string summary() const;

  // Between steps only. restore: InvalidArgument for another version, rank, world size, policy or
  // layer table, naming expected and got. For another world size see reshard().
  ReducerState state() const;
  void restore(const ReducerState& state);

  // Ends everything in flight with TransportError; idempotent; any thread.
  void abort() noexcept;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thinwire
