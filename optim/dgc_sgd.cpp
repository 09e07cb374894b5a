#include "optim/dgc_sgd.h"

#include <algorithm>
#include <limits>
#include <utility>

namespace thinwire::optim {
namespace {

constexpr std::size_t kNoGroup = std::numeric_limits<std::size_t>::max();

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
  for (std::size_t i = 0; i < size(); ++i) {
    const Codec& codec = reducer.plan().choices[layer_index(i)].codec;
    group_of_[layer_index(i)] = group(i);
    corrects_[i] = compressed(i) && is_topk(codec) && first_[group(i)].momentum > 0;
  }
  refuse_start("warmup=STEPS raises the sparsity step by step from the first one");
  if (any_compressed() && std::none_of(reducer.plan().choices.begin(), reducer.plan().choices.end(),
                                       [](const auto& choice) { return is_topk(choice.codec); })) {
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

std::string DgcSgd::codec_options(std::size_t layer, const Codec& codec) const {
  if (!is_topk(codec) || group_of_[layer] == kNoGroup) {
    return {};
  }
  const SgdOptions& options = first_[group_of_[layer]];
  if (options.momentum == 0) {
    return {};
  }
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

std::string DgcSgd::settings_text() const {
  return "clip=" + number_text(options_.clip) + (options_.clip_by_last ? " by last norm" : "");
}

}  // namespace thinwire::optim
