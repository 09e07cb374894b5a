// Low rank: a tensor of shape (n, ...) is taken as a matrix v of n rows and m columns, and what
// travels are factors of its projection on a subspace of few dimensions. rank is cut to min(n, m).
//
// PowerSGD (Vogels, Karimireddy, Jaggi, NeurIPS 2019, algorithm 1; v = gradient + residual):
//   round 0: P = mean of v Q, round 1: Q = mean of v^T P for P made orthonormal; M^ = P Q^T.
// One step of a power iteration that goes on from the last step's Q, so that M^ becomes the best
// matrix of that rank. With one round a step (the authors' later variant), even steps send v Q for
// the kept Q made orthonormal, odd ones v^T P likewise.
//
// GaLore (Zhao et al., ICML 2024, arXiv 2403.03507) as a communication compressor: an orthonormal
// basis P of the smaller side is kept for `refresh` steps and only P^T v travels; every
// `refresh`-th step is one of PowerSGD, of which P is left.
//
// Factors and bases are the same bits on all ranks, as what is absorbed is. Where nothing was kept
// the step begins with a random basis, drawn from (key, step).
//
// lowrank is the payload for receivers that share no state: both factors of one tensor, by one
// power iteration that goes on from the memory's state, or by two from a random basis. It takes the
// shape from Context::shape; without, the elements are cut into about as many rows as columns.
//
// The codecs are immutable and safe to call from several threads; they own nothing of the caller's.
#pragma once

#include <cstdint>
#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"
#include "compressors/lowrank/lowrank_kernels.h"

namespace thinwire {

inline constexpr std::int64_t kMaxLowRankRefresh = 10'000;

struct PowerSgdOptions {
  std::int64_t rank = 4;    // 1 to kMaxLowRank
  std::int64_t rounds = 2;  // 1 or 2
};
struct GaloreOptions {
  std::int64_t rank = 4;       // 1 to kMaxLowRank
  std::int64_t refresh = 200;  // 1 to kMaxLowRankRefresh
};
// InvalidArgument outside these ranges.
std::shared_ptr<const LinearCodec> make_powersgd_codec(const PowerSgdOptions& options);
std::shared_ptr<const LinearCodec> make_galore_codec(const GaloreOptions& options);

// rank 1 to kMaxLowRank; InvalidArgument otherwise.
std::shared_ptr<const PayloadCodec> make_lowrank_codec(std::int64_t rank);

extern const Family kLowRankFamily;
extern const Family kPowerSgdFamily;
extern const Family kGaloreFamily;

}  // namespace thinwire
