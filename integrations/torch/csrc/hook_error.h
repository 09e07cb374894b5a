// Carries the library's errors through torch's C++ into Python as classes of thinwire.errors.
// Thread-safe; python_type() holds the GIL.
#pragma once

#include <torch/csrc/Exceptions.h>

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

namespace thinwire {

class HookError final : public torch::PyTorchError {
 public:
  // `error` must not be null.
  explicit HookError(const std::exception_ptr& error);

  // The class in thinwire.errors; for PeerLost a subclass made for this error, which carries
  // `ranks` and `step`. A borrowed reference that lives as long as the process.
  PyObject* python_type() override;

 private:
  std::string class_name_;
  std::vector<int> lost_ranks_;
  std::uint64_t step_ = 0;
};

}  // namespace thinwire
