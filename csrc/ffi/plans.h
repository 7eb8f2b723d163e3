// What the CUDA module tells Python about the choice of kernels: which ones an op of given sizes would take and could
// take, on the devices of this process or on one that is described, and the switch that forces one.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "decode.h"

namespace jax_router {

namespace nb = nanobind;

// Sizes by name, each taken once.
class Sizes {
 public:
  explicit Sizes(const nb::kwargs& values) : values_(values) {}

  template <typename T>
  T take(const char* name, std::optional<T> otherwise = std::nullopt) {
    if (!values_.contains(name)) {
      if (!otherwise) throw std::invalid_argument(std::string("missing size: ") + name);
      return *otherwise;
    }
    ++taken_;
    return nb::cast<T>(values_[name]);
  }
  DType dtype(const char* of = "dtype", std::optional<std::string> otherwise = std::nullopt) {
    const auto name = take<std::string>(of, otherwise);
    for (DType dtype : cuda::kDTypes) {
      if (cuda::name(dtype) == name) return dtype;
    }
    throw std::invalid_argument(std::string(of) + " must be f32, bf16 or f16, got " + name);
  }
  void finish() const {
    if (taken_ != values_.size()) throw std::invalid_argument("sizes that the op does not have");
  }

 private:
  const nb::kwargs& values_;
  size_t taken_ = 0;
};

// Plans look at whether there is such an operand, and whether it can be read in quads, as those of XLA can; not at it.
inline const float* an_operand(bool given) {
  alignas(16) static const float number = 0.0f;
  return given ? &number : nullptr;
}

inline void take_sizes(Sizes& sizes, ActivationTopk& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.selection.experts = sizes.take<int32_t>("experts");
  op.selection.k = sizes.take<int32_t>("k");
  op.selection.groups.num_groups = sizes.take<int32_t>("num_groups", 1);
  op.selection.groups.top_groups = sizes.take<int32_t>("top_groups", (op.selection.groups.num_groups + 1) / 2);
  op.bias = an_operand(sizes.take<bool>("bias", false));
  op.dtype = sizes.dtype();
}
inline void take_sizes(Sizes& sizes, DenseRouter& op) {
  op.hidden = sizes.take<int32_t>("hidden");
  take_sizes(sizes, op.select);
  op.operand_dtype = std::exchange(op.select.dtype, DType::kF32);
  op.weight_dtype = sizes.dtype("weight_dtype", cuda::name(op.operand_dtype));
}
inline void take_sizes(Sizes& sizes, TopkSelect& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.length = sizes.take<int64_t>("length");
  op.k = sizes.take<int64_t>("k");
  op.sorted = sizes.take<bool>("sorted", true);
  op.dtype = sizes.dtype();
}
template <typename Op>
void take_choices(Sizes& sizes, Op& op) {
  op.batch = sizes.take<int64_t>("batch", 1);
  op.tokens = sizes.take<int64_t>("tokens");
  op.k = sizes.take<int32_t>("k");
  op.experts = sizes.take<int32_t>("experts");
}
inline void take_sizes(Sizes& sizes, ExpertDispatch& op) {
  take_choices(sizes, op);
  op.align = sizes.take<int32_t>("align", 1);
}
inline void take_sizes(Sizes& sizes, DispatchedRows& rows) {
  rows.batch = sizes.take<int64_t>("batch", 1);
  rows.tokens = sizes.take<int64_t>("tokens");
  rows.k = sizes.take<int32_t>("k");
  rows.slots = sizes.take<int64_t>("slots", rows.tokens * rows.k);
  rows.hidden = sizes.take<int64_t>("hidden");
}
inline void take_sizes(Sizes& sizes, Permute& op) {
  take_sizes(sizes, op.rows);
  op.dtype = sizes.dtype();
  op.element_bytes = sizes.take<int32_t>("element_bytes", cuda::size_of(op.dtype));
  op.weights = an_operand(sizes.take<bool>("weights", false));
}
// Of combine, and of the cotangents.
template <typename Op>
auto take_sizes(Sizes& sizes, Op& op) -> decltype(op.rows.hidden, void()) {
  take_sizes(sizes, op.rows);
  op.dtype = sizes.dtype();
}
inline void take_sizes(Sizes& sizes, ExpertCounts& op) { take_choices(sizes, op); }
inline void take_sizes(Sizes& sizes, HashRouter& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.k = sizes.take<int32_t>("k");
}
inline void take_scoring(Sizes& sizes, Scoring& scoring) {
  const bool whole_row = sizes.take<bool>("whole_row", false);
  scoring.score_fn = whole_row ? ScoreFn::kSoftmax : ScoreFn::kSigmoid;
  scoring.renormalize = !whole_row;
}
inline void take_sizes(Sizes& sizes, RouteAt& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.experts = sizes.take<int32_t>("experts");
  op.k = sizes.take<int32_t>("k");
  take_scoring(sizes, op.scoring);
  op.dtype = sizes.dtype();
}
inline void take_sizes(Sizes& sizes, RouteCotangent& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.experts = sizes.take<int32_t>("experts");
  op.k = sizes.take<int32_t>("k");
  take_scoring(sizes, op.scoring);
  if (sizes.take<bool>("identity", false)) op.scoring = {ScoreFn::kIdentity, false, 1.0f, 0.0f};
  op.dtype = sizes.dtype();
}

inline void take_sizes(Sizes& sizes, RoutedCotangent& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.experts = sizes.take<int32_t>("experts");
  op.k = sizes.take<int32_t>("k");
  op.scoring.score_fn = ScoreFn::kSigmoid;
  op.in_parts = true;
}
inline void take_sizes(Sizes& sizes, RoutedGradients& op) {
  op.rows = sizes.take<int64_t>("rows");
  op.experts = sizes.take<int32_t>("experts");
  op.k = sizes.take<int32_t>("k");
  op.hidden = sizes.take<int32_t>("hidden");
}

// visit(op) with an empty op of that name.
template <typename Visit, typename... AllOps>
auto with_op(const std::string& name, Visit visit, const std::tuple<AllOps...>&) {
  std::optional<decltype(visit(HashRouter{}))> result;
  const auto try_one = [&](auto op) {
    if (name == Target<decltype(op)>::kName) result = visit(op);
  };
  (try_one(AllOps{}), ...);
  if (!result) throw std::invalid_argument("no op is called " + name);
  return *result;
}
template <typename Visit>
auto with_op(const std::string& name, Visit visit) {
  return with_op(name, visit, Ops{});
}

inline cuda::Device device_of(const std::optional<nb::dict>& description) {
  if (!description) {
    const cuda::Device* device = cuda::current_device();
    if (device == nullptr) throw std::runtime_error("this process has no CUDA device: describe one");
    return *device;
  }
  const auto number = [&](const char* name) { return nb::cast<int>((*description)[name]); };
  const int capability = number("compute_capability");
  return {capability, number("multiprocessors"), number("shared_bytes"), capability >= 90, capability == 90};
}

template <typename Op>
void fill(Op& op, const nb::kwargs& values) {
  Sizes sizes(values);
  take_sizes(sizes, op);
  sizes.finish();
}

// The name of the plan that would be taken, if any, and of all that could be.
using Plans = std::pair<std::optional<std::string>, std::vector<std::string>>;

inline Plans plans_of(const std::string& name, const std::optional<nb::dict>& device, const nb::kwargs& values) {
  const cuda::Device on = device_of(device);
  return with_op(name, [&](auto op) {
    fill(op, values);
    Plans found;
    if (const auto plan = cuda::planned(op, on)) found.first = cuda::name(op, *plan);
    for (const auto& plan : plans(op, on)) found.second.push_back(cuda::name(op, plan));
    return found;
  });
}

// Of each plan by its name: the bytes of shared memory of a block, the blocks of a cluster, whether it runs kernels of
// 9.0a, and the blocks of the grid.
using NeedsOfPlans = std::map<std::string, std::tuple<int64_t, int, bool, int64_t>>;

inline NeedsOfPlans needs_of(const std::string& name, const std::optional<nb::dict>& device, const nb::kwargs& values) {
  const cuda::Device on = device_of(device);
  return with_op(name, [&](auto op) {
    fill(op, values);
    NeedsOfPlans found;
    for (const auto& plan : plans(op, on)) {
      const cuda::Needs needs = cuda::needs(plan);
      found[cuda::name(op, plan)] = {needs.shared_bytes, needs.cluster_blocks, needs.hopper_kernels, plan.blocks};
    }
    return found;
  });
}

// Whether the plan that would be taken is faster than what there is without it.
inline bool pays_on(const std::string& name, const std::optional<nb::dict>& device, const nb::kwargs& values) {
  const cuda::Device on = device_of(device);
  return with_op(name, [&](auto op) {
    fill(op, values);
    const auto plan = cuda::planned(op, on);
    return plan && pays(op, *plan, on);
  });
}

// What a launch needs on a described device, or at most on those that are lowered for.
inline int64_t workspace_bytes_of(const std::string& name, const std::optional<nb::dict>& device,
                                  const nb::kwargs& values) {
  return with_op(name, [&](auto op) {
    fill(op, values);
    if (!device) return cuda::most_workspace_bytes(op);
    const auto plan = cuda::planned(op, device_of(device));
    return plan ? cuda::workspace_bytes(*plan) : 0;
  });
}

inline void define_plans(nb::module_& module) {
  module.def("max_select_k", [] { return cuda::max_select_k(); });
  // Why dense_router cannot be one kernel, or "".
  module.def(
      "dense_router_unsupported",
      [](const nb::kwargs& sizes) {
        DenseRouter op{};
        fill(op, sizes);
        return cuda::why_not_fused_anywhere(op);
      },
      nb::arg("sizes"));
  // Whether a kernel is faster than what there is without it, on the devices that are lowered for.
  module.def(
      "pays_everywhere",
      [](const std::string& name, const nb::kwargs& values) {
        return with_op(name, [&](auto op) {
          fill(op, values);
          return cuda::pays_everywhere(op);
        });
      },
      nb::arg("op"), nb::arg("sizes"));
  module.def("plans", plans_of, nb::arg("op"), nb::arg("device").none() = nb::none(), nb::arg("sizes"));
  module.def("workspace_bytes", workspace_bytes_of, nb::arg("op"), nb::arg("device").none() = nb::none(),
             nb::arg("sizes"));
  module.def("needs", needs_of, nb::arg("op"), nb::arg("device").none() = nb::none(), nb::arg("sizes"));
  module.def("pays", pays_on, nb::arg("op"), nb::arg("device").none() = nb::none(), nb::arg("sizes"));
  // Every kernel of an op, as plans name it before their comma.
  module.def(
      "instances",
      [](const std::string& op, const std::optional<nb::dict>& device) {
        return with_op(op, [&](auto of) { return cuda::instances(of, device_of(device)); });
      },
      nb::arg("op"), nb::arg("device").none() = nb::none());
  // From now on every launch of the op in this process takes the plan of that name, and fails where it cannot; "" for
  // the chosen one again.
  module.def(
      "force_plan",
      [](const std::string& op, const std::string& plan) {
        with_op(op, [&](auto of) {
          cuda::ForcedPlan<decltype(of)>::set(plan);
          return true;
        });
      },
      nb::arg("op"), nb::arg("plan"));
}

}  // namespace jax_router
