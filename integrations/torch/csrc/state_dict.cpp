#include "integrations/torch/csrc/state_dict.h"

#include <pybind11/stl.h>

#include <cstring>

#include "compressors/core/error.h"

namespace thinwire {

namespace py = pybind11;

at::Tensor to_tensor(const std::vector<float>& values) {
  at::Tensor tensor = at::empty({static_cast<std::int64_t>(values.size())}, at::kFloat);
  std::memcpy(tensor.data_ptr(), values.data(), values.size() * sizeof(float));
  return tensor;
}

std::vector<float> from_tensor(py::handle value) {
  const at::Tensor tensor = py::cast<at::Tensor>(value).to(at::kCPU, at::kFloat).contiguous();
  const auto* begin = tensor.const_data_ptr<float>();
  return {begin, begin + tensor.numel()};
}

py::dict to_python(const ReducerState& s) {
  py::dict residuals;
  for (const StateEntry& entry : s.entries) {
    residuals[py::str(entry.key)] = to_tensor(entry.values);
  }
  return py::dict(py::arg("version") = s.version, py::arg("rank") = s.rank,
                  py::arg("world_size") = s.world_size, py::arg("step") = s.step,
                  py::arg("loss_scale") = s.loss_scale, py::arg("policy") = s.policy,
                  py::arg("codecs") = s.codecs, py::arg("residuals") = residuals);
}

ReducerState reducer_state(py::handle value) {
  ReducerState s;
  try {
    const auto dict = py::cast<py::dict>(value);
    s.version = py::cast<int>(dict["version"]);
    s.rank = py::cast<int>(dict["rank"]);
    s.world_size = py::cast<int>(dict["world_size"]);
    s.step = py::cast<std::uint64_t>(dict["step"]);
    s.loss_scale = py::cast<double>(dict["loss_scale"]);
    s.policy = py::cast<std::string>(dict["policy"]);
    if (dict.contains("codecs")) {  // earlier versions have none
      s.codecs = py::cast<std::vector<std::string>>(dict["codecs"]);
    }
    for (const auto& [key, residual] : py::cast<py::dict>(dict["residuals"])) {
      s.entries.push_back({py::cast<std::string>(key), from_tensor(residual)});
    }
  } catch (const std::exception& error) {
    throw InvalidArgument(std::string("load_state_dict: not a state_dict of a thinwire reducer (") +
                          error.what() + ")\nhint: pass what reducer.state_dict() returned");
  }
  return s;
}

}  // namespace thinwire
