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

constexpr int kChoiceBlocks = 4;  // of a multiprocessor, where choices are apart

struct CombineCotangentPlan {
  bool wide;
  bool apart;            // whether each choice is a block's
  uint32_t pieces;       // of a row
  int warps;             // of a token
  int tokens;            // of a block, or choices where these are apart
  int64_t token_blocks;  // before those that look for unused slots
  uint32_t choices;      // where these are apart
  Quotient token_of;     // of the number of a choice
  int64_t blocks;
};

inline std::optional<CombineCotangentPlan> plan_with(const CombineCotangent& op, bool apart) {
  const DispatchedRows& rows = op.rows;
  CombineCotangentPlan plan{};
  const int bytes = size_of(op.dtype);
  plan.wide = rows_have_pieces(rows.hidden * bytes, {op.grad, op.y, op.grad_y});
  plan.apart = apart;
  plan.pieces = static_cast<uint32_t>(count_pieces(rows, plan.wide, bytes));
  plan.warps = warps_of_token(plan.pieces);
  plan.tokens = kMoveWarps / plan.warps;
  const int64_t owners = rows.token_rows() * (apart ? rows.k : 1);
  plan.token_blocks = ceil_div(owners, plan.tokens);
  plan.blocks = plan.token_blocks + ceil_div(rows.slot_rows(), kSlotsOfWarp * plan.warps * plan.tokens);
  if (apart) {
    if (owners > kMostBlocks) return std::nullopt;
    plan.choices = static_cast<uint32_t>(owners);
    plan.token_of = Quotient::by(rows.k);
  }
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<CombineCotangentPlan> plans(const CombineCotangent& op, const Device&) {
  std::vector<CombineCotangentPlan> found;
  for (bool apart : {false, true}) {
    if (const auto plan = plan_with(op, apart)) found.push_back(*plan);
  }
  return found;
}

// Choices are apart where their blocks all run at once: a token's row is read again for each of its choices, but no
// block has more than one row of a slot to wait for.
inline std::optional<CombineCotangentPlan> plan(const CombineCotangent& op, const Device& device) {
  const std::vector<CombineCotangentPlan> found = plans(op, device);
  if (found.empty()) return std::nullopt;
  const bool at_once = found.back().token_blocks <= int64_t{kChoiceBlocks} * device.multiprocessors;
  return at_once ? found.back() : found.front();
}

inline std::string instance_name(const std::string& pieces, bool apart) {
  return pieces + (apart ? " of a choice" : " of a token");
}

inline std::string name(const CombineCotangent& op, const CombineCotangentPlan& plan) {
  return instance_name(pieces_name(op.dtype, plan.wide), plan.apart);
}

inline std::vector<std::string> instances(const CombineCotangent&, const Device&) {
  std::vector<std::string> all;
  for (const std::string& pieces : all_pieces_names()) {
    for (bool apart : {false, true}) all.push_back(instance_name(pieces, apart));
  }
  return all;
}

}  // namespace jax_router::cuda
