// Which kernel computes an activation_topk: one whose tiles hold a row in registers, for few tokens one with a block a
// token, or one that keeps rows that are too long for that, or that have too many choices, in shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

struct ActivationTopkNumbers {
  HalfWarpRows half_warps[2][3];  // of 16-bit logits and of 32-bit ones, by KeyMode
  // And from how many on tiles of 8 lanes are faster than those of 16: by KeyMode, rows of up to 512 bytes, and longer
  // ones, which only groups have.
  int64_t quarter_warps[3];
  int64_t long_quarter_warps;
  // Up to how many rows a block a token is the fastest, by KeyMode. Not for logits: there is little to compute.
  int64_t block_rows[3];
};
// Measured on an H100 and some anew on an H200, which has its multiprocessors: those of groups, with a bias, as models
// have them, of 384 and 512 experts with a bias, and of 16-bit logits. Blocks for 128 to 512 experts, half warps for up
// to 512 experts, quarters for 128 and 256, and up to 65536 rows.
constexpr auto kActivationTopkNumbers =
    everywhere(ActivationTopkNumbers{{{{{1, 1, 512, 2048}}, {{1, 1920, 2560, 4608}}, {{2560, 2560, 2560, 2560}}},
                                      {{{1, 1, 512, 2048}}, {{1, 2304, 3840, 8192}}, {{2560, 2560, 2560, 2560}}}},
                                     {12288, 12288, 16384},
                                     67584,
                                     {0, 132, 198}});

// The widths that have kernels of their own are a choice between speed and the time to compile them.
constexpr RowTile kActivationTopkTiles[] = {{16, 1, 0}, {16, 2, 1}, {16, 3, 2}, {16, 4, 3}, {16, 6, 4},
                                            {16, 8, 6}, {16, 4, 4}, {32, 2, 0}, {32, 3, 2}, {32, 4, 2},
                                            {32, 8, 4}, {8, 4, 4},  {8, 8, 8}};

// Whether a tile was compiled for logits of a type and a way to make keys.
constexpr bool has_tile(const RowTile& tile, DType dtype, KeyMode mode) {
  if (tile.lanes == 8) {
    // Not with 32 logits of 32 bits a lane, unless there is much to compute: too few warps have room to wait for them.
    if (dtype == DType::kF16) return false;
    return mode == KeyMode::kGroups ? tile.chunks == 8 : tile.chunks <= 4 || dtype == DType::kBF16;
  }
  const bool for_groups = tile.lanes == 16 && tile.full_chunks == tile.chunks;
  if (mode == KeyMode::kGroups) return for_groups || (tile.lanes == 32 && tile.chunks != 3);
  if (dtype == DType::kF16) return tile.lanes == 32 && tile.chunks != 3;
  return !for_groups;
}

constexpr KeyMode key_mode(const ActivationTopk& op) {
  if (op.selection.groups.num_groups > 1) return KeyMode::kGroups;
  return op.bias != nullptr ? KeyMode::kScores : KeyMode::kLogits;
}

// Of a block of tiles. Smaller ones were measured to pay for scores alone.
JR_HOST_DEVICE constexpr int gate_threads(KeyMode mode) { return mode == KeyMode::kScores ? 64 : kTileThreads; }

// Whether the logits' places in the L2 cache are given away first. Measured on an H100, whose L2 has 50 MB: up to 6 %
// faster where it has room for them, 4 % slower where it has not.
constexpr bool logits_pass(const ActivationTopk& op) {
  return op.rows * op.selection.experts * size_of(op.dtype) <= 40 << 20;
}

// In the place of a tile.
constexpr int kRowInShared = -1;
constexpr int kBlockOfToken = -2;

constexpr int kLeastBlockExperts = 128;  // fewer were not measured
// More of either were slower than tiles for the most rows of block_rows: of k = 16 choices, and of groups of 64
// experts.
constexpr int kMostBlockChoices = 12;
constexpr int kMostBlockGroup = 32;
// The most threads of a block, each of which has an expert; 0: no kernel has a block a token.
constexpr int most_block_threads(KeyMode mode) {
  return mode == KeyMode::kLogits ? 0 : mode == KeyMode::kGroups ? 256 : 512;
}
// The threads that a kernel has room for.
constexpr int block_size(int experts) { return experts <= 256 ? 256 : 512; }
constexpr int kBlockCandidates = 32;  // that a block has room for: a lane each of the warp that ranks them
// Of what it declares as __shared__, for up to 1024 experts.
constexpr int kBlockScratchBytes = 3072;

struct ActivationTopkPlan {
  int tile;     // of kActivationTopkTiles, or one of these
  int threads;  // of a block
  int64_t blocks;
  int warp_bytes;  // of shared memory, for rows there
};

// What a warp needs that keeps a row of keys in shared memory (parts/long_token.cuh).
constexpr int kLongCandidates = 256;
constexpr int64_t long_token_bytes(int experts, int num_groups) {
  const int64_t words = 3 * kLongCandidates + 3 * kMaxTopK + round_up(experts, 128);
  return 4 * (words + (num_groups > 1 ? round_up(num_groups, 128) : 0));
}

inline bool can_use(const ActivationTopk& op, const RowTile& tile) {
  const Selection& selection = op.selection;
  const KeyMode mode = key_mode(op);
  // Tiles of 8 lanes read nothing but quads.
  const auto has_quads = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % (4 * bytes) == 0; };
  if (tile.lanes == 8 && !(has_quads(op.logits, size_of(op.dtype)) && has_quads(op.bias, 4))) return false;
  // The kernel numbers tokens and choices with 31 bits.
  if (op.rows > INT32_MAX / std::max(selection.k, 1)) return false;
  return has_tile(tile, op.dtype, mode) && tile.holds(selection.experts) && selection.k <= max_tile_k(tile.lanes) &&
         (mode != KeyMode::kGroups || tile_can_group(tile.lanes, selection.experts, selection.groups.num_groups));
}

