// expert_counts: how often each expert was chosen.
//
// The ids of one problem (tokens * k of them in flat order) are cut into chunks, one a thread block. A block counts its
// chunk in shared memory, in up to 32 copies of the counts, one for each lane of a warp, so that lanes do not wait for
// each other's additions, however the ids are distributed. The copies are added up, and each block of the cluster adds
// up some experts' counts of all its blocks, which these send it through distributed shared memory. With one cluster
// that is the result; with several a second kernel adds up the counts of the clusters. Sums of integers: the order of
// the additions, which is left to chance, does not show.
//
// Floor: 4 bytes a choice.
#include <cstdint>

#include "kernels.h"
#include "parts/cluster.cuh"
#include "parts/launch.cuh"
#include "parts/warp.cuh"

namespace jax_router::cuda {
namespace {

__device__ __forceinline__ const uint8_t* mask_of(const ExpertCounts& op, int64_t problem) {
  return op.token_mask + problem * op.tokens;
}

template <bool kMasked>
__global__ void __launch_bounds__(kCountThreads)
    expert_counts_of_clusters(const CountLayout layout, const ExpertCounts op, uint32_t* sums) {
  let_later_kernel_start();
  __shared__ TransferBarrier all_sent;
  extern __shared__ __align__(16) uint32_t shared_memory[];
  uint32_t* counts = shared_memory;                                    // [experts + 1][copies]
  uint32_t* received = counts + (layout.experts + 1) * layout.copies;  // [cluster_blocks][2^owned_bits]
  const uint32_t cluster_of_all = blockIdx.x / layout.cluster_blocks;
  const int64_t problem = cluster_of_all / layout.clusters;
  const uint32_t chunk = blockIdx.x % (layout.clusters * layout.cluster_blocks);
  const uint32_t first_owned = block_of_cluster() << layout.owned_bits;
  const uint32_t owned = min(1u << layout.owned_bits, layout.experts - min(first_owned, layout.experts));

  // Ids are numbered from the last address before them that a word may have. Up to three lie before the first whole
  // word of the chunk, and as many behind the last.
  const int32_t* ids = op.expert_ids + problem * layout.choices;
  const uint32_t shift = reinterpret_cast<uintptr_t>(ids) / sizeof(int32_t) % kCountIdsAtOnce;
  ids -= shift;
  const uint32_t begin = min(chunk * layout.chunk_choices, layout.choices) + shift;
  const uint32_t end = min(begin + layout.chunk_choices, layout.choices + shift);
  const uint32_t first_word = (begin + kCountIdsAtOnce - 1) / kCountIdsAtOnce;
  const uint32_t end_word = max(end / kCountIdsAtOnce, first_word);
  uint32_t word = first_word + threadIdx.x;
  int4 words[kCountWords];
  const auto load_words = [&] {
#pragma unroll
    for (int w = 0; w < kCountWords; ++w) {
      words[w] = make_int4(-1, -1, -1, -1);
      if (word + w * kCountThreads < end_word) {
        words[w] = __ldg(reinterpret_cast<const int4*>(ids) + word + w * kCountThreads);
      }
    }
  };
  load_words();  // they are on their way while all else is made ready
  constexpr uint32_t kApart = kCountIdsAtOnce - 1;
  const bool before = threadIdx.x < kApart;
  const uint32_t apart = before ? begin + threadIdx.x : end_word * kCountIdsAtOnce + threadIdx.x - kApart;
  const bool is_apart = threadIdx.x < 2 * kApart && apart < (before ? min(first_word * kCountIdsAtOnce, end) : end);
  const int32_t id_apart = is_apart ? ids[apart] : -1;

  const bool alone = layout.cluster_blocks == 1;
  if (threadIdx.x == 0 && !alone) init_transfers(&all_sent, 1);
  cluster_arrive_relaxed();
  auto* pieces = reinterpret_cast<uint4*>(counts);
  const uint32_t piece_bits = __ffs(layout.copies / kCopiesOfPiece) - 1;  // of an expert: 1 to 8 of them
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < layout.experts << piece_bits; i += kCountThreads) pieces[i] = {0, 0, 0, 0};
  __syncthreads();
  if (threadIdx.x == 0 && !alone) announce(address_of(&all_sent), layout.cluster_blocks * owned * sizeof(uint32_t));

