// What both nanobind modules export: the FFI API they were built for, the native limits and their targets.
#pragma once

#include <nanobind/nanobind.h>

#include "targets.h"

namespace jax_router {

template <typename Backend>
void define_module(nanobind::module_& module) {
  module.attr("ffi_api_version") = nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.attr("max_experts") = kMaxExperts;
  module.attr("max_top_k") = kMaxTopK;
  module.def("targets", [] {
    nanobind::dict targets;
    for_each_target<Backend>([&](const char* name, XLA_FFI_Error* (*function)(XLA_FFI_CallFrame*)) {
      targets[name] = nanobind::capsule(reinterpret_cast<void*>(function));
    });
    return targets;
  });
}

}  // namespace jax_router
