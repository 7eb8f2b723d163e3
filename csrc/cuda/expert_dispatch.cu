// expert_dispatch: a stable counting sort of expert ids.
//
// The choices of one sort (tokens * k ids in flat order) are cut into chunks, one a thread block, and a chunk into
// tiles. A block ranks every choice of a tile among the earlier choices of the same expert in that tile (each warp with
// a table of its own, then a scan over the warps' counts), orders the tile by expert in shared memory, and writes it
// out in runs: token_index to where its expert's run of the whole sort has got to, slot back in flat order. What a
// block must know of the others, the choices of each expert before its chunk, comes either through distributed shared
// memory, when one cluster of blocks holds the whole sort (one launch), or from a counting kernel that runs before (two
// launches; the second ranks its first tile while the first still counts).
//
// Ids outside [0, experts) count as one more expert, the last, which has no group: their choices have slot -1, as those
// beyond a group's capacity. Every block knows where all groups end, so the slots without a choice are shared out over
// the blocks of a sort: behind the choices of a group by one warp of one block, behind the last group by all threads.
//
// Most code runs once a block, and has to be fetched for that: loops there are unrolled no further than pays.
//
// Floor: 8 bytes a choice (id in, slot out) and 4 bytes a slot (token_index).
#include <cstdint>

#include "kernels.h"
#include "parts/cluster.cuh"
#include "parts/launch.cuh"
#include "parts/warp.cuh"

namespace jax_router::cuda {
namespace {

// Shared memory of a block, one array after the other.
struct Shared {
  uint32_t* masks;       // [warps][mask_bins] the lanes whose bin has these low bits; 0 between uses
  uint32_t* counts;      // [columns] choices of each bin in this block's chunk (or tile)
  uint32_t* next_slot;   // [columns] slot of the tile's first choice of each bin
  uint32_t* tile_start;  // [columns] the same within the tile
  uint32_t* ordered;     // [threads * rounds] bin << 16 | choice within the tile, ordered by bin
  uint16_t* ranks;       // [warps][columns] choices of each bin so far, then in earlier warps
  uint16_t* received;    // [cluster_blocks][columns] the counts of the cluster's blocks, where these send them
  uint32_t* kept_end;    // [experts] slot behind the last choice that a group keeps; in the place of ranks, of which
                         // nobody knows any more when a tile is ranked, and known where may_drop() alone
};

__device__ Shared carve_shared(const SortLayout& layout, int threads) {
  extern __shared__ __align__(16) uint32_t shared_memory[];
  Shared shared;
  shared.masks = shared_memory;
  shared.counts = shared.masks + threads / 32 * layout.mask_bins;
  shared.next_slot = shared.counts + layout.columns;
  shared.tile_start = shared.next_slot + layout.columns;
  shared.ordered = shared.tile_start + layout.columns;
  shared.ranks = reinterpret_cast<uint16_t*>(shared.ordered + threads * layout.rounds);
  shared.received = shared.ranks + threads / 32 * layout.columns;
  shared.kept_end = reinterpret_cast<uint32_t*>(shared.ranks);  // two warps or more have as much
  return shared;
}

// Sum of x over the threads before this one; `total` is the sum over all. Ends with a barrier.
template <int kThreads>
__device__ uint32_t exclusive_sum(uint32_t x, uint32_t& total) {
  constexpr int kWarps = kThreads / 32;
  __shared__ uint32_t warp_sums[kWarps];
  const uint32_t sum = exclusive_sum_of_block<kThreads>(x, warp_sums);
  const int lane = threadIdx.x % 32;
  total = __reduce_add_sync(kFullWarp, lane < kWarps ? warp_sums[lane] : 0);
  __syncthreads();
  return sum;
}

// A tile in registers: choice `first + lane + 32 * r` of the tile, a run of 32 * rounds for each warp.
template <uint32_t kRounds>
struct TileChoices {
  uint32_t bin[kRounds];
  uint32_t rank[kRounds];  // among the tile's choices of the same bin
};

__device__ uint32_t place_in_tile(const SortLayout& layout, int round) {
  return (threadIdx.x / 32 * layout.rounds + round) * 32 + threadIdx.x % 32;
}

__device__ void clear_masks(const SortLayout& layout, const Shared& shared, int threads) {
  uint4* masks = reinterpret_cast<uint4*>(shared.masks);
#pragma unroll 2
  for (uint32_t i = threadIdx.x; i < threads / 32 * layout.mask_bins / 4; i += threads)
    masks[i] = make_uint4(0, 0, 0, 0);
}

// Loads and ranks the choices [begin, end) and leaves counts, tile_start and ordered in shared memory. Needs clear
// masks, and leaves them clear. Tells `others` of the counts.
template <int kThreads, uint32_t kRounds, class Others>
__device__ TileChoices<kRounds> rank_tile(const SortLayout& layout, const Shared& shared, const int32_t* expert_ids,
                                          uint32_t begin, uint32_t end, const Others& others) {
  constexpr int kWarps = kThreads / 32;
  const uint32_t past_end = layout.bins();
  TileChoices<kRounds> tile;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const uint32_t choice = begin + place_in_tile(layout, r);
    tile.bin[r] = past_end;
    if (r < layout.rounds && choice < end) tile.bin[r] = min(static_cast<uint32_t>(expert_ids[choice]), layout.experts);
  }
  uint32_t* rank_words = reinterpret_cast<uint32_t*>(shared.ranks);
  const uint32_t words = layout.columns / 2;
#pragma unroll 2
  for (uint32_t i = threadIdx.x; i < kWarps * words; i += kThreads) rank_words[i] = 0;
  __syncthreads();