  // Ids that count nowhere count behind the last expert.
  const uint32_t own_copy = address_of(counts + threadIdx.x % layout.copies);
  const uint32_t row_bytes = layout.copies * sizeof(uint32_t);
  const auto count = [&](int32_t id, uint32_t i) {
    const uint32_t expert = min(static_cast<uint32_t>(id), layout.experts);
    if (kMasked && (expert == layout.experts || (mask_of(op, problem)[layout.token_of(i - shift)] & 1) == 0)) return;
    add_one(own_copy + expert * row_bytes);
  };
  count(id_apart, apart);
  while (word < end_word) {
#pragma unroll
    for (int w = 0; w < kCountWords; ++w) {
      const uint32_t i = (word + w * kCountThreads) * kCountIdsAtOnce;
      count(words[w].x, i);
      count(words[w].y, i + 1);
      count(words[w].z, i + 2);
      count(words[w].w, i + 3);
    }
    word += kCountWords * kCountThreads;
    if (word < end_word) load_words();
  }
  __syncthreads();
  cluster_wait();  // every block has its barrier

  // As many lanes as an expert has pieces add these up; warps go together, to the last whole one.
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i - threadIdx.x % 32 < layout.experts << piece_bits; i += kCountThreads) {
    const uint32_t expert = i >> piece_bits;
    const uint4 piece = expert < layout.experts ? pieces[i] : uint4{0, 0, 0, 0};
    uint32_t sum = piece.x + piece.y + piece.z + piece.w;
    for (uint32_t lanes = 1u << piece_bits >> 1; lanes != 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
    if (expert < layout.experts && expert << piece_bits == i) {
      if (alone) {
        sums[cluster_of_all * int64_t{layout.experts} + expert] = sum;
      } else {
        const uint32_t owner = expert >> layout.owned_bits;
        const uint32_t place = ((block_of_cluster() - owner) << layout.owned_bits) + expert;
        send(address_in_block(received + place, owner), sum, address_in_block(&all_sent, owner));
      }
    }
  }
  if (alone || owned == 0) return;
  wait_for_transfers(&all_sent, 0);
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < owned; i += kCountThreads) {
    uint32_t sum = 0;
#pragma unroll 8
    for (uint32_t block = 0; block < layout.cluster_blocks; ++block) sum += received[(block << layout.owned_bits) + i];
    sums[static_cast<int64_t>(cluster_of_all) * layout.experts + first_owned + i] = sum;
  }
}

// Adds up the counts of the clusters, [problems, clusters, experts]; a thread has one expert of one problem.
__global__ void __launch_bounds__(kCountThreads)
    expert_counts_sum(const CountLayout layout, const ExpertCounts op, const uint32_t* cluster_counts) {
  wait_for_earlier_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCountThreads + threadIdx.x;
  if (i >= op.batch * layout.experts) return;
  const uint32_t* counts =
      cluster_counts + (i / layout.experts * layout.clusters) * layout.experts + i % layout.experts;
  uint32_t sum = 0;
#pragma unroll 16
  for (uint32_t cluster = 0; cluster < layout.clusters; ++cluster) sum += counts[int64_t{cluster} * layout.experts];
  op.counts[i] = static_cast<int32_t>(sum);
}

}  // namespace

cudaError_t run(const ExpertCounts& op, const ExpertCountsPlan& plan, cudaStream_t stream) {
  const CountLayout& layout = plan.layout;
  const bool alone = layout.clusters == 1;
  auto* sums = alone ? reinterpret_cast<uint32_t*>(op.counts) : static_cast<uint32_t*>(op.workspace.data);
  const LaunchShape shape{plan.blocks, kCountThreads, plan.shared_bytes, static_cast<int>(layout.cluster_blocks)};
  const auto kernel = op.token_mask == nullptr ? expert_counts_of_clusters<false> : expert_counts_of_clusters<true>;
  const cudaError_t error = launch_kernel(kernel, shape, stream, layout, op, sums);
  if (error != cudaSuccess || alone) return error;
  LaunchShape sum_shape{ceil_div(op.batch * layout.experts, kCountThreads), kCountThreads};
  sum_shape.overlaps = layout.cluster_blocks > 1;  // which the devices can that have clusters
  return launch_kernel(expert_counts_sum, sum_shape, stream, layout, op, static_cast<const uint32_t*>(sums));
}

}  // namespace jax_router::cuda
