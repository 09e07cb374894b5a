// GatherChoice: whether a plan's layers that quantise few values (gathers() of comm/exchange.h) go
// to all ranks, in one message with those that are gathered anyway, instead of to owners: where no
// layer must go to owners, so that it saves transfers, and for few bytes. A sum over the layers.
#pragma once

#include <cstdint>

#include "compressors/core/spec.h"

namespace thinwire {

class GatherChoice {
 public:
  explicit GatherChoice(int ranks) : ranks_(ranks) {}

  // A layer of n elements; split: its sparse bodies go to owners. True: it is one of those.
  bool add(const Codec& codec, std::int64_t n, bool split);
  bool worth_it() const;

 private:
  int ranks_;
  bool allgathers_ = false;
  bool requantises_ = false;
  bool linear_ = false;
  double gradient_bytes_ = 0;
  double gathered_bytes_ = 0;  // that a rank sends
};

}  // namespace thinwire
