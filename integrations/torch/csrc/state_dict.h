// States as Python sees them: dicts of plain values and fp32 CPU tensors. The GIL is held.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <vector>

#include "comm/reducer_state.h"

namespace thinwire {

at::Tensor to_tensor(const std::vector<float>& values);
// InvalidArgument for what is no tensor of numbers.
std::vector<float> from_tensor(pybind11::handle value);

pybind11::dict to_python(const ReducerState& state);
// InvalidArgument for what to_python() did not make.
ReducerState reducer_state(pybind11::handle value);

}  // namespace thinwire
