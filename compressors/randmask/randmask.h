// Random mask: every rank sends the elements of v = gradient + residual at the same positions,
// drawn anew each step from (key, step) and never from the sender, so that the transport's own
// allreduce averages them (the shared mask of Wang et al., CocktailSGD, ICML 2023). The rest stays
// in the residual: (1/P) sum v = M^ + (1/P) sum residual.
//
// The codec is immutable and safe to call from several threads; it owns nothing of the caller's.
#pragma once

#include <memory>

#include "compressors/core/codec.h"
#include "compressors/core/family.h"

namespace thinwire {

// density in (0, 1]; ceil(density * n) elements travel. InvalidArgument otherwise.
std::shared_ptr<const LinearCodec> make_randmask_codec(double density);

extern const Family kRandmaskFamily;

}  // namespace thinwire
