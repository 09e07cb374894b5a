#include "comm/window_report.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "compressors/core/error.h"

namespace thinwire {
namespace {

// What a report holds before its lists.
enum Head : std::size_t { kStructure, kSeconds, kWork, kWaited, kContention, kSampling, kHeads };

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

// Of finite values; NaN without any.
double median(std::vector<double> values) {
  std::erase_if(values, [](double value) { return !std::isfinite(value); });
  if (values.empty()) return kUnknown;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// As a float holds it.
float structure_value(const StepTimes& step) {
  return static_cast<float>(step.structure() & 0xFFFFFFU);
}

// On a wire that carries one after another. NaN where its beginning or its end is not known.
double transfer_seconds(const StepTimes& step, std::size_t t) {
  const TransferTime& transfer = step.transfers[t];
  if (!transfer.awaited) return kUnknown;
  Clock::time_point began = transfer.issued;
  if (t > 0) {
    const TransferTime& last = step.transfers[t - 1];
    if (last.finished > transfer.issued && !last.awaited) return kUnknown;
    began = std::max(began, last.finished);
  }
  const double seconds = std::chrono::duration<double>(transfer.finished - began).count();
  return seconds > 0 ? seconds : kUnknown;
}

// The rows of all ranks' reports.
class Reports {
 public:
  Reports(std::span<const float> all, int ranks)
      : all_(all), ranks_(static_cast<std::size_t>(ranks)), row_(all.size() / ranks_) {}

  std::size_t ranks() const { return ranks_; }
  std::span<const float> row(std::size_t rank) const { return all_.subspan(rank * row_, row_); }
  double most(std::size_t at) const {
    return fold(at, [](double a, double b) { return std::fmax(a, b); });
  }
  double least(std::size_t at) const {
    return fold(at, [](double a, double b) { return std::fmin(a, b); });
  }

 private:
  template <typename Choose>
  double fold(std::size_t at, Choose&& choose) const {
    double value = kUnknown;
    for (std::size_t rank = 0; rank < ranks_; ++rank) {
      value = choose(value, static_cast<double>(row(rank)[at]));
    }
    return value;
  }

  std::span<const float> all_;
  std::size_t ranks_;
  std::size_t row_;
};

std::optional<ErrorCurves> mean_curves(const Reports& reports, std::size_t at) {
  ErrorCurves sum;
  float count = 0;
  for (std::size_t rank = 0; rank < reports.ranks(); ++rank) {
    const std::span<const float> values = reports.row(rank).subspan(at);
    if (values[0] == 0) continue;
    ErrorCurves curves;
    std::copy_n(values.begin() + 1, ErrorCurves::kValues, curves.values().begin());
    sum += curves;
    ++count;
  }
  if (count == 0) return std::nullopt;
  sum *= 1 / count;
  return sum;
}

}  // namespace

std::uint32_t StepTimes::structure() const {
  std::uint64_t hash = 0xCBF29CE484222325U;  // FNV-1a
  const auto add = [&hash](std::uint64_t value) { hash = (hash ^ value) * 0x100000001B3U; };
  for (const BucketReady& bucket : buckets) {
    add(bucket.layers.size());
    for (const std::size_t layer : bucket.layers) add(layer);
  }
  for (const TransferTime& transfer : transfers) {
    add(static_cast<std::uint64_t>(transfer.verb));
    add(static_cast<std::uint64_t>(transfer.sent));
  }
  return static_cast<std::uint32_t>(hash ^ (hash >> 32U));
}

std::vector<float> write_report(std::span<const StepTimes> steps, double sampling_seconds,
                                const SampledCurves& curves) {
  std::vector<float> report(kHeads);
  const auto over_steps = [&](auto&& value) {
    std::vector<double> values;
    for (const StepTimes& step : steps) values.push_back(value(step));
    return static_cast<float>(median(std::move(values)));
  };
  const StepTimes& any = steps.back();
  report[kStructure] = structure_value(any);
  report[kSeconds] = over_steps([](const StepTimes& s) { return s.seconds; });
  report[kWork] = over_steps([](const StepTimes& s) { return s.work; });
  report[kWaited] = over_steps([](const StepTimes& s) { return s.waited; });
  report[kContention] = over_steps([](const StepTimes& s) { return s.contention; });
  report[kSampling] = static_cast<float>(sampling_seconds);
  for (std::size_t b = 0; b < any.buckets.size(); ++b) {
    report.push_back(over_steps([b](const StepTimes& s) { return s.buckets[b].ready; }));
  }
  for (const StepTimes& step : steps) {
    for (std::size_t t = 0; t < any.transfers.size(); ++t) {
      report.push_back(static_cast<float>(transfer_seconds(step, t)));
    }
  }
  for (const std::optional<ErrorCurves>& found : curves) {
    const ErrorCurves values = found.value_or(ErrorCurves());
    report.push_back(found ? 1.0F : 0.0F);
    report.insert(report.end(), values.values().begin(), values.values().end());
  }
  return report;
}

WindowDigest read_reports(std::span<const float> floats, int ranks,
                          std::span<const StepTimes> steps, std::size_t sampled) {
  const Reports reports(floats, ranks);
  const StepTimes& any = steps.back();
  for (std::size_t rank = 1; rank < reports.ranks(); ++rank) {
    if (reports.row(rank)[kStructure] != reports.row(0)[kStructure]) {
      throw MismatchError("rank " + std::to_string(rank) +
                          " reduces its gradients in other buckets than rank 0\nhint: every "
                          "rank must call reduce() with the same buckets in the same order");
    }
  }
  WindowDigest digest;
  digest.seconds = reports.most(kSeconds);
  digest.work = reports.most(kWork);
  digest.waited = reports.most(kWaited);
  digest.contention = reports.most(kContention);
  digest.sampling = reports.most(kSampling);
  digest.buckets = any.buckets;
  std::size_t at = kHeads;
  for (BucketReady& bucket : digest.buckets) bucket.ready = reports.most(at++);
  // Kept in order, whatever the ranks' medians say.
  for (std::size_t b = digest.buckets.size(); b-- > 1;) {
    digest.buckets[b - 1].ready = std::min(digest.buckets[b - 1].ready, digest.buckets[b].ready);
  }
  digest.kinds = any.transfers;
  const std::size_t transfers = any.transfers.size();
  for (std::size_t t = 0; t < transfers; ++t) {
    double fastest = kUnknown;
    for (std::size_t s = 0; s < steps.size(); ++s) {
      fastest = std::fmin(fastest, reports.least(at + s * transfers + t));
    }
    digest.transfers.push_back(fastest);
  }
  at += steps.size() * transfers;
  for (std::size_t i = 0; i < sampled; ++i, at += 1 + ErrorCurves::kValues) {
    digest.curves.push_back(mean_curves(reports, at));
  }
  return digest;
}

}  // namespace thinwire
