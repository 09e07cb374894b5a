// FedZip: the largest entries of v = gradient + residual, rounded to the centroids of k clusters
// and entropy-coded (Malekijoo et al., FedZip, arXiv 2102.01593). Zero is one of the k clusters,
// its centroid exact; with k = 3 the rest is a positive and a negative one: ternary values.
// Positions travel as Rice-coded gaps, labels in the smallest of three codes, by bytes that are
// written, not estimated. What rounding and selection lose stays in the residual.
//
// The codec is immutable and safe to call from several threads. It owns nothing of the caller's.
// Bodies are the same on every SIMD target and thread count.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

// Two clusters would leave one for positive and negative entries, whose mean says nothing.
inline constexpr std::int64_t kLeastFedzipClusters = 3;
inline constexpr std::int64_t kMostFedzipClusters = 256;

struct FedzipOptions {
  double density = 0;         // (0, 1]: max(1, round(density * n)) entries are kept
  std::int64_t clusters = 3;  // zero's included
};

// InvalidArgument for options out of range. A tensor of the codec has less than 2^32 elements.
std::shared_ptr<const PayloadCodec> make_fedzip_codec(const FedzipOptions& options);

extern const Family kFedzipFamily;

}  // namespace thinwire
