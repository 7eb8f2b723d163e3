// topk_select for rows that the registers of one thread block hold: each row is read once, 16 bytes a load, all loads
// under way together.
//
// Few choices (k up to kMaxFewK): each warp knows that the j largest of its threads' maxima are elements no smaller
// than the j-th of them. The least of these bounds over the warps is one that at least k elements reach, and seldom
// many more: those go to shared memory, where every thread counts how many of them beat its own.
//
// Many choices: a histogram over the elements rounded to f16 names the bin that holds the k-th largest. Its members are
// ranked, which gives the k-th pair, and all pairs no smaller are written, already in ascending order of the index.
// Best first, the bins are in order too, and each element's place is its rank in its bin.
//
// Where too many elements share a bin or reach the bound (narrow ranges, many equal elements), a bisection over the
// pairs (key, index) and PairSelect::order take over: slower, but the same for any row.
//
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include <climits>

#include "parts/launch.cuh"
#include "parts/pair_select.cuh"
#include "parts/tile.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kIndexBits = 32;  // the halves of a word need no shifts

// -inf in every element of a word.
template <typename T>
constexpr uint32_t kMinusInfinities = 0xFF800000u;
template <>
constexpr uint32_t kMinusInfinities<__nv_bfloat16> = 0xFF80FF80u;
template <>
constexpr uint32_t kMinusInfinities<__half> = 0xFC00FC00u;

// A row in the registers of a block: its whole vectors of 16 bytes, and the elements before and after these, the edges,
// one a thread. Vectors that do not exist hold -inf. `place` is the thread's among those that have vectors side by
// side.
template <typename T, int kThreads, int kVectors>
struct RegisterRow {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr uint32_t kStep = kThreads * kElements;  // from a thread's vector to its next

  uint4 vectors[kVectors];
  float edge = -INFINITY;
  uint32_t head;        // elements before the first whole vector
  uint32_t end;         // where the whole vectors end
  uint32_t first;       // index of this thread's first vector
  uint32_t edge_index;  // of this thread's edge
  bool has_edge;        // whether this thread has one
  bool has_edges;       // whether the row has

  __device__ __forceinline__ RegisterRow(const T* row, uint32_t length, uint32_t place = threadIdx.x) {
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
    end = length - (length - head) % kElements;
    first = head + place * kElements;
    row += first;
    asm("" : "+l"(row));  // one address with constant offsets
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      constexpr uint32_t kFill = kMinusInfinities<T>;
      vectors[v] = make_uint4(kFill, kFill, kFill, kFill);
      if (exists(v)) vectors[v] = __ldg(reinterpret_cast<const uint4*>(row + v * kStep));
    }
    has_edges = head + length - end != 0;
    edge_index = threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head;
    has_edge = edge_index < length;
    has_edge = has_edge && has_edges;
    if (has_edge) edge = load_one(row - first + edge_index);
  }

  __device__ __forceinline__ uint32_t index(int v) const { return first + v * kStep; }
  __device__ __forceinline__ bool exists(int v) const { return index(v) < end; }
  __device__ __forceinline__ float element(int v, int e) const { return element_of(vectors[v], e, T{}); }
  __device__ __forceinline__ uint64_t pair(int v, int e) const {
    return PairFormat<T>{kIndexBits}.pair(element(v, e), index(v) + e);
  }
  __device__ __forceinline__ uint64_t edge_pair() const { return PairFormat<T>{kIndexBits}.pair(edge, edge_index); }

  // The thread's largest element, NaN if one is.
  __device__ __forceinline__ float maximum() const { return max_nan(largest_element<T>(vectors), edge); }

  // Bit v * kElements + e for each element of a whole vector that `test` accepts.
  template <class Test>
  __device__ __forceinline__ uint32_t mask_of(Test test) const {
    static_assert(kVectors * kElements <= 32);
    uint32_t mask = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint32_t of_vector = 0;
#pragma unroll
      for (int e = 0; e < kElements; ++e) of_vector |= test(v, e) ? 1u << (v * kElements + e) : 0;
      if (exists(v)) mask |= of_vector;
    }
    return mask;
  }

  static __device__ __forceinline__ uint32_t key(float x) {
    return static_cast<uint32_t>(PairFormat<T>{kIndexBits}.pair(x, 0) >> kIndexBits);
  }
};

