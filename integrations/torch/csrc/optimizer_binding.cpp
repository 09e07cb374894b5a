#include "integrations/torch/csrc/optimizer_binding.h"

#include <ATen/Parallel.h>
#include <pybind11/stl.h>

#include <utility>

#include "comm/reducer.h"
#include "integrations/torch/csrc/ddp_hook.h"
#include "integrations/torch/csrc/state_dict.h"
#include "optim/dgc_sgd.h"
#include "optim/onebit_adam.h"
#include "optim/onebit_lamb.h"
#include "optim/zero_one_adam.h"

namespace thinwire {
namespace {

namespace py = pybind11;
using optim::Member;
using optim::Optimizer;
using optim::OptimizerState;

// Elements that are worth a thread.
constexpr std::int64_t kGrain = 65536;

void parallel_for(std::int64_t n, const optim::Range& f) { at::parallel_for(0, n, kGrain, f); }

[[noreturn]] void refuse(const std::string& name, const std::string& what,
                         const std::string& hint) {
  throw InvalidArgument("parameter '" + name + "': " + what + "\nhint: " + hint);
}

// Elements in the order of the parameter's memory; a gradient of another order is copied.
optim::Parameter describe(const at::Tensor& parameter, const std::string& name,
                          std::vector<at::Tensor>& copies) {
  if (!parameter.is_non_overlapping_and_dense()) {
    refuse(name, "expected dense memory without gaps, got strides of a view",
           "keep parameters as tensors of their own");
  }
  optim::Parameter described;
  described.weights = {parameter.data_ptr(), parameter.numel(), dtype_of(parameter)};
  at::Tensor grad = parameter.grad();
  if (!grad.defined()) {
    return described;
  }
  if (grad.is_sparse()) {
    refuse(name, "expected a dense gradient, got a sparse one",
           "build the embedding with sparse=False");
  }
  if (grad.strides() != parameter.strides()) {
    grad = copies.emplace_back(at::empty_like(parameter).copy_(grad));
  }
  described.grad = {grad.data_ptr(), grad.numel(), dtype_of(grad)};
  return described;
}

bool step_optimizer(Optimizer& optimizer, const std::vector<at::Tensor>& parameters,
                    const std::vector<std::string>& names) {
  const at::NoGradGuard no_grad;
  std::vector<optim::Parameter> described;
  std::vector<at::Tensor> copies;
  described.reserve(parameters.size());
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    described.push_back(describe(parameters[i], names[i], copies));
  }
  return optimizer.step(described);
}

// What each slot holds of each parameter, in the optimizer's own memory, flat; None where it holds
// nothing. A tensor keeps the optimizer alive.
py::dict slots(const std::shared_ptr<Optimizer>& optimizer) {
  py::dict all;
  for (Optimizer::Slot& slot : optimizer->slots()) {
    py::list values;
    for (std::vector<float>& of : slot.values) {
      if (of.empty()) {
        values.append(py::none());
      } else {
        values.append(at::from_blob(
            of.data(), {static_cast<std::int64_t>(of.size())}, [optimizer](void*) {},
            at::TensorOptions(at::kFloat)));
      }
    }
    all[py::str(slot.name)] = py::make_tuple(slot.local, values);
  }
  return all;
}

py::dict entries_to_python(const std::vector<StateEntry>& entries) {
  py::dict dict;
  for (const StateEntry& entry : entries) {
    dict[py::str(entry.key)] = to_tensor(entry.values);
  }
  return dict;
}

std::vector<StateEntry> entries_from_python(const py::dict& dict) {
  std::vector<StateEntry> entries;
  for (const auto& [key, value] : dict) {
    entries.push_back({py::cast<std::string>(key), from_tensor(value)});
  }
  return entries;
}

py::dict optimizer_state(const Optimizer& optimizer) {
  OptimizerState s;
  {
    const py::gil_scoped_release no_gil;
    s = optimizer.state();
  }
  return py::dict(py::arg("version") = s.version, py::arg("method") = s.method,
                  py::arg("numbers") = s.numbers, py::arg("shared") = entries_to_python(s.shared),
                  py::arg("local") = entries_to_python(s.local),
                  py::arg("reducer") = to_python(s.reducer));
}

void restore_optimizer(Optimizer& optimizer, const py::list& ranks, int rank, int world_size) {
  std::vector<OptimizerState> states;
  try {
    for (const py::handle& item : ranks) {
      const auto dict = py::cast<py::dict>(item);
      states.push_back({.version = py::cast<int>(dict["version"]),
                        .method = py::cast<std::string>(dict["method"]),
                        .numbers = py::cast<optim::Numbers>(dict["numbers"]),
                        .shared = entries_from_python(dict["shared"]),
                        .local = entries_from_python(dict["local"]),
                        .reducer = reducer_state(dict["reducer"])});
    }
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw InvalidArgument(
        std::string("load_state_dict: not a state_dict of a thinwire optimizer (") + error.what() +
        ")\nhint: pass what optimizer.state_dict() returned");
  }
  const py::gil_scoped_release no_gil;
  // As for reducers: see torch_module.cpp.
  const bool own = states.size() == 1 && states[0].reducer.world_size > 1;
  optimizer.restore(own ? states[0] : reshard(states, rank, world_size));
}

using SgdTuple = std::tuple<double, double, double, bool>;
std::vector<optim::SgdOptions> sgd_groups(const std::vector<SgdTuple>& tuples) {
  std::vector<optim::SgdOptions> groups;
  for (const auto& [lr, momentum, weight_decay, nesterov] : tuples) {
    groups.push_back({lr, momentum, weight_decay, nesterov});
  }
  return groups;
}

using AdamTuple = std::tuple<double, double, double, double, double>;
std::vector<optim::AdamOptions> adam_groups(const std::vector<AdamTuple>& tuples) {
  std::vector<optim::AdamOptions> groups;
  for (const auto& [lr, beta1, beta2, eps, weight_decay] : tuples) {
    groups.push_back(
        {.lr = lr, .beta1 = beta1, .beta2 = beta2, .eps = eps, .weight_decay = weight_decay});
  }
  return groups;
}

using Members = std::vector<std::pair<std::size_t, std::size_t>>;  // layer, group
std::vector<Member> members_of(const Members& pairs) {
  std::vector<Member> members;
  for (const auto& [layer, group] : pairs) {
    members.push_back({layer, group});
  }
  return members;
}

template <typename T>
std::shared_ptr<T> threaded(std::shared_ptr<T> optimizer) {
  optimizer->set_parallel_for(parallel_for);
  return optimizer;
}

}  // namespace

