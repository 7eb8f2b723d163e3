// Which kernel computes a permute_cotangent: the widest accesses that rows and pointers allow. A token is one block's,
// since all of its choices add up in one row.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

struct PermuteCotangentPlan {
  bool wide;
  uint32_t pieces;  // of a row
  int warps;        // of a token
  int tokens;       // of a block
  int64_t blocks;
};

inline std::optional<PermuteCotangentPlan> plan(const PermuteCotangent& op, const Device&) {
  PermuteCotangentPlan plan{};
  const int bytes = size_of(op.dtype);
  plan.wide = rows_have_pieces(op.rows.hidden * bytes, {op.grad, op.x, op.grad_x});
  plan.pieces = static_cast<uint32_t>(count_pieces(op.rows, plan.wide, bytes));
  plan.warps = warps_of_token(plan.pieces);
  plan.tokens = kMoveWarps / plan.warps;
  plan.blocks = ceil_div(op.rows.token_rows(), plan.tokens);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<PermuteCotangentPlan> plans(const PermuteCotangent& op, const Device& device) {
  const auto only = plan(op, device);
  return only ? std::vector{*only} : std::vector<PermuteCotangentPlan>{};
}

inline std::string name(const PermuteCotangent& op, const PermuteCotangentPlan& plan) {
  return pieces_name(op.dtype, plan.wide);
}

inline std::vector<std::string> instances(const PermuteCotangent&, const Device&) { return all_pieces_names(); }

}  // namespace jax_router::cuda
