// topk_select: the k largest of each row, exactly and deterministically, for any distribution.
//
// A row belongs to one thread block, or to a cluster of blocks that deal its 512-byte pieces out among themselves. A
// block reads its part of the row once, a batch at a time into registers, and appends to a buffer in shared memory only
// what can still be among the k best: pairs (key, index) no smaller than a bound. The bound comes from a sample of the
// first batch, and rises to the k-th best pair seen whenever the buffer is full. The first block of a cluster then
// takes the other blocks' candidates over distributed shared memory, selects exactly k of them, puts them in order and
// writes them.
//
// A bound from the buffer is certain, one from a sample is not: if fewer than k candidates were found, or the k-th of
// them is below some block's sampled bound, the row is read again with a certain bound. Random rows never need that.
//
// Nothing but the row is read from device memory, and nothing but the result is written.
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include <cooperative_groups.h>

#include <algorithm>
#include <cstdint>

#include "../common/score.h"
#include "block_select.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

namespace cg = cooperative_groups;

constexpr int kKeys = 16;  // that a thread holds at a time
constexpr int kMaxClusterBlocks = 16;

// How the rows are laid over the device.
struct Plan {
  int threads;
  int blocks;         // a row; more than one form a cluster
  uint32_t capacity;  // of a block's candidate buffer: at least k + 4 * threads
};

// No element has a key this small.
constexpr uint64_t kLowestBound = uint64_t{1} << 32;

// One batch of a block's part of a row: kKeys elements a thread, in vectors of 16 aligned bytes.
template <typename T>
struct Batch {
  static constexpr int kElements = 16 / sizeof(T);  // of a vector
  static constexpr int kVectors = kKeys / kElements;

  uint32_t keys[kKeys];  // kNoKey outside the row
  uint32_t first;        // index in the row of the first vector
  uint32_t stride;       // from one vector to the next

  // The index of key i. Indices are cheap to compute but many: the empty instruction keeps the compiler from computing
  // them long before their use.
  struct Indices {
    uint32_t first, stride;
    __device__ __forceinline__ uint32_t operator()(int i) const {
      return first + i / kElements * stride + i % kElements;
    }
  };
  __device__ __forceinline__ Indices indices() const {
    Indices indices{first, stride};
    asm volatile("" : "+r"(indices.first), "+r"(indices.stride));
    return indices;
  }

  // Whole vectors below `end`.
  __device__ __forceinline__ void load(const T* row, uint32_t end) {
    uint4 vectors[kVectors];
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t start = first + v * stride;
      vectors[v] = make_uint4(0, 0, 0, 0);
      if (start < end) vectors[v] = __ldg(reinterpret_cast<const uint4*>(row + start));
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const uint32_t key = order_key(element_of(vectors[i / kElements], i % kElements, T{}));
      keys[i] = first + i / kElements * stride < end ? key : kNoKey;
    }
  }

  // The element `first` alone, if `inside`.
  __device__ __forceinline__ void load_one_element(const T* row, bool inside) {
#pragma unroll
    for (int i = 0; i < kKeys; ++i) keys[i] = kNoKey;
    if (inside) keys[0] = order_key(load_one(row + first));
  }

  // Bit i: key i makes a pair no smaller than the bound.
  __device__ __forceinline__ uint32_t candidates(uint64_t bound) const {
    const uint32_t bound_key = pair_key(bound);
    uint32_t mask = 0;
    bool ties = false;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      mask |= keys[i] > bound_key ? 1u << i : 0;
      ties = ties || keys[i] == bound_key;
    }
    if (ties) {
      const Indices index = indices();
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        mask |= keys[i] == bound_key && index(i) <= pair_index(bound) ? 1u << i : 0;
      }
    }
    return mask;
  }

  // One element of each of the first `vectors` vectors, where they are in the row.
  __device__ __forceinline__ uint32_t sample(int vectors) const {
    uint32_t mask = 0;
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
      const bool chosen = i / kElements < vectors && i % kElements == threadIdx.x % kElements;
      mask |= chosen && keys[i] != kNoKey ? 1u << i : 0;
    }
    return mask;
  }
};

