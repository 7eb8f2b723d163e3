// Which kernel computes a hash_router: the widest accesses that k and the alignment of the operands allow, and whether
// the table goes through the L1.
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

struct HashRouterNumbers {
  int64_t past_l1_rows;  // up to so many read few lines of the table twice
};
// Measured on an H100, with 6 of 129280 ids a row: 7 % faster at 4096 rows, 3 % at 32768, level at 65536, 1 % slower at
// 131072. With 2 of them: 8 % faster at 65536, 4 % at 81920.
constexpr auto kHashRouterNumbers = everywhere(HashRouterNumbers{/*past_l1_rows=*/81920});

struct HashRouterPlan {
  int width;
  bool past_l1;
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
    HashRouterPlan plan{width, false, op.k / width, 0, 0, 0, 0};
    plan.block_columns = std::min(plan.columns, kHashThreads);
    // A multiple of 16 tokens at a time keeps what a warp stores aligned to sectors.
    const int tokens = std::max(1, kHashThreads / std::max(plan.columns, 1));
    plan.block_tokens = tokens >= 16 ? tokens / 16 * 16 : tokens;
    plan.blocks = ceil_div(op.rows, int64_t{plan.block_tokens} * kHashTokens);
    plan.column_blocks = static_cast<int>(ceil_div(plan.columns, kHashThreads));
    if (plan.blocks > kMostBlocks || plan.column_blocks > kMostColumnBlocks) continue;
    for (bool past_l1 : {true, false}) {
      plan.past_l1 = past_l1;
      found.push_back(plan);
    }
  }
  return found;
}

inline std::optional<HashRouterPlan> plan(const HashRouter& op, const Device& device) {
  const bool past_l1 = op.rows <= device.scaled(kHashRouterNumbers.of(device).past_l1_rows);
  for (const HashRouterPlan& plan : plans(op, device)) {
    if (plan.past_l1 == past_l1) return plan;
  }
  return std::nullopt;
}

inline std::string instance_name(int width, bool past_l1) {
  return "width " + std::to_string(width) + (past_l1 ? " past the L1" : "");
}

inline std::string name(const HashRouter&, const HashRouterPlan& plan) {
  return instance_name(plan.width, plan.past_l1);
}

inline std::vector<std::string> instances(const HashRouter&, const Device&) {
  std::vector<std::string> all;
  for (int width : kHashWidths) {
    for (bool past_l1 : {true, false}) all.push_back(instance_name(width, past_l1));
  }
  return all;
}

}  // namespace jax_router::cuda