  uint16_t* warp_counts = shared.ranks + threadIdx.x / 32 * layout.columns;
  uint32_t* warp_masks = shared.masks + threadIdx.x / 32 * layout.mask_bins;
  const uint32_t own_lane = 1u << threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r < layout.rounds) {
      const uint32_t bin = tile.bin[r];
      uint32_t* mask = warp_masks + bin % kMaskBins;
      atomicOr(mask, own_lane);
      const uint32_t before = warp_counts[bin];
      __syncwarp();
      uint32_t peers = *mask;  // the lanes with the same bin
      for (uint32_t bit = kMaskBins; bit <= past_end; bit *= 2) {
        const bool set = (bin & bit) != 0;
        const uint32_t ballot = __ballot_sync(kFullWarp, set);
        peers &= set ? ballot : ~ballot;
      }
      const uint32_t earlier = peers & (own_lane - 1);
      tile.rank[r] = before + __popc(earlier);
      __syncwarp();
      *mask = 0;
      if (earlier == 0) warp_counts[bin] = before + __popc(peers);
      __syncwarp();
    }
  }
  __syncthreads();

  // A warp's counts become the sums over earlier warps, two bins a word; the sums over all warps are the tile's.
  others.wait_to_tell();
  for (uint32_t word = threadIdx.x; word < words; word += kThreads) {
    uint32_t counts[kWarps];
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) counts[warp] = rank_words[warp * words + word];
    uint32_t sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      rank_words[warp * words + word] = sum;
      sum += counts[warp];
    }
    shared.counts[2 * word] = sum & 0xFFFF;
    shared.counts[2 * word + 1] = sum >> 16;
    others.tell(word, sum);
  }
  __syncwarp();  // there may be a barrier next that a warp's lanes must reach together
  others.end_telling();
  __syncthreads();
  uint32_t carry = 0;
  for (uint32_t first = 0; first < layout.bins(); first += kThreads) {
    const uint32_t bin = first + threadIdx.x;
    uint32_t total;
    const uint32_t sum = exclusive_sum<kThreads>(bin < layout.bins() ? shared.counts[bin] : 0, total);
    if (bin < layout.bins()) shared.tile_start[bin] = carry + sum;
    carry += total;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const uint32_t bin = tile.bin[r];
    if (bin < past_end) {
      tile.rank[r] += warp_counts[bin];
      shared.ordered[shared.tile_start[bin] + tile.rank[r]] = bin << 16 | place_in_tile(layout, r);
    }
  }
  return tile;
}

__device__ bool has_slot(const SortLayout& layout, const Shared& shared, uint32_t bin, uint32_t slot) {
  return bin < layout.experts && (!layout.may_drop() || slot < shared.kept_end[bin]);
}

