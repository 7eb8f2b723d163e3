// topk_select: the choice of a kernel, and the kernel for rows of any length: the k largest of each row, exactly and
// deterministically, for any distribution.
//
// A row belongs to one thread block, or to a cluster of blocks that each take part of it. A block streams its part
// through shared memory, a few vectors of 16 bytes a thread and step, and keeps what can still be among the k best: the
// pairs (key, index) no smaller than a bound that comes from a sample, the first vectors of every thread. Few vectors
// hold such an element, and only those are looked at one by one. The candidates of all blocks meet in the shared memory
// of the cluster's first block, which selects exactly k of them, puts them in order and writes them.
//
// Every thread reads back only what it fetched itself, and a step of a warp lies far from the steps of the others, so
// that the first vectors are a fair sample of rows that have a trend. Should the bound be wrong (fewer than k
// candidates, or the k-th of them below some block's bound) or there be more candidates than fit, the row is read again
// with a bound that is certain: the k-th best of the pairs at hand. Each reading leaves fewer candidates; random rows
// never need a second.
//
// Nothing but the row is read from device memory, and nothing but the result is written.
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include <algorithm>
#include <cstdint>

#include "../common/score.h"
#include "cluster.cuh"
#include "pair_select.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kBatch = 4;   // vectors of a thread's step
constexpr int kStages = 2;  // steps under way
constexpr int kRing = kBatch * kStages;
constexpr int kSampled = 4;  // vectors of a thread that the sample is taken from
constexpr int kMaxClusterBlocks = 16;

// How the rows are laid over the device.
struct Plan {
  int threads;
  int blocks;         // a row; more than one form a cluster
  uint32_t capacity;  // candidates that a block can hold, and a sample
};

// Shared memory that the other blocks of a cluster write to.
struct Gathering {
  uint64_t doubts[kMaxClusterBlocks];  // in the first block: below this a block may have left candidates out
  uint64_t next_bound;                 // for reading the row again, or 0 if there is no need
  uint32_t count;                      // of candidates, those that found no room included
};
constexpr uint64_t kNoRoom = ~uint64_t{0};  // as a doubt: the block did leave candidates out

// Until at most `kPending` of this thread's steps are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_fetches() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A block's part of a row, step by step. The row's whole vectors of 16 bytes are [head, end); what lies outside them is
// one more step of the first block.
template <typename T, int kThreads>
struct Stream {
  static constexpr uint32_t kElements = 16 / sizeof(T);
  static constexpr uint32_t kPiece = 32 * kElements * kBatch;  // elements of a warp's step

  const T* row;
  uint32_t end;
  uint32_t steps;  // of whole vectors
  uint32_t first;  // index in the row of this thread's first vector; the next lie 32 vectors further each
  uint32_t edge;   // index of this thread's element outside whole vectors, or length
  bool has_edges;
  uint4* ring;  // kRing vectors, kThreads apart

  __device__ __forceinline__ Stream(const T* row, uint32_t length, uint32_t block, uint32_t blocks, uint4* ring)
      : row(row), ring(ring + threadIdx.x) {
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    const uint32_t head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
    end = length - (length - head) % kElements;
    const uint32_t pieces = (end - head + kPiece - 1) / kPiece;
    const uint32_t warps = kThreads / 32 * blocks;
    steps = (pieces + warps - 1) / warps;
    const uint32_t warp = threadIdx.x / 32 * blocks + block;
    first = head + warp * steps * kPiece + threadIdx.x % 32 * kElements;
    edge = min(threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head, length);
    has_edges = block == 0 && head + length - end != 0;
  }

  // Of this thread's vectors, counted through all steps.
  __device__ __forceinline__ uint32_t index(uint32_t vector) const { return first + vector * 32 * kElements; }
  __device__ __forceinline__ uint4* slot(uint32_t vector) const { return ring + vector % kRing * kThreads; }

