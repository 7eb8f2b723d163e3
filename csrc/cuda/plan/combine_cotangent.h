// Which kernel computes a combine_cotangent: the widest accesses that rows and pointers allow, and whether a token's
// choices are one block's, which reads the token's row once, or each another's, so that few tokens fill the device too.
// The products are the same: each is the sum of one choice's row.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

struct CombineCotangentPlan {
  bool wide;
  bool apart;            // whether each choice is a block's
  uint32_t pieces;       // of a row
  int warps;             // of a token
  int tokens;            // of a block, or choices where these are apart
  int64_t token_blocks;  // before those that look for unused slots
  int64_t blocks;
};

// Among how many multiprocessors there must be a block where choices are not apart. Measured from one block each on,
// where that takes half the time in bf16, and extended to where the two lines meet.
struct CombineCotangentNumbers {
  int64_t multiprocessors_a_block;
};
constexpr auto kCombineCotangentNumbers = everywhere(CombineCotangentNumbers{3});

inline std::optional<CombineCotangentPlan> plan_with(const CombineCotangent& op, bool apart) {
  const DispatchedRows& rows = op.rows;
  CombineCotangentPlan plan{};
  const int bytes = size_of(op.dtype);
  plan.wide = rows_have_pieces(rows.hidden * bytes, {op.grad, op.y, op.grad_y});
  plan.apart = apart;
  plan.pieces = static_cast<uint32_t>(count_pieces(rows, plan.wide, bytes));
  plan.warps = warps_of_token(plan.pieces);
  plan.tokens = kMoveWarps / plan.warps;
  plan.token_blocks = ceil_div(rows.token_rows() * (apart ? rows.k : 1), plan.tokens);
  plan.blocks = plan.token_blocks + ceil_div(rows.slot_rows(), kSlotsOfWarp * plan.warps * plan.tokens);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<CombineCotangentPlan> plans(const CombineCotangent& op, const Device&) {
  std::vector<CombineCotangentPlan> found;
  for (bool apart : {false, true}) {
    if (apart && op.rows.k < 2) continue;
    if (const auto plan = plan_with(op, apart)) found.push_back(*plan);
  }
  return found;
}

inline std::optional<CombineCotangentPlan> plan(const CombineCotangent& op, const Device& device) {
  const std::vector<CombineCotangentPlan> found = plans(op, device);
  if (found.empty()) return std::nullopt;
  const int64_t enough = ceil_div(device.multiprocessors, kCombineCotangentNumbers.of(device).multiprocessors_a_block);
  return found.front().token_blocks >= enough ? found.front() : found.back();
}

inline std::string name(const CombineCotangent& op, const CombineCotangentPlan& plan) {
  return pieces_name(op.dtype, plan.wide) + (plan.apart ? ", choices apart" : ", choices together");
}

inline std::vector<std::string> instances(const CombineCotangent&, const Device&) { return all_pieces_names(); }

}  // namespace jax_router::cuda
