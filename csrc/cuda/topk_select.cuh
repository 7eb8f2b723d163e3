// What one thread block does with (key, index) pairs in shared memory: find the k-th largest, and put the k largest in
// order. Pairs (order_pair) are all distinct, so that ties are no special case anywhere.
//
// Both go by histograms whose bins divide the range of pairs that is really there, and divide it again where too many
// fell into one bin. Narrow ranges, equal keys and outliers therefore cost at most a few more rounds.
#pragma once

#include <cstdint>

#include "../common/order.h"

namespace jax_router::cuda {

template <int kThreads>
struct BlockSelect {
  static constexpr unsigned kFullWarp = 0xFFFFFFFFu;
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBins = 2 * kThreads;
  static constexpr int kBinBits = kThreads == 1024 ? 11 : kThreads == 512 ? 10 : kThreads == 256 ? 9 : 8;
  static_assert(kBins == 1 << kBinBits);

  // Shared memory of fixed size.
  struct Scratch {
    alignas(16) uint32_t bins[kBins];
    uint32_t warp_sums[kWarps];
    uint32_t key_max, key_min;
    struct {
      uint32_t bin, before, count;
    } found;
  };

  struct Kth {
    uint64_t pair;  // exactly k pairs, or up to `slack` more, are no smaller
    uint64_t best;  // no pair is larger
  };

  Scratch& scratch;

  // Before the first use of a Scratch; a barrier must follow.
  __device__ void init() const {
    if (threadIdx.x == 0) {
      scratch.key_max = 0;
      scratch.key_min = 0xFFFFFFFFu;
    }
  }

  // Sum of x over earlier threads. A barrier must lie between the return and the next call.
  __device__ uint32_t exclusive_sum(uint32_t x) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(kFullWarp, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == 31) scratch.warp_sums[warp] = sum;
    __syncthreads();
    return __reduce_add_sync(kFullWarp, lane < warp ? scratch.warp_sums[lane] : 0) + sum - x;
  }

  // a[i] becomes the sum of a[0..i). `a` has room for an even number of words. Ends with a barrier.
  __device__ void scan(uint32_t* a, uint32_t size) const {
    uint32_t carry = 0;
    for (uint32_t first = 0; first < size; first += kBins) {
      const uint32_t i = first + 2 * threadIdx.x;
      uint2 pair = {0, 0};
      if (i < size) pair = *reinterpret_cast<const uint2*>(a + i);
      const uint32_t before = carry + exclusive_sum(pair.x + pair.y);
      if (i < size) *reinterpret_cast<uint2*>(a + i) = make_uint2(before, before + pair.x);
      if (threadIdx.x == kThreads - 1) scratch.found.before = before + pair.x + pair.y;
      __syncthreads();
      carry = scratch.found.before;
    }
  }

