#include "integrations/torch/csrc/hook_error.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "comm/communicator.h"
#include "compressors/core/error.h"
#include "integrations/torch/csrc/error_names.h"

namespace thinwire {

HookError::HookError(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const PeerLost& lost) {
    class_name_ = "PeerLost";
    msg = lost.what();
    lost_ranks_ = lost.ranks;
    step_ = lost.step;
  } catch (const std::exception& other) {
    class_name_ = python_class_of(other);
    msg = other.what();
  } catch (...) {
    class_name_ = "Error";
    msg = "unknown exception";
  }
}

PyObject* HookError::python_type() {
  namespace py = pybind11;
  const py::gil_scoped_acquire gil;
  const py::module_ errors = py::module_::import("thinwire.errors");
  py::object type = class_name_ == "PeerLost" ? errors.attr("_peer_lost_type")(lost_ranks_, step_)
                                              : errors.attr(class_name_.c_str());
  return type.release().ptr();  // kept: torch borrows it after this object is gone
}

}  // namespace thinwire