constexpr int kActivationTopkTileCount = static_cast<int>(std::size(kActivationTopkTiles));

inline ActivationTopkPlan tile_plan(const ActivationTopk& op, int tile) {
  const int threads = gate_threads(key_mode(op));
  return {tile, threads, ceil_div(op.rows, threads / kActivationTopkTiles[tile].lanes), 0};
}

inline std::optional<ActivationTopkPlan> long_plan(const ActivationTopk& op) {
  const int64_t bytes = long_token_bytes(op.selection.experts, op.selection.groups.num_groups);
  const int64_t warps = std::min<int64_t>(8, kUnaskedSharedBytes / bytes);
  if (warps == 0 || op.selection.k > kMaxTopK) return std::nullopt;
  const ActivationTopkPlan plan{kRowInShared, static_cast<int>(32 * warps), ceil_div(op.rows, warps),
                                static_cast<int>(bytes)};
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::optional<ActivationTopkPlan> block_plan(const ActivationTopk& op) {
  const Selection& selection = op.selection;
  const KeyMode mode = key_mode(op);
  if (selection.experts < kLeastBlockExperts || selection.experts > most_block_threads(mode)) return std::nullopt;
  if (selection.k > kMostBlockChoices || op.rows > INT32_MAX / std::max(selection.k, 1)) return std::nullopt;
  int eligible = selection.experts;
  if (mode == KeyMode::kGroups) {
    const int size = selection.experts / selection.groups.num_groups;
    if (!tile_can_group(32, selection.experts, selection.groups.num_groups)) return std::nullopt;
    if (size > kMostBlockGroup) return std::nullopt;
    eligible = size * selection.groups.top_groups;
  }
  // With fewer maxima than choices all that are eligible would reach the bound.
  if (eligible > kBlockCandidates && eligible < selection.k * block_size(selection.experts) / 32) return std::nullopt;
  return ActivationTopkPlan{kBlockOfToken, static_cast<int>(round_up(selection.experts, 32)), op.rows, 0};
}

inline std::optional<ActivationTopkPlan> plan(const ActivationTopk& op, const Device& device) {
  const ActivationTopkNumbers& numbers = kActivationTopkNumbers.of(device);
  const int mode = static_cast<int>(key_mode(op));
  const auto pays = [&](const RowTile& tile) {
    const bool is_long = op.selection.experts * size_of(op.dtype) > 512;
    if (tile.lanes == 8) {
      return op.rows >= device.scaled(is_long ? numbers.long_quarter_warps : numbers.quarter_warps[mode]);
    }
    const HalfWarpRows& half_warps = numbers.half_warps[op.dtype == DType::kF32][mode];
    return tile.lanes == 32 || half_warps.pay(op.rows, tile.chunks, device);
  };
  if (op.rows <= device.scaled(numbers.block_rows[mode])) {
    if (const auto plan = block_plan(op)) return plan;
  }
  for (int lanes : {8, 16, 32}) {
    for (int i = 0; i < kActivationTopkTileCount; ++i) {
      const RowTile& tile = kActivationTopkTiles[i];
      if (tile.lanes == lanes && can_use(op, tile) && pays(tile)) return tile_plan(op, i);
    }
  }
  return long_plan(op);
}

inline std::vector<ActivationTopkPlan> plans(const ActivationTopk& op, const Device&) {
  std::vector<ActivationTopkPlan> found;
  for (int i = 0; i < kActivationTopkTileCount; ++i) {
    if (can_use(op, kActivationTopkTiles[i])) found.push_back(tile_plan(op, i));
  }
  if (const auto plan = block_plan(op)) found.push_back(*plan);
  if (const auto plan = long_plan(op)) found.push_back(*plan);
  return found;
}

inline std::string block_name(DType dtype, KeyMode mode, int threads) {
  return name(dtype) + " " + name(mode) + " block of " + std::to_string(block_size(threads));
}

inline std::string instance_name(DType dtype, KeyMode mode, int tile) {
  if (tile == kRowInShared) return name(dtype) + " shared memory";
  return name(dtype) + " " + name(mode) + " " + name(kActivationTopkTiles[tile]);
}

inline std::string name(const ActivationTopk& op, const ActivationTopkPlan& plan) {
  if (plan.tile == kBlockOfToken) return block_name(op.dtype, key_mode(op), plan.threads);
  return instance_name(op.dtype, key_mode(op), plan.tile);
}

constexpr Needs needs(const ActivationTopkPlan& plan) { return {plan.threads / 32 * plan.warp_bytes, 1, false}; }

inline std::vector<std::string> instances(const ActivationTopk&, const Device&) {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    all.push_back(instance_name(dtype, KeyMode::kLogits, kRowInShared));
    for (KeyMode mode : kKeyModes) {
      for (int threads : {256, 512}) {
        if (threads <= most_block_threads(mode)) all.push_back(block_name(dtype, mode, threads));
      }
      for (int i = 0; i < kActivationTopkTileCount; ++i) {
        if (has_tile(kActivationTopkTiles[i], dtype, mode)) all.push_back(instance_name(dtype, mode, i));
      }
    }
  }
  return all;
}

}  // namespace jax_router::cuda
