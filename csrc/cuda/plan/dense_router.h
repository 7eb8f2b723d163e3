// Which kernel computes a dense_router, whether one can, and whether it is worth it: elsewhere XLA's product and the
// kernel of activation_topk are faster.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../../common/macros.h"
#include "activation_topk.h"
#include "names.h"

namespace jax_router::cuda {

// One token (dense_router_one.cu): a block has two experts.
constexpr int kOneThreads = 256;
constexpr int kOneStages = 4;                     // steps of a thread that are under way at once, of 16 bytes of a row
constexpr int kOneStageBytes = 48 * kOneThreads;  // of two rows of the weight, and at most as many of x
constexpr int kOneExperts[] = {256, 512};         // at most, of each kernel
constexpr int kOneSizes = static_cast<int>(std::size(kOneExperts));
constexpr int kOneStaticBytes = kBlockScratchBytes + 256;

// Few tokens (dense_router_few.cu): several blocks share the hidden axis of the same tokens and experts.
constexpr int kFewTokens = 128;  // at most
constexpr int kFewWarps = 8;
constexpr int kFewStepBytes = 128;  // of every expert's row, for one warp
constexpr int kFewStages = 2;       // steps of a warp that are under way at once
constexpr int kPacketBytes = 16;    // of the workspace, for two partial logits
// Offsets within a few rows are 32 bits wide.
constexpr int64_t kMostRowBytes = int64_t{1} << 29;

// What a block has, and for how many experts in all.
struct FewTile {
  int token_tiles;    // of 16 tokens
  int expert_tiles;   // of 8 experts
  int least_experts;  // in all
  int most_experts;
  int splits;  // blocks that share the hidden axis