  __device__ __forceinline__ void fetch(uint32_t step) const {
#pragma unroll
    for (uint32_t vector = step * kBatch; vector < step * kBatch + kBatch; ++vector) {
      if (step < steps && index(vector) < end) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                         static_cast<uint32_t>(__cvta_generic_to_shared(slot(vector)))),
                     "l"(row + index(vector))
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads) select_long_rows(TopkSelect op, Plan plan) {
  using Select = PairSelect<kThreads>;
  constexpr int kElements = 16 / sizeof(T);
  __shared__ Gathering gathering;
  __shared__ uint32_t start;

  const int64_t row_index = blockIdx.x / plan.blocks;
  const uint32_t block = blockIdx.x % plan.blocks;
  const T* row = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  uint64_t* pairs = Select::pairs();
  uint4* ring = reinterpret_cast<uint4*>(pairs + plan.capacity);
  const Stream<T, kThreads> stream(row, length, block, plan.blocks, ring);

  Select::init();
  if (threadIdx.x == 0) gathering.count = 0;
  __syncthreads();

  // Room for `own` more candidates of each lane: the first one's place. Called by whole warps.
  const auto reserve = [&](uint32_t own) {
    const uint32_t before = inclusive_sum_of_lanes(own);
    uint32_t place = 0;
    if (threadIdx.x % 32 == 31) place = atomicAdd(&gathering.count, before);
    return __shfl_sync(kFullWarp, place, 31) + before - own;
  };

  uint64_t bound = kLowestPair;
  typename Select::Kth kth = {0, 0};
  uint32_t count = 0;
  bool first_reading = true;
  while (k != 0) {
#pragma unroll 1
    for (uint32_t step = 0; step < kStages; ++step) stream.fetch(step);

    if (first_reading) {
      if (length > plan.capacity) {
        wait_for_fetches<0>();
        // Where few elements are among the k best, the largest of a vector counts for all of the vector: at least as
        // many elements reach any bound as maxima do.
        const bool sparse = 4 * kElements * k < length;
#pragma unroll 1
        for (uint32_t vector = 0; vector < kSampled; ++vector) {
          const uint32_t i = stream.index(vector);
          const bool inside = vector < stream.steps * kBatch && i < stream.end;
          const uint32_t insiders = __popc(__ballot_sync(kFullWarp, inside));
          if (threadIdx.x % 32 == 0) atomicAdd(&gathering.count, insiders);
          const uint4 elements[1] = {*stream.slot(vector)};
          const float one = element_of(elements[0], threadIdx.x % kElements, T{});
          const float element = sparse ? largest_element<T>(elements) : one;
          pairs[vector * kThreads + threadIdx.x] = inside ? order_pair(order_key(element), i) : kNoPair;
        }
        __syncthreads();
        const uint32_t size = gathering.count;
        const float sampled = static_cast<float>(sparse ? size * kElements : size);
        const float expected = __fdividef(static_cast<float>(k) * sampled, static_cast<float>(length));
        // Five standard deviations are left for chance.
        const uint32_t rank = static_cast<uint32_t>(expected + 5 * fast_sqrt(expected)) + 2;
        if (rank < size) bound = Select::kth_largest(kSampled * kThreads, rank, length, rank / 8).pair;
        __syncthreads();
        if (threadIdx.x == 0) gathering.count = 0;
        __syncthreads();
      }
      if (plan.blocks > 1) cluster_arrive();  // from here on other blocks may add to this block's candidates
    }

    const float bound_element = float_of_key(pair_key(bound));
#pragma unroll 1
    for (uint32_t step = 0; step < stream.steps; ++step) {
      wait_for_fetches<kStages - 1>();
      const uint32_t first_vector = step * kBatch;
      uint4 vectors[kBatch];
#pragma unroll
      for (int v = 0; v < kBatch; ++v) vectors[v] = *stream.slot(first_vector + v);
      // Of vectors that do not exist, the slots hold old elements: their bits of the mask stay 0.
      const bool reaches = stream.index(first_vector) < stream.end && !(largest_element<T>(vectors) < bound_element);
      if (__any_sync(kFullWarp, reaches)) {
        const auto pair_of = [&](uint32_t bit) {
          const uint32_t vector = first_vector + bit / kElements, e = bit % kElements;
          const T element = reinterpret_cast<const T*>(stream.slot(vector))[e];
          return order_pair(order_key(as_float(element)), stream.index(vector) + e);
        };
        uint32_t mask = 0;
        if (reaches) {
#pragma unroll
          for (int i = 0; i < kBatch * kElements; ++i) {
            const bool inside = i < kElements || stream.index(first_vector + i / kElements) < stream.end;
            if (inside && !(element_of(vectors[i / kElements], i % kElements, T{}) < bound_element)) mask |= 1u << i;
          }
        }
        if (!first_reading) {
          // Elements that equal the bound may be many: now only those that are not behind it.
#pragma unroll 1
          for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
            const uint32_t bit = __ffs(rest) - 1;
            if (pair_of(bit) < bound) mask ^= 1u << bit;
          }
        }
        uint32_t place = reserve(__popc(mask));
#pragma unroll 1
        for (; mask != 0 && place < plan.capacity; mask &= mask - 1) pairs[place++] = pair_of(__ffs(mask) - 1);
      }
      stream.fetch(step + kStages);
    }
    if (stream.has_edges && stream.edge < length) {
      const uint64_t pair = order_pair(order_key(load_one(row + stream.edge)), stream.edge);
      const uint32_t place = pair >= bound ? atomicAdd(&gathering.count, 1) : plan.capacity;
      if (place < plan.capacity) pairs[place] = pair;
    }
    __syncthreads();

    // Only the bound of a sample is uncertain, and a block that is alone needs but count what it found.
    const uint64_t doubt = first_reading && plan.blocks > 1 ? bound : 0;
    if (plan.blocks > 1) {
      if (first_reading) cluster_wait();
      if (block != 0) {
        const uint32_t size = min(gathering.count, plan.capacity);
        if (threadIdx.x == 0) {
          start = remote_add(address_in_block(&gathering.count, 0), size);
          remote_store(address_in_block(&gathering.doubts[block], 0), size < gathering.count ? kNoRoom : doubt);
        }
        __syncthreads();
        const uint32_t first_place = address_in_block(pairs + start, 0);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < size && start + i < plan.capacity; i += kThreads) {
          remote_store(first_place + i * sizeof(uint64_t), pairs[i]);
        }
      }
      cluster_arrive();
      cluster_wait();
    }

