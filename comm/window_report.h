// WindowReport: a window of steps as one rank saw it, as floats to be exchanged, and what all
// ranks' together say. Pure functions: the same reports give the same digest on every rank.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "comm/metered_communicator.h"
#include "comm/step_model.h"
#include "compressors/adaptive/error_curves.h"

namespace thinwire {

// What one step was on one rank. Times are in seconds.
struct StepTimes {
  double seconds = 0;     // from the end of the one before
  double work = 0;        // encode and decode
  double sampling = 0;    // what judging gradients took since the one before
  double waited = 0;      // for a core, by the rank's main thread
  double contention = 0;  // the share of that in what it ran or waited for a core
  std::vector<BucketReady> buckets = {};
  std::vector<TransferTime> transfers = {};

  // Hash of which buckets and transfers there are.
  std::uint32_t structure() const;
};

// The curves of layers that were to be sampled, in order; none where a rank had no sample.
using SampledCurves = std::vector<std::optional<ErrorCurves>>;

// Of steps of one structure, at least one.
std::vector<float> write_report(std::span<const StepTimes> steps, double sampling_seconds,
                                const SampledCurves& curves);

// Of the ranks' medians, the largest: the slowest rank counts.
struct WindowDigest {
  double seconds = 0;
  double work = 0;
  double waited = 0;
  double contention = 0;
  double sampling = 0;               // of the whole window
  std::vector<BucketReady> buckets;  // of a usual step
  // Seconds of each transfer of a step, NaN where no rank can tell. In each step the rank that came
  // last tells how long the wire took; of the steps, the fastest, which the ranks' computation
  // disturbed least.
  std::vector<double> transfers;
  std::vector<TransferTime> kinds;  // verb and bytes of each
  SampledCurves curves;             // the mean of those ranks that had a sample
};

// All ranks' reports, in their order, each as long as this rank's, which is of `steps` with
// `sampled` curves. MismatchError, naming the rank, where ranks reduce in other buckets.
WindowDigest read_reports(std::span<const float> reports, int ranks,
                          std::span<const StepTimes> steps, std::size_t sampled);

}  // namespace thinwire
