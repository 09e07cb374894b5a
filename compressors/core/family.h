// Family: one kind of codec as policies, help and documents know it. Each family's folder defines
// one such constant a family; compressors/families.h lists them.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "compressors/core/spec.h"
#include "compressors/core/spec_reader.h"

namespace thinwire {

// `name=value` behind the commas of a spec.
struct FamilyOption {
  std::string_view name;
  std::string_view values;     // "fp32 | bf16 | q8", "64 to 4096, a multiple of 64"
  std::string_view otherwise;  // when it is not given
  std::string_view what;
};

struct Family {
  std::string_view name;    // in tables: "topk", "q1 to q8"
  Words words;              // what a spec may begin with
  std::uint8_t id = 0;      // PayloadHeader::codec_id, FORMAT.md
  std::string_view main;    // what follows the colon; empty: nothing does
  std::string_view sample;  // a spec
  std::span<const FamilyOption> options;
  std::string_view paper;
  std::string_view use;  // when it is the one to take
  // Sets the codec's payload or linear.
  void (*make)(const SpecReader& reader, Codec& codec) = nullptr;
};

}  // namespace thinwire