// A bound that at least k and at most `most` of a row's pairs reach, where the row has more than `most`. The k-th
// largest has a key between the least and the largest that any thread gives. The row is read again for each step: it is
// in the caches, and there are no registers for its pairs. For all threads together; `counts` is shared memory.
template <typename T, int kThreads>
__device__ __noinline__ uint64_t bisect(const T* row, uint32_t length, uint32_t key_min, uint32_t key_max, uint32_t k,
                                        uint32_t most, uint32_t (&counts)[2][kThreads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PairFormat<T> format = {kIndexBits};
  key_max = __reduce_max_sync(kFullWarp, key_max);
  key_min = __reduce_min_sync(kFullWarp, key_min);
  if (lane == 0) counts[0][warp] = key_max;
  if (lane == 0) counts[1][warp] = key_min;
  __syncthreads();
  key_max = __reduce_max_sync(kFullWarp, counts[0][lane % (kThreads / 32)]);
  key_min = __reduce_min_sync(kFullWarp, counts[1][lane % (kThreads / 32)]);
  __syncthreads();
  // Many equal elements are the usual reason to come here: only indices that exist are divided.
  uint64_t low = static_cast<uint64_t>(key_min) << kIndexBits | ~(length - 1);
  uint64_t high = static_cast<uint64_t>(key_max) << kIndexBits | 0xFFFFFFFFu;
  if (high != ~uint64_t{0}) ++high;
#pragma unroll 1
  for (int round = 0;; round ^= 1) {
    if (high - low == 1) return high;  // which no pair exceeds
    const uint64_t middle = low + (high - low) / 2;
    uint32_t own = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < length; i += kThreads) own += format.pair(load_one(row + i), i) >= middle;
    const uint32_t of_warp = __reduce_add_sync(kFullWarp, own);
    if (lane == 0) counts[round][warp] = of_warp;
    __syncthreads();
    const uint32_t count = __reduce_add_sync(kFullWarp, lane < kThreads / 32 ? counts[round][lane] : 0);
    (count < k ? high : low) = middle;
    if (count >= k && count <= most) return low;
  }
}

