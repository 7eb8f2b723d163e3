// jax_router._cpu: the CPU kernels as FFI handlers.
#include <limits>

#include "cpu_backend.h"
#include "module.h"

NB_MODULE(_cpu, module) {
  jax_router::define_module<jax_router::Cpu>(module);
  module.def("max_select_k", [] { return std::numeric_limits<int64_t>::max(); });
  module.attr("cuda_obstacle") = JAX_ROUTER_CUDA_OBSTACLE;  // why no CUDA module was built beside it, or ""
}
