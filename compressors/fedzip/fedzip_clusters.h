// Internal: clusters of non-zero values on the line, none of both signs, so that no decoded value
// has the wrong sign. A histogram over the bits of the magnitude gives up to 4096 atoms; the two
// neighbours whose union costs the least squared error are united until `most` are left (pairwise
// nearest neighbours, Equitz, IEEE Trans. ASSP 1989), then boundaries move to the middle between
// centroids until they stay (Lloyd, IEEE Trans. IT 1982). Integers and fp64 in a fixed order: the
// same result on every machine. Pure functions, thread-safe; the caller owns all memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "compressors/core/workspace.h"

namespace thinwire {

inline constexpr std::size_t kFedzipMostClusters = 256;

struct FedzipClusters {
  std::size_t size = 0;
  std::array<float, kFedzipMostClusters> centroid;       // ascending; the mean of the members
  std::array<std::uint32_t, kFedzipMostClusters> count;  // of members, at least 1
};

// Bytes that cluster_values takes from the workspace.
std::size_t cluster_scratch_bytes();

// At most `most` (2 to kFedzipMostClusters) clusters of `values`, finite and non-zero; labels[i]
// becomes the cluster of values[i]. With fewer atoms than that, each has a cluster of its own.
FedzipClusters cluster_values(std::span<const float> values, std::size_t most, Workspace workspace,
                              std::span<std::uint8_t> labels);

}  // namespace thinwire
