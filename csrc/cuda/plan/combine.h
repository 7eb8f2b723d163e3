// Which kernel computes a combine: the widest accesses that rows and pointers allow.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

struct CombinePlan {
  bool wide;
  int64_t pieces;    // of a row, one a lane
  int64_t segments;  // of a row, each a warp's
  int64_t token_warps;
  int warps;  // of a block
  int64_t blocks;
};

inline std::optional<CombinePlan> plan(const Combine& op, const Device& device) {
  CombinePlan plan{};
  const int bytes = size_of(op.dtype);
  plan.wide = rows_have_pieces(op.rows.hidden * bytes, {op.y, op.out});
  plan.pieces = count_pieces(op.rows, plan.wide, bytes);
  plan.segments = ceil_div(plan.pieces, 32);
  plan.token_warps = op.rows.token_rows() * plan.segments;
  plan.warps = warps_of_block(plan.token_warps, device);
  plan.blocks = ceil_div(plan.token_warps, plan.warps);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<CombinePlan> plans(const Combine& op, const Device& device) {
  const auto only = plan(op, device);
  return only ? std::vector{*only} : std::vector<CombinePlan>{};
}

inline std::string name(const Combine& op, const CombinePlan& plan) { return pieces_name(op.dtype, plan.wide); }

inline std::vector<std::string> instances(const Combine&, const Device&) { return all_pieces_names(); }

}  // namespace jax_router::cuda