// What the blocks of a cluster tell each other.
struct Exchange {
  uint32_t count;    // candidates of this block
  uint64_t sampled;  // the bound that it took from a sample, or 0
  uint64_t bound;    // for reading the row again
  bool done;
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads) select_rows(TopkSelect op, Plan plan) {
  using Select = BlockSelect<kThreads>;
  constexpr int kWarps = kThreads / 32;
  constexpr int kElements = Batch<T>::kElements;
  constexpr uint32_t kStep = 4 * kThreads;  // appended at a time when the buffer is nearly full

  extern __shared__ uint64_t dynamic_shared[];
  __shared__ typename Select::Scratch scratch;
  __shared__ uint32_t counters[3];
  __shared__ uint32_t kept;
  __shared__ Exchange exchange, others[kMaxClusterBlocks];
  const Select select{scratch};
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const cg::cluster_group cluster = cg::this_cluster();
  const uint32_t block = plan.blocks > 1 ? cluster.block_rank() : 0;

  const int64_t row_index = blockIdx.x / plan.blocks;
  const T* row = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);

  uint64_t* pairs = dynamic_shared;
  uint64_t* spare = pairs + plan.capacity;
  uint32_t* fine = reinterpret_cast<uint32_t*>(spare + op.k);

  select.init();
  if (thread == 0) counters[0] = 0;
  int turn = 0;
  __syncthreads();

  // Adds the batch's elements in `mask` to the buffer, `count` pairs long, and returns how many all threads had. What
  // does not fit is dropped. The counters rotate: one is cleared while nobody uses it, a barrier before it is needed.
  const auto append = [&](const Batch<T>& batch, uint32_t mask, uint32_t count) -> uint32_t {
    uint32_t* counter = &counters[turn];
    turn = turn == 2 ? 0 : turn + 1;
    if (thread == 0) counters[turn] = 0;
    const uint32_t own = __popc(mask);
    uint32_t sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(Select::kFullWarp, sum, step);
      if (lane >= step) sum += other;
    }
    const uint32_t total = __shfl_sync(Select::kFullWarp, sum, 31);
    if (total != 0) {
      uint32_t place = 0;
      if (lane == 0) place = atomicAdd(counter, total);
      place = count + __shfl_sync(Select::kFullWarp, place, 0) + sum - own;
      const auto index = batch.indices();
#pragma unroll
      for (int bit = 0; bit < kKeys; ++bit) {
        if ((mask >> bit & 1) != 0) {
          if (place < plan.capacity) pairs[place] = order_pair(batch.keys[bit], index(bit));
          ++place;
        }
      }
    }
    __syncthreads();
    return *counter;
  };

  // Keeps the k best of the buffer and returns the k-th.
  const auto prune = [&](uint32_t count) -> uint64_t {
    if (thread == 0) kept = 0;
    const uint64_t bound = select.kth_largest(pairs, count, k, length, 0).pair;
    for (uint32_t i = thread; i < count; i += kThreads) {
      if (pairs[i] >= bound) spare[atomicAdd(&kept, 1)] = pairs[i];
    }
    __syncthreads();
    for (uint32_t i = thread; i < k; i += kThreads) pairs[i] = spare[i];
    __syncthreads();
    return bound;
  };

  // The row's whole vectors are [head, end). Pieces of 32 vectors go to one warp each. A batch takes every `batches`-th
  // piece of the row, so that the first batch is a sample. What lies outside whole vectors is a last, short batch.
  const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
  const uint32_t head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
  const uint32_t end = length - (length - head) % kElements;
  const uint32_t pieces = (end - head + 32 * kElements - 1) / (32 * kElements);
  const uint32_t pieces_a_batch = kWarps * Batch<T>::kVectors * plan.blocks;
  const uint32_t batches = (pieces + pieces_a_batch - 1) / pieces_a_batch;
  const uint32_t edges = head + length - end;

  uint32_t count = 0;
  typename Select::Kth kth = {0, 0};
  uint64_t bound = kLowestBound;
  bool sample = length > plan.capacity;
  const float share = __fdividef(static_cast<float>(k), static_cast<float>(length));
  const int sample_vectors = share * kThreads >= 32 ? 1 : share * kThreads >= 16 ? 2 : Batch<T>::kVectors;
  while (k != 0) {
    count = 0;
    uint64_t sampled = 0;
    for (uint32_t b = 0; b < batches + (edges != 0); ++b) {
      Batch<T> batch;
      if (b < batches) {
        const uint32_t piece = (warp * plan.blocks + block) * batches + b;
        batch.first = head + (piece * 32 + lane) * kElements;
        batch.stride = kWarps * plan.blocks * batches * 32 * kElements;
        batch.load(row, end);
      } else {
        batch.first = thread < head ? thread : end + thread - head;
        batch.load_one_element(row, block == 0 && thread < edges);
      }

      // The whole batch at once, or, where that does not fit, a step at a time.
      constexpr int kSample = -2, kWhole = -1;
      int step = sample ? kSample : kWhole;
      uint32_t candidates = step == kSample ? batch.sample(sample_vectors) : batch.candidates(bound);
      while (true) {
        const uint32_t mask = step < 0 ? candidates : candidates & 0xFu << 4 * step;
        const uint32_t added = append(batch, mask, count);
        if (step == kSample) {
          // The rank leaves five standard deviations for chance.
          const float expected = share * static_cast<float>(added);
          const uint32_t rank = static_cast<uint32_t>(expected + 5 * fast_sqrt(expected)) + 2;
          if (rank < added) bound = sampled = select.kth_largest(pairs, added, rank, length, rank / 8).pair;
          sample = false;
          step = kWhole;
        } else {
          if (count + added > plan.capacity) {
            step = 0;
          } else {
            count += added;
            if (step == kWhole || ++step == kKeys / 4) break;
          }
          if (count + kStep <= plan.capacity) continue;
          bound = prune(count);
          count = k;
        }
        candidates = batch.candidates(bound);
      }
    }

    if (plan.blocks > 1) {
      if (thread == 0) {
        exchange.count = count;
        exchange.sampled = sampled;
      }
      cluster.sync();
      if (block == 0) {
        if (thread < plan.blocks) others[thread] = *cluster.map_shared_rank(&exchange, thread);
        __syncthreads();
        uint32_t total = 0;
        for (int other = 1; other < plan.blocks; ++other) {
          total += others[other].count;
          sampled = max(sampled, others[other].sampled);
        }
        // As many pairs as fit at a time: pair number `first` of the other blocks and those after it.
        for (uint32_t first = 0; first < total;) {
          if (count == plan.capacity) {
            prune(count);
            count = k;
          }
          const uint32_t size = min(total - first, plan.capacity - count);
          const int warps_a_block = kWarps / plan.blocks;
          uint32_t start = 0;
          for (int other = 1; other < plan.blocks; ++other) {
            if (warp / warps_a_block == other) {
              const uint64_t* remote = cluster.map_shared_rank(pairs, other);
              for (uint32_t i = warp % warps_a_block * 32 + lane; i < others[other].count; i += warps_a_block * 32) {
                const uint32_t place = start + i - first;
                if (place < size) pairs[count + place] = remote[i];
              }
            }
            start += others[other].count;
          }
          __syncthreads();
          count += size;
          first += size;
        }
      }
    }

    if (block == 0) {
      if (count >= k) kth = select.kth_largest(pairs, count, k, length, 0);
      exchange.done = count >= k && kth.pair >= sampled;
      exchange.bound = count >= k ? kth.pair : kLowestBound;
    }
    if (plan.blocks > 1) {
      if (block == 0 && thread != 0 && thread < plan.blocks) {
        Exchange* remote = cluster.map_shared_rank(&exchange, thread);
        remote->done = count >= k && kth.pair >= sampled;
        remote->bound = count >= k ? kth.pair : kLowestBound;
      }
      cluster.sync();
    } else {
      __syncthreads();
    }
    if (exchange.done) break;
    bound = exchange.bound;
  }
  if (block != 0) return;

  if (k != 0) {
    if (op.sorted) {
      select.template order<true>(pairs, count, kth.pair, kth.best, k, length, spare, fine);
    } else {
      select.template order<false>(pairs, count, kth.pair, kth.best, k, length, spare, fine);
    }
  }
  for (uint32_t i = thread; i < op.k; i += kThreads) {
    if (i < k) {
      write_result(op, row_index, row, i, pairs[i]);
    } else {
      write_nothing<T>(op, row_index, i);
    }
  }
}