// Writes the tile out. Needs next_slot and kept_end, and a barrier before and after.
template <int kThreads, uint32_t kRounds>
__device__ void write_tile(const SortLayout& layout, const Shared& shared, const TileChoices<kRounds>& tile,
                           uint32_t begin, uint32_t end, int32_t* token_index, int32_t* slot) {
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r < layout.rounds) {
      const uint32_t bin = tile.bin[r];
      if (bin < layout.bins()) {
        const uint32_t own = shared.next_slot[bin] + tile.rank[r];
        slot[begin + place_in_tile(layout, r)] = has_slot(layout, shared, bin, own) ? static_cast<int32_t>(own) : -1;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const uint32_t place = r * kThreads + threadIdx.x;
    if (place < end - begin) {
      const uint32_t bin = shared.ordered[place] >> 16;
      const uint32_t choice = begin + (shared.ordered[place] & 0xFFFF);
      const uint32_t own = shared.next_slot[bin] + (place - shared.tile_start[bin]);
      if (has_slot(layout, shared, bin, own)) token_index[own] = layout.token_of(choice);
    }
  }
}

// The lanes of a warp, each with a range of slots, write -1 to the ranges of those that `mine` is true for.
__device__ void clear_slots(bool mine, uint32_t begin, uint32_t end, int32_t* token_index) {
  for (uint32_t lanes = __ballot_sync(kFullWarp, mine && begin < end); lanes != 0; lanes &= lanes - 1) {
    const int lane = __ffs(lanes) - 1;
    const uint32_t last = __shfl_sync(kFullWarp, end, lane);
#pragma unroll 1
    for (uint32_t slot = __shfl_sync(kFullWarp, begin, lane) + threadIdx.x % 32; slot < last; slot += 32) {
      token_index[slot] = -1;
    }
  }
}

// next_slot and kept_end of a chunk from counts(bin) = {choices of the bin before the chunk, in the whole sort}, and
// the chunk's share of the slots without a choice. The first chunk also writes group_sizes.
template <int kThreads, typename Counts>
__device__ void find_slots(const SortLayout& layout, const Shared& shared, Counts counts, uint32_t chunk,
                           int32_t* group_sizes, int32_t* token_index) {
  uint32_t carry = 0;
  for (uint32_t first = 0; first < layout.experts; first += kThreads) {
    const uint32_t bin = first + threadIdx.x;
    uint2 count = {0, 0};
    if (bin < layout.experts) count = counts(bin);
    const uint32_t kept = min(count.y, layout.capacity);
    const uint32_t size = layout.size_of_group(kept);
    uint32_t total;
    const uint32_t begin = carry + exclusive_sum<kThreads>(size, total);
    if (bin < layout.experts) {
      shared.next_slot[bin] = begin + count.x;
      if (layout.may_drop()) shared.kept_end[bin] = begin + kept;
      if (chunk == 0) group_sizes[bin] = size;
    }
    if (layout.align > 1) clear_slots(bin % layout.chunks == chunk, begin + kept, begin + size, token_index);
    carry += total;
  }
#pragma unroll 1
  for (uint32_t slot = carry + chunk * kThreads + threadIdx.x; slot < layout.slots; slot += layout.chunks * kThreads) {
    token_index[slot] = -1;
  }
}

// {sum of load(i) over i < mine, over i < size}. All loads are under way before the first is needed; where they may be
// so many that registers run out, there are none but those below `size`.
template <int kMaxSize, typename Load>
__device__ uint2 sum_before_and_all(uint32_t mine, uint32_t size, Load load) {
  uint32_t counts[kMaxSize];
#pragma unroll
  for (uint32_t i = 0; i < kMaxSize; ++i) counts[i] = kMaxSize <= 16 || i < size ? load(min(i, size - 1)) : 0;
  uint2 sum = {0, 0};
#pragma unroll
  for (uint32_t i = 0; i < kMaxSize; ++i) {
    sum.x += i < mine ? counts[i] : 0;
    sum.y += i < size ? counts[i] : 0;
  }
  return sum;
}

// A block that nobody waits for.
struct NoOthers {
  __device__ void wait_to_tell() const {}
  __device__ void tell(uint32_t, uint32_t) const {}
  __device__ void end_telling() const {}
};

