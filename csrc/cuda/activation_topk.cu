// activation_topk: scores, selection and weights of tokens whose logits lie in device memory.
//
// A tile of 16 or 32 lanes owns one token: it reads the row once into registers, 4 logits a lane at a time, and selects
// there (select.cuh). Rows too long or with too many choices for that are kept in shared memory, one warp a token.
// Floor: the logits are read once, and k weights and ids are written: rows * (experts * sizeof(logit) + 8 k) bytes.
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "load.cuh"
#include "select.cuh"
#include "select_long.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kThreads = 128;

// From so many rows on, tiles of 16 lanes: fewer instructions a token, where below them the steps in a row count.
constexpr int64_t kManyRows = 4096;
// Up to so many rows, a token has a thread block of its own.
constexpr int64_t kFewRows = 1024;

// One row of logits in device memory, for re-reading the few that matter.
template <class T>
struct GlobalRow {
  const T* row;
  __device__ __forceinline__ float operator()(int expert) const { return load_one(row + expert); }
};

// The least number of blocks that a multiprocessor must have room for; 0 leaves it to the compiler, which is too
// generous with registers for scores.
constexpr int blocks_for(KeyMode mode, int chunks, size_t element_bytes) {
  if (mode == KeyMode::kLogits) return 0;
  if (chunks > 4) return chunks <= 6 ? 6 : 4;
  return mode == KeyMode::kGroups && element_bytes == 2 ? 7 : 8;
}

// kChunks: quads a lane, of which the first kFullChunks are within the row.
template <class T, KeyMode kMode, int kLanes, int kChunks, int kFullChunks>
__global__ void __launch_bounds__(kThreads, blocks_for(kMode, kChunks, sizeof(T)))
    select_rows(const ActivationTopk op, const bool quads) {
  constexpr int kElements = 4 * kChunks;
  __shared__ SelectScratch<kLanes> scratch[kThreads / kLanes];
  const unsigned tile = threadIdx.x / kLanes;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + tile;
  const bool exists = token < op.rows;
  const bool wanted = exists && (op.token_mask == nullptr || op.token_mask[token]);
  const T* row = static_cast<const T*>(op.logits) + token * op.selection.experts;

  // A masked token's logits are loaded too, so as not to wait for the mask.
  float logits[kElements];
  if (exists) {
    load_tile<kLanes, kFullChunks>(row, op.selection.experts, quads, logits);
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) logits[i] = -INFINITY;
  }
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, exists ? token * op.selection.k : -1};
  const float* bias = op.bias == nullptr ? nullptr : op.bias + (exists ? token * op.bias_stride : 0);
  select_token<kMode, kLanes, kFullChunks>(op.selection, logits, wanted, bias, GlobalRow<T>{row}, output,
                                           scratch[tile]);
}

template <class T>
__global__ void select_long_rows(const ActivationTopk op, const int scratch_bytes, const bool quads) {
  extern __shared__ __align__(16) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + warp;
  if (token >= op.rows) return;
  const T* row = static_cast<const T*>(op.logits) + token * op.selection.experts;
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, token * op.selection.k};
  if (op.token_mask != nullptr && !op.token_mask[token]) {
    for (int j = static_cast<int>(threadIdx.x & 31); j < op.selection.k; j += 32) output.store(j, 0.0f, -1, 0.0f);
    return;
  }
  const bool scored = op.bias != nullptr || op.selection.groups.num_groups > 1;
  const float* bias = op.bias == nullptr ? nullptr : op.bias + token * op.bias_stride;
  select_long_token(op.selection, scored, row, quads, bias, output,
                    LongScratch(shared + warp * scratch_bytes, op.selection.experts));
}

template <class T, KeyMode kMode, int kLanes, int kChunks, int kFullChunks>
cudaError_t launch_tiles(const ActivationTopk& op, cudaStream_t stream) {
  const int threads = kLanes == 32 && op.rows <= kFewRows ? 32 : kThreads;
  const int tiles = threads / kLanes;
  const int64_t blocks = (op.rows + tiles - 1) / tiles;
  const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T));
  select_rows<T, kMode, kLanes, kChunks, kFullChunks><<<static_cast<unsigned>(blocks), threads, 0, stream>>>(op, quads);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch_long(const ActivationTopk& op, cudaStream_t stream) {
  constexpr int kSharedBytes = 48 * 1024;  // what a block may have without asking
  const int bytes = LongScratch::bytes(op.selection.experts, op.selection.groups.num_groups);
  const int warps = std::min(8, kSharedBytes / bytes);
  if (warps == 0) return cudaErrorInvalidValue;
  const int64_t blocks = (op.rows + warps - 1) / warps;
  const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T));
  select_long_rows<T><<<static_cast<unsigned>(blocks), 32 * warps, warps * bytes, stream>>>(op, bytes, quads);
  return cudaGetLastError();
}

template <class T, KeyMode kMode>
cudaError_t launch_mode(const ActivationTopk& op, cudaStream_t stream) {
  // The widths that have kernels of their own are a choice between speed and the time to compile them.
  constexpr bool kAllWidths = !std::is_same_v<T, __half> && kMode != KeyMode::kGroups;
  const int quads = (op.selection.experts + 3) / 4;
  if (op.rows >= kManyRows && op.selection.k <= kMaxTileTopK<16>) {
    if constexpr (kAllWidths) {
      if (quads <= 16 * 1) return launch_tiles<T, kMode, 16, 1, 0>(op, stream);
      if (quads <= 16 * 2) return launch_tiles<T, kMode, 16, 2, 1>(op, stream);
      if (quads <= 16 * 3) return launch_tiles<T, kMode, 16, 3, 2>(op, stream);
      if (quads <= 16 * 4) return launch_tiles<T, kMode, 16, 4, 3>(op, stream);
      if (quads <= 16 * 6) return launch_tiles<T, kMode, 16, 6, 4>(op, stream);
      if (quads <= 16 * 8) return launch_tiles<T, kMode, 16, 8, 6>(op, stream);
    } else if constexpr (kMode == KeyMode::kGroups) {
      if (quads == 16 * 4 && tile_can_group(16, op.selection.experts, op.selection.groups.num_groups)) {
        return launch_tiles<T, kMode, 16, 4, 4>(op, stream);
      }
    }
  }
  if (op.selection.k > kMaxTileTopK<32>) return launch_long<T>(op, stream);
  if (quads <= 32 * 2) return launch_tiles<T, kMode, 32, 2, 0>(op, stream);
  if constexpr (kAllWidths) {
    if (quads <= 32 * 3) return launch_tiles<T, kMode, 32, 3, 2>(op, stream);
  }
  if (quads <= 32 * 4) return launch_tiles<T, kMode, 32, 4, 2>(op, stream);
  if (quads <= 32 * 8) return launch_tiles<T, kMode, 32, 8, 4>(op, stream);
  return launch_long<T>(op, stream);
}

}  // namespace

cudaError_t launch(const ActivationTopk& op, cudaStream_t stream) {
  if (op.rows == 0 || op.selection.k == 0) return cudaSuccess;
  return with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (op.selection.groups.num_groups > 1) {
      if (!tile_can_group(32, op.selection.experts, op.selection.groups.num_groups)) return launch_long<T>(op, stream);
      return launch_mode<T, KeyMode::kGroups>(op, stream);
    }
    if (op.bias != nullptr) return launch_mode<T, KeyMode::kScores>(op, stream);
    return launch_mode<T, KeyMode::kLogits>(op, stream);
  });
}

}  // namespace jax_router::cuda