  constexpr int tokens() const { return 16 * token_tiles; }
  constexpr int experts() const { return 8 * expert_tiles; }
  constexpr int shared_bytes(DType x, DType weight) const {
    return kFewWarps * kFewStages * kFewStepBytes * (tokens() * size_of(x) / size_of(weight) + experts());
  }
  // Of the block's threads, how many experts each has when it selects.
  constexpr int experts_of_thread() const { return ceil_div(most_experts, 32 * kFewWarps); }
  // Twice the experts, so that the blocks of two tiles of tokens all run at once.
  constexpr bool is_for_two() const { return token_tiles == 4 && expert_tiles >= 4 && most_experts < 1024; }
};
// In the order of preference. The blocks of a launch should all run at once, one a multiprocessor, of which an H100 has
// 132: a block has so many experts that 384 of them, or 512 with 64 tokens a block, make at most 128 blocks a tile of
// tokens. A device with fewer multiprocessors, or less shared memory, takes them for fewer experts; see pays.
// Four splits hand fewer sums over than eight, but more blocks read the same tokens: that is worth it for up to 16 of
// them, if the weight is not in f32.
constexpr FewTile kFewTiles[] = {{4, 4, 0, 256, 8},    {4, 6, 256, 384, 8}, {4, 2, 0, 256, 8},   {4, 3, 256, 384, 8},
                                 {4, 4, 384, 1024, 8}, {1, 1, 0, 256, 4},   {1, 1, 256, 384, 4}, {1, 2, 384, 1024, 4},
                                 {1, 2, 0, 256, 8},    {1, 3, 256, 384, 8}, {1, 3, 384, 1024, 8}};
constexpr int kFewTileCount = static_cast<int>(std::size(kFewTiles));
// Those of x and weight that there are kernels for.
struct OperandDTypes {
  DType x, weight;
};
constexpr OperandDTypes kOperandDTypes[] = {
    {DType::kF32, DType::kF32}, {DType::kBF16, DType::kBF16}, {DType::kF16, DType::kF16}, {DType::kBF16, DType::kF32}};

// Whether there is a kernel. An x in f32 takes no tensor core, and few tokens a block. So many experts that no more
// than 16 tokens of them are worth it have one number of splits.
constexpr bool takes(const FewTile& tile, DType x, DType weight) {
  if (tile.token_tiles > 1) return x != DType::kF32 && tile.splits == 8;
  return weight == DType::kF32 ? tile.splits == 8 : tile.splits == 4 || tile.most_experts < 1024;
}

// Many tokens (dense_router_many.cu): a cluster of blocks has a tile of tokens, each block 128 experts and a part of
// the hidden axis. Or, for the most tokens, each block has a tile of its own, which is called wide: all experts and the
// whole hidden axis; two such blocks share what they read of the weight.
constexpr int kManyBlockExperts = 128;
constexpr int kManyExperts = 2 * kManyBlockExperts;
constexpr int kManyWideTokens = 128;
constexpr int kManyWarps = 16;
constexpr int kManyWideWarps = 12;     // whose threads have registers for sums of all experts
constexpr int kManyWideLanes = 8;      // that select for a token
constexpr int kManyWideHidden = 3072;  // from here on they pay: they were level with XLA at 2048, ahead at 4096
constexpr int kManyBoxDepth = 64;      // hidden elements that a copy brings
constexpr int kManyBoxRowBytes = 2 * kManyBoxDepth;
constexpr int kManyStages = 16;  // of the ring, at most
constexpr int kManyPieceBits = 3;
constexpr int kManyPieces = 1 << kManyPieceBits;   // in which the sums of other blocks come, at most
constexpr int kManyAlignment = 1024;               // of what the copy engine writes
constexpr int kManyPitch = kManyBlockExperts + 4;  // of a row of sums: rows that are written together differ in banks
JR_HOST_DEVICE constexpr int many_scratch_bytes(bool wide) { return wide ? 896 * kManyWideWarps : 512 * kManyWarps; }
constexpr int many_static_bytes(bool wide) { return many_scratch_bytes(wide) + 8 * (2 * kManyStages + kManyPieces); }

// The product of a block has 128 rows, experts or, where it is wide, tokens. Its columns are the others. Boxes of each
// operand in a stage: small tiles would spend more time on barriers than on products.
constexpr int kManyRows = 128;
static_assert(kManyRows == kManyBlockExperts && kManyRows == kManyWideTokens);
JR_HOST_DEVICE constexpr int boxes_of(int columns) { return columns <= 72 ? 2 : 1; }
JR_HOST_DEVICE constexpr int box_bytes_of(int columns) { return (kManyRows + columns) * kManyBoxRowBytes; }
JR_HOST_DEVICE constexpr int stage_bytes_of(int columns) { return boxes_of(columns) * box_bytes_of(columns); }

// How a launch for many tokens divides the work.
struct ManyTiling {
  int tokens;       // of a tile
  int sharer_bits;  // log2 of the blocks that have the same columns and hidden elements
  int split_bits;   // log2 of the parts of the hidden axis
  bool wide;
  bool half_warps;  // select, rather than whole ones: not with four parts
  int stages;       // of the ring
  int received;     // where in shared memory the sums of other blocks go
  bool apart;       // whether that is outside of the ring

