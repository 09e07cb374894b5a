// BucketLayout: how one set of layers is reduced: the layers in groups, an exchange a group. Built
// once for a set and kept, for its buffers; a layout serves one bucket at a time. Belongs to the
// communication thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "comm/exchange.h"
#include "comm/gradient_method.h"
#include "comm/policy.h"

namespace thinwire {

struct BucketGroup {
  std::unique_ptr<Exchange> exchange;
  std::vector<std::size_t> members;  // positions in the bucket, ascending

  // Of the bucket on its way.
  std::unique_ptr<Transfer> transfer;
  int issued = 0;  // transfers started
};

struct BucketLayout {
  // In the order in which every rank starts them: the largest share of the wire first.
  std::vector<BucketGroup> groups;
  std::uint64_t last_step = 0;
};

// What a layout needs to know; all of it outlives the layout.
struct LayoutContext {
  Communicator& comm;
  const std::vector<Layer>& layers;
  const Plan& plan;
  const std::vector<std::uint64_t>& key_hashes;  // one a layer
  MemoryStore& memories;
  StepMode mode = StepMode::kPolicy;
  bool means = true;  // else sums, which a 16-bit type may not hold
  std::size_t ride_along_bytes = 0;
};

// `indices`: the bucket's layers. Layers whose policy starts after `step` go dense, and so do all
// in kDense; in kLocal there are no groups.
BucketLayout make_bucket_layout(const LayoutContext& context,
                                const std::vector<std::size_t>& indices, std::uint64_t step);

}  // namespace thinwire
