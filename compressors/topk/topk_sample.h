// Internal: what top-k does outside the one pass: the threshold estimated beforehand, and the
// scatter of sent positions. Thread-safe on disjoint memory; nothing is owned.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/random.h"
#include "compressors/topk/topk_kernels.h"

namespace thinwire::topk {

// Candidates that estimate_threshold needs room for, without the slack.
std::size_t sample_capacity(std::int64_t n, std::int64_t k);

// Bits of a magnitude that about candidates.keep of the scanned entries, n in all, and some
// deviations of that estimate more, reach: one deviation of a `sampled` choice, whose threshold
// decides what is sent, four where it only must not be too high. From a stratified sample of whole
// cache lines (Lin et al. 2018 sample 0.1 to 1 %; here as many as give an expected 32, else 4, in
// the sample). 1, that is everything but zeros, for small tensors. `candidates` lends its arrays
// and is unchanged. The same on every target.
std::uint32_t estimate_threshold(std::span<const Scan> parts, std::int64_t n,
                                 const Candidates& candidates, bool sampled,
                                 const RandomStream& stream);

// `threshold`, bits of a magnitude, or what a sample says about it: no lower than what one standard
// deviation (of the sample) more than `wanted` entries reach, no higher than what one less do; 1
// where the sample has fewer. For small tensors the threshold as it is. The rest as above.
std::uint32_t check_threshold(const Scan& scan, const Candidates& candidates,
                              std::uint32_t threshold, double wanted, const RandomStream& stream);

// How many of the k largest are expected in the sample; 0 for small tensors.
double expected_hits(std::int64_t n, std::int64_t k);

// out[indices[i] - first] = values[i].
void scatter(std::span<const std::uint32_t> indices, std::span<const float> values,
             std::uint32_t first, float* out);
// The same of a residual that is open.
void scatter(std::span<const std::uint32_t> indices, std::span<const float> values,
             std::uint32_t first, const OpenedResidual& out);
// out[indices[i]] = values[i], rounded once to fp32, bf16 or fp16.
void scatter(std::span<const std::uint32_t> indices, std::span<const float> values, TensorView out);
// out[indices[i]] += weight * values[i], the product rounded, then the sum.
void scatter_add(std::span<const std::uint32_t> indices, std::span<const float> values,
                 float weight, float* out);

}  // namespace thinwire::topk