// The blocks of a cluster, each of which needs the counts of all: they send them where there is room for so many, and
// read each other's elsewhere.
class OthersOfCluster {
 public:
  __device__ OthersOfCluster(const SortLayout& layout, const Shared& shared, TransferBarrier* all_sent)
      : layout_(layout), shared_(shared), all_sent_(all_sent) {
    if (!layout.sends) return;
    if (threadIdx.x == 0) init_transfers(all_sent, 1);
    cluster_arrive_relaxed();
  }
  // Behind a barrier of the block.
  __device__ void wait_to_tell() const {
    if (!layout_.sends) return;
    if (threadIdx.x == 0) {
      announce(address_of(all_sent_), layout_.cluster_blocks * layout_.columns * sizeof(uint16_t));
    }
    cluster_wait();  // every block has its barrier
  }
  // Of the bins 2 * word and 2 * word + 1, a half of `counts` each.
  __device__ void tell(uint32_t word, uint32_t counts) const {
    if (!layout_.sends) return;
    const uint32_t* place =
        reinterpret_cast<const uint32_t*>(shared_.received + block_of_cluster() * layout_.columns) + word;
    for (uint32_t block = 0; block < layout_.cluster_blocks; ++block) {
      send(address_in_block(place, block), counts, address_in_block(all_sent_, block));
    }
  }
  __device__ void end_telling() const {
    if (is_read()) cluster_arrive();
  }
  __device__ void wait_for_counts() const {
    if (layout_.sends) wait_for_transfers(all_sent_, 0);
    if (is_read()) cluster_wait();
  }
  // Calls body(counts), where counts(bin) = {choices of the bin in earlier blocks, in all}.
  template <typename Body>
  __device__ void with_counts(Body body) const {
    const auto sum = [&](auto load) {
      return sum_before_and_all<kMaxSortBlocks>(block_of_cluster(), layout_.cluster_blocks, load);
    };
    if (layout_.cluster_blocks == 1) {
      body([&](uint32_t bin) { return uint2{0, shared_.counts[bin]}; });
    } else if (layout_.sends) {
      body([&](uint32_t bin) {
        return sum([&](uint32_t block) { return shared_.received[block * layout_.columns + bin]; });
      });
    } else {
      body([&](uint32_t bin) {
        return sum([&](uint32_t block) { return remote_load(address_in_block(shared_.counts + bin, block)); });
      });
    }
  }
  // No block may leave while another reads its counts.
  __device__ void end_reading() const {
    if (is_read()) cluster_arrive_relaxed();
  }
  __device__ void wait_to_leave() const {
    if (is_read()) cluster_wait();
  }

 private:
  __device__ bool is_read() const { return layout_.cluster_blocks > 1 && !layout_.sends; }

  const SortLayout& layout_;
  const Shared& shared_;
  TransferBarrier* all_sent_;
};

// One cluster a sort, one tile a block.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads)
    expert_dispatch_in_cluster(SortLayout layout, ExpertDispatch op) {
  __shared__ TransferBarrier all_sent;
  const Shared shared = carve_shared(layout, kThreads);
  const OthersOfCluster others(layout, shared, &all_sent);
  const int64_t sort = blockIdx.x / layout.chunks;
  const uint32_t chunk = block_of_cluster();
  const int64_t offset = sort * layout.choices;
  int32_t* token_index = op.token_index + sort * layout.slots;
  const uint32_t begin = min(chunk * layout.chunk_choices, layout.choices);
  const uint32_t end = min(begin + layout.chunk_choices, layout.choices);

  clear_masks(layout, shared, kThreads);
  const auto tile = rank_tile<kThreads, kClusterRounds>(layout, shared, op.expert_ids + offset, begin, end, others);
  others.wait_for_counts();
  others.with_counts([&](auto counts) {
    find_slots<kThreads>(layout, shared, counts, chunk, op.group_sizes + sort * layout.experts, token_index);
  });
  __syncthreads();
  others.end_reading();
  write_tile<kThreads>(layout, shared, tile, begin, end, token_index, op.slot + offset);
  others.wait_to_leave();
}

