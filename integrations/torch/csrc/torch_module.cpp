// Extension module thinwire._torch: the reducer over a c10d group, and its hook for DDP.
#include <torch/csrc/utils/pybind.h>
#include <torch/csrc/distributed/c10d/reducer.hpp>

#include <pybind11/stl.h>

#include <optional>

#include "comm/reducer.h"
#include "compressors/core/error.h"
#include "integrations/torch/csrc/c10d_communicator.h"
#include "integrations/torch/csrc/ddp_hook.h"
#include "integrations/torch/csrc/hook_error.h"
#include "integrations/torch/csrc/optimizer_binding.h"
#include "integrations/torch/csrc/state_dict.h"

namespace py = pybind11;

namespace thinwire {
namespace {

std::chrono::milliseconds milliseconds(double seconds) {
  return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
}

std::shared_ptr<GradientReducer> make_reducer(c10::intrusive_ptr<c10d::Backend> backend,
                                              c10::intrusive_ptr<c10d::Store> store, int store_host,
                                              const std::vector<std::string>& names,
                                              const std::vector<at::Tensor>& parameters,
                                              const std::string& policy, double deadline_seconds,
                                              double grace_seconds, const std::string& trace_file,
                                              int trace_process, int trace_model) {
  std::vector<Layer> layers;
  layers.reserve(names.size());
  for (std::size_t i = 0; i < names.size(); ++i) {
    layers.push_back({names[i], parameters[i].sizes().vec(), dtype_of(parameters[i])});
  }
  auto comm = std::make_unique<C10dCommunicator>(
      std::move(backend), std::move(store),
      C10dOptions{.store_host = store_host, .connect_limit = milliseconds(deadline_seconds)});
  ReducerOptions options;
  options.deadline = milliseconds(deadline_seconds);
  options.roll_call_grace = milliseconds(grace_seconds);
  options.trace = {.file = trace_file, .process = trace_process, .model = trace_model};
  // Its end waits for its thread, which may need the GIL to let go of a gradient.
  const auto end = [](GradientReducer* reducer) {
    std::optional<py::gil_scoped_release> no_gil;
    if (PyGILState_Check() != 0) {
      no_gil.emplace();
    }
    delete reducer;
  };
  return {new GradientReducer(std::move(comm), std::move(layers), Policy::parse(policy), options),
          end};
}

py::dict stats(const GradientReducer& reducer) {
  ReducerStats s;
  {
    const py::gil_scoped_release no_gil;
    s = reducer.stats();
  }
  py::list layers;
  for (const LayerStats& layer : s.layers) {
    layers.append(py::dict(py::arg("name") = layer.name, py::arg("elements") = layer.elements,
                           py::arg("codec") = layer.codec, py::arg("reason") = layer.reason,
                           py::arg("slot_bytes") = layer.slot_bytes, py::arg("ratio") = layer.ratio,
                           py::arg("nonfinite_steps") = layer.nonfinite_steps));
  }
  return py::dict(
      py::arg("steps") = s.steps, py::arg("skipped_steps") = s.skipped_steps,
      py::arg("wire_bytes") = s.wire_bytes, py::arg("dense_wire_bytes") = s.dense_wire_bytes,
      py::arg("ratio") = s.ratio, py::arg("ratio_bf16") = s.ratio_bf16,
      py::arg("memory_bytes") = s.memory_bytes, py::arg("buffer_bytes") = s.buffer_bytes,
      py::arg("encode_seconds") = s.encode_seconds, py::arg("decode_seconds") = s.decode_seconds,
      py::arg("wait_seconds") = s.wait_seconds, py::arg("layers") = layers);
}

py::dict state(const GradientReducer& reducer) {
  ReducerState s;
  {
    const py::gil_scoped_release no_gil;
    s = reducer.state();
  }
  return to_python(s);
}

void restore(GradientReducer& reducer, const py::list& ranks) {
  std::vector<ReducerState> states;
  for (const py::handle& rank : ranks) {
    states.push_back(reducer_state(py::cast<py::dict>(rank)));
  }
  const py::gil_scoped_release no_gil;
  // One rank's own state of several is for that rank; of one alone it is all there is.
  const bool own = states.size() == 1 && states[0].world_size > 1;
  reducer.restore(own ? states[0]
                      : reshard(states, reducer.rank(), reducer.size(), ReduceOp::kMean));
}

std::shared_ptr<GradientHandover> attach(const std::shared_ptr<GradientReducer>& reducer,
                                         const std::shared_ptr<c10d::Reducer>& ddp,
                                         const std::vector<at::Tensor>& parameters,
                                         bool hand_over) {
  auto handover = hand_over ? GradientHandover::make(parameters) : nullptr;
  ddp->register_comm_hook(std::make_unique<DdpHook>(reducer, parameters, handover));
  return handover;
}

void translate(std::exception_ptr error) {
  if (!error) {
    return;
  }
  try {
    std::rethrow_exception(error);
  } catch (HookError& e) {
    PyErr_SetString(e.python_type(), e.what());
  } catch (const Error&) {
    HookError e(error);
    PyErr_SetString(e.python_type(), e.what());
  }
}

}  // namespace
}  // namespace thinwire

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using thinwire::GradientReducer;
  m.doc() = "thinwire's reducer over a c10d process group; use thinwire.torch instead";
  py::register_exception_translator(&thinwire::translate);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  py::class_<thinwire::GradientHandover, std::shared_ptr<thinwire::GradientHandover>>(
      m, "GradientHandover")
      .def("arm", &thinwire::GradientHandover::arm, no_gil, py::arg("reduces"));
  py::class_<GradientReducer, std::shared_ptr<GradientReducer>>(m, "GradientReducer")
      .def(py::init(&thinwire::make_reducer), no_gil, py::arg("backend"), py::arg("store"),
           py::arg("store_host"), py::arg("names"), py::arg("parameters"), py::arg("policy"),
           py::arg("deadline"), py::arg("grace"), py::arg("trace_file"), py::arg("trace_process"),
           py::arg("trace_model"))
      .def("attach", &thinwire::attach, py::arg("ddp_reducer"), py::arg("parameters"),
           py::arg("hand_over"))
      .def("stats", &thinwire::stats)
      .def("state", &thinwire::state)
      .def("restore", &thinwire::restore)
      .def("summary", &GradientReducer::summary, no_gil)
      .def("residual_norms", &GradientReducer::residual_norms, no_gil)
      .def("chooses", [](const GradientReducer& reducer) { return reducer.plan()->chooses(); })
      .def("take_decisions", &GradientReducer::take_decisions, no_gil)
      .def("take_warnings", &GradientReducer::take_warnings, no_gil)
      .def("loss_scale", &GradientReducer::loss_scale)
      .def("last_step_skipped", &GradientReducer::last_step_skipped, no_gil)
      .def("set_loss_scale", &GradientReducer::set_loss_scale, no_gil)
      .def(
          "set_policy",
          [](GradientReducer& reducer, const std::string& policy) {
            reducer.set_policy(thinwire::Policy::parse(policy));
          },
          no_gil)
      .def("abandon_step", &GradientReducer::abandon_step, no_gil)
      .def("abort", &GradientReducer::abort, no_gil);
  thinwire::bind_optimizers(m);
}
