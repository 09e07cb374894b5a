#include "comm/summary.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>

namespace thinwire {
namespace {

std::string readable_bytes(std::size_t bytes) {
  char text[32];
  const auto value = static_cast<double>(bytes);
  std::snprintf(text, sizeof text, bytes < 1'000'000 ? "%.1f kB" : "%.1f MB",
                value / (bytes < 1'000'000 ? 1e3 : 1e6));
  return text;
}

struct Tally {
  std::size_t layers = 0;
  std::int64_t elements = 0;
  std::size_t bytes = 0;
  bool joint = false;  // layers of a bucket are encoded as one

  void add(const Layer& layer, const Codec& codec) {
    ++layers;
    elements += layer.elements();
    bytes += message_bytes(layer, codec);
    joint = joint || (codec.payload && codec.payload->joint() != nullptr);
  }
};

std::string describe(const std::string& what, const Tally& tally) {
  return "\n  " + what + ": " + std::to_string(tally.layers) +
         (tally.layers == 1 ? " layer, " : " layers, ") + std::to_string(tally.elements) +
         " elements, " + std::to_string(tally.bytes) + " bytes a step" +
         (tally.joint ? " if each layer were alone" : "");
}

std::size_t generations(const Codec& codec) {
  const bool lossless = codec.payload ? codec.payload->traits().lossless
                                      : !codec.linear || codec.linear->traits().lossless;
  if (lossless || !codec.options.error_feedback) {
    return 0;
  }
  return codec.options.transactional ? 2 : 1;
}

// What the layer's memory keeps beside the residual, a generation.
std::size_t kept_bytes(const Layer& layer, const Codec& codec) {
  if (codec.is_none()) {
    return 0;
  }
  const MemoryNeeds needs = codec.payload ? codec.payload->memory_needs(layer.elements())
                                          : codec.linear->memory_needs(layer.shape);
  return sizeof(float) *
         static_cast<std::size_t>(needs.state + (needs.velocity ? layer.elements() : 0));
}

}  // namespace

std::size_t message_bytes(const Layer& layer, const Codec& codec) {
  // Few 16-bit elements of a bucket may travel as fp32.
  return message_bytes(codec, layer.shape, layer.dtype);
}

MemoryForecast forecast_memory(const std::vector<Layer>& layers, const Plan& plan, int world_size) {
  MemoryForecast forecast;
  if (world_size < 2) {
    return forecast;
  }
  const auto ranks = static_cast<std::size_t>(world_size);
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Codec& codec = plan.choices[i].codec;
    const auto fp32_bytes = static_cast<std::size_t>(layers[i].elements()) * sizeof(float);
    const std::size_t message = message_bytes(layers[i], codec);
    const std::size_t residual = residual_bytes(codec.options.storage, layers[i].elements());
    forecast.residual_bytes += generations(codec) * (residual + kept_bytes(layers[i], codec));
    if (!codec.payload) {
      forecast.buffer_bytes += message;  // reduced in place
    } else if (plan.choices[i].gathered ||
               (codec.payload->traits().sparse && plan.choices[i].split_ranges == 0)) {
      forecast.buffer_bytes += (1 + ranks) * message;
    } else {
      forecast.residual_bytes += generations(codec) * residual / ranks;  // as owner
      forecast.buffer_bytes += 3 * message + fp32_bytes / ranks;
    }
  }
  return forecast;
}

std::string summarise(const std::vector<Layer>& layers, const Policy& policy, const Plan& plan,
                      int world_size) {
  if (world_size < 2) {
    return "thinwire: one rank, gradients stay untouched";
  }
  std::map<std::string, Tally> compressed;
  std::map<std::string, Tally> dense;
  Tally all;
  for (std::size_t i = 0; i < layers.size(); ++i) {
    const Policy::Choice& choice = plan.choices[i];
    all.add(layers[i], choice.codec);
    auto& group = choice.codec.is_none() ? dense : compressed;
    std::string reason = choice.reason;
    if (choice.codec.is_none() && reason.find(" < ") != std::string::npos) {
      reason = "dense: fewer than min_elements";
    }
    const std::string way = choice.split_ranges > 0 ? " by split-reduce" : "";
    group[choice.codec.is_none() ? reason : choice.codec.spec + way].add(layers[i], choice.codec);
  }
  std::string text = "thinwire: " + std::to_string(layers.size()) + " layers, " +
                     std::to_string(all.elements) + " elements on " + std::to_string(world_size) +
                     " ranks; messages of " + readable_bytes(all.bytes) + " a step for " +
                     readable_bytes(static_cast<std::size_t>(all.elements) * sizeof(float)) +
                     " of fp32 gradients";
  if (policy.text().find('\n') == std::string::npos) {
    text += " (policy " + policy.text() + ")";
  }
  for (const auto& [spec, tally] : compressed) {
    text += describe(spec, tally);
  }
  for (const auto& [reason, tally] : dense) {
    text += describe(reason == "default" ? "uncompressed" : reason, tally);
  }
  const MemoryForecast memory = forecast_memory(layers, plan, world_size);
  return text + "\n  memory to be taken: at most " + readable_bytes(memory.residual_bytes) +
         " of residuals, about " + readable_bytes(memory.buffer_bytes) + " of message buffers";
}

}  // namespace thinwire
