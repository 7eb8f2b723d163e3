// activation_topk: scores, selection and weights of tokens whose logits lie in device memory.
//
// A tile of 8, 16 or 32 lanes owns one token: it reads the row once into registers, 4 logits a lane at a time, and
// selects there (parts/token.cuh). Few tokens that are selected by scores have a block each, with a thread for each
// expert (parts/block_token.cuh). Rows too long or with too many choices for that are kept in shared memory, one warp a
// token. Floor: the logits are read once, and k weights and ids are written: rows * (experts * sizeof(logit) + 8 k)
// bytes.
#include "kernels.h"
#include "parts/block_token.cuh"
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

// The least number of blocks of 128 threads that a multiprocessor must have room for; 0 leaves it to the compiler,
// which is too generous with registers for scores.
constexpr int least_room(KeyMode mode, int lanes, int chunks, size_t element_bytes) {
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

constexpr int least_blocks(KeyMode mode, int lanes, int chunks, size_t element_bytes) {
  return least_room(mode, lanes, chunks, element_bytes) * 128 / gate_threads(mode);
}

// kChunks: quads a lane, of which the first kFullChunks are within the row. quads: see rows_have_quads, of the logits
// and the biases. passing: see PassingLoads.
template <class T, KeyMode kMode, int kLanes, int kChunks, int kFullChunks>
__global__ void __launch_bounds__(gate_threads(kMode), least_blocks(kMode, kLanes, kChunks, sizeof(T)))
    activation_topk_tiles(const ActivationTopk op, const bool quads, const bool passing) {
  constexpr int kElements = 4 * kChunks;
  constexpr int kTokens = gate_threads(kMode) / kLanes;
  __shared__ SelectScratch<kLanes> scratch[kTokens];
  // Where there is no token the last one's row is loaded, so that the loads need no condition; and a masked token's
  // before it is known that it is masked. The numbers of tokens and of choices fit 31 bits, see can_use: products of
  // two such are one instruction.
  const unsigned own = blockIdx.x * kTokens + threadIdx.x / kLanes;
  const unsigned last = static_cast<unsigned>(op.rows) - 1;
  const bool exists = own <= last;
  const uint64_t token = exists ? own : last;
  const unsigned row_bytes = op.selection.experts * sizeof(T);
  const T* row = reinterpret_cast<const T*>(static_cast<const char*>(op.logits) + token * row_bytes);
  asm("" : "+l"(row));  // one address, where the compiler would keep its parts

  using Logits =
      std::conditional_t<kMode == KeyMode::kLogits && sizeof(T) == 2, PackedTile<T, kElements>, float[kElements]>;
  Logits logits;
  const float* bias = op.bias == nullptr ? nullptr : op.bias + token * static_cast<unsigned>(op.bias_stride);
  [[maybe_unused]] float keys[kElements];
  // Logits of 16 bits are unpacked where they are loaded, which the biases need not wait for.
  if constexpr (sizeof(T) == 2) load_biases<kMode, kLanes, kFullChunks>(op.selection.experts, bias, quads, keys);
  load_tile<kLanes, kFullChunks>(row, op.selection.experts, kLanes == 8 || quads, logits, PassingLoads(passing));
  if constexpr (sizeof(T) == 4) load_biases<kMode, kLanes, kFullChunks>(op.selection.experts, bias, quads, keys);
  bool wanted = exists;
  if (op.token_mask != nullptr) wanted = exists && !is_masked(op, token);
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, 0,
                           exists ? static_cast<int>(own) * op.selection.k : -1};
  select_token<kMode, kLanes, kFullChunks>(op.selection, logits, keys, wanted, bias, GlobalRow<T>{row}, output,
                                           scratch[threadIdx.x / kLanes]);
}

template <class T, KeyMode kMode, int kThreads>
__global__ void __launch_bounds__(kThreads) activation_topk_block(const ActivationTopk op) {
  __shared__ BlockScratch<kThreads> scratch;
  const unsigned token = blockIdx.x;
  const unsigned expert = threadIdx.x;
  const bool exists = expert < static_cast<unsigned>(op.selection.experts);
  const bool has_bias = kMode == KeyMode::kScores || op.bias != nullptr;
  const uint64_t place = static_cast<uint64_t>(token) * static_cast<unsigned>(op.selection.experts) + expert;
  const float logits[] = {exists ? load_one(static_cast<const T*>(op.logits) + place) : -INFINITY};
  const float biases[] = {exists && has_bias ? __ldg(op.bias + token * op.bias_stride + expert) : 0.0f};
  const TokenOutput output{op.weights, op.expert_ids, op.chosen_logits, 0, static_cast<int>(token) * op.selection.k};
  scratch.clear(op.selection);
  select_token_of_block<kMode, kThreads>(op.selection, logits, has_bias, biases, !is_masked(op, token), output,
                                         scratch);
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
cudaError_t run_in_registers(const ActivationTopk& op, const ActivationTopkPlan& plan, cudaStream_t stream) {
  if constexpr (constexpr int kMost = most_block_threads(kMode); kMost > 0) {
    if (plan.tile == kBlockOfToken) {
      const auto kernel =
          plan.threads <= 256 ? activation_topk_block<T, kMode, 256> : activation_topk_block<T, kMode, kMost>;
      return launch_kernel(kernel, {plan.blocks, plan.threads}, stream, op);
    }
  }
  return with_index<kActivationTopkTileCount>(plan.tile, [&](auto index) {
    constexpr RowTile kTile = kActivationTopkTiles[decltype(index)::value];
    if constexpr (has_tile(kTile, dtype_of(T{}), kMode)) {
      const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T)) &&
                         rows_have_quads(op.bias, op.selection.experts, sizeof(float));
      const bool passing = logits_pass(op);
      const LaunchShape shape{plan.blocks, plan.threads};
      // Rows that fill their tile, as those of most models do, need not ask what lies within them.
      constexpr int kFilled = 4 * kTile.lanes * kTile.chunks;
      if constexpr (kFilled % 128 == 0 && kFilled <= 384) {
        if (op.selection.experts == kFilled) {
          return launch_kernel(activation_topk_tiles<T, kMode, kTile.lanes, kTile.chunks, kTile.chunks>, shape, stream,
                               op, quads, passing);
        }
      }
      return launch_kernel(activation_topk_tiles<T, kMode, kTile.lanes, kTile.chunks, kTile.full_chunks>, shape, stream,
                           op, quads, passing);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace

cudaError_t run(const ActivationTopk& op, const ActivationTopkPlan& plan, cudaStream_t stream) {
  return with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    if (plan.tile == kRowInShared) {
      const bool quads = rows_have_quads(op.logits, op.selection.experts, sizeof(T));
      return launch_kernel(activation_topk_long<T>, {plan.blocks, plan.threads, plan.threads / 32 * plan.warp_bytes},
                           stream, op, plan.warp_bytes, quads);
    }
    switch (key_mode(op)) {
      case KeyMode::kLogits:
        return run_in_registers<T, KeyMode::kLogits>(op, plan, stream);
      case KeyMode::kScores:
        return run_in_registers<T, KeyMode::kScores>(op, plan, stream);
      case KeyMode::kGroups:
        return run_in_registers<T, KeyMode::kGroups>(op, plan, stream);
    }
    return cudaErrorInvalidValue;
  });
}

}  // namespace jax_router::cuda
