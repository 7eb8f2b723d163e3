// How rows of tokens and slots are cut for permute, combine and their cotangents: into pieces, which a lane takes at a
// time, of 16 bytes where all rows begin at a multiple of that, and else of one element.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "names.h"
#include "quotient.h"

namespace jax_router::cuda {

constexpr int kPieceBytes = 16;
constexpr int kMoveWarps = 8;    // of a block, at most
constexpr int kSlotsOfWarp = 8;  // where a warp looks for slots that are not in use

inline bool rows_have_pieces(int64_t row_bytes, std::initializer_list<const void*> pointers) {
  uintptr_t all = static_cast<uintptr_t>(row_bytes);
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % kPieceBytes == 0;
}

// Of a row.
inline int64_t count_pieces(const DispatchedRows& rows, bool wide, int element_bytes) {
  return wide ? rows.hidden * element_bytes / kPieceBytes : rows.hidden;
}

// How rows are shared out among blocks: one has a part of a row, or some whole rows.
struct RowBlocks {
  uint32_t all_rows;
  uint32_t parts;       // of a row, each a block's
  uint32_t block_rows;  // of a block
  int warps;            // of a row in a block
  Quotient by_parts;    // of the number of a block
  int64_t blocks;

  // None where numbers of rows or of blocks have more than 31 bits.
  static std::optional<RowBlocks> of(int64_t all_rows, int64_t row_warps, int most_warps) {
    RowBlocks shared{};
    shared.all_rows = static_cast<uint32_t>(all_rows);
    shared.warps = static_cast<int>(std::clamp<int64_t>(row_warps, 1, most_warps));
    shared.parts = static_cast<uint32_t>(ceil_div(row_warps, shared.warps));
    shared.block_rows = static_cast<uint32_t>(most_warps / shared.warps);
    shared.by_parts = Quotient::by(shared.parts);
    shared.blocks = ceil_div(all_rows, shared.block_rows) * shared.parts;
    return std::max(all_rows, shared.blocks) <= kMostBlocks ? std::optional(shared) : std::nullopt;
  }
};

// How many warps a block has, where each has work of its own: fewer where the blocks would not fill the device.
inline int warps_of_block(int64_t warps, const Device& device) {
  int of_block = kMoveWarps;
  while (of_block > 1 && ceil_div(warps, of_block) < device.multiprocessors) of_block /= 2;
  return of_block;
}

inline std::string pieces_name(DType dtype, bool wide) { return name(dtype) + (wide ? " wide" : ""); }

// Every kernel that has these names.
inline std::vector<std::string> all_pieces_names() {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    for (bool wide : {true, false}) all.push_back(pieces_name(dtype, wide));
  }
  return all;
}

// The warps of a token where a block has whole tokens. The sums of the cotangents are made in an order that depends on
// this, so it follows from the length of a row alone.
inline int warps_of_token(int64_t pieces) {
  return static_cast<int>(std::clamp<int64_t>(ceil_div(pieces, 32), 1, kMoveWarps));
}

}  // namespace jax_router::cuda
