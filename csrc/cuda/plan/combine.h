// Which kernel computes a combine: by the widest accesses that rows and pointers allow, from rows in memory; or, where
// many tokens share few rows, from a table in shared memory, which has some columns of all rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pieces.h"

namespace jax_router::cuda {

constexpr int kCombineWarps = 4;  // of a block
constexpr int kTableThreads = 1024;
constexpr int kTableTokens = 128;  // whose choices lie in shared memory at a time
constexpr int kTableChoices = 16;  // of a token, at most

struct CombinePlan {
  bool wide;
  bool table;
  uint32_t pieces;         // of a row, one a lane
  RowBlocks row_blocks;    // of tokens
  Quotient problem_of;     // of the number of a token, by those of a problem
  int64_t problem_pieces;  // of the slots of a problem
  int64_t segments;        // of a row, 32 pieces each, of which a table has one
  int64_t batches;         // of kTableTokens tokens
  int64_t blocks;
  int64_t shared_bytes;
};

struct CombineNumbers {
  int64_t reads_of_row;   // on average, from which on its columns are worth a place in shared memory,
  int filled_tenths;      // where so much of the device at least is busy, until the last of its rounds,
  int lone_round_tenths;  // and so much, if there is one
};
// Measured on an H100: 64 to 384 rows of 2048 to 16384 elements, 2 to 8 choices. The last round of pairs of a segment
// and a batch takes as long as the others, however few they are.
constexpr auto kCombineNumbers =
    everywhere(CombineNumbers{/*reads_of_row=*/6, /*filled_tenths=*/7, /*lone_round_tenths=*/8});

inline std::optional<CombinePlan> rows_plan(const Combine& op) {
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

// A table has one row more, for the choices that have no slot. Of a token's choices two lie in a word, those of two
// batches beside each other.
constexpr int64_t table_bytes(const DispatchedRows& rows) {
  return kPieceBytes * (32 * (rows.slots + 1) + 2 * kTableTokens * ceil_div(rows.k, 2));
}

// As many blocks as run at once share out the segments of all batches.
inline std::optional<CombinePlan> table_plan(const Combine& op, const Device& device) {
  const DispatchedRows& rows = op.rows;
  const bool wide = rows_have_pieces(rows.hidden * size_of(op.dtype), {op.y, op.out});
  if (!wide || rows.batch != 1 || rows.k == 0 || rows.k > kTableChoices || rows.slots > kMostBlocks)
    return std::nullopt;
  CombinePlan plan{};
  plan.wide = plan.table = true;
  plan.shared_bytes = table_bytes(rows);
  plan.pieces = static_cast<uint32_t>(count_pieces(rows, true, size_of(op.dtype)));
  plan.segments = ceil_div(plan.pieces, 32);
  plan.batches = ceil_div(rows.tokens, kTableTokens);
  const int64_t pairs = plan.segments * plan.batches;
  plan.blocks = std::min<int64_t>(pairs, device.multiprocessors);
  const bool fits = plan.shared_bytes <= device.shared_bytes && pairs <= kMostBlocks;
  return fits ? std::optional(plan) : std::nullopt;
}

inline std::optional<CombinePlan> plan(const Combine& op, const Device& device) {
  const CombineNumbers& numbers = kCombineNumbers.of(device);
  if (op.rows.tokens * op.rows.k >= numbers.reads_of_row * op.rows.slots) {
    if (const auto table = table_plan(op, device)) {
      const int64_t pairs = table->segments * table->batches;
      const int64_t rounds = ceil_div(pairs, device.multiprocessors);
      const int tenths = rounds == 1 ? numbers.lone_round_tenths : numbers.filled_tenths;
      if (10 * pairs >= tenths * rounds * device.multiprocessors) return table;
    }
  }
  return rows_plan(op);
}

inline std::vector<CombinePlan> plans(const Combine& op, const Device& device) {
  std::vector<CombinePlan> found;
  for (const auto& plan : {rows_plan(op), table_plan(op, device)}) {
    if (plan) found.push_back(*plan);
  }
  return found;
}

inline std::string table_name(DType dtype) { return name(dtype) + " table"; }

inline std::string name(const Combine& op, const CombinePlan& plan) {
  return plan.table ? table_name(op.dtype) : pieces_name(op.dtype, plan.wide);
}

constexpr Needs needs(const CombinePlan& plan) { return {plan.shared_bytes, 1, false}; }

inline std::vector<std::string> instances(const Combine&, const Device&) {
  std::vector<std::string> all = all_pieces_names();
  for (DType dtype : kDTypes) all.push_back(table_name(dtype));
  return all;
}

}  // namespace jax_router::cuda
