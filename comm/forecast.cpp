#include "comm/forecast.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "comm/link_model.h"
#include "comm/plan_search.h"
#include "comm/reducer.h"
#include "comm/step_model.h"
#include "compressors/adaptive/error_curves.h"
#include "compressors/adaptive/gradient_sample.h"
#include "compressors/core/context.h"
#include "compressors/core/error.h"

namespace thinwire {
namespace {

constexpr double kFirstBucketBytes = 1 << 20;

void check(const ForecastJob& job) {
  if (job.ranks < 2) {
    throw InvalidArgument("forecast: " + std::to_string(job.ranks) + " ranks; expected 2 or more");
  }
  if (!job.gradients.empty() && job.gradients.size() != job.layers.size()) {
    throw InvalidArgument("forecast: " + std::to_string(job.gradients.size()) + " gradients for " +
                          std::to_string(job.layers.size()) + " layers");
  }
  for (std::size_t i = 0; i < job.gradients.size(); ++i) {
    const TensorView& gradient = job.gradients[i];
    if (gradient.data != nullptr && gradient.elements != job.layers[i].elements()) {
      throw InvalidArgument("forecast: the gradient of layer '" + job.layers[i].name + "' has " +
                            std::to_string(gradient.elements) + " elements, expected " +
                            std::to_string(job.layers[i].elements()) + ", " +
                            job.layers[i].shape_text());
    }
  }
  const auto positive = [](double value) { return value > 0 && std::isfinite(value); };
  if (!positive(job.link.bytes_per_second) || !positive(job.link.latency_seconds) ||
      !std::isfinite(job.backward_seconds) || job.backward_seconds < 0) {
    throw InvalidArgument(
        "forecast: expected a positive link speed and latency, and a backward pass of 0 seconds or "
        "more");
  }
}

std::vector<BucketReady> usual_buckets(const ForecastJob& job) {
  double total = 0;
  for (const Layer& layer : job.layers) total += static_cast<double>(layer.elements());
  std::vector<BucketReady> buckets;
  double done = 0;
  double bytes = 0;
  double limit = 0;  // opens the first
  for (std::size_t i = job.layers.size(); i-- > 0;) {
    if (buckets.empty() || bytes >= limit) {
      limit = buckets.empty() ? kFirstBucketBytes : kUsualBucketBytes;
      bytes = 0;
      buckets.emplace_back();
    }
    const auto elements = static_cast<double>(job.layers[i].elements());
    bytes += elements * sizeof(float);
    done += elements;
    buckets.back().layers.push_back(i);
    buckets.back().ready = total > 0 ? job.backward_seconds * (done / total - 1) : 0;
  }
  return buckets;
}

// Samples enough for each element of a layer to be in one, up to these.
constexpr std::int64_t kMostSamples = 16;

void see_gradients(const ForecastJob& job, PlanSearch& search) {
  for (const std::size_t i : search.judged()) {
    const TensorView gradient = job.gradients.empty() ? TensorView() : job.gradients[i];
    const Layer& layer = job.layers[i];
    if (gradient.data == nullptr) continue;
    const std::int64_t samples = std::clamp<std::int64_t>(
        (gradient.elements + kSampleElements - 1) / kSampleElements, 1, kMostSamples);
    const std::uint64_t key =
        Key{.stream = "forecast", .parameter = layer.name, .begin = 0, .end = 0}.hash();
    ErrorCurves curves;
    GradientSample sample;
    for (std::int64_t counter = 0; counter < samples; ++counter) {
      take_sample({.grad = gradient, .shape = layer.shape}, key,
                  static_cast<std::uint64_t>(counter), sample);
      curves += measure_errors(sample, search.wants_low_rank(i));
    }
    if (curves.nonfinite()) {
      throw InvalidArgument("forecast: the gradient of layer '" + layer.name +
                            "' holds NaN or Inf\nhint: save those of a step that went well");
    }
    search.see(i, curves);
  }
}

}  // namespace

Forecast forecast(const ForecastJob& job, const Policy& policy, CodecSpeeds& speeds) {
  check(job);
  Forecast result;
  result.plan = Plan::make(policy, job.layers);
  const std::vector<Codec> codecs = PlanSearch::codecs(job.layers, result.plan);
  speeds.measure(codecs);
  const LinkModel link = link_model(job.link, job.ranks);
  const std::vector<BucketReady> buckets = usual_buckets(job);
  if (result.plan.chooses()) {
    std::vector<CodecSpeed> known;
    for (const Codec& codec : codecs) known.push_back(speeds.of(codec.spec));
    PlanSearch search(job.layers, result.plan, job.ranks, known);
    see_gradients(job, search);
    search.update({.link = link, .buckets = buckets});
    result.plan = search.plan(search.best(0).id);
  }
  result.plan.choose_routes(job.layers, job.ranks, job.link, ReducerOptions().split_from_ranks);
  std::vector<LayerCost> costs;
  for (std::size_t i = 0; i < job.layers.size(); ++i) {
    const Codec& codec = result.plan.choices[i].codec;
    costs.push_back(layer_cost(job.layers[i], codec, result.plan.choices[i].gathered,
                               speeds.of(codec.spec), link, job.ranks));
    result.layer_seconds.push_back(costs.back().seconds());
    result.layer_sent.push_back(costs.back().sent);
  }
  const StepCost step = step_cost(buckets, costs);
  result.exposed = step.exposed;
  result.work = step.work;
  result.sent = step.sent;
  return result;
}

}  // namespace thinwire
