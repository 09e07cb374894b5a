// Optimizer: what the optimizers over a GradientReducer have in common. Each is two passes around
// one reduction: before it, on the reducer's thread, what is reduced in the place of the gradient
// (GradientMethod); after it, in step(), the new weights. Everything that is decided on the way is
// decided from reduced values, so all ranks decide alike.
//
// One optimizer a reducer, made before its first step; the reducer shares it, and outlives its
// calls. It allocates in its constructor, at the first step, and where a method says so. Calls may
// come from any thread, one at a time, between the end of a reduction and the next one's beginning;
// set_options() also while one is on its way.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "comm/gradient_method.h"
#include "comm/reducer.h"
#include "optim/optim_kernels.h"
#include "optim/optimizer_state.h"
#include "optim/schedules.h"

namespace thinwire::optim {

// A parameter of an optimizer: a layer of the reducer's table, and the group its options come from.
struct Member {
  std::size_t layer = 0;
  std::size_t group = 0;
};
// All layers of a reducer in one group.
std::vector<Member> all_layers(const GradientReducer& reducer);

// A parameter's memory at a step. weights: fp32, bf16 or fp16 (then the optimizer keeps fp32
// weights of its own beside them), as many elements as the layer has. grad: what the reducer made
// of the gradient, in the layer's dtype; no data: the parameter had no gradient and stays.
struct Parameter {
  TensorView weights;
  TensorView grad;
};

template <typename T>
std::span<T> slice(std::span<T> values, std::int64_t begin, std::int64_t end) {
  return values.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
}

// f(begin, end) for ranges that make up [0, n), perhaps at the same time on several threads.
using Range = std::function<void(std::int64_t begin, std::int64_t end)>;
using ParallelFor = std::function<void(std::int64_t n, const Range& f)>;

class Optimizer : public GradientMethod {
 public:
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;

  // Applies what was reduced; parameters[i] belongs to member i. False: the reducer's last step was
  // skipped on all ranks (NaN or Inf somewhere), and nothing changes. InvalidArgument, naming the
  // layer, for another dtype, length or number of parameters, and where nothing has been reduced
  // since the last call, before anything changes.
  bool step(std::span<const Parameter> parameters);
  // Steps applied.
  std::int64_t steps() const { return steps_; }

  // Lets step() use several threads; the same bits for any number.
  void set_parallel_for(ParallelFor parallel_for) { parallel_for_ = std::move(parallel_for); }

  // restore: InvalidArgument for another method, version, model or world size.
  OptimizerState state() const;
  void restore(const OptimizerState& saved);

  // A state that belongs to parameters: values[i] is member i's. Local: this rank's own. Optional:
  // empty until it is needed.
  struct Slot {
    std::string name;
    bool local = false;
    bool optional = false;
    std::vector<std::vector<float>> values;
  };
  const std::deque<Slot>& slots() const { return slots_; }
  // Changes when a slot gets or loses memory.
  std::uint64_t slots_version() const { return slots_version_; }
  std::deque<Slot>& slots() { return slots_; }
  Numbers numbers() const;
  const std::string& name() const { return name_; }

  std::vector<HandshakeField> fields() const final;
  bool prepare(std::size_t layer, TensorView gradient, TensorView out) final;
  StepMode begin_step() final;
  void plan_changed() final;

 protected:
  // InvalidArgument when a member is no layer of the reducer's, is there twice, or has a dtype that
  // no optimizer takes, and for a reducer of sums.
  Optimizer(GradientReducer& reducer, std::string name, std::vector<Member> members);

  // The plan has a codec for member i, and there are ranks to exchange with.
  bool compressed(std::size_t i) const { return compressed_[i]; }
  bool any_compressed() const { return any_compressed_; }
  // The plan has one, however many ranks there are.
  bool has_codec(std::size_t i) const { return !codec(*reducer_.plan(), i).is_none(); }
  const Codec& codec(const Plan& plan, std::size_t i) const {
    return plan.choices[layer_index(i)].codec;
  }
  std::size_t size() const { return members_.size(); }
  std::size_t group(std::size_t i) const { return members_[i].group; }
  std::size_t groups() const;
  const Layer& layer(std::size_t i) const { return reducer_.layers()[members_[i].layer]; }
  std::int64_t elements(std::size_t i) const { return layer(i).elements(); }
  std::size_t layers() const { return reducer_.layers().size(); }
  std::size_t layer_index(std::size_t i) const { return members_[i].layer; }
  GradientReducer& reducer() { return reducer_; }

