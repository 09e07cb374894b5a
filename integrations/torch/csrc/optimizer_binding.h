// The optimizers of optim/ for thinwire/torch/optim.py.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace thinwire {

void bind_optimizers(pybind11::module_& m);

}  // namespace thinwire
