// The codecs that the policy `auto` chooses from for a layer, with the bytes that each sends and
// the error that it would make. Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/adaptive/error_curves.h"
#include "compressors/core/dtype.h"
#include "compressors/core/spec.h"

namespace thinwire {

// What tells a candidate's error.
enum class Curve : std::uint8_t { kNone, kBF16, kTopK, kQuantize, kOneBit, kLowRank };

struct CandidateCodec {
  std::string spec;  // canonical
  Curve curve = Curve::kNone;
  // kTopK: entries / elements; kQuantize: bits; kLowRank: the rank.
  double parameter = 0;
  TopKValues values = TopKValues::kF32;  // kTopK
  std::size_t bytes = 0;                 // message_bytes
};

// The parts of "topk|lowrank": words that specs begin with, "lowrank" for powersgd and "quantize"
// for q2, q4 and q8. PolicyError for a word that names no candidate.
std::vector<std::string_view> split_families(std::string_view text);

// "none", which is always there, and of the families' candidates (none given: of all) those that
// send less than it does; of two that send the same entries the first. By family, thickest first.
std::vector<CandidateCodec> make_candidates(std::span<const std::int64_t> shape, DType dtype,
                                            std::span<const std::string_view> families = {});

// Of a codec whose error curves tell: one of the kinds above with any parameter. PolicyError for
// another one.
CandidateCodec candidate_of(const Codec& codec);

double error(const CandidateCodec& candidate, const ErrorCurves& curves);

}  // namespace thinwire
