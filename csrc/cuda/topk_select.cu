// topk_select for rows of any length: the k largest of each row, exactly and deterministically, for any distribution.
//
// A row belongs to one thread block, or to a cluster of blocks that each take part of it. A block streams its part
// through shared memory, 16 bytes a thread and step, with a few steps under way, and keeps what can still be among the
// k best: the pairs (key, index) no smaller than a bound that comes from a sample, the first few steps. The candidates
// of all blocks meet in the shared memory of the cluster's first block, which selects exactly k of them, puts them in
// order and writes them.
//
// Every thread reads back only what it fetched itself, and a step of a warp lies far from the steps of the others, so
// that the first steps are a fair sample of rows that have a trend. Should the bound be wrong (fewer than k candidates,
// or the k-th of them below some block's bound) or there be more candidates than fit, the row is read again with a
// bound that is certain: the k-th best of the pairs at hand. Each reading leaves fewer candidates; random rows never
// need a second.
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

constexpr int kStages = 4;  // steps under way, and steps that the sample is taken from
constexpr int kMaxClusterBlocks = 16;

// How the rows are laid over the device.
struct Plan {
  int threads;
  int blocks;         // a row; more than one form a cluster
  uint32_t capacity;  // candidates that a block can hold, and a sample
};

// No element has a key this small.
constexpr uint64_t kLowestBound = uint64_t{1} << 32;

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

  const T* row;
  uint32_t end;
  uint32_t steps;  // of whole vectors
  uint32_t first;  // index in the row of this thread's first vector; each step goes on 32 vectors
  uint32_t edge;   // index of this thread's element outside whole vectors, or length
  bool has_edges;
  uint4* ring;  // kStages vectors, kThreads apart

  __device__ __forceinline__ Stream(const T* row, uint32_t length, uint32_t block, uint32_t blocks, uint4* ring)
      : row(row), ring(ring + threadIdx.x) {
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    const uint32_t head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
    end = length - (length - head) % kElements;
    const uint32_t pieces = (end - head + 32 * kElements - 1) / (32 * kElements);  // one is a step of a warp
    const uint32_t warps = kThreads / 32 * blocks;
    steps = (pieces + warps - 1) / warps;
    const uint32_t warp = threadIdx.x / 32 * blocks + block;
    first = head + (warp * steps * 32 + threadIdx.x % 32) * kElements;
    edge = min(threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head, length);
    has_edges = block == 0 && head + length - end != 0;
  }

  __device__ __forceinline__ uint32_t index(uint32_t step) const { return first + step * 32 * kElements; }

  __device__ __forceinline__ void fetch(uint32_t step) const {
    const uint32_t i = index(step);
    if (step < steps && i < end) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       static_cast<uint32_t>(__cvta_generic_to_shared(slot(step)))),
                   "l"(row + i)
                   : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  __device__ __forceinline__ uint4* slot(uint32_t step) const { return ring + step % kStages * kThreads; }
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads) select_rows(TopkSelect op, Plan plan) {
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

  const auto add = [&](uint64_t pair, uint32_t place) {
    if (place < plan.capacity) pairs[place] = pair;
  };

  uint64_t bound = kLowestBound;
  typename Select::Kth kth = {0, 0};
  uint32_t count = 0;
  bool first_reading = true;
  while (k != 0) {
#pragma unroll 1
    for (uint32_t step = 0; step < kStages; ++step) stream.fetch(step);

    if (first_reading) {
      if (length > plan.capacity) {
        wait_for_fetches<0>();
#pragma unroll 1
        for (uint32_t step = 0; step < min(stream.steps, kStages); ++step) {
          const int e = threadIdx.x % kElements;
          const uint32_t i = stream.index(step);
          const bool inside = i < stream.end;
          const uint32_t ballot = __ballot_sync(kFullWarp, inside);
          uint32_t place = 0;
          if (threadIdx.x % 32 == 0) place = atomicAdd(&gathering.count, __popc(ballot));
          place = __shfl_sync(kFullWarp, place, 0) + threadIdx.x % 32;  // those inside come first
          if (inside) add(order_pair(order_key(element_of(*stream.slot(step), e, T{})), i + e), place);
        }
        __syncthreads();
        // One element of each vector. The rank leaves five standard deviations for chance.
        const uint32_t size = gathering.count;
        const float expected = __fdividef(static_cast<float>(k) * static_cast<float>(size), static_cast<float>(length));
        const uint32_t rank = static_cast<uint32_t>(expected + 5 * fast_sqrt(expected)) + 2;
        if (rank < size) bound = Select::kth_largest(size, rank, length, rank / 8).pair;
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
      const uint4 vector[1] = {*stream.slot(step)};
      stream.fetch(step + kStages);
      const uint32_t i = stream.index(step);
      // Seldom does one of a vector's elements reach the bound.
      if (i < stream.end && !(largest_element<T>(vector) < bound_element)) {
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const uint64_t pair = order_pair(order_key(element_of(vector[0], e, T{})), i + e);
          if (pair >= bound) add(pair, atomicAdd(&gathering.count, 1));
        }
      }
    }
    if (stream.has_edges && stream.edge < length) {
      const uint64_t pair = order_pair(order_key(load_one(row + stream.edge)), stream.edge);
      if (pair >= bound) add(pair, atomicAdd(&gathering.count, 1));
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

    uint64_t next_bound = kLowestBound;
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
      cluster_wait();
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
    if (op.sorted) {
      Select::template order<true>(count, kth.pair, kth.best, k, length, spare, fine);
    } else {
      Select::template order<false>(count, kth.pair, kth.best, k, length, spare, fine);
    }
  }
#pragma unroll 1
  for (uint32_t i = threadIdx.x; i < op.k; i += kThreads) {
    if (i < k) {
      write_result(op, row_index, row, i, pairs[i]);
    } else {
      write_nothing<T>(op, row_index, i);
    }
  }
}

template <int kThreads>
size_t shared_bytes(const TopkSelect& op, const Plan& plan) {
  const size_t ring = sizeof(uint4) * kStages * kThreads;
  const size_t ordering = sizeof(uint64_t) * op.k + sizeof(uint32_t) * (op.k + 1);
  return sizeof(PairSelect<kThreads>) + sizeof(uint64_t) * plan.capacity + std::max(ring, ordering);
}

Plan make_plan(const TopkSelect& op) {
  constexpr int kMultiprocessors = 132;
  Plan plan{512, 1, 0};
  if (op.rows > kMultiprocessors && op.length <= 16384) plan.threads = 256;
  // A cluster must have enough to share out: much, if its blocks are to take the last multiprocessors.
  if (device_has_clusters()) {
    const auto pays = [&](int64_t part) {
      const int64_t blocks = 2 * plan.blocks * op.rows;
      return part >= 32768 ? blocks <= kMultiprocessors : part >= 8192 && blocks <= kMultiprocessors / 2;
    };
    while (plan.blocks < kMaxClusterBlocks && pays(op.length / plan.blocks)) plan.blocks *= 2;
  }
  plan.capacity = static_cast<uint32_t>(op.k + std::min<int64_t>(std::max<int64_t>(2 * op.k, 4 * plan.threads), 4096));
  plan.capacity = (plan.capacity + 1) / 2 * 2;
  return plan;
}

template <typename T, int kThreads>
cudaError_t launch_rows(const TopkSelect& op, const Plan& plan, cudaStream_t stream) {
  const size_t shared = shared_bytes<kThreads>(op, plan);
  const auto kernel = select_rows<T, kThreads>;
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

}  // namespace

cudaError_t launch(const TopkSelect& op, cudaStream_t stream) {
  if (op.rows == 0 || op.k == 0) return cudaSuccess;
  if (op.length <= kMaxShortLength && op.k <= kMaxFewK) return launch_short_rows(op, stream);
  if (op.length <= kMaxBlockLength) return launch_block_rows(op, stream);
  const Plan plan = make_plan(op);
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan.threads == 256) return launch_rows<T, 256>(op, plan, stream);
    return launch_rows<T, 512>(op, plan, stream);
  });
}

}  // namespace jax_router::cuda
