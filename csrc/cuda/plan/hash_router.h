// Which kernel computes a hash_router: the widest accesses that k and the alignment of the operands allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

constexpr int kHashTokens = 2;  // that a thread has
constexpr int kHashThreads = 128;
constexpr int kHashWidths[] = {4, 2, 1};  // neighbouring columns that a thread has

struct HashRouterPlan {
  int width;
  int columns;        // k / width
  int block_columns;  // that the threads of a block have at a time,
  int block_tokens;   // and tokens
  int64_t blocks;     // along the tokens
  int column_blocks;
};

inline bool can_use(const HashRouter& op, int width) {
  const auto all = reinterpret_cast<uintptr_t>(op.hash_lut) | reinterpret_cast<uintptr_t>(op.expert_ids) |
                   reinterpret_cast<uintptr_t>(op.weights);
  return op.k % width == 0 && all % (4 * width) == 0;
}

inline std::vector<HashRouterPlan> plans(const HashRouter& op, const Device&) {
  constexpr int kMostColumnBlocks = 65535;  // of a grid's second axis
  std::vector<HashRouterPlan> found;
  for (int width : kHashWidths) {
    if (!can_use(op, width)) continue;
    HashRouterPlan plan{width, op.k / width, 0, 0, 0, 0};
    plan.block_columns = std::min(plan.columns, kHashThreads);
    // A multiple of 16 tokens at a time keeps what a warp stores aligned to sectors.
    const int tokens = std::max(1, kHashThreads / std::max(plan.columns, 1));
    plan.block_tokens = tokens >= 16 ? tokens / 16 * 16 : tokens;
    plan.blocks = ceil_div(op.rows, int64_t{plan.block_tokens} * kHashTokens);
    plan.column_blocks = static_cast<int>(ceil_div(plan.columns, kHashThreads));
    if (plan.blocks <= kMostBlocks && plan.column_blocks <= kMostColumnBlocks) found.push_back(plan);
  }
  return found;
}

inline std::optional<HashRouterPlan> plan(const HashRouter& op, const Device& device) {
  const std::vector<HashRouterPlan> found = plans(op, device);
  return found.empty() ? std::nullopt : std::optional(found.front());
}

inline std::string instance_name(int width) { return "width " + std::to_string(width); }

inline std::string name(const HashRouter&, const HashRouterPlan& plan) { return instance_name(plan.width); }

inline std::vector<std::string> instances(const HashRouter&, const Device&) {
  std::vector<std::string> all;
  for (int width : kHashWidths) all.push_back(instance_name(width));
  return all;
}

}  // namespace jax_router::cuda
