// The CUDA kernels, one `run` an op: raw pointers, a plan and a stream in, cudaError_t out. They never synchronise,
// allocate or read device memory on the host, and a plan is made of shapes and options alone, so that a CUDA graph may
// hold them.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/ops.h"
#include "device.h"
#include "plan/planned.h"

namespace jax_router::cuda {

// Workspaces have as many bytes as the plan says.
cudaError_t run(const HashRouter& op, const HashRouterPlan& plan, cudaStream_t stream);
cudaError_t run(const ActivationTopk& op, const ActivationTopkPlan& plan, cudaStream_t stream);
cudaError_t run(const RouteAt& op, const RouteAtPlan& plan, cudaStream_t stream);
cudaError_t run(const RouteCotangent& op, const RouteCotangentPlan& plan, cudaStream_t stream);
// x, weight and grad_x must be aligned to 16 bytes.
cudaError_t run(const RoutedGradients& op, const RoutedGradientsPlan& plan, cudaStream_t stream);
cudaError_t run(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream);
cudaError_t run(const ExpertDispatch& op, const ExpertDispatchPlan& plan, cudaStream_t stream);
cudaError_t run(const Permute& op, const PermutePlan& plan, cudaStream_t stream);
cudaError_t run(const Combine& op, const CombinePlan& plan, cudaStream_t stream);
cudaError_t run(const PermuteCotangent& op, const PermuteCotangentPlan& plan, cudaStream_t stream);
cudaError_t run(const CombineCotangent& op, const CombineCotangentPlan& plan, cudaStream_t stream);
cudaError_t run(const ExpertCounts& op, const ExpertCountsPlan& plan, cudaStream_t stream);
// x and weight must be aligned to 16 bytes.
cudaError_t run(const DenseRouter& op, const DenseRouterPlan& plan, cudaStream_t stream);

// Whether there is nothing to write.
inline bool is_empty(const ExpertDispatch& op) { return op.batch == 0; }
inline bool is_empty(const ExpertCounts& op) { return op.batch == 0; }
inline bool is_empty(const RouteCotangent& op) { return op.rows == 0 || op.experts == 0; }
inline bool is_empty(const RoutedGradients& op) { return op.hidden == 0; }
inline bool is_empty(const ActivationTopk& op) { return op.rows == 0 || op.selection.k == 0; }
inline bool is_empty(const DenseRouter& op) { return is_empty(op.select); }
inline bool is_empty(const Permute& op) { return op.rows.slot_rows() == 0 || op.rows.hidden == 0; }
inline bool is_empty(const Combine& op) { return op.rows.token_rows() == 0 || op.rows.hidden == 0; }
inline bool is_empty(const PermuteCotangent& op) { return op.rows.token_rows() == 0; }
inline bool is_empty(const CombineCotangent& op) { return op.rows.token_rows() == 0 && op.rows.slot_rows() == 0; }
template <class Op>
bool is_empty(const Op& op) {
  return op.rows == 0 || op.k == 0;
}

template <class Plan, class = void>
constexpr bool kHasWorkspace = false;
template <class Plan>
constexpr bool kHasWorkspace<Plan, std::void_t<decltype(Plan::workspace_bytes)>> = true;

template <class Plan>
int64_t workspace_bytes(const Plan& plan) {
  if constexpr (kHasWorkspace<Plan>) return plan.workspace_bytes;
  return 0;
}

// Makes a plan for the current device, and runs it.
template <class Op>
cudaError_t launch(const Op& op, cudaStream_t stream) {
  if (is_empty(op)) return cudaSuccess;
  const Device* device = current_device();
  if (device == nullptr) return cudaErrorInvalidDevice;
  const auto plan = planned(op, *device);
  return plan ? run(op, *plan, stream) : cudaErrorNotSupported;
}

// The devices that a program is lowered for: those of this process, or where there is none, one like that which the
// tables were measured on, without the kernels that are for it alone.
inline std::vector<Device> lowered_for() {
  constexpr Device kMeasured{90, 132, 227 * 1024, true, false};
  return devices().empty() ? std::vector{kMeasured} : devices();
}

// The k that all of them can do.
inline int max_select_k() {
  int k = kMaxSelectK;
  for (const Device& device : lowered_for()) k = std::min(k, max_select_k(device));
  return k;
}

// Why one of them cannot compute a dense_router in one kernel; empty where all can.
inline std::string why_not_fused_anywhere(const DenseRouter& op) {
  const std::string reason = why_not_fused(op);
  if (!reason.empty()) return reason;
  for (const Device& device : lowered_for()) {
    if (!planned(op, device)) return "no fused kernel for so many tokens and experts on every device of this process";
  }
  return "";
}

// Whether a kernel is faster on all of them than what there is without it.
template <class Op>
bool pays_everywhere(const Op& op) {
  const std::vector<Device> all = lowered_for();
  return std::all_of(all.begin(), all.end(), [&](const Device& device) {
    const auto plan = planned(op, device);
    return plan && (!ForcedPlan<Op>::get().empty() || pays(op, *plan, device));
  });
}

// The bytes of workspace that any of them needs; 0 for an op that it does not compute.
template <class Op>
int64_t most_workspace_bytes(const Op& op) {
  int64_t most = 0;
  for (const Device& device : lowered_for()) {
    if (const auto plan = planned(op, device)) most = std::max(most, workspace_bytes(*plan));
  }
  return most;
}

}  // namespace jax_router::cuda