// Long sorts, first kernel. Workspace: the choices of each bin in earlier chunks of the same cluster [batch, chunks,
// bins], and in each cluster [batch, clusters, bins]. Each block adds up some bins, whose counts the others send it.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 2048 / kThreads)
    expert_dispatch_count(SortLayout layout, ExpertDispatch op, uint32_t* chunk_counts, uint32_t* cluster_counts) {
  let_later_kernel_start();
  __shared__ TransferBarrier all_sent;
  extern __shared__ uint32_t counts[];                    // [bins + 1]
  uint32_t* const received = counts + layout.bins() + 1;  // [cluster_blocks][2^owned_bits]
  const int64_t sort = blockIdx.x / layout.chunks;
  const uint32_t chunk = blockIdx.x % layout.chunks;
  const uint32_t begin = min(chunk * layout.chunk_choices, layout.choices);
  const uint32_t end = min(begin + layout.chunk_choices, layout.choices);
  const int32_t* expert_ids = op.expert_ids + sort * layout.choices;
  const bool alone = layout.cluster_blocks == 1;
  const uint32_t first_owned = block_of_cluster() << layout.owned_bits;
  const uint32_t owned = min(1u << layout.owned_bits, layout.bins() - min(first_owned, layout.bins()));
  if (threadIdx.x == 0 && !alone) init_transfers(&all_sent, 1);
  cluster_arrive_relaxed();

  for (uint32_t bin = threadIdx.x; bin < layout.bins(); bin += kThreads) counts[bin] = 0;
  __syncthreads();
  if (threadIdx.x == 0 && !alone) announce(address_of(&all_sent), layout.cluster_blocks * owned * sizeof(uint32_t));
  constexpr int kLoads = 4;
  for (uint32_t first = begin + threadIdx.x; first < end; first += kLoads * kThreads) {
    uint32_t bin[kLoads];
#pragma unroll
    for (int r = 0; r < kLoads; ++r) {
      const uint32_t choice = first + r * kThreads;
      bin[r] = choice < end ? min(static_cast<uint32_t>(expert_ids[choice]), layout.experts) : layout.bins();
    }
#pragma unroll
    for (int r = 0; r < kLoads; ++r) add_one(address_of(counts) + bin[r] * sizeof(uint32_t));
  }
  __syncthreads();
  cluster_wait();  // every block has its barrier

  chunk_counts += static_cast<int64_t>(blockIdx.x - block_of_cluster()) * layout.bins();
  cluster_counts += static_cast<int64_t>(blockIdx.x / layout.cluster_blocks) * layout.bins();
  for (uint32_t bin = threadIdx.x; bin < layout.bins(); bin += kThreads) {
    if (alone) {
      chunk_counts[bin] = 0;
      cluster_counts[bin] = counts[bin];
    } else {
      const uint32_t owner = bin >> layout.owned_bits;
      const uint32_t place = ((block_of_cluster() - owner) << layout.owned_bits) + bin;
      send(address_in_block(received + place, owner), counts[bin], address_in_block(&all_sent, owner));
    }
  }
  if (alone || owned == 0) return;
  wait_for_transfers(&all_sent, 0);
  for (uint32_t i = threadIdx.x; i < owned; i += kThreads) {
    uint32_t sum = 0;
    for (uint32_t block = 0; block < layout.cluster_blocks; ++block) {
      chunk_counts[block * layout.bins() + first_owned + i] = sum;
      sum += received[(block << layout.owned_bits) + i];
    }
    cluster_counts[first_owned + i] = sum;
  }
}

// Of the long sorts' second kernel, on a multiprocessor at once: with 64 registers each, but before compute
// capability 9.0, where the compiler wants some more, and there are fewer blocks than multiprocessors.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kLongSortThreads = 768;
#else
constexpr int kLongSortThreads = 1024;
#endif

// Long sorts, second kernel: one block a chunk, tile after tile. Once a block has read its part of chunk_counts, it
// keeps kept_end there from tile to tile.
template <int kThreads, uint32_t kClusters, uint32_t kRounds>
__global__ void __launch_bounds__(kThreads, kLongSortThreads / kThreads)
    expert_dispatch_sort(SortLayout layout, ExpertDispatch op, uint32_t* chunk_counts, const uint32_t* cluster_counts) {
  const Shared shared = carve_shared(layout, kThreads);
  const int64_t sort = blockIdx.x / layout.chunks;
  const uint32_t chunk = blockIdx.x % layout.chunks;
  const int64_t offset = sort * layout.choices;
  int32_t* token_index = op.token_index + sort * layout.slots;
  const uint32_t chunk_begin = min(chunk * layout.chunk_choices, layout.choices);
  const uint32_t chunk_end = min(chunk_begin + layout.chunk_choices, layout.choices);
  const uint32_t tile_choices = kThreads * layout.rounds;
  chunk_counts += static_cast<int64_t>(blockIdx.x) * layout.bins();
  cluster_counts += sort * layout.clusters() * layout.bins();

  clear_masks(layout, shared, kThreads);
  uint32_t begin = chunk_begin;
  do {
    const uint32_t end = min(begin + tile_choices, chunk_end);
    const auto tile = rank_tile<kThreads, kRounds>(layout, shared, op.expert_ids + offset, begin, end, NoOthers());
    if (begin == chunk_begin) {
      wait_for_earlier_kernel();
      const auto counts = [&](uint32_t bin) {
        const uint32_t before_in_cluster = chunk_counts[bin];
        uint2 sum = sum_before_and_all<kClusters>(
            chunk / layout.cluster_blocks, layout.clusters(),
            [&](uint32_t cluster) { return cluster_counts[cluster * layout.bins() + bin]; });
        sum.x += before_in_cluster;
        return sum;
      };
      find_slots<kThreads>(layout, shared, counts, chunk, op.group_sizes + sort * layout.experts, token_index);
      if (layout.may_drop() && end < chunk_end) {  // a thread has the same bins here, in find_slots and below
        for (uint32_t bin = threadIdx.x; bin < layout.experts; bin += kThreads)
          chunk_counts[bin] = shared.kept_end[bin];
      }
    } else if (layout.may_drop()) {
      __syncthreads();
      for (uint32_t bin = threadIdx.x; bin < layout.experts; bin += kThreads) shared.kept_end[bin] = chunk_counts[bin];
    }
    __syncthreads();
    write_tile<kThreads>(layout, shared, tile, begin, end, token_index, op.slot + offset);
    begin = end;
    if (begin < chunk_end) {
      __syncthreads();
      for (uint32_t bin = threadIdx.x; bin < layout.experts; bin += kThreads)
        shared.next_slot[bin] += shared.counts[bin];
      __syncthreads();
    }
  } while (begin < chunk_end);
}

