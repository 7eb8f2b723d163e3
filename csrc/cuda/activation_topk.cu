// activation_topk: scores, selection and weights of tokens whose logits lie in device memory.
//
// A tile of 8, 16 or 32 lanes owns one token: it reads the row once into registers, 4 logits a lane at a time, and
// selects there (parts/token.cuh). Rows too long or with too many choices for that are kept in shared memory, one warp
// a token. Floor: the logits are read once, and k weights and ids are written: rows * (experts * sizeof(logit) + 8 k)
// bytes.
#include "kernels.h"
#include "parts/launch.cuh"
#include "parts/long_token.cuh"
#include "parts/token.cuh"

namespace jax_router::cuda {
namespace {

// One row of logits in device memory, for re-reading the few that matter.
template <class T>
struct GlobalRow {
  const T* row;
  __device__ __forceinline__ float operator()(int expert) const { return load_one(row + expert); }
};

// The least number of blocks that a multiprocessor must have room for; 0 leaves it to the compiler, which is too
// generous with registers for scores.
constexpr int least_blocks(KeyMode mode, int lanes, int chunks, size_t element_bytes) {
  if (lanes == 8) {
    if (mode == KeyMode::kGroups) return 6;
    if (mode == KeyMode::kScores) return chunks <= 4 ? 9 : 8;
    return chunks <= 4 ? 10 : 8;
  }
  if (mode == KeyMode::kLogits) return chunks <= (lanes == 16 ? 3 : 2) ? 12 : 0;
  if (chunks > 4) return chunks <= 6 ? 7 : 5;
  if (mode == KeyMode::kScores) return 9;
  return (lanes == 16 ? 9 : 8) - (element_bytes == 2 ? 1 : 0);
}

// kChunks: quads a lane, of which the first kFullChunks are within the row.
template <class T, KeyMode kMode, int kLanes, int kChunks, int kFullChunks>
__global__ void __launch_bounds__(kTileThreads, least_blocks(kMode, kLanes, kChunks, sizeof(T)))
    activation_topk_tiles(const ActivationTopk op, const bool quads) {
  constexpr int kElements = 4 * kChunks;
  constexpr int kTokens = kTileThreads / kLanes;
  __shared__ SelectScratch<kLanes> scratch[kTokens];
  const int index = static_cast<int>(threadIdx.x / kLanes);
  // Where there is no token the last one's row is loaded, so that the loads need no condition; and a masked token's
  // before it is known that it is masked. The token that is loaded is first + loaded.
  int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  int loaded = 0;
  bool exists;
  if constexpr (kLanes == 32) {
    exists = first + index < op.rows;
    first = exists ? first + index : op.rows - 1;
  } else {
    // What a whole block shares is kept apart: it is computed once for all lanes, and leaves them numbers of 32 bits.
    // But that takes longer, which few tokens wait for.
    const int left = static_cast<int>(min(op.rows - first, static_cast<int64_t>(kTokens)));
    exists = index < left;
    loaded = exists ? index : left - 1;
  }
  const T* row = static_cast<const T*>(op.logits) + first * op.selection.experts + loaded * op.selection.experts;
  asm("" : "+l"(row));  // one address, where the compiler would keep its parts

  using Logits =
      std::conditional_t<kMode == KeyMode::kLogits && sizeof(T) == 2, PackedTile<T, kElements>, float[kElements]>;
  Logits logits;
  load_tile<kLanes, kFullChunks>(row, op.selection.experts, kLanes == 8 || quads, logits);
  const bool wanted = exists & !is_masked(op, first + loaded);
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, first * op.selection.k,
                           exists ? loaded * op.selection.k : -1};
  const float* bias = op.bias;
  if (bias != nullptr) bias += first * op.bias_stride + loaded * static_cast<int>(op.bias_stride);
  select_token<kMode, kLanes, kFullChunks>(op.selection, logits, wanted, bias, GlobalRow<T>{row}, output,
                                           scratch[index]);
}

template <class T>
__global__ void activation_topk_long(const ActivationTopk op, const int scratch_bytes, const bool quads) {
  extern __shared__ __align__(16) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (token >= op.rows) return;
  const T* row = static_cast<const T*>(op.logits) + token * op.selection.experts;
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, token * op.selection.k};
  if (is_masked(op, token)) {
    for (int j = static_cast<int>(threadIdx.x & 31); j < op.selection.k; j += 32) output.store(j, 0.0f, -1, 0.0f);
    return;
  }
  const bool scored = op.bias != nullptr || op.selection.groups.num_groups > 1;
  const float* bias = op.bias == nullptr ? nullptr : op.bias + token * op.bias_stride;
  select_long_token(op.selection, scored, row, quads, bias, output,
                    LongScratch(shared + warp * scratch_bytes, op.selection.experts));
}

template <class T, KeyMode kMode>
cudaError_t run_tiles(const ActivationTopk& op, const ActivationTopkPlan& plan, cudaStream_t stream) {
  return with_index<kActivationTopkTileCount>(plan.tile, [&](auto index) {
    constexpr RowTile kTile = kActivationTopkTiles[decltype(index)::value];
    if constexpr (has_tile(kTile, dtype_of(T{}), kMode)) {
      const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T));
      const LaunchShape shape{plan.blocks, plan.threads};
      // Rows that fill their tile, as those of most models do, need not ask what lies within them.
      constexpr int kFilled = 4 * kTile.lanes * kTile.chunks;
      if constexpr (kFilled % 128 == 0 && kFilled <= 384) {
        if (op.selection.experts == kFilled) {
          return launch_kernel(activation_topk_tiles<T, kMode, kTile.lanes, kTile.chunks, kTile.chunks>, shape, stream,
                               op, quads);
        }
      }
      return launch_kernel(activation_topk_tiles<T, kMode, kTile.lanes, kTile.chunks, kTile.full_chunks>, shape, stream,
                           op, quads);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t run(const ActivationTopk& op, const ActivationTopkPlan& plan, cudaStream_t stream) {
  return with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (plan.tile < 0) {
      const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T));
      return launch_kernel(activation_topk_long<T>, {plan.blocks, plan.threads, plan.threads / 32 * plan.warp_bytes},
                           stream, op, plan.warp_bytes, quads);
    }
    switch (key_mode(op)) {
      case KeyMode::kLogits:
        return run_tiles<T, KeyMode::kLogits>(op, plan, stream);
      case KeyMode::kScores:
        return run_tiles<T, KeyMode::kScores>(op, plan, stream);
      case KeyMode::kGroups:
        return run_tiles<T, KeyMode::kGroups>(op, plan, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_router::cuda
