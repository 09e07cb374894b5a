#include "optim/dgc_sgd.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "comm/state_key.h"

namespace thinwire::optim {
namespace {

constexpr std::size_t kNoGroup = std::numeric_limits<std::size_t>::max();

constexpr const char* kStartHint =
    "warmup=STEPS raises the sparsity step by step from the first one";

bool is_topk(const Codec& codec) {
  return codec.payload && codec.payload->name().starts_with("topk:");
}

}  // namespace

DgcSgd::DgcSgd(GradientReducer& reducer, std::vector<Member> members,
               std::vector<SgdOptions> groups, DgcOptions options)
    : Optimizer(reducer, "DGCSGD", std::move(members)),
      groups_(name(), Optimizer::groups(), groups),
      first_(std::move(groups)),
      options_(options),
      corrects_(size()),
      group_of_(reducer.layers().size(), kNoGroup),
      velocity_(add_slot("momentum_buffer", SlotKind::kOptional)) {
  if (!(options.clip >= 0)) {
    refuse("clip: expected 0 or more, got " + number_text(options.clip), "leave it out for none");
  }
  bool any_topk = false;
  for (std::size_t i = 0; i < size(); ++i) {
    const bool topk = compressed(i) && is_topk(codec(*reducer.plan(), i));
    any_topk = any_topk || topk;
    if (topk && first_[group(i)].momentum == 0 && options.clip > 0) {
      refuse("clip with momentum 0 in parameter group " + std::to_string(group(i)),
             "local clipping belongs to momentum correction: leave it out, or set a momentum");
    }
    if (topk && first_[group(i)].momentum > 0) {
      corrects_[i] = true;
      group_of_[layer_index(i)] = group(i);
    }
  }
  refuse_start(*reducer.plan(), kStartHint);
  if (any_compressed() && !any_topk) {
    refuse("no layer has a top-k codec, whose momentum it would correct",
           "use the policy topk:0.001, or another optimizer");
  }
}

std::shared_ptr<DgcSgd> DgcSgd::make(GradientReducer& reducer, std::vector<Member> members,
                                     std::vector<SgdOptions> groups, DgcOptions options) {
  std::shared_ptr<DgcSgd> optimizer(
      new DgcSgd(reducer, std::move(members), std::move(groups), options));
  reducer.follow(optimizer);
  return optimizer;
}

void DgcSgd::check_plan(const Plan& plan) const {
  refuse_start(plan, kStartHint);
  refuse_other_members(plan, is_topk, "momentum is corrected in top-k codecs, and stays there");
}

void DgcSgd::set_options(std::vector<SgdOptions> groups) {
  for (std::size_t i = 0; i < std::min(groups.size(), first_.size()); ++i) {
    if (groups[i].momentum != first_[i].momentum || groups[i].nesterov != first_[i].nesterov) {
      refuse("parameter group " + std::to_string(i) + ": expected " + options_text()[i] +
                 " as at first, got " + optim::options_text(groups[i]),
             "momentum is corrected before the exchange and cannot change on the way");
    }
  }
  groups_.set(std::move(groups));
}

std::string DgcSgd::codec_options(std::size_t layer, const Codec& /*codec*/) const {
  if (group_of_[layer] == kNoGroup) {
    return {};
  }
  const SgdOptions& options = first_[group_of_[layer]];
  std::string text = ",momentum=" + number_text(options.momentum);
  if (options.nesterov) text += ",nesterov";
  if (options_.clip > 0) {
    text += ",clip=" + number_text(options_.clip);
    if (options_.clip_by_last) text += ",clip_norm=last";
  }
  return text;
}

void DgcSgd::update(std::size_t i, std::span<float> weights, TensorView reduced) {
  const SgdOptions options = groups_.now(group(i));
  const bool remembers = corrects_[i] ? options.weight_decay > 0 : options.momentum > 0;
  const std::span<float> velocity = remembers ? ensure(velocity_, i) : std::span<float>();
  for_ranges(reduced.elements, [&](std::int64_t begin, std::int64_t end) {
    const auto of = [&](std::span<float> values) {
      return values.empty() ? values : slice(values, begin, end);
    };
    (corrects_[i] ? dgc_step : sgd_step)(options, reduced.slice(begin, end), of(weights),
                                         of(velocity));
  });
}

void DgcSgd::save(Numbers& numbers) const {
  numbers["corrected"] = {corrects_.begin(), corrects_.end()};
}

// With one rank the gradient's momentum is the optimizer's, with several the codec's, on each rank.
void DgcSgd::adapt(OptimizerState& state) const {
  const std::vector<double> corrected = expect(state.numbers, "corrected", size());
  for (std::size_t i = 0; i < size(); ++i) {
    const std::string own = velocity_.name + "/" + layer(i).name;
    const StateKey residual{.layer = layer(i).name, .end = elements(i)};
    StateKey local_velocity = residual;
    local_velocity.role = "worker.velocity";
    const SgdOptions& options = first_[group(i)];
    // The codec's velocity of Nesterov's is M times SGD's, and comes with the loss scale.
    const double unit = (options.nesterov ? options.momentum : 1) * state.reducer.loss_scale;
    const auto add = [](std::vector<float>& to, const std::vector<float>& from, double factor) {
      to.resize(std::max(to.size(), from.size()));
      for (std::size_t j = 0; j < from.size(); ++j) {
        to[j] += static_cast<float>(factor * static_cast<double>(from[j]));
      }
    };
    if (corrected[i] == 0 && corrects_[i]) {
      std::vector<float> velocity;
      add(velocity, take(state.shared, own), unit);
      if (!velocity.empty()) {
        state.reducer.entries.push_back({local_velocity.text(), std::move(velocity)});
      }
    } else if (corrected[i] != 0 && !corrects_[i] && options.momentum > 0) {
      std::vector<float> velocity = take(state.shared, own);  // of weight decay
      add(velocity, take(state.reducer.entries, local_velocity.text()), 1 / unit);
      // What is pending has had its momentum. A velocity d moves weights by lr d M / (1 - M) in
      // all, Nesterov's M times as far.
      add(velocity, take(state.reducer.entries, residual.text()),
          (1 - options.momentum) / (options.momentum * unit));
      if (!velocity.empty()) {
        state.shared.push_back({own, std::move(velocity)});
      }
    }
  }
}

std::string DgcSgd::settings_text() const {
  return "clip=" + number_text(options_.clip) + (options_.clip_by_last ? " by last norm" : "");
}

}  // namespace thinwire::optim
