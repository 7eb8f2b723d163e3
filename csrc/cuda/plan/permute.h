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
constexpr int kPermuteDepths[] = {kOfOneSlot, 4, 2, 1};

struct PermutePlan {
  bool wide;
  int depth;
  int64_t pieces;  // of a row
  int64_t blocks;

  // Where warps have tokens.
  int64_t segments;     // of a row, each a warp's
  int64_t token_warps;  // before those that look for unused slots
  int warps;            // of a block

  // Where blocks have slots.
  RowBlocks slots;
  uint32_t row_bytes;
  Quotient problem_of;  // of the number of a slot, by those of a problem
};

inline std::optional<PermutePlan> plan_with(const Permute& op, const Device& device, int depth) {
  const DispatchedRows& rows = op.rows;
  PermutePlan plan{};
  plan.wide = rows_have_pieces(rows.hidden * op.element_bytes, {op.x, op.out});
  plan.depth = depth;
  plan.pieces = count_pieces(rows, plan.wide, op.element_bytes);
  if (depth == kOfOneSlot) {
    const auto slots = RowBlocks::of(rows.slot_rows(), ceil_div(plan.pieces, 32), kMoveWarps);
    const int64_t row_bytes = rows.hidden * op.element_bytes;
    if (!slots || row_bytes > UINT32_MAX) return std::nullopt;
    plan.slots = *slots;
    plan.row_bytes = static_cast<uint32_t>(row_bytes);
    plan.problem_of = Quotient::by(rows.slots);
    plan.blocks = slots->blocks;
    return plan;
  }
  plan.segments = ceil_div(plan.pieces, 32 * depth);
  plan.token_warps = rows.token_rows() * plan.segments;
  const int64_t warps = plan.token_warps + ceil_div(rows.slot_rows(), kSlotsOfWarp);
  plan.warps = warps_of_block(warps, device);
  plan.blocks = ceil_div(warps, plan.warps);
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<PermutePlan> plans(const Permute& op, const Device& device) {
  std::vector<PermutePlan> found;
  for (int depth : kPermuteDepths) {
    if (const auto plan = plan_with(op, device, depth)) found.push_back(*plan);
  }
  return found;
}

// Slots each on their own where their blocks have room in five eighths of the device: a token's row is read again for
// each of its slots, but nothing waits for anything else. Else the deepest whose lanes have all of their pieces and
// whose warps fill the device; else the flattest that there is.
inline std::optional<PermutePlan> plan(const Permute& op, const Device& device) {
  const int64_t room = int64_t{device.warps()} * device.multiprocessors;
  std::optional<PermutePlan> flattest;
  for (const PermutePlan& plan : plans(op, device)) {
    if (plan.depth == kOfOneSlot) {
      if (kMoveWarps * plan.blocks <= room * 5 / 8) return plan;
      continue;
    }
    if (plan.pieces >= 32 * plan.depth && plan.token_warps >= room) return plan;
    flattest = plan;
  }
  return flattest;
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
    all.push_back(instance_name(false, 0, DType::kF32, true, depth));
    for (int bytes : {1, 2, 4}) all.push_back(instance_name(false, bytes, DType::kF32, false, depth));
    for (DType dtype : kDTypes) {
      for (bool wide : {true, false}) all.push_back(instance_name(true, 0, dtype, wide, depth));
    }
  }
  return all;
}

}  // namespace jax_router::cuda
