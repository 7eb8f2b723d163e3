// The CUDA kernels, one `run` an op: raw pointers, a plan and a stream in, cudaError_t out. They never synchronise,
// allocate or read device memory on the host, and a plan is made of shapes and options alone, so that a CUDA graph may
// hold them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <string>
#include <type_traits>

#include "../common/ops.h"
#include "device.h"
#include "plan/planned.h"

namespace jax_router::cuda {

// `workspace`: as many bytes as the plan says, aligned to 16, with any content.
cudaError_t run(const HashRouter& op, const HashRouterPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t run(const ActivationTopk& op, const ActivationTopkPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t run(const RouteAt& op, const RouteAtPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t run(const RouteCotangent& op, const RouteCotangentPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t run(const TopkSelect& op, const TopkSelectPlan& plan, void* workspace, cudaStream_t stream);
cudaError_t run(const ExpertDispatch& op, const ExpertDispatchPlan& plan, void* workspace, cudaStream_t stream);
// x and weight must be aligned to 16 bytes.
cudaError_t run(const DenseRouter& op, const DenseRouterPlan& plan, void* workspace, cudaStream_t stream);

// Whether there is nothing to write.
inline bool is_empty(const ExpertDispatch& op) { return op.batch == 0; }
inline bool is_empty(const RouteCotangent& op) { return op.rows == 0 || op.experts == 0; }
inline bool is_empty(const ActivationTopk& op) { return op.rows == 0 || op.selection.k == 0; }
inline bool is_empty(const DenseRouter& op) { return is_empty(op.select); }
template <class Op>
bool is_empty(const Op& op) {
  return op.rows == 0 || op.k == 0;
}

template <class Plan, class = void>
constexpr bool kHasWorkspace = false;
template <class Plan>
constexpr bool kHasWorkspace<Plan, std::void_t<decltype(Plan::workspace_bytes)>> = true;

template <class Plan>
size_t workspace_bytes(const Plan& plan) {
  if constexpr (kHasWorkspace<Plan>) return static_cast<size_t>(plan.workspace_bytes);
  return 0;
}

// Makes a plan for the current device, calls make_workspace(bytes) if it needs any, and runs it.
template <class Op, class MakeWorkspace>
cudaError_t launch(const Op& op, cudaStream_t stream, MakeWorkspace make_workspace) {
  if (is_empty(op)) return cudaSuccess;
  const Device* device = current_device();
  if (device == nullptr) return cudaErrorInvalidDevice;
  const auto plan = planned(op, *device);
  if (!plan) return cudaErrorNotSupported;
  const size_t bytes = workspace_bytes(*plan);
  void* workspace = bytes == 0 ? nullptr : make_workspace(bytes);
  if (bytes > 0 && workspace == nullptr) return cudaErrorMemoryAllocation;
  return run(op, *plan, workspace, stream);
}

// The k that every device of the process can do.
inline int max_select_k() {
  int k = kMaxSelectK;
  for (const Device& device : devices()) k = std::min(k, max_select_k(device));
  return k;
}

// Why some device of the process cannot compute a dense_router in one kernel; empty where all can.
inline std::string why_not_fused_anywhere(const DenseRouter& op) {
  const std::string reason = why_not_fused(op);
  if (!reason.empty()) return reason;
  for (const Device& device : devices()) {
    if (!planned(op, device)) return "no fused kernel for so many tokens and experts on every device of this process";
  }
  return devices().empty() ? "no CUDA device" : "";
}

// Whether that is faster on all of them than XLA's product and the kernel of activation_topk.
inline bool pays_everywhere(const DenseRouter& op) {
  return std::all_of(devices().begin(), devices().end(), [&](const Device& device) {
    const auto plan = planned(op, device);
    return plan && (!ForcedPlan<DenseRouter>::get().empty() || pays(op, *plan, device));
  });
}

}  // namespace jax_router::cuda
