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

// The ids first .. first + 3 of [begin, end); -1 in place of others. One load where their address allows it.
__device__ int4 load_ids(const int32_t* ids, int64_t first, int64_t begin, int64_t end) {
  if (first >= begin && first + kCountIdsAtOnce <= end) return __ldg(reinterpret_cast<const int4*>(ids + first));
  const auto one = [&](int64_t i) { return i >= begin && i < end ? ids[i] : -1; };
  return make_int4(one(first), one(first + 1), one(first + 2), one(first + 3));
}

__global__ void __launch_bounds__(kCountThreads)
    expert_counts_of_clusters(const CountLayout layout, const ExpertCounts op, uint32_t* sums) {
  let_later_kernel_start();
  extern __shared__ uint32_t shared_memory[];
  uint32_t* counts = shared_memory;                            // [experts][copies]
  uint32_t* totals = counts + layout.experts * layout.copies;  // [owned], of the cluster
  const uint32_t cluster_of_all = blockIdx.x / layout.cluster_blocks;
  const int64_t problem = cluster_of_all / layout.clusters;
  const uint32_t chunk = blockIdx.x % (layout.clusters * layout.cluster_blocks);

  auto* pieces = reinterpret_cast<uint4*>(counts);
  const uint32_t expert_pieces = layout.copies / kCopiesOfPiece;  // a power of two, up to 8
  for (uint32_t i = threadIdx.x; i < layout.experts * expert_pieces; i += kCountThreads) pieces[i] = {0, 0, 0, 0};
  for (uint32_t i = threadIdx.x; i < layout.owned; i += kCountThreads) totals[i] = 0;
  __syncthreads();
  cluster_arrive();  // others may add to this block's totals from now on

  // Ids are numbered from the last address before them that a word may have.
  const int32_t* ids = op.expert_ids + problem * layout.choices;
  const uint8_t* mask = op.token_mask == nullptr ? nullptr : op.token_mask + problem * op.tokens;
  const int64_t shift = reinterpret_cast<uintptr_t>(ids) / sizeof(int32_t) % kCountIdsAtOnce;
  ids -= shift;
  const int64_t begin = min(static_cast<int64_t>(chunk) * layout.chunk_choices, int64_t{layout.choices}) + shift;
  const int64_t end = min(begin + layout.chunk_choices, layout.choices + shift);
  uint32_t* own_copy = counts + threadIdx.x % layout.copies;
  const auto count = [&](int32_t id, int64_t i) {
    if (static_cast<uint32_t>(id) >= layout.experts) return;
    if (mask != nullptr && (mask[layout.token_of(static_cast<uint32_t>(i - shift))] & 1) == 0) return;
    atomicAdd(own_copy + static_cast<uint32_t>(id) * layout.copies, 1);
  };
  constexpr int64_t kStep = int64_t{kCountThreads} * kCountIdsAtOnce;
  int64_t first = begin / kCountIdsAtOnce * kCountIdsAtOnce + threadIdx.x * kCountIdsAtOnce;
  for (; first < end; first += kStep * kCountWords) {
    int4 words[kCountWords];
#pragma unroll
    for (int w = 0; w < kCountWords; ++w) words[w] = load_ids(ids, first + w * kStep, begin, end);
#pragma unroll
    for (int w = 0; w < kCountWords; ++w) {
      const int64_t i = first + w * kStep;
      count(words[w].x, i);
      count(words[w].y, i + 1);
      count(words[w].z, i + 2);
      count(words[w].w, i + 3);
    }
  }
  __syncthreads();
  cluster_wait();

  // As many lanes as an expert has pieces add these up; warps go together, to the last whole one.
  for (uint32_t i = threadIdx.x; i - threadIdx.x % 32 < layout.experts * expert_pieces; i += kCountThreads) {
    const uint32_t expert = i / expert_pieces;
    const uint4 piece = expert < layout.experts ? pieces[i] : uint4{0, 0, 0, 0};
    uint32_t sum = piece.x + piece.y + piece.z + piece.w;
    for (uint32_t lanes = expert_pieces / 2; lanes != 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
    if (sum != 0 && i % expert_pieces == 0) {
      remote_add(address_in_block(totals + expert % layout.owned, expert / layout.owned), sum);
    }
  }
  cluster_arrive();
  cluster_wait();

  const uint32_t first_owned = block_of_cluster() * layout.owned;
  for (uint32_t i = threadIdx.x; i < layout.owned && first_owned + i < layout.experts; i += kCountThreads) {
    sums[static_cast<int64_t>(cluster_of_all) * layout.experts + first_owned + i] = totals[i];
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
  const cudaError_t error = launch_kernel(expert_counts_of_clusters, shape, stream, layout, op, sums);
  if (error != cudaSuccess || alone) return error;
  LaunchShape sum_shape{ceil_div(op.batch * layout.experts, kCountThreads), kCountThreads};
  sum_shape.overlaps = layout.cluster_blocks > 1;  // which the devices can that have clusters
  return launch_kernel(expert_counts_sum, sum_shape, stream, layout, op, static_cast<const uint32_t*>(sums));
}

}  // namespace jax_router::cuda
