// How a row lies in the registers of a tile of lanes (parts/tile.cuh), and what can be selected there.
#pragma once

#include <cstdint>

#include "../../common/macros.h"
#include "device.h"

namespace jax_router::cuda {

// `chunks` quads of 4 neighbours a lane, of which the first `full_chunks` are known to be within the row.
struct RowTile {
  int lanes;  // 8, 16 or 32
  int chunks;
  int full_chunks;

  constexpr bool holds(int64_t length) const {
    return 4 * lanes * full_chunks <= length && length <= 4 * lanes * chunks;
  }
};

// A tile selects up to this many.
JR_HOST_DEVICE constexpr int max_tile_k(int lanes) { return lanes == 8 ? 8 : lanes / 2; }

// What the keys that select are made of.
enum class KeyMode {
  kLogits,  // the logits themselves: no bias and no groups
  kScores,  // score + bias
  kGroups,  // score + bias, within the best groups; see tile_can_group
};

// Whether the groups are whole runs of a tile's lanes, and no more than its lanes.
constexpr bool tile_can_group(int lanes, int experts, int num_groups) {
  const int quads = experts / num_groups / 4;
  const bool whole = quads * 4 * num_groups == experts && quads > 0 && (quads & (quads - 1)) == 0;
  return whole && quads <= lanes && num_groups <= lanes;
}

// Of a block, whose tiles have a row each. Fewer are no faster for a few rows either.
constexpr int kTileThreads = 128;
constexpr int64_t tile_blocks(int64_t rows, int lanes) { return ceil_div(rows, kTileThreads / lanes); }

// From how many rows of an H100 on tiles of 16 lanes are faster than those of 32: a lane has more steps in a row, which
// nobody waits for where a multiprocessor has enough other rows. By the quads of a lane, up to 2, 4, 6 and 8.
struct HalfWarpRows {
  int64_t by_chunks[4];

  constexpr bool pay(int64_t rows, int chunks, const Device& device) const {
    return rows >= device.scaled(by_chunks[(chunks - 1) / 2]);
  }
};

}  // namespace jax_router::cuda