template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, (kVectors * 16 / sizeof(T) > 16 ? 768
                                             : sizeof(T) == 4               ? 1536
                                                                            : 1280) /
                                                kThreads) topk_select_few(const TopkSelect op) {
  using Row = RegisterRow<T, kThreads, kVectors>;
  constexpr int kWarps = kThreads / 32;
  constexpr uint32_t kMost = kThreads;                // candidates
  constexpr uint32_t kMostRanked = 5 * kThreads / 8;  // of them, to be compared each with all
  __shared__ alignas(16) uint64_t pairs[kMost];
  __shared__ alignas(16) int chosen_indices[kMaxFewK];
  __shared__ alignas(16) float warp_bounds[kWarps];
  __shared__ uint32_t counts[2][kWarps];
  __shared__ uint32_t count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int64_t row_index = blockIdx.x;
  const T* data = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  const PairFormat<T> format = {kIndexBits};
  // Warps take turns of 128 bytes where all have some: each has its part of the best of a sorted row.
  const bool takes_turns = length >= (kThreads + 1) * Row::kElements;
  const Row row(data, length, takes_turns ? (lane / 8 * kWarps + warp) * 8 + lane % 8 : threadIdx.x);
  pairs[threadIdx.x] = 0;
  if (threadIdx.x < kMaxFewK) chosen_indices[threadIdx.x] = INT_MAX;
  if (threadIdx.x == 0) count = 0;

  // Of the warps all of whose threads have an element, each owes its share of the bound.
  const uint32_t full_warps = min((row.end - row.head) / (32 * Row::kElements), static_cast<uint32_t>(kWarps));
  const uint32_t share = max((k + full_warps - 1) / max(full_warps, 1u), 1u);
  // A NaN is above +inf, and so is a thread that has one.
  const auto least_of_best = [&](float x, uint32_t share, uint32_t warps) {
    const float sorted = sort_descending<32>(x != x ? INFINITY : x);
    const float bound_of_warp = share <= 32 ? __shfl_sync(kFullWarp, sorted, share - 1) : -INFINITY;
    if (lane == 0) warp_bounds[warp] = bound_of_warp;
    __syncthreads();
    float bound = warps == 0 ? -INFINITY : warp_bounds[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      if (w < warps) bound = fminf(bound, warp_bounds[w]);
    }
    return bound;
  };
  const float maximum = row.maximum();
  const float bound = least_of_best(maximum, share, full_warps);
  uint32_t mask = row.mask_of([&](int v, int e) { return !(row.element(v, e) < bound); });
  bool edge_reaches = row.has_edge && !(row.edge < bound);

  const uint32_t own = __popc(mask) + (edge_reaches ? 1 : 0);
  const uint32_t sum = inclusive_sum_of_lanes(own);
  uint32_t free_place = 0;
  if (lane == 31 && sum != 0) free_place = atomicAdd(&count, sum);
  free_place = __shfl_sync(kFullWarp, free_place, 31) + sum - own;
#pragma unroll 1
  for (; mask != 0 && free_place < kMost; ++free_place, mask &= mask - 1) {
    const int i = __ffs(mask) - 1;
    const uint32_t index = row.first + i / Row::kElements * Row::kStep + i % Row::kElements;
    pairs[free_place] = format.pair(load_one(data + index), index);
  }
  if (edge_reaches && free_place < kMost) pairs[free_place] = row.edge_pair();
  __syncthreads();
  uint32_t candidates = count;
  if (candidates > kMost) {
    const uint64_t exact_bound =
        bisect<T, kThreads>(data, length, row.key(bound), row.key(maximum), k, kMostRanked, counts);
    pairs[threadIdx.x] = kNoPair;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < length; i += kThreads) {
      const uint64_t pair = format.pair(load_one(data + i), i);
      if (pair >= exact_bound) pairs[atomicAdd(&count, 1)] = pair;
    }
    __syncthreads();
    candidates = count;
  } else if (candidates > kMostRanked) {
    // More than chance brings, as of a sorted row: a bound from these, again of all warps.
    const uint64_t pair = pairs[lane * kWarps + warp];
    const float x = pair == kNoPair ? -INFINITY : format.element(pair);
    const float higher_bound = least_of_best(x, (k + kWarps - 1) / kWarps, kWarps);
    pairs[threadIdx.x] = kNoPair;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    if (pair != kNoPair && !(x < higher_bound)) pairs[atomicAdd(&count, 1)] = pair;
    __syncthreads();
    candidates = count;
  }
  const uint64_t pair = pairs[threadIdx.x];
  int place = 32 * warp < candidates ? count_larger(pair, pairs, candidates) : 0;
  const bool chosen = threadIdx.x < candidates && place < k;
  if (!op.sorted) {
    const int index = static_cast<int>(format.index(pair));
    if (chosen) chosen_indices[place] = index;
    __syncthreads();
    place = 0;
    if (32 * warp < candidates) {
#pragma unroll 4
      for (int begin = 0; begin < k; begin += 4) {
        const int4 others = *reinterpret_cast<const int4*>(chosen_indices + begin);
        place += (others.x < index) + (others.y < index) + (others.z < index) + (others.w < index);
      }
    }
  }
  if (chosen) write_result(op, row_index, data, place, format, pair);
  if (threadIdx.x >= k && threadIdx.x < op.k) write_nothing<T>(op, row_index, threadIdx.x);
}

// The element's own bits.
__device__ __forceinline__ void set_element(float* value, uint4 vector, int e) {
  *value = bits_float(word_of(vector, e));
}
template <typename Half>
__device__ __forceinline__ void set_element(Half* value, uint4 vector, int e) {
  const uint32_t word = word_of(vector, e / 2);
  *reinterpret_cast<unsigned short*>(value) = static_cast<unsigned short>(e % 2 == 0 ? word : word >> 16);
}

template <int kThreads>
using BlockSelect = PairSelect<kThreads, kBlockRowBins>;
static_assert(sizeof(BlockSelect<256>) == pair_select_bytes(256, kBlockRowBins));
static_assert(sizeof(BlockSelect<1024>) == pair_select_bytes(1024, kBlockRowBins));

