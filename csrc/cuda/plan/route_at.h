// Which kernel computes a route_at: one thread a choice, for few tokens one block a token, or where softmax needs the
// whole row, one warp a token.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

enum class RouteAtKernel { kAhead, kChoices, kRows };
constexpr RouteAtKernel kRouteAtKernels[] = {RouteAtKernel::kAhead, RouteAtKernel::kChoices, RouteAtKernel::kRows};

constexpr int kRouteAtThreads = 256;
constexpr int kAheadChoices = 8;     // of a token, at most: a warp has them
constexpr int kAheadExperts = 1024;  // at most: the threads behind that warp have one or two each
constexpr int kAheadThreads = 32 + kAheadExperts / 2;

struct RouteAtPlan {
  RouteAtKernel kernel;
  int tokens;   // of a block
  int threads;  // where a block has one token
  int64_t blocks;
};

struct RouteAtNumbers {
  int64_t ahead_rows;  // up to so many, whole rows are scored while the ids are on their way
};
// Measured on an H100, 6 of 256 experts. By a table: 20 % faster at one row and at 64, 17 % at 264, 12 % at 528. Of
// given ids: 20 % at one row, 17 % at 64, 8 % at 264, 4 % at 528.
constexpr auto kRouteAtNumbers = everywhere(RouteAtNumbers{/*ahead_rows=*/264});

inline std::optional<RouteAtPlan> plan_with(const RouteAt& op, RouteAtKernel kernel) {
  if (op.k < 1 || op.scoring.needs_whole_row() != (kernel == RouteAtKernel::kRows)) return std::nullopt;
  RouteAtPlan plan{kernel, 1, 0, 0};
  switch (kernel) {
    case RouteAtKernel::kAhead:
      if (op.k > kAheadChoices || op.experts > kAheadExperts) return std::nullopt;
      plan.threads = std::min(32 + static_cast<int>(round_up(op.experts, 32)), kAheadThreads);
      break;
    case RouteAtKernel::kChoices:
      if (op.k > kRouteAtThreads) return std::nullopt;
      plan.tokens = kRouteAtThreads / op.k;
      break;
    case RouteAtKernel::kRows:
      plan.tokens = kRouteAtThreads / 32;
  }
  plan.blocks = ceil_div(op.rows, plan.tokens);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<RouteAtPlan> plans(const RouteAt& op, const Device&) {
  std::vector<RouteAtPlan> found;
  for (RouteAtKernel kernel : kRouteAtKernels) {
    if (const auto plan = plan_with(op, kernel)) found.push_back(*plan);
  }
  return found;
}

inline std::optional<RouteAtPlan> plan(const RouteAt& op, const Device& device) {
  const int64_t ahead_rows = device.scaled(kRouteAtNumbers.of(device).ahead_rows);
  for (const RouteAtPlan& plan : plans(op, device)) {
    if (plan.kernel != RouteAtKernel::kAhead || op.rows <= ahead_rows) return plan;
  }
  return std::nullopt;
}

inline std::string instance_name(DType dtype, RouteAtKernel kernel) {
  switch (kernel) {
    case RouteAtKernel::kAhead:
      return name(dtype) + " ahead";
    case RouteAtKernel::kChoices:
      return name(dtype) + " choices";
    case RouteAtKernel::kRows:
      return name(dtype) + " rows";
  }
  return "";
}

inline std::string name(const RouteAt& op, const RouteAtPlan& plan) { return instance_name(op.dtype, plan.kernel); }

inline std::vector<std::string> instances(const RouteAt&, const Device&) {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    for (RouteAtKernel kernel : kRouteAtKernels) all.push_back(instance_name(dtype, kernel));
  }
  return all;
}

}  // namespace jax_router::cuda
