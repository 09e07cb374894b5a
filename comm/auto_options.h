// AutoOptions: what the policy `auto` may choose for a layer:
//
//   auto[,error=BUDGET][,families=F|G|...][,at_least=CODEC] and the options of every family
//
//   error=topk:0.001      the layer's share of the error budget: what this codec would lose of it
//   error=2*powersgd:4    a multiple of that
//   error=0.5             or this share of its gradients' norm
//   families=topk|quantize  only these families, and none
//   at_least=q8           nothing that loses more of the layer than this codec
//
// Budgets are summed over a policy's layers: what one leaves another may use. Pure functions.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "compressors/core/spec.h"

namespace thinwire {

struct AutoOptions {
  std::string text;   // canonical
  double factor = 1;  // of the reference's error, or of the gradients' norm where there is none
  std::string reference;
  std::vector<std::string> families;  // empty: all
  std::string at_least;               // empty: no bound
  CommonOptions options;
  std::string common;  // `options` as a spec has them
  // Whether memory= was given. Else residuals are stored as fp32, or as bf16 where the codec takes
  // that as it is: it is then faster, since it goes through fewer bytes.
  bool memory_given = false;

  // Of a codec that takes a residual of bf16 as it is, or does not.
  CommonOptions options_for(bool takes_bf16) const;
};

// Whether the spec's first word is "auto".
bool is_auto(std::string_view spec);
// PolicyError with place and nearest spelling.
AutoOptions parse_auto(std::string_view spec);

}  // namespace thinwire
