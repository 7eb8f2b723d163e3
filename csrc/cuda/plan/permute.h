// Which kernel computes a permute: the widest accesses that rows and pointers allow, whether warps have tokens or
// slots, and how much of a token's row.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

// Pieces of a token's row that a lane holds at a time, to store them to each slot of the token. kOfOneSlot: a lane has
// a piece of one slot's row instead.
constexpr int kOfOneSlot = 0;
constexpr int kPermuteDepths[] = {kOfOneSlot, 8, 4, 2, 1};
// More than four pieces of one element are slower.
constexpr bool has_depth(bool wide, int depth) { return wide || depth <= 4; }

struct PermutePlan {
  bool wide;
  int depth;
  uint32_t pieces;         // of a row
  RowBlocks row_blocks;    // of tokens, or of slots
  Quotient problem_of;     // of the number of a row, by those of a problem
  int64_t problem_pieces;  // of the slots of a problem
  int64_t blocks;          // behind those that have rows of tokens are some that look for unused slots
};

inline std::optional<PermutePlan> plan_with(const Permute& op, int depth) {
  const DispatchedRows& rows = op.rows;
  PermutePlan plan{};
  plan.wide = rows_have_pieces(rows.hidden * op.element_bytes, {op.x, op.out});
  plan.depth = depth;
  const int64_t pieces = count_pieces(rows, plan.wide, op.element_bytes);
  plan.pieces = static_cast<uint32_t>(pieces);
  plan.problem_pieces = rows.slots * pieces;
  const bool of_slots = depth == kOfOneSlot;
  const auto row_blocks = of_slots ? RowBlocks::of(rows.slot_rows(), ceil_div(pieces, 32), kMoveWarps)
                                   : RowBlocks::of(rows.token_rows(), ceil_div(pieces, 32 * depth), kMoveWarps);
  if (!row_blocks || !has_depth(plan.wide, depth)) return std::nullopt;
  plan.row_blocks = *row_blocks;
  plan.problem_of = Quotient::by(of_slots ? rows.slots : rows.tokens);
  plan.blocks = row_blocks->blocks;
  if (!of_slots) plan.blocks += ceil_div(rows.slot_rows(), kSlotsOfWarp * row_blocks->block_rows * row_blocks->warps);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<PermutePlan> plans(const Permute& op, const Device&) {
  std::vector<PermutePlan> found;
  for (int depth : kPermuteDepths) {
    if (const auto plan = plan_with(op, depth)) found.push_back(*plan);
  }
  return found;
}

// Slots each on their own where their warps do not fill half of the device: a token's row is read again for each of its
// slots, but nothing waits for anything else. Else the deepest whose lanes have all of their pieces and whose warps
// fill a quarter; else the flattest that there is.
inline std::optional<PermutePlan> plan(const Permute& op, const Device& device) {
  const int64_t room = int64_t{device.warps()} * device.multiprocessors;
  std::optional<PermutePlan> chosen;
  for (const PermutePlan& plan : plans(op, device)) {
    const int64_t warps = plan.row_blocks.all_warps;
    if (plan.depth == kOfOneSlot) {
      if (2 * warps <= room) return plan;
      continue;
    }
    chosen = plan;
    if (int64_t{plan.pieces} >= 32 * plan.depth && 4 * warps >= room) break;
  }
  return chosen;
}

inline std::string instance_name(bool weighted, int element_bytes, DType dtype, bool wide, int depth) {
  const std::string pieces = weighted ? "weighted " + pieces_name(dtype, wide)
                                      : "copy " + std::to_string(wide ? kPieceBytes : element_bytes) + " bytes";
  return pieces + (depth == kOfOneSlot ? " of a slot" : " x" + std::to_string(depth));
}

inline std::string name(const Permute& op, const PermutePlan& plan) {
  return instance_name(op.weights != nullptr, op.element_bytes, op.dtype, plan.wide, plan.depth);
}

inline std::vector<std::string> instances(const Permute&, const Device&) {
  std::vector<std::string> all;
  for (int depth : kPermuteDepths) {
    for (bool wide : {true, false}) {
      if (!has_depth(wide, depth)) continue;
      for (int bytes : {1, 2, 4}) {
        if (!wide || bytes == 4) all.push_back(instance_name(false, bytes, DType::kF32, wide, depth));
      }
      for (DType dtype : kDTypes) all.push_back(instance_name(true, 0, dtype, wide, depth));
    }
  }
  return all;
}

}  // namespace jax_router::cuda