  __device__ void clear(uint32_t* a, uint32_t size) const {
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) a[i] = 0;
  }

  // The smallest shift that brings every distance up to `span` into `bits` bits.
  __device__ static int shift_for(uint64_t span, int bits) { return max(64 - __clzll(span) - bits, 0); }

  // The k-th largest of pairs[0..count), 1 <= k <= count, for indices < length. All threads get it.
  __device__ __noinline__ Kth kth_largest(const uint64_t* pairs, uint32_t count, uint32_t k, uint32_t length,
                                          uint32_t slack) const {
    uint64_t best = ~uint64_t{0}, worst = 0, overall_best = 0;
    while (true) {
      uint32_t key_max = 0, key_min = 0xFFFFFFFFu;
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t pair = pairs[i];
        if (pair >= worst && pair <= best) {
          key_max = max(key_max, pair_key(pair));
          key_min = min(key_min, pair_key(pair));
        }
      }
      clear(scratch.bins, kBins);
      key_max = __reduce_max_sync(kFullWarp, key_max);
      key_min = __reduce_min_sync(kFullWarp, key_min);
      if (threadIdx.x % 32 == 0) {
        atomicMax(&scratch.key_max, key_max);
        atomicMin(&scratch.key_min, key_min);
      }
      __syncthreads();
      best = min(best, order_pair(scratch.key_max, 0));
      worst = max(worst, order_pair(scratch.key_min, length - 1));
      if (overall_best == 0) overall_best = best;
      const int shift = shift_for(best - worst, kBinBits);
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        const uint64_t pair = pairs[i];
        if (pair >= worst && pair <= best) atomicAdd(&scratch.bins[(best - pair) >> shift], 1);
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        scratch.key_max = 0;
        scratch.key_min = 0xFFFFFFFFu;
      }
      const uint2 counts = reinterpret_cast<const uint2*>(scratch.bins)[threadIdx.x];
      const uint32_t before = exclusive_sum(counts.x + counts.y);
      if (before < k && k <= before + counts.x + counts.y) {
        const bool second = k > before + counts.x;
        scratch.found = {2 * threadIdx.x + second, before + (second ? counts.x : 0), second ? counts.y : counts.x};
      }
      __syncthreads();
      k -= scratch.found.before;
      best -= static_cast<uint64_t>(scratch.found.bin) << shift;
      const uint64_t last = (uint64_t{1} << shift) - 1;
      if (best - worst > last) worst = best - last;
      if (scratch.found.count <= k + slack) return {worst, overall_best};
    }
  }

  // Moves the pairs of pairs[0..count) that are no smaller than `bound` to ordered[0..size), in descending order if
  // kByKey, else by ascending index. Exactly `size` pairs are. `fine` has room for size words, if kByKey.
  // Ends with a barrier; the result is in `pairs` again.
  template <bool kByKey>
  __device__ void order(uint64_t* pairs, uint32_t count, uint64_t bound, uint64_t best, uint32_t size, uint32_t length,
                        uint64_t* spare, uint32_t* fine) const {
    // Distance from the front. By index: the low word of a pair is ~index.
    const auto distance = [&](uint64_t pair) -> uint64_t {
      if constexpr (kByKey) return best - pair;
      return pair_index(pair);
    };
    const int shift = shift_for(kByKey ? best - bound : length - 1, kBinBits);
    uint32_t* starts = kByKey ? fine : scratch.bins;
    clear(scratch.bins, kBins);
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      if (pairs[i] >= bound) atomicAdd(&scratch.bins[distance(pairs[i]) >> shift], 1);
    }
    __syncthreads();
    // A bin of n pairs is divided again, into n parts, so that the parts hold few pairs each even where the keys crowd.
    // Indices are spread well enough as they are.
    scan(scratch.bins, kBins);
    const auto part = [&](uint64_t pair) -> uint32_t {
      const uint64_t d = distance(pair);
      const uint32_t bin = d >> shift;
      if constexpr (!kByKey) return bin;
      const uint32_t start = scratch.bins[bin];
      const uint32_t end = bin + 1 < kBins ? scratch.bins[bin + 1] : size;
      const uint64_t rest = d & ((uint64_t{1} << shift) - 1);
      const uint32_t fraction = static_cast<uint32_t>(shift > 16 ? rest >> (shift - 16) : rest << (16 - shift));
      return start + (fraction * (end - start) >> 16);
    };
    if constexpr (kByKey) {
      clear(fine, size);
      __syncthreads();
      for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
        if (pairs[i] >= bound) atomicAdd(&fine[part(pairs[i])], 1);
      }
      __syncthreads();
      scan(fine, size);
    }
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      if (pairs[i] >= bound) spare[atomicAdd(&starts[part(pairs[i])], 1)] = pairs[i];
    }
    __syncthreads();
    // Now starts[p] is where part p ends, and the next begins.
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t pair = spare[i];
      const uint32_t p = part(pair);
      const uint32_t begin = p == 0 ? 0 : starts[p - 1], end = starts[p];
      uint32_t rank = begin;
      for (uint32_t other = begin; other < end; ++other) rank += distance(spare[other]) < distance(pair);
      pairs[rank] = pair;
    }
    __syncthreads();
  }
};

}  // namespace jax_router::cuda