template <typename T, int kThreads, int kVectors>
__global__ void __launch_bounds__(kThreads, kThreads == 1024 ? 1 : 1024 / kThreads)
    topk_select_many(const TopkSelect op) {
  using Row = RegisterRow<T, kThreads, kVectors>;
  using Select = BlockSelect<kThreads>;
  constexpr int kWarps = kThreads / 32;
  __shared__ uint32_t counts[2][kWarps];
  __shared__ uint32_t sizes[1 + kVectors * kWarps];  // how many are chosen: of the head, then by vector and warp
  __shared__ uint64_t exact_bound;
  __shared__ uint32_t count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int64_t row_index = blockIdx.x;
  const T* data = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  uint32_t* bins = Select::shared().bins;
  uint64_t* pairs = Select::pairs();
  const PairFormat<T> format = {kIndexBits};
  const Row row(data, length);
  Select::clear_bins();
  Select::init();
  if (threadIdx.x == 0) count = 0;
  __syncthreads();

  if (k != 0) {
    // Ascending bins hold descending elements.
    const auto bin_of = [](float x) {
      const uint32_t half = __half_as_ushort(__float2half_rn(x));
      return (half >> 15 != 0 ? half : half ^ 0x7FFFu) >> (16 - Select::kBinBits);
    };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!row.exists(v)) continue;
#pragma unroll
      for (int e = 0; e < Row::kElements; ++e) atomicAdd(&bins[bin_of(row.element(v, e))], 1);
    }
    if (row.has_edge) atomicAdd(&bins[bin_of(row.edge)], 1);
    __syncthreads();
    const bool crowded = Select::find_bin(k, op.sorted);
    const auto found = Select::shared().found;

    const auto append = [&](uint64_t pair) {
      const uint32_t place = atomicAdd(&count, 1);
      if (place < kThreads) pairs[place] = pair;
    };
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < Row::kElements; ++e) {
        if (row.exists(v) && bin_of(row.element(v, e)) == found.bin) append(row.pair(v, e));
      }
    }
    if (row.has_edge && bin_of(row.edge) == found.bin) append(row.edge_pair());
    if (threadIdx.x == 0 && found.count <= kThreads) pairs[found.count] = kNoPair;
    __syncthreads();
    if (found.count <= kThreads) {
      if (threadIdx.x < found.count) {
        const uint64_t pair = pairs[threadIdx.x];
        if (found.before + count_larger(pair, pairs, found.count) == k - 1) exact_bound = pair;
      }
    } else {
      uint32_t key_min = 0xFFFFFFFFu, key_max = 0;
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < length; i += kThreads) {
        const float x = load_one(data + i);
        if (bin_of(x) != found.bin) continue;
        key_min = min(key_min, row.key(x));
        key_max = max(key_max, row.key(x));
      }
      const uint64_t bound = bisect<T, kThreads>(data, length, key_min, key_max, k, k, counts);
      if (threadIdx.x == 0) exact_bound = bound;
    }
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    const uint64_t bound = exact_bound;

    const auto write = [&](uint32_t place, uint64_t pair) { write_result(op, row_index, data, place, format, pair); };
    if (op.sorted && !crowded) {
      // Several places are asked for before the first is used.
      constexpr uint32_t kNowhere = 0xFFFFFFFFu;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint32_t places[Row::kElements];
#pragma unroll
        for (int e = 0; e < Row::kElements; ++e) {
          places[e] =
              row.exists(v) && row.pair(v, e) >= bound ? atomicAdd(&bins[bin_of(row.element(v, e))], 1) : kNowhere;
        }
#pragma unroll
        for (int e = 0; e < Row::kElements; ++e) {
          if (places[e] != kNowhere) pairs[places[e]] = row.pair(v, e);
        }
      }
      if (row.has_edge && row.edge_pair() >= bound) pairs[atomicAdd(&bins[bin_of(row.edge)], 1)] = row.edge_pair();
      __syncthreads();
      // Now bins[b] is where bin b ends, and the next begins.
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
        const uint64_t pair = pairs[i];
        const uint32_t bin = bin_of(format.element(pair));
        uint32_t place = bin == 0 ? 0 : bins[bin - 1];