void bind_optimizers(py::module_& m) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  // The reducer owns the optimizer, too; keep_alive: the optimizer's calls need the reducer.
  const auto keeps_reducer = py::keep_alive<1, 2>();
  py::class_<Optimizer, std::shared_ptr<Optimizer>>(m, "Optimizer")
      .def("step", &step_optimizer, no_gil, py::arg("parameters"), py::arg("names"))
      .def("steps", &Optimizer::steps)
      .def("slots", &slots)
      .def("slots_version", &Optimizer::slots_version)
      .def("state", &optimizer_state)
      .def("restore", &restore_optimizer, py::arg("ranks"), py::arg("rank"), py::arg("world_size"));

  using optim::DgcSgd;
  py::class_<DgcSgd, Optimizer, std::shared_ptr<DgcSgd>>(m, "DGCSGD")
      .def(py::init([](GradientReducer& reducer, const Members& members,
                       const std::vector<SgdTuple>& groups, double clip, bool clip_by_last) {
             return threaded(DgcSgd::make(reducer, members_of(members), sgd_groups(groups),
                                          {.clip = clip, .clip_by_last = clip_by_last}));
           }),
           keeps_reducer, py::arg("reducer"), py::arg("members"), py::arg("groups"),
           py::arg("clip"), py::arg("clip_by_last"))
      .def("set_options", [](DgcSgd& optimizer, const std::vector<SgdTuple>& groups) {
        optimizer.set_options(sgd_groups(groups));
      });

  using optim::OneBitAdam;
  py::class_<OneBitAdam, Optimizer, std::shared_ptr<OneBitAdam>>(m, "OneBitAdam")
      .def(py::init([](GradientReducer& reducer, const Members& members,
                       const std::vector<AdamTuple>& groups, std::int64_t freeze_step, double ratio,
                       std::int64_t min_freeze_step, double variance_floor) {
             auto options = adam_groups(groups);
             const optim::FreezeOptions freeze{.beta2 = options.at(0).beta2,
                                               .ratio = ratio,
                                               .min_steps = min_freeze_step,
                                               .at_step = freeze_step,
                                               .floor = variance_floor};
             return threaded(OneBitAdam::make(reducer, members_of(members), options, freeze));
           }),
           keeps_reducer, py::arg("reducer"), py::arg("members"), py::arg("groups"),
           py::arg("freeze_step"), py::arg("freeze_ratio"), py::arg("min_freeze_step"),
           py::arg("variance_floor"))
      .def("frozen_after", &OneBitAdam::frozen_after)
      .def("set_options", [](OneBitAdam& optimizer, const std::vector<AdamTuple>& groups) {
        optimizer.set_options(adam_groups(groups));
      });

  using optim::ZeroOneAdam;
  py::class_<ZeroOneAdam, Optimizer, std::shared_ptr<ZeroOneAdam>>(m, "ZeroOneAdam")
      .def(py::init([](GradientReducer& reducer, const Members& members,
                       const std::vector<AdamTuple>& groups, std::int64_t kappa,
                       std::int64_t var_freeze_step, std::int64_t local_step_scaler,
                       std::int64_t local_step_clipper, double variance_floor) {
             return threaded(ZeroOneAdam::make(reducer, members_of(members), adam_groups(groups),
                                               {.kappa = kappa,
                                                .var_freeze_step = var_freeze_step,
                                                .local_step_scaler = local_step_scaler,
                                                .local_step_clipper = local_step_clipper,
                                                .floor = variance_floor}));
           }),
           keeps_reducer, py::arg("reducer"), py::arg("members"), py::arg("groups"),
           py::arg("kappa"), py::arg("var_freeze_step"), py::arg("local_step_scaler"),
           py::arg("local_step_clipper"), py::arg("variance_floor"))
      .def("synchronised", &ZeroOneAdam::synchronised)
      .def("set_options", [](ZeroOneAdam& optimizer, const std::vector<AdamTuple>& groups) {
        optimizer.set_options(adam_groups(groups));
      });

  using optim::OneBitLamb;
  py::class_<OneBitLamb, Optimizer, std::shared_ptr<OneBitLamb>>(m, "OneBitLAMB")
      .def(py::init([](GradientReducer& reducer, const Members& members,
                       const std::vector<AdamTuple>& groups, std::int64_t freeze_step, double ratio,
                       std::int64_t min_freeze_step, double variance_floor, double coefficient_min,
                       double coefficient_max, double coefficient_beta, double factor_min,
                       double factor_max, double factor_threshold) {
             auto options = adam_groups(groups);
             const optim::FreezeOptions freeze{.beta2 = options.at(0).beta2,
                                               .ratio = ratio,
                                               .min_steps = min_freeze_step,
                                               .at_step = freeze_step,
                                               .floor = variance_floor};
             return threaded(OneBitLamb::make(reducer, members_of(members), options, freeze,
                                              {.coefficient_min = coefficient_min,
                                               .coefficient_max = coefficient_max,
                                               .coefficient_beta = coefficient_beta,
                                               .factor_min = factor_min,
                                               .factor_max = factor_max,
                                               .factor_threshold = factor_threshold}));
           }),
           keeps_reducer, py::arg("reducer"), py::arg("members"), py::arg("groups"),
           py::arg("freeze_step"), py::arg("freeze_ratio"), py::arg("min_freeze_step"),
           py::arg("variance_floor"), py::arg("coefficient_min"), py::arg("coefficient_max"),
           py::arg("coefficient_beta"), py::arg("factor_min"), py::arg("factor_max"),
           py::arg("factor_threshold"))
      .def("frozen_after", &OneBitLamb::frozen_after)
      .def("set_options", [](OneBitLamb& optimizer, const std::vector<AdamTuple>& groups) {
        optimizer.set_options(adam_groups(groups));
      });
}

}  // namespace thinwire
