// One-line codec specs: `family[:main][,option[=value]]...`, e.g. "topk:0.01,values=q8".
// The grammar of design's "What users type"; FORMAT-independent. Pure functions, thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/core/codec.h"

namespace thinwire {

enum class NonFinite : std::uint8_t {
  kPropagate,  // the tensor becomes NaN on all ranks; the step's memory is rolled back
  kSkipStep,   // every gradient of the step becomes zero on all ranks; memory is rolled back
  kError,      // NonFiniteError on all ranks; memory is rolled back
};

// Options that every family takes; obeyed by the caller of the codec.
struct CommonOptions {
  bool error_feedback = true;  // ef=on|off; families that lose nothing ignore it
  bool transactional = true;   // transactional=on|off
  ResidualStorage storage = ResidualStorage::kFP32;  // memory=fp32|bf16|q8
  float decay = 1.0F;                                // decay in [0, 1]
  std::uint64_t start_step = 0;                      // start=STEP: dense before it
  std::uint64_t warmup_steps = 0;  // warmup=STEPS, from start on, where the family has it
  NonFinite nonfinite = NonFinite::kPropagate;
};

// What is sent before `end`, in steps from CommonOptions::start_step.
struct WarmupStage {
  std::uint64_t end = 0;
  std::shared_ptr<const PayloadCodec> payload;
};

// A parsed, validated spec: the codec and the options around it. Exactly one of payload and linear
// is set; neither for "none".
struct Codec {
  std::string spec;  // canonical text: defaults left out, options in a fixed order
  std::uint8_t family_id = 0;
  std::shared_ptr<const PayloadCodec> payload;
  std::shared_ptr<const LinearCodec> linear;
  std::vector<WarmupStage> warmup;  // by rising end; afterwards `payload`
  CommonOptions options;

  bool is_none() const { return !payload && !linear; }
  // What is sent at a step; null where it is dense or linear.
  const PayloadCodec* payload_at(std::uint64_t step) const;
  // The last step, up to this one, from which on something else is sent than before; 0 at first.
  std::uint64_t phase_at(std::uint64_t step) const;
};

// Bytes that a tensor's message of one step holds: the codec's slot, all rounds of a linear codec
// (the mean over the steps), or the values themselves.
std::size_t message_bytes(const Codec& codec, std::span<const std::int64_t> shape, DType dtype);

// PolicyError that quotes the text, marks the place with ^ and names the nearest valid spelling.
// What the design has and this version lacks is refused with NotAvailable. Knows all families:
// defined in compressors/families.cpp.
Codec make_codec(std::string_view spec);

}  // namespace thinwire