  // References stay valid.
  enum class SlotKind : std::uint8_t { kShared, kLocal, kOptional, kOptionalLocal };
  Slot& add_slot(std::string name, SlotKind kind);
  // The values of a slot, zeros where there were none.
  std::span<float> ensure(Slot& slot, std::size_t i);
  void drop(Slot& slot, std::size_t i);

  void for_ranges(std::int64_t n, const Range& f) const;

  // The parts of a method. On the reducer's thread:
  virtual StepMode begin() { return StepMode::kPolicy; }
  virtual bool before(std::size_t /*i*/, TensorView /*gradient*/, TensorView /*out*/) {
    return false;
  }
  // In step(): before any update, for each parameter with a gradient, and after all.
  virtual void begin_update() {}
  virtual void update(std::size_t i, std::span<float> weights, TensorView reduced) = 0;
  virtual void end_update() {}
  // Before a state is checked and restored: brings one that was saved with another number of ranks
  // into this optimizer's form.
  virtual void adapt(OptimizerState& /*state*/) const {}
  // Besides the number of steps.
  virtual void save(Numbers& /*numbers*/) const {}
  // InvalidArgument by expect() where something is missing.
  virtual void load(const Numbers& /*numbers*/) {}
  // The options, in words, for the comparison between ranks; one a group.
  virtual std::vector<std::string> options_text() const = 0;
  // The same of what is set for all groups together.
  virtual std::string settings_text() const { return {}; }

  // What gradients come multiplied by, as the reducer was told.
  double loss_scale() const { return reducer_.loss_scale(); }
  // The L1 norm of a slot's compressed members.
  double compressed_norm(const Slot& slot) const;
  // PolicyError when a compressed member's codec starts later than the first step: `instead` says
  // what does so here.
  void refuse_start(const Plan& plan, const std::string& instead) const;
  // For check_plan(): PolicyError when other members than now have a codec, or one that `is` names.
  using IsKind = bool (*)(const Codec& codec);
  void refuse_other_members(const Plan& plan, IsKind is, const std::string& why) const;
  // For adapt(): removes an entry and returns its values, none where there is none.
  static std::vector<float> take(std::vector<StateEntry>& entries, const std::string& key);
  // For adapt(), on one rank: what the workers' residual of member i holds goes into its first
  // moment, times `factor`, instead of into the next gradient. Not where its variance is 0.
  void settle_residual(OptimizerState& state, std::size_t i, double factor) const;
  // A freeze rule's part of numbers().
  static void save(const FreezeRule& rule, Numbers& numbers);
  void load(FreezeRule& rule, const Numbers& numbers) const;
  // That its freeze rule had frozen.
  bool is_frozen(const OptimizerState& state) const;

  // numbers[name], which must have `count` values.
  const std::vector<double>& expect(const Numbers& numbers, const std::string& name,
                                    std::size_t count) const;
  [[noreturn]] void refuse(const std::string& what, const std::string& hint) const;

  std::int64_t steps_ = 0;

 private:
  void check(std::span<const Parameter> parameters) const;
  void note_compressed();
  void update_rounded(std::size_t i, const Parameter& parameter);

  GradientReducer& reducer_;
  const std::string name_;
  const std::vector<Member> members_;
  std::vector<bool> compressed_;
  bool any_compressed_ = false;
  std::vector<std::size_t> member_of_;  // by layer; size() where there is none
  std::deque<Slot> slots_;
  std::uint64_t slots_version_ = 0;
  Slot* master_ = nullptr;
  ParallelFor parallel_for_;
  std::uint64_t reduced_ = 0;  // the reducer's steps at the last call of step()
};

}  // namespace thinwire::optim