  JR_DEVICE_TOO constexpr int cluster_bits() const { return sharer_bits + split_bits; }
  // log2 of the blocks that have a tile together.
  JR_DEVICE_TOO constexpr int tile_bits() const { return wide ? 0 : cluster_bits(); }
  JR_DEVICE_TOO constexpr int columns() const { return wide ? kManyExperts : tokens; }
  // The most tokens that one block selects for.
  JR_DEVICE_TOO constexpr int share() const { return (tokens + (1 << tile_bits()) - 1) >> tile_bits(); }
};

// In the order of preference, of those of which one wave has all tokens; the last is for all that is more.
struct ManyTile {
  int tokens;
  int split_bits;
  bool wide = false;
};
constexpr ManyTile kManyTiles[] = {{24, 2},
                                   {40, 2},
                                   {56, 2},
                                   {72, 2},
                                   {56, 1},
                                   {72, 1},
                                   {112, 1},
                                   {144, 1},
                                   {112, 0},
                                   {128, 0},
                                   {kManyWideTokens, 0, true}};

struct DenseRouterNumbers {
  int64_t few_tokens;         // up to so many, any number of experts is worth it
  int64_t few_experts;        // of more tokens, up to so many
  int64_t small_tile_tokens;  // up to so many, blocks have 16 tokens instead of 64 (of most experts, up to few_tokens)
  int64_t tile_tokens;        // of more than these, more than least_experts up to most_experts
  int64_t least_experts, most_experts;
  int clusters[4];         // of 1, 2, 4 and 8 blocks that have room at a time
  int filled_eighths;      // of the experts' tiles, that must be more than this to be worth it
  int filled_tenths;       // of a wave of tokens, at least, where the hidden axis is not split
  int wide_filled_tenths;  // of one of wide blocks
};
// Measured on an H100: up to 128 tokens with 64 to 1024 experts and hidden sizes from 2048 to 7168, more with 64 to 256
// experts. In numbers of tokens, the clusters and the tenths come to up to 4320 tokens of 256 experts and 9504 of 128,
// to 5175 to 8448 of 256, and to 13517 to 16896 of 256.
constexpr auto kDenseRouterNumbers = everywhere(
    DenseRouterNumbers{/*few_tokens=*/16, /*few_experts=*/512, /*small_tile_tokens=*/32,
                       /*tile_tokens=*/64, /*least_experts=*/96, /*most_experts=*/384, /*clusters=*/{132, 66, 30, 15},
                       /*filled_eighths=*/6, /*filled_tenths=*/7, /*wide_filled_tenths=*/8});

struct DenseRouterPlan {
  int one;          // of kOneExperts, or -1:
  int few;          // of kFewTiles, or -1: the kernel for many tokens, with
  ManyTiling many;  // this
  int64_t blocks;
  int64_t shared_bytes;
  int64_t workspace_bytes;
};

constexpr int64_t few_blocks(const DenseRouter& op, const FewTile& tile) {
  return ceil_div(op.select.selection.experts, tile.experts()) * tile.splits * ceil_div(op.select.rows, tile.tokens());
}

// Why no kernel can compute the op on any device, whatever its number of tokens; empty where some kernel may.
inline std::string why_not_fused(const DenseRouter& op) {
  const Selection& selection = op.select.selection;
  const auto text = [](const char* wanted, int64_t got) { return wanted + (", got " + std::to_string(got)); };
  if (op.hidden <= 0 || op.hidden % 8 != 0) return text("a hidden size that is a multiple of 8", op.hidden);
  if (op.hidden * int64_t{size_of(op.weight_dtype)} > kMostRowBytes) {
    return text("at most 2^29 bytes of an expert's row, so many elements", op.hidden);
  }
  if (op.weight_dtype != op.operand_dtype && op.operand_dtype != DType::kBF16) {
    return "x in bf16 where the weight is in f32, got f16";
  }
  if (selection.k > max_tile_k(32)) return text("at most top_k = 16", selection.k);
  if (selection.groups.num_groups > 1 && !tile_can_group(32, selection.experts, selection.groups.num_groups)) {
    return text("at most 32 groups of 4, 8, 16, 32, 64 or 128 experts", selection.groups.num_groups);
  }
  return "";
}

inline std::optional<DenseRouterPlan> one_plan(const DenseRouter& op, int index, const Device& device) {
  const int experts = op.select.selection.experts;
  const int64_t blocks = ceil_div(experts, 2);
  constexpr int kSharedBytes = kOneStages * kOneStageBytes;
  if (op.select.rows != 1 || experts > kOneExperts[index] || kSharedBytes + kOneStaticBytes > device.shared_bytes ||
      blocks * kPacketBytes > op.workspace.bytes) {
    return std::nullopt;
  }
  return DenseRouterPlan{index, -1, {}, blocks, kSharedBytes, blocks * kPacketBytes};
}

constexpr int64_t few_workspace_bytes(const DenseRouter& op, const FewTile& tile) {
  return tile.splits * op.select.rows * ceil_div(op.select.selection.experts, 2) * kPacketBytes;
}

inline bool can_use(const DenseRouter& op, const FewTile& tile, const Device& device) {
  const int experts = op.select.selection.experts;
  // The blocks that select wait for all others: each must be running.
  const int64_t waiting = std::min(op.select.rows, few_blocks(op, tile));
  return op.select.rows <= kFewTokens && waiting <= device.multiprocessors && tile.least_experts <= experts &&
         experts <= tile.most_experts && takes(tile, op.operand_dtype, op.weight_dtype) &&
         tile.shared_bytes(op.operand_dtype, op.weight_dtype) + kBlockScratchBytes <= device.shared_bytes &&
         few_workspace_bytes(op, tile) <= op.workspace.bytes;
}

inline DenseRouterPlan few_plan(const DenseRouter& op, int tile) {
  const int64_t shared_bytes = kFewTiles[tile].shared_bytes(op.operand_dtype, op.weight_dtype);
  return {-1, tile, {}, few_blocks(op, kFewTiles[tile]), shared_bytes, few_workspace_bytes(op, kFewTiles[tile])};
}

// Divides the shared memory; returns the bytes that a block needs, or 0 if it has less.
constexpr int place_in_shared_memory(ManyTiling& tiling, int most) {
  constexpr int kEnoughBoxes = 8;  // under way, so that a ring that leaves room for the sums is no slower
  const int stage_bytes = stage_bytes_of(tiling.columns());
  const int sums_bytes = (tiling.tokens * kManyPitch * 4) << tiling.wide;
  const int received_bytes = tiling.tile_bits() == 0 ? 0 : (tiling.share() * kManyPitch * 4) << tiling.tile_bits();
  const auto stages_in = [&](int bytes) { return std::min(bytes / stage_bytes, kManyStages); };
  tiling.stages = stages_in(most - received_bytes);
  tiling.apart = tiling.tile_bits() == 0 || tiling.stages * boxes_of(tiling.columns()) >= kEnoughBoxes;
  if (!tiling.apart) tiling.stages = stages_in(most);
  tiling.received = std::max(sums_bytes, tiling.apart ? tiling.stages * stage_bytes : 0);
  const int bytes = std::max(tiling.stages * stage_bytes, tiling.received + received_bytes);
  return tiling.stages > 0 && bytes <= most ? bytes : 0;
}

inline std::optional<DenseRouterPlan> many_plan(const DenseRouter& op, const ManyTile& tile, const Device& device) {
  const Selection& selection = op.select.selection;
  if (!device.has_hopper_kernels || op.weight_dtype == DType::kF32 || selection.experts > kManyExperts) {
    return std::nullopt;
  }
  // Wide blocks select last, with nothing to hide that behind: with a bias or groups it would take too long.
  const bool can_be_wide = key_mode(op.select) == KeyMode::kLogits && selection.k <= max_tile_k(kManyWideLanes) &&
                           selection.experts > kManyBlockExperts;
  if (tile.wide && !can_be_wide) return std::nullopt;
  ManyTiling tiling{tile.tokens, selection.experts > kManyBlockExperts, tile.split_bits, tile.wide, false, 0, 0, false};
  tiling.half_warps = selection.k <= max_tile_k(16) && tiling.split_bits < 2 && tiling.share() > kManyWarps;
  const int bytes = place_in_shared_memory(tiling, device.shared_bytes - many_static_bytes(tile.wide) - kManyAlignment);
  const int64_t tiles = ceil_div(op.select.rows, tiling.tokens);
  // Coordinates of the copy engine are 32 bits wide, and so is a grid.
  if (bytes == 0 || op.select.rows > INT32_MAX - 1024) return std::nullopt;
  const int64_t blocks = round_up(tiles << tiling.tile_bits(), int64_t{1} << tiling.cluster_bits());
  return DenseRouterPlan{-1, -1, tiling, blocks, bytes + kManyAlignment, 0};
}

// The tokens that have room at a time.
inline int64_t wave_of(const ManyTiling& tiling, const Device& device) {
  const int clusters = kDenseRouterNumbers.of(device).clusters[tiling.cluster_bits()];
  return device.scaled(int64_t{tiling.tokens} * clusters << (tiling.cluster_bits() - tiling.tile_bits()));
}

inline std::optional<DenseRouterPlan> plan(const DenseRouter& op, const Device& device) {
  if (!why_not_fused(op).empty()) return std::nullopt;
  if (op.select.rows > kFewTokens) {
    std::optional<DenseRouterPlan> found;
    for (const ManyTile& tile : kManyTiles) {
      const std::optional<DenseRouterPlan> next = many_plan(op, tile, device);
      if (!next) continue;
      found = next;
      if (op.select.rows <= wave_of(found->many, device)) break;
    }
    return found;
  }
  for (int i = 0; i < kOneSizes; ++i) {
    if (const auto plan = one_plan(op, i, device)) return plan;
  }
  const DenseRouterNumbers& numbers = kDenseRouterNumbers.of(device);
  const bool most = op.select.selection.experts > numbers.most_experts;
  const int64_t small = most ? numbers.few_tokens : numbers.small_tile_tokens;
  for (int i = 0; i < kFewTileCount; ++i) {
    const FewTile& tile = kFewTiles[i];
    if (tile.token_tiles > 1 && op.select.rows <= small) continue;
    if (tile.splits < 8 && op.select.rows > tile.tokens()) continue;
    if (tile.is_for_two() && (op.select.rows <= tile.tokens() || op.select.selection.experts <= numbers.least_experts))
      continue;
    if (can_use(op, tile, device)) return few_plan(op, i);
  }
  return std::nullopt;
}

inline std::vector<DenseRouterPlan> plans(const DenseRouter& op, const Device& device) {
  std::vector<DenseRouterPlan> found;
  if (!why_not_fused(op).empty()) return found;
  for (int i = 0; i < kOneSizes; ++i) {
    if (const auto plan = one_plan(op, i, device)) found.push_back(*plan);
  }
  for (int i = 0; i < kFewTileCount; ++i) {
    if (can_use(op, kFewTiles[i], device)) found.push_back(few_plan(op, i));
  }
  for (const ManyTile& tile : kManyTiles) {
    if (const auto plan = many_plan(op, tile, device)) found.push_back(*plan);
  }
  return found;
}

constexpr Needs needs(const DenseRouterPlan& plan) {
  if (plan.one >= 0) return {plan.shared_bytes + kOneStaticBytes, 1, false};
  if (plan.few >= 0) return {plan.shared_bytes + kBlockScratchBytes, 1, false};
  return {plan.shared_bytes + many_static_bytes(plan.many.wide), 1 << plan.many.cluster_bits(), true};
}

// In how many turns the blocks of a plan for few tokens run. A multiprocessor has registers for two of 16 tokens, and
// for one of more.
inline int64_t turns(const DenseRouterPlan& plan, const Device& device) {
  const int64_t most = kFewTiles[plan.few].token_tiles == 1 ? 2 : 1;
  const int64_t of_multiprocessor = std::min<int64_t>(device.blocks_with(needs(plan).shared_bytes), most);
  return ceil_div(plan.blocks, of_multiprocessor * device.multiprocessors);
}

// Whether the plan is faster than XLA's product and the kernel of activation_topk. Blocks that multiply on tensor cores
// were faster in one turn, and slower in two: on an H100, beyond few_experts and most_experts. Those of an x in f32
// were faster in two, and slower in three. Where a turn ends is a matter of the device.
inline bool pays(const DenseRouter& op, const DenseRouterPlan& plan, const Device& device) {
  const DenseRouterNumbers& numbers = kDenseRouterNumbers.of(device);
  const int64_t rows = op.select.rows;
  const int64_t experts = op.select.selection.experts;
  const bool is_short = op.operand_dtype != DType::kF32;
  // A token of more experts XLA multiplies as fast, without a hand-over.
  if (rows == 1) return plan.one >= 0;
  if (plan.few >= 0) {
    if (rows > numbers.few_tokens && turns(plan, device) > (is_short ? 1 : 2)) return false;
    if (rows > numbers.tile_tokens) {
      return experts > numbers.least_experts && experts <= numbers.most_experts && is_short;
    }
    return experts <= numbers.few_experts || rows <= numbers.few_tokens;
  }
  // Few of the experts a block may be missing.
  if (experts * 8 <= (kManyBlockExperts << plan.many.sharer_bits) * numbers.filled_eighths) return false;
  if (plan.many.split_bits > 0) return true;
  if (plan.many.sharer_bits == 0 || (plan.many.wide && op.hidden < kManyWideHidden)) return false;
  const int64_t wave = wave_of(plan.many, device);
  const int64_t tenths = plan.many.wide ? numbers.wide_filled_tenths : numbers.filled_tenths;
  return rows <= wave && rows * 10 >= wave * tenths;
}

inline std::string operands_name(DType x, DType weight, KeyMode mode) {
  return name(x) + (x == weight ? "" : "x" + name(weight)) + " " + name(mode);
}
inline std::string instance_name(DType x, DType weight, KeyMode mode, int one_experts) {
  return operands_name(x, weight, mode) + " one of " + std::to_string(one_experts);
}
inline std::string instance_name(DType x, DType weight, KeyMode mode, const FewTile& tile) {
  return operands_name(x, weight, mode) + " few " + std::to_string(tile.tokens()) + "x" +
         std::to_string(tile.experts()) + " of " + std::to_string(tile.most_experts);
}
inline std::string instance_name(DType dtype, KeyMode mode, int many_tokens, int split_bits, bool wide) {
  return name(dtype) + " " + name(mode) + " many " + std::to_string(many_tokens) +
         (wide ? " wide" : " by " + std::to_string(1 << split_bits));
}

inline std::string name(const DenseRouter& op, const DenseRouterPlan& plan) {
  const KeyMode mode = key_mode(op.select);
  if (plan.one >= 0) return instance_name(op.operand_dtype, op.weight_dtype, mode, kOneExperts[plan.one]);
  if (plan.few >= 0) return instance_name(op.operand_dtype, op.weight_dtype, mode, kFewTiles[plan.few]);
  return instance_name(op.operand_dtype, mode, plan.many.tokens, plan.many.split_bits, plan.many.wide);
}

inline std::vector<std::string> instances(const DenseRouter&, const Device& device) {
  std::vector<std::string> all;
  for (const auto& [x, weight] : kOperandDTypes) {
    for (KeyMode mode : kKeyModes) {
      for (int experts : kOneExperts) all.push_back(instance_name(x, weight, mode, experts));
      for (const FewTile& tile : kFewTiles) {
        const bool fits = tile.shared_bytes(x, weight) + kBlockScratchBytes <= device.shared_bytes;
        if (fits && takes(tile, x, weight)) all.push_back(instance_name(x, weight, mode, tile));
      }
      for (const ManyTile& tile : kManyTiles) {
        if (!device.has_hopper_kernels || weight == DType::kF32) continue;
        if (tile.wide && mode != KeyMode::kLogits) continue;
        all.push_back(instance_name(x, mode, tile.tokens, tile.split_bits, tile.wide));
      }
    }
  }
  return all;
}

}  // namespace jax_router::cuda
