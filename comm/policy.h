// Policy: the user's rules; Plan: what they make of a layer table. Immutable values.
//
// A policy is one line (a codec spec for every eligible layer) or TOML:
//
//   policy = "topk:0.01,values=q8"      # the default for layers no rule names
//   min_elements = 1024                 # smaller layers go dense
//   [[rule]]                            # the first rule that matches decides
//   name = "*.embedding.*"              # shell-style glob over the parameter's name
//   dims = 2                            # optional: number of dimensions
//   min_elements = 100000               # optional, also max_elements
//   policy = "q8"
//
// Layers with at most one dimension (biases, norms) and layers under min_elements go dense unless a
// rule with a `name` names them; so do, in any case, those that a linear codec would not make
// smaller (LinearCodec::gains).
//
// A policy may be `auto` (comm/auto_options.h): the reducer chooses the layer's codec, and changes
// its choice as it learns. Layers that would go dense by themselves go dense then, or by
// q8 or q4.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "comm/auto_options.h"
#include "comm/collective_cost.h"
#include "compressors/core/spec.h"
#include "compressors/core/tensor_view.h"

namespace thinwire {

struct Layer {
  std::string name;
  std::vector<std::int64_t> shape;
  DType dtype = DType::kF32;

  std::int64_t elements() const;
  std::string shape_text() const;  // "[512, 784]"
};

// What a line of a policy gives to a layer: a codec, or the choice of one.
struct Prescription {
  Codec codec;  // of `automatic`: none
  std::shared_ptr<const AutoOptions> automatic = {};

  bool is_none() const { return codec.is_none() && !automatic; }
  const std::string& spec() const { return automatic ? automatic->text : codec.spec; }
};

struct PolicyRule {
  std::string name_glob;  // empty: any
  std::optional<int> dims;
  std::optional<std::int64_t> min_elements;
  std::optional<std::int64_t> max_elements;
  Prescription prescription;

  bool matches(const Layer& layer) const;
};

class Policy {
 public:
  // One line, TOML text, or "@FILE" for a TOML file. PolicyError with place and nearest spelling.
  static Policy parse(std::string_view text);

  // The codec of a layer and the reason in words ("default", "rule 2: *.embedding.*",
  // "dense: 1 dimension", "dense: 10 < 1024 elements", "dense: too small for powersgd:4").
  struct Choice {
    Codec codec;
    std::string reason;
    std::optional<std::size_t> rule = {};               // the one that decided, from 0
    std::shared_ptr<const AutoOptions> automatic = {};  // the codec is the reducer's choice
    // Why an automatic one is small ("1 dimension", "10 < 1024 elements"); empty: it is not.
    std::string small = {};
    // Plan's business. Above 0: the layer is split-reduced, in so many ranges (comm/exchange.h).
    int split_ranges = 0;
    bool gathered = false;  // goes with the sparse layers, though its codec is none of theirs
  };
  Choice choose(const Layer& layer) const;

  // Canonical text: equal for equal policies, hashed in the handshake.
  const std::string& text() const { return text_; }
  const std::vector<PolicyRule>& rules() const { return rules_; }
  // Some rule or the default is not "none".
  bool compresses() const;
  // Some rule or the default is "auto".
  bool chooses() const;

 private:
  static Policy from_toml(std::string_view text, const std::string& source);

  std::string text_;
  Prescription fallback_;
  std::int64_t min_elements_ = 1024;
  std::vector<PolicyRule> rules_;
};

struct Plan {
  std::vector<Policy::Choice> choices;  // one a layer

  // PolicyError when the policy asks for compression and no layer gets any, or when a rule decides
  // no layer: the message says what decided the layers that it matches, or lists those with the
  // names nearest to the rule's.
  static Plan make(const Policy& policy, const std::vector<Layer>& layers);

  // Of the codecs, one a layer.
  std::vector<std::string> specs() const;
  // The same with these codecs, a spec a layer, where the policy leaves them to the reducer.
  Plan with_codecs(const std::vector<std::string>& specs) const;
  // The policy leaves some layer's codec to the reducer.
  bool chooses() const;

  // Chooses how layers travel whose codec leaves that open. It goes by the plan as a whole, not by
  // buckets or steps, since memories are cut as the layers are. Those that may be split, all in one
  // way: by split-reduce where it is predicted to take a tenth less than an allgather in buckets of
  // 25 MiB of fp32 gradients (the default of PyTorch's DDP), and there are at least
  // `split_from_ranks`. Those that gathers() holds for: as comm/gather_choice.h has it.
  void choose_routes(const std::vector<Layer>& layers, int world_size, const Link& link,
                     int split_from_ranks);

 private:
  void choose_split(const std::vector<Layer>& layers, int world_size, const Link& link,
                    int split_from_ranks);
};

}  // namespace thinwire