#pragma unroll 4
        for (uint32_t other = place, end = bins[bin]; other < end; ++other) place += pairs[other] > pair;
        write(place, pair);
      }
    } else if (op.sorted) {
      uint64_t best = 0;
      uint32_t varying = 0;
      const auto keep = [&](uint64_t pair) {
        best = max(best, pair);
        if (pair < bound) return;
        varying |= static_cast<uint32_t>((pair ^ bound) >> format.index_bits);
        pairs[atomicAdd(&count, 1)] = pair;
      };
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < Row::kElements; ++e) {
          if (row.exists(v)) keep(row.pair(v, e));
        }
      }
      if (row.has_edge) keep(row.edge_pair());
      const uint32_t key_max = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(best >> format.index_bits));
      varying = __reduce_or_sync(kFullWarp, varying);
      if (lane == 0) {
        atomicMax(&Select::shared().key_max, key_max);
        atomicOr(&Select::shared().key_varying, varying);
      }
      __syncthreads();
      varying = Select::shared().key_varying;
      best = (static_cast<uint64_t>(Select::shared().key_max) + 1 << format.index_bits) - 1;
      Select::template order<true>(k, bound, best, varying, k, format.index_bits, length, pairs + op.k, write);
    } else {
      const uint32_t mask = row.mask_of([&](int v, int e) { return row.pair(v, e) >= bound; });
      const auto mask_of_vector = [&](int v) { return mask >> (v * Row::kElements) & ((1u << Row::kElements) - 1); };
      uint32_t sums[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = inclusive_sum_of_lanes(__popc(mask_of_vector(v)));
        if (lane == 31) sizes[1 + v * kWarps + warp] = sums[v];
      }
      // The edges belong to the first warp.
      const uint32_t edges = __ballot_sync(kFullWarp, row.has_edge && row.edge_pair() >= bound);
      if (threadIdx.x == 0) sizes[0] = __popc(edges & ((1u << row.head) - 1));
      __syncthreads();
      T* values = static_cast<T*>(op.values) + row_index * op.k;
      int32_t* indices = op.indices + row_index * op.k;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint32_t before = 0;
        for (int i = lane; i < 1 + v * kWarps + warp; i += 32) before += sizes[i];
        uint32_t place = __reduce_add_sync(kFullWarp, before) + sums[v] - __popc(mask_of_vector(v));
#pragma unroll
        for (int e = 0; e < Row::kElements; ++e) {
          if ((mask_of_vector(v) >> e & 1) != 0) {
            set_element(values + place, row.vectors[v], e);
            indices[place] = static_cast<int32_t>(row.index(v) + e);
            ++place;
          }
        }
      }
      if ((edges >> lane & 1) != 0 && warp == 0) {
        const uint32_t earlier = edges & ((1u << lane) - 1);
        const uint32_t place = lane < row.head ? __popc(earlier) : k - __popc(edges & ~earlier);
        values[place] = data[row.edge_index];
        indices[place] = static_cast<int32_t>(row.edge_index);
      }
    }
  }
#pragma unroll 1
  for (uint32_t i = k + threadIdx.x; i < op.k; i += kThreads) write_nothing<T>(op, row_index, i);
}

}  // namespace

cudaError_t run_block(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream) {
  const LaunchShape shape{plan.blocks, plan.threads, plan.shared_bytes};
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    return with_index<kTopkInstanceCount>(plan.instance, [&](auto index) {
      constexpr TopkInstance kInstance = kTopkInstances[decltype(index)::value];
      if constexpr (has_instance(kInstance, dtype_of(T{}))) {
        if constexpr (kInstance.kernel == TopkKernel::kFew) {
          return launch_kernel(topk_select_few<T, kInstance.threads, kInstance.size>, shape, stream, op);
        } else if constexpr (kInstance.kernel == TopkKernel::kMany) {
          return launch_kernel(topk_select_many<T, kInstance.threads, kInstance.size>, shape, stream, op);
        }
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace jax_router::cuda
