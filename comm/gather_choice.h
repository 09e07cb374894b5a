// GatherChoice: whether a plan's layers that quantise few values (gathers() of comm/exchange.h) go
// to all ranks instead of to owners: in the message of layers that are allgathered, or alone where
// the others are linear; not where some layer goes to owners anyway, which would add transfers, nor
// for too many bytes together. A sum over the layers. One thread at a time.
#pragma once

#include <cstdint>

#include "compressors/core/spec.h"

namespace thinwire {

class GatherChoice {
 public:
  explicit GatherChoice(int ranks) : ranks_(ranks) {}

  // A layer of n elements; split: its sparse bodies go to owners. True: gathers() holds for it.
  bool add(const Codec& codec, std::int64_t n, bool split);
  // Of all that were added.
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