size_t shared_bytes(const TopkSelect& op, const Plan& plan) {
  const size_t fine = op.sorted ? (op.k + 1) / 2 * 2 * sizeof(uint32_t) : 0;
  return (plan.capacity + op.k) * sizeof(uint64_t) + fine;
}

Plan make_plan(const TopkSelect& op) {
  Plan plan{1024, 1, 0};
  if (op.rows > 132) plan.threads = op.length <= 4096 ? 256 : 512;
  while (plan.blocks < kMaxClusterBlocks && op.rows * plan.blocks * 2 <= 132 && op.length / plan.blocks >= 8192) {
    plan.blocks *= 2;
  }
  plan.capacity = static_cast<uint32_t>(op.k + std::max<int64_t>(4 * plan.threads, std::min<int64_t>(2 * op.k, 4096)));
  return plan;
}

template <typename T, int kThreads>
cudaError_t launch_rows(const TopkSelect& op, const Plan& plan, cudaStream_t stream) {
  const size_t shared = shared_bytes(op, plan);
  const auto kernel = select_rows<T, kThreads>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error != cudaSuccess) return error;
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
  if (op.length <= kMaxShortLength && op.k <= kMaxShortK) return launch_short_rows(op, stream);
  const Plan plan = make_plan(op);
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (plan.threads == 256) return launch_rows<T, 256>(op, plan, stream);
    if (plan.threads == 512) return launch_rows<T, 512>(op, plan, stream);
    return launch_rows<T, 1024>(op, plan, stream);
  });
}

}  // namespace jax_router::cuda