    uint64_t next_bound = kLowestPair;
    if (block == 0) {
      const bool all_here = gathering.count <= plan.capacity;
      count = min(gathering.count, plan.capacity);
      if (count >= k) {
        kth = Select::kth_largest(count, k, length, 0);
        const int other = threadIdx.x % 32;
        const uint64_t its_doubt = other == 0 ? doubt : other < plan.blocks ? gathering.doubts[other] : 0;
        const bool exact = kth.pair >= its_doubt;
        next_bound = __all_sync(kFullWarp, exact) && all_here ? 0 : kth.pair;
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) gathering.count = 0;
    if (plan.blocks > 1) {
      if (block == 0 && threadIdx.x != 0 && threadIdx.x < plan.blocks) {
        remote_store(address_in_block(&gathering.next_bound, threadIdx.x), next_bound);
      }
      cluster_arrive();
      if (next_bound != 0 || block != 0) cluster_wait();
      if (block != 0) next_bound = gathering.next_bound;
    } else {
      __syncthreads();
    }
    bound = next_bound;
    if (bound == 0) break;
    first_reading = false;
  }
  if (block != 0) return;

  if (k != 0) {
    uint64_t* spare = reinterpret_cast<uint64_t*>(ring);
    uint32_t* fine = reinterpret_cast<uint32_t*>(spare + k);
    const auto write = [&](uint32_t place, uint64_t pair) { write_result(op, row_index, row, place, pair); };
    if (op.sorted) {
      Select::template order<true>(count, kth.pair, kth.best, k, length, spare, fine, write);
    } else {
      Select::template order<false>(count, kth.pair, kth.best, k, length, spare, fine, write);
    }
  }
#pragma unroll 1
  for (uint32_t i = k + threadIdx.x; i < op.k; i += kThreads) write_nothing<T>(op, row_index, i);
  if (plan.blocks > 1 && k != 0) cluster_wait();
}

