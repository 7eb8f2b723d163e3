// Which kernel computes a route_at: one thread a choice, or where softmax needs the whole row, one warp a token.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

constexpr int kRouteAtThreads = 256;

struct RouteAtPlan {
  bool by_rows;
  int tokens;  // of a block
  int64_t blocks;
};

inline std::optional<RouteAtPlan> plan(const RouteAt& op, const Device&) {
  const bool by_rows = op.scoring.needs_whole_row();
  if (op.k < 1 || (!by_rows && op.k > kRouteAtThreads)) return std::nullopt;
  const int tokens = by_rows ? kRouteAtThreads / 32 : kRouteAtThreads / op.k;
  const RouteAtPlan plan{by_rows, tokens, ceil_div(op.rows, tokens)};
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<RouteAtPlan> plans(const RouteAt& op, const Device& device) {
  const auto only = plan(op, device);
  return only ? std::vector{*only} : std::vector<RouteAtPlan>{};
}

inline std::string instance_name(DType dtype, bool by_rows) { return name(dtype) + (by_rows ? " rows" : " choices"); }

inline std::string name(const RouteAt& op, const RouteAtPlan& plan) { return instance_name(op.dtype, plan.by_rows); }

inline std::vector<std::string> instances(const RouteAt&, const Device&) {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    for (bool by_rows : {false, true}) all.push_back(instance_name(dtype, by_rows));
  }
  return all;
}

}  // namespace jax_router::cuda
