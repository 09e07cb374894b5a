// Columns of a cosine transform: a matrix's rows are transformed by the orthonormal DCT-II, all
// ranks agree on the RANK columns that hold most of the mean's energy, and those are averaged (the
// dynamic column selection of Modoranu et al., SVD-Free Low-Rank Adaptive Gradient Optimization,
// arXiv 2505.17967, section 3, with a sketch in the place of the norms, which a rank knows only of
// its own gradient). Formulas: FORMAT.md.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

inline constexpr std::int64_t kMaxDctColsRank = 65536;
inline constexpr std::int64_t kMaxDctColsRefresh = 10'000;

struct DctColsOptions {
  std::int64_t rank = 32;    // columns, in [1, kMaxDctColsRank]; a matrix has as many as it can
  std::int64_t refresh = 1;  // steps between two choices of columns, in [1, kMaxDctColsRefresh]
};

// InvalidArgument for options out of range.
std::shared_ptr<const LinearCodec> make_dctcols_codec(const DctColsOptions& options);

extern const Family kDctColsFamily;

}  // namespace thinwire
