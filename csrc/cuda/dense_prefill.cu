// The product of dense_router for many tokens: logits = x @ weight.T by warpgroup matrix products (wgmma).
//
// A thread block owns 128 tokens x kExperts experts x one slice of the hidden axis. One warp keeps the copy engine busy:
// stages of 64 hidden elements of both operands, swizzled, in a ring of shared memory; two warpgroups multiply 64 tokens
// each into registers. The blocks of a cluster hold neighbouring tokens and share the weight: each copies its part of a
// stage to all of them, so that the L2 serves the weight once a cluster. Slices of the hidden axis are added by whoever
// selects (dense_partials.cuh), so that few tokens fill the chip too.
// Floor: rows * experts * hidden multiply-adds on the tensor cores; x and the weight read once from device memory.
#include <algorithm>

#include "dense_product.cuh"
#include "hopper.cuh"
#include "load.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kTokens = 128;
constexpr int kDepth = 64;  // hidden elements a stage: 128 bytes a row
constexpr int kRingBytes = 192 * 1024;

struct PrefillShape {
  int64_t rows;
  int hidden;
  int splits;
  int expert_tiles;
  int row_stride;  // of the partial logits
};

// Accumulators of 64 tokens x kExperts experts, in columns of one wgmma each.
template <int kExperts>
constexpr int kColumns = kExperts <= 256 ? 1 : 2;

template <int kExperts>
struct alignas(1024) Stage {
  uint16_t x[kTokens * kDepth];
  uint16_t weight[kExperts * kDepth];
};

template <int kExperts>
constexpr int kStages = kRingBytes / static_cast<int>(sizeof(Stage<kExperts>));

template <int kExperts>
struct Shared {
  Stage<kExperts> stages[kStages<kExperts>];
  uint64_t full[kStages<kExperts>];
  uint64_t empty[kStages<kExperts>];
};

template <class T, int kExperts, int kCluster>
__global__ void __launch_bounds__(384, 1)
    multiply_tiles(const __grid_constant__ CUtensorMap x_map, const __grid_constant__ CUtensorMap weight_map,
                   const PrefillShape shape, float* partials) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kRing = kStages<kExperts>;
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<Shared<kExperts>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t{1023});
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;

  const int expert_tile = static_cast<int>(blockIdx.y) % shape.expert_tiles;
  const int split = static_cast<int>(blockIdx.y) / shape.expert_tiles;
  const int steps = (shape.hidden + kDepth - 1) / kDepth;
  const int first_step = static_cast<int>(static_cast<int64_t>(split) * steps / shape.splits);
  const int last_step = static_cast<int>(static_cast<int64_t>(split + 1) * steps / shape.splits);
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * kTokens;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kRing; ++i) {
      mbarrier_init(&shared.full[i], 1);
      mbarrier_init(&shared.empty[i], 8 * kCluster);
    }
    fence_mbarrier_init();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  }
  if constexpr (kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }

  if (warp < 4) {
    set_fewer_registers<40>();
    if (warp == 0 && lane == 0) {
      const int rank = kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
      constexpr int kShare = kExperts / kCluster;
      for (int step = first_step; step < last_step; ++step) {
        const int use = step - first_step;
        const int slot = use % kRing;
        Stage<kExperts>& stage = shared.stages[slot];
        if (use >= kRing) mbarrier_wait(&shared.empty[slot], (use / kRing - 1) & 1);
        mbarrier_expect_bytes(&shared.full[slot], sizeof(stage.x) + sizeof(stage.weight));
        copy_tile(stage.x, x_map, step * kDepth, static_cast<int>(first_token), &shared.full[slot]);
        const int share = rank * kShare;
        if constexpr (kCluster > 1) {
          copy_tile_multicast(stage.weight + share * kDepth, weight_map, step * kDepth, expert_tile * kExperts + share,
                              &shared.full[slot], (1 << kCluster) - 1);
        } else {
          for (int part = 0; part < kExperts; part += 128) {
            copy_tile(stage.weight + part * kDepth, weight_map, step * kDepth, expert_tile * kExperts + part,
                      &shared.full[slot]);
          }
        }
      }
    }
  } else {
    set_more_registers<232>();
    constexpr int kWidth = kExperts / kColumns<kExperts>;
    const int group = warp / 4 - 1;
    float sums[kColumns<kExperts>][kWidth / 2];
    for (int step = first_step; step < last_step; ++step) {
      const int use = step - first_step;
      const int slot = use % kRing;
      Stage<kExperts>& stage = shared.stages[slot];
      mbarrier_wait(&shared.full[slot], use / kRing & 1);
      const uint64_t x_tile = wgmma_descriptor(stage.x + group * 64 * kDepth);
      const uint64_t weight_tile = wgmma_descriptor(stage.weight);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
        for (int c = 0; c < kColumns<kExperts>; ++c) {
          constexpr int kStep = 16 * sizeof(T) / 16;
          wgmma(T{}, sums[c], x_tile + k * kStep, weight_tile + c * (kWidth * kDepth * sizeof(T) / 16) + k * kStep,
                use > 0 || k > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      // The products of the step before are finished, so its stage may be filled again.
      if (use > 0 && lane < kCluster) mbarrier_arrive(&shared.empty[(use - 1) % kRing], lane);
    }
    wgmma_wait<0>();

    float* tile = partials + (static_cast<int64_t>(split) * shape.rows + first_token) * shape.row_stride;
    const int row = group * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int c = 0; c < kColumns<kExperts>; ++c) {
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        const int expert = expert_tile * kExperts + c * kWidth + j * 8 + lane % 4 * 2;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = row + 8 * half;
          if (first_token + r < shape.rows && expert < shape.row_stride) {
            *reinterpret_cast<float2*>(tile + static_cast<int64_t>(r) * shape.row_stride + expert) =
                make_float2(defined(sums[c][4 * j + 2 * half]), defined(sums[c][4 * j + 2 * half + 1]));
          }
        }
      }
    }
  }
  // A block stays until its neighbours have stopped writing to it.
  if constexpr (kCluster > 1) cluster_sync();
#endif
}
