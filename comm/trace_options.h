// TraceOptions: whether a reducer keeps a trace of its steps (comm/trace.h), and where.
#pragma once

#include <cstddef>
#include <string>

namespace thinwire {

struct TraceOptions {
  std::string file = {};                            // none: empty
  int process = -1;                                 // rank in the job; below 0: in the group
  int model = 0;                                    // tells apart the models of a process
  std::size_t limit_bytes = std::size_t{64} << 20;  // written by one rank for one model
};

}  // namespace thinwire
