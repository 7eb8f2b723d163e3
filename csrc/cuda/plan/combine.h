// Which kernel computes a combine: the widest accesses that rows and pointers allow.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

constexpr int kCombineWarps = 4;  // of a block

struct CombinePlan {
  bool wide;
  uint32_t pieces;         // of a row, one a lane
  RowBlocks row_blocks;    // of tokens
  Quotient problem_of;     // of the number of a token, by those of a problem
  int64_t problem_pieces;  // of the slots of a problem
  int64_t blocks;
};

inline std::optional<CombinePlan> plan(const Combine& op, const Device&) {
  const DispatchedRows& rows = op.rows;
  CombinePlan plan{};
  const int bytes = size_of(op.dtype);
  plan.wide = rows_have_pieces(rows.hidden * bytes, {op.y, op.out});
  const int64_t pieces = count_pieces(rows, plan.wide, bytes);
  plan.pieces = static_cast<uint32_t>(pieces);
  const auto row_blocks = RowBlocks::of(rows.token_rows(), ceil_div(pieces, 32), kCombineWarps);
  if (!row_blocks) return std::nullopt;
  plan.row_blocks = *row_blocks;
  plan.problem_of = Quotient::by(rows.tokens);
  plan.problem_pieces = rows.slots * pieces;
  plan.blocks = row_blocks->blocks;
  return plan;
}

inline std::vector<CombinePlan> plans(const Combine& op, const Device& device) {
  const auto only = plan(op, device);
  return only ? std::vector{*only} : std::vector<CombinePlan>{};
}

inline std::string name(const Combine& op, const CombinePlan& plan) { return pieces_name(op.dtype, plan.wide); }

inline std::vector<std::string> instances(const Combine&, const Device&) { return all_pieces_names(); }

}  // namespace jax_router::cuda
