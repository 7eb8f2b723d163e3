// What both nanobind modules export: the FFI API they were built for, the native limits, their targets, and what these
// take.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "targets.h"

namespace jax_router {

inline nanobind::tuple names(const std::vector<std::string>& names) {
  nanobind::list list;
  for (const std::string& name : names) list.append(name.c_str());
  return nanobind::tuple(list);
}

template <typename Backend>
void define_module(nanobind::module_& module) {
  module.attr("ffi_api_version") = nanobind::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  module.attr("max_experts") = kMaxExperts;
  module.attr("max_top_k") = kMaxTopK;
  module.def("targets", [] {
    nanobind::dict targets;
    for_each_target<Backend>([&](const char* name, XLA_FFI_Error* (*function)(XLA_FFI_CallFrame*), const auto&) {
      targets[name] = nanobind::capsule(reinterpret_cast<void*>(function));
    });
    return targets;
  });
  module.def("declarations", [] {
    nanobind::dict declarations;
    for_each_target<Backend>([&](const char* name, const auto&, const Declaration& declaration) {
      nanobind::dict attributes, entry;
      for (const auto& [attribute, type] : declaration.attributes) attributes[attribute.c_str()] = type.c_str();
      entry["operands"] = names(declaration.operands);
      entry["results"] = names(declaration.results);
      entry["attributes"] = attributes;
      declarations[name] = entry;
    });
    return declarations;
  });
}

}  // namespace jax_router
