// The low-rank codecs' arithmetic one element at a time: the oracle of lowrank_simd.cpp. Pure
// functions.
#pragma once

#include "compressors/lowrank/lowrank_kernels.h"

namespace thinwire {

// The projections summed in fp64: not the same bits, within the bound of lowrank_kernels.h.
void lowrank_project_left_reference(const LowRankMatrix& v, const LowRankFactor& right,
                                    const LowRankFactor& left);
void lowrank_project_right_reference(const LowRankMatrix& v, const LowRankFactor& left,
                                     const LowRankFactor& right);
// The same bits.
void lowrank_replace_reference(const LowRankReconstruct& args);
void lowrank_orthonormalise_reference(const LowRankFactor& factor, const RandomStream& stream);

}  // namespace thinwire