// As much of a multiprocessor's memory as there is for shared memory, whatever one block asks for.
template <class Kernel>
cudaError_t prepare_sort(Kernel* kernel, const LaunchShape& shape) {
  const cudaError_t error = prepare(kernel, shape);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

template <int kThreads>
cudaError_t run_in_cluster(const ExpertDispatch& op, const ExpertDispatchPlan& plan, cudaStream_t stream) {
  const auto kernel = expert_dispatch_in_cluster<kThreads>;
  const LaunchShape shape{plan.blocks, kThreads, plan.shared_bytes, static_cast<int>(plan.layout.cluster_blocks)};
  const cudaError_t error = prepare_sort(kernel, shape);
  return error != cudaSuccess ? error : launch_prepared(kernel, shape, stream, plan.layout, op);
}

template <int kThreads, uint32_t kClusters, uint32_t kRounds>
cudaError_t run_counted(const ExpertDispatch& op, const ExpertDispatchPlan& plan, cudaStream_t stream) {
  const SortLayout& layout = plan.layout;
  const auto count = expert_dispatch_count<kThreads>;
  const auto sort = expert_dispatch_sort<kThreads, kClusters, kRounds>;
  uint32_t* chunk_counts = static_cast<uint32_t*>(op.workspace.data);
  uint32_t* cluster_counts = chunk_counts + plan.blocks * layout.bins();
  const LaunchShape count_shape{plan.blocks, kThreads, count_shared_bytes(layout),
                                static_cast<int>(layout.cluster_blocks)};
  LaunchShape sort_shape{plan.blocks, kThreads, plan.shared_bytes};
  sort_shape.overlaps = layout.cluster_blocks > 1;  // which the devices can that have clusters
  // Both are prepared first: the second launch should follow the first as soon as it can.
  cudaError_t error = prepare_sort(count, count_shape);
  if (error == cudaSuccess) error = prepare_sort(sort, sort_shape);
  if (error == cudaSuccess) {
    error = launch_prepared(count, count_shape, stream, layout, op, chunk_counts, cluster_counts);
  }
  if (error != cudaSuccess) return error;
  return launch_prepared(sort, sort_shape, stream, layout, op, chunk_counts,
                         static_cast<const uint32_t*>(cluster_counts));
}

template <int kThreads>
cudaError_t run_with(const ExpertDispatch& op, const ExpertDispatchPlan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case SortKernel::kCluster:
      return run_in_cluster<kThreads>(op, plan, stream);
    case SortKernel::kOneWave:
      return run_counted<kThreads, kOneWaveCut.clusters, kOneWaveCut.rounds>(op, plan, stream);
    case SortKernel::kLonger:
      return run_counted<kThreads, kLongerCut.clusters, kLongerCut.rounds>(op, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t run(const ExpertDispatch& op, const ExpertDispatchPlan& plan, cudaStream_t stream) {
  switch (plan.threads) {
    case kSortThreads[0]:
      return run_with<kSortThreads[0]>(op, plan, stream);
    case kSortThreads[1]:
      return run_with<kSortThreads[1]>(op, plan, stream);
    case kSortThreads[2]:
      return run_with<kSortThreads[2]>(op, plan, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jax_router::cuda