template <int kThreads>
size_t shared_bytes(const TopkSelect& op, const Plan& plan) {
  const size_t ring = sizeof(uint4) * kRing * kThreads;
  const size_t ordering = sizeof(uint64_t) * op.k + sizeof(uint32_t) * (op.k + 1);
  return sizeof(PairSelect<kThreads>) + sizeof(uint64_t) * plan.capacity + std::max(ring, ordering);
}

Plan make_plan(const TopkSelect& op) {
  Plan plan{512, 1, 0};
  if (op.rows > kMultiprocessors && op.length <= 32768) plan.threads = 256;
  // A cluster must have enough to share out: much, if its blocks are to take the last multiprocessors.
  if (device_has_clusters() && op.length > 16384) {
    const auto pays = [&](int64_t part) {
      const int64_t blocks = 2 * plan.blocks * op.rows;
      return part > 65536 ? blocks <= kMultiprocessors : part >= 16384 && blocks <= kMultiprocessors / 2;
    };
    while (plan.blocks < kMaxClusterBlocks && pays(op.length / plan.blocks)) plan.blocks *= 2;
  }
  const int64_t most = plan.blocks > 1 ? 4096 : 3072;  // so that a multiprocessor has room for two blocks
  plan.capacity = static_cast<uint32_t>(op.k + std::min<int64_t>(std::max<int64_t>(2 * op.k, 4 * plan.threads), most));
  plan.capacity = (plan.capacity + 1) / 2 * 2;
  return plan;
}

template <typename T, int kThreads>
cudaError_t launch_rows(const TopkSelect& op, const Plan& plan, cudaStream_t stream) {
  const size_t shared = shared_bytes<kThreads>(op, plan);
  const auto kernel = select_long_rows<T, kThreads>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  if (plan.blocks > 8) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(plan.blocks), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(op.rows * plan.blocks);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, op, plan);
}

cudaError_t launch_long_rows(const TopkSelect& op, cudaStream_t stream) {
  const Plan plan = make_plan(op);
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan.threads == 256) return launch_rows<T, 256>(op, plan, stream);
    return launch_rows<T, 512>(op, plan, stream);
  });
}

}  // namespace

// Which kernel takes which rows, by where their times cross on an H100.
cudaError_t launch(const TopkSelect& op, cudaStream_t stream) {
  if (op.rows == 0 || op.k == 0) return cudaSuccess;
  const bool few_rows = op.rows <= kMultiprocessors;
  if (op.length <= kMaxShortLength && op.k <= kMaxTileK) return launch_tile_rows(op, stream);
  // A warp for each row pays where rows are many, or so short that a block has nothing to share out.
  if (op.length <= (op.rows >= 1024 ? kMaxShortLength : 256) && op.k <= kMaxWarpK) return launch_warp_rows(op, stream);
  if (op.length <= kMaxBlockLength && op.k <= kMaxFewK) return launch_few_of_block_rows(op, stream);
  // The longest of these rows fill so many registers that few of them are under way at once.
  if (op.length <= (few_rows || op.k >= kMaxBlockLength / 6 ? kMaxBlockLength : kMaxBlockLength / 2)) {
    return launch_many_of_block_rows(op, stream);
  }
  return launch_long_rows(op, stream);
}

}  // namespace jax_router::cuda
