// What one thread block does with (key, index) pairs in its shared memory: find the k-th largest, and put the k largest
// in order. Pairs (PairFormat, in topk_select.cuh) are all distinct, so that ties are no special case anywhere.
//
// Both go by histograms whose bins divide the range of pairs that is really there, and divide it again where too many
// fell into one bin. Narrow ranges, equal keys and outliers therefore cost at most a few more rounds.
//
// Between two barriers a block waits for its loads from shared memory: some are under way at once. Other loops are not
// unrolled, and what is needed twice is one function.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../../common/order.h"
#include "../plan/topk_select.h"
#include "cluster.cuh"
#include "predicated.cuh"
#include "warp.cuh"

namespace jax_router::cuda {

constexpr uint64_t kNoPair = 0;
constexpr uint64_t kLowestPair = 1;  // no element's pair is smaller

// How many of pairs[0..count) are larger than this one. `pairs` is shared memory, aligned to 16 bytes; if count is odd,
// pairs[count] is 0, or another that is no larger.
__device__ __forceinline__ int count_larger(uint64_t pair, const uint64_t* pairs, int count) {
  int larger = 0;
#pragma unroll 4
  for (int other = 0; other < count; other += 2) {
    const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(pairs + other);
    asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(larger) : "l"(others.x), "l"(pair));
    asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(larger) : "l"(others.y), "l"(pair));
  }
  return larger;
}

// The same, of pairs that differ by less than 2^31. If count is odd, pairs[count] is smaller.
__device__ __forceinline__ int count_larger_of_close(uint64_t pair, const uint64_t* pairs, int count) {
  const uint32_t own = static_cast<uint32_t>(pair);
  int larger = 0, more = 0;
#pragma unroll 4
  for (int other = 0; other < count; other += 2) {
    const uint4 others = *reinterpret_cast<const uint4*>(pairs + other);
    larger += own - others.x >> 31;
    more += own - others.z >> 31;
  }
  return larger + more;
}

// A block's shared memory: this, then its pairs, then whatever the kernel wants.
extern __shared__ uint4 block_shared_memory[];

template <int kThreads, int kBinsOfThread>
struct alignas(16) PairSelect {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBins = kBinsOfThread * kThreads;
  static constexpr int kMostMembers = 64;                        // of a bin, to be ranked by comparing each with all,
  static constexpr int kMostListed = kThreads < 256 ? 64 : 128;  // of the k-th's bin, where nothing else is ranked
  static constexpr uint32_t kFewRanked = 512;                    // or twice as many where so few are ranked
  static constexpr uint32_t kMostOfBin = 16;                     // of a bin, to be put in order so
  static constexpr uint32_t kMostToCompare = 128;  // of a bin, before there is a faster way to put them in order
  static constexpr int kBinBits = log2_of(kBins);
  static_assert(kBins == 1 << kBinBits);

  alignas(16) uint32_t bins[kBins];
  uint32_t warp_sums[kWarps];
  uint32_t key_max, key_min;
  uint32_t key_varying;
  uint32_t members;  // of the last bin, listed so far
  uint64_t kth;
  struct {
    uint32_t bin, before, count;
    uint32_t bin_of_few;
  } found;

  static __device__ __forceinline__ PairSelect& shared() { return *reinterpret_cast<PairSelect*>(block_shared_memory); }
  static __device__ __forceinline__ uint64_t* pairs() {
    return reinterpret_cast<uint64_t*>(block_shared_memory + sizeof(PairSelect) / sizeof(uint4));
  }

  // Before the first use; a barrier must follow.
  static __device__ __forceinline__ void init() {
    if (threadIdx.x == 0) {
      shared().key_max = 0;
      shared().key_min = 0xFFFFFFFFu;
      shared().key_varying = 0;
      shared().members = 0;
    }
  }

  static __device__ __forceinline__ void clear_bins() {
#pragma unroll
    for (int i = 0; i < kBins; i += 2 * kThreads) {
      reinterpret_cast<uint2*>(shared().bins + i)[threadIdx.x] = make_uint2(0, 0);
    }
  }

  static __device__ __forceinline__ void clear(uint32_t* a, uint32_t size) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) a[i] = 0;
  }

  // Sum of x over earlier threads. A barrier must lie between the return and the next call.
  static __device__ __forceinline__ uint32_t exclusive_sum(uint32_t x) {
    return exclusive_sum_of_block<kThreads>(x, shared().warp_sums);
  }

  // a[i] becomes the sum of a[0..i). `a` has room for an even number of words. Whether one of them was above
  // kMostOfBin. Ends with a barrier.
  static __device__ __noinline__ bool scan(uint32_t* a, uint32_t size) {
    uint32_t carry = 0;
    int crowded = 0;
#pragma unroll 1
    for (uint32_t first = 0; first < size; first += 2 * kThreads) {
      const uint32_t i = first + 2 * threadIdx.x;
      uint2 two = {0, 0};
      if (i < size) two = *reinterpret_cast<const uint2*>(a + i);
      const uint32_t before = carry + exclusive_sum(two.x + two.y);
      if (i < size) *reinterpret_cast<uint2*>(a + i) = make_uint2(before, before + two.x);
      if (threadIdx.x == kThreads - 1) shared().found.before = before + two.x + two.y;
      crowded = __syncthreads_or(crowded | (max(two.x, two.y) > kMostOfBin));
      carry = shared().found.before;
    }
    return crowded != 0;
  }

  // As many as one load takes.
  static constexpr int kBinsAtOnce = kBinsOfThread % 4 == 0 ? 4 : 2;
  struct alignas(4 * kBinsAtOnce) SomeBins {
    uint32_t counts[kBinsAtOnce];
  };
  struct Bins {
    uint32_t counts[kBinsOfThread];
    uint32_t sum;
  };
  static __device__ __forceinline__ Bins own_bins() {
    Bins own = {{}, 0};
#pragma unroll
    for (int i = 0; i < kBinsOfThread; i += kBinsAtOnce) {
      const SomeBins some = *reinterpret_cast<const SomeBins*>(shared().bins + kBinsOfThread * threadIdx.x + i);
#pragma unroll
      for (int j = 0; j < kBinsAtOnce; ++j) {
        own.counts[i + j] = some.counts[j];
        own.sum += some.counts[j];
      }
    }
    return own;
  }
  // If one thread's bins, of which the first begins at `before`, hold that number: body(bin, where it begins, count).
  template <class Body>
  static __device__ __forceinline__ void at_number(const Bins& own, uint32_t before, uint32_t number, Body body) {
#pragma unroll
    for (uint32_t i = 0; i < kBinsOfThread; ++i) {
      if (before < number && number <= before + own.counts[i]) {
        body(kBinsOfThread * threadIdx.x + i, before, own.counts[i]);
      }
      before += own.counts[i];
    }
  }
  // It says so in `found`.
  static __device__ __forceinline__ void find_among(const Bins& own, uint32_t before, uint32_t k) {
    at_number(own, before, k, [](uint32_t bin, uint32_t start, uint32_t count) {
      shared().found.bin = bin;
      shared().found.before = start;
      shared().found.count = count;
    });
  }

  // Which of the bins holds number k of what was counted into them, in `found`, and number `few`, unless that is 0.
  // Ends with a barrier.
  static __device__ __forceinline__ void find_bin(uint32_t k, uint32_t few = 0) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // For the sum of a warp its lanes read side by side.
    uint32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; i += kBinsAtOnce) {
      const uint32_t* bins = shared().bins + 32 * (kBinsOfThread * warp + i) + kBinsAtOnce * lane;
      const SomeBins some = *reinterpret_cast<const SomeBins*>(bins);
#pragma unroll
      for (int j = 0; j < kBinsAtOnce; ++j) sum += some.counts[j];
    }
    const uint32_t of_warp = __reduce_add_sync(kFullWarp, sum);
    if (lane == 0) shared().warp_sums[warp] = of_warp;
    __syncthreads();
    const uint32_t before = __reduce_add_sync(kFullWarp, lane < warp ? shared().warp_sums[lane] : 0);
    const auto is_here = [&](uint32_t number) { return before < number && number <= before + of_warp; };
    if (is_here(k) || is_here(few)) {
      const Bins own = own_bins();
      const uint32_t start = before + inclusive_sum_of_lanes(own.sum) - own.sum;
      find_among(own, start, k);
      at_number(own, start, few, [](uint32_t bin, uint32_t, uint32_t) { shared().found.bin_of_few = bin; });
    }
    __syncthreads();
  }

  // The same, and each bin becomes the number of what lies in earlier ones. Whether a bin up to the k-th's, or another
  // of that one's thread, holds more than kMostMembers, or than twice as many where few are ranked.
  static __device__ __forceinline__ bool find_bin_and_starts(uint32_t k) {
    const Bins own = own_bins();
    const uint32_t before = exclusive_sum(own.sum);
    uint32_t start = before, most = 0;
#pragma unroll
    for (int i = 0; i < kBinsOfThread; i += 2) {
      most = max(most, max(own.counts[i], own.counts[i + 1]));
      reinterpret_cast<uint2*>(shared().bins + kBinsOfThread * threadIdx.x)[i / 2] =
          make_uint2(start, start + own.counts[i]);
      start += own.counts[i] + own.counts[i + 1];
    }
    if (before < k && k <= before + own.sum) find_among(own, before, k);
    return __syncthreads_or(before < k && most > (k <= kFewRanked ? 2 * kMostMembers : kMostMembers)) != 0;
  }

  static constexpr int kAtOnce = 2;           // pairs of a thread where all accesses are predicated,
  static constexpr int kAtOnceWithJumps = 3;  // and where they are not
  // Calls body(some) for pairs()[0..count), several at once, with kNoPair for what is missing of the last. If `spread`,
  // the lanes of a warp take pairs far apart.
  template <int kPairs, class Body>
  static __device__ __forceinline__ void for_some(uint32_t count, bool spread, Body body) {
    const uint32_t of_lane = (count + 31) / 32 | 1;  // odd, so that lanes load from different banks
    const uint32_t start = spread ? threadIdx.x % 32 * of_lane + threadIdx.x / 32 : threadIdx.x;
    const uint32_t end = spread ? min(threadIdx.x % 32 * of_lane + of_lane, count) : count;
    const uint32_t stride = spread ? kWarps : kThreads;
#pragma unroll 1
    for (uint32_t first = start; first < end; first += kPairs * stride) {
      uint64_t some[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) some[i] = first + i * stride < end ? pairs()[first + i * stride] : kNoPair;
      body(some);
    }
  }

  // Calls body(pair) for each of pairs()[0..count) from `worst` to `best`.
  template <class Body>
  static __device__ __forceinline__ void for_each(uint32_t count, uint64_t worst, uint64_t best, Body body) {
    for_some<kAtOnceWithJumps>(count, false, [&](const uint64_t (&some)[kAtOnceWithJumps]) {
#pragma unroll
      for (uint64_t pair : some) {
        if (pair >= worst && pair <= best) body(pair);
      }
    });
  }

  // The smallest shift that brings every distance up to `span` into `bits` bits.
  static __device__ __forceinline__ int shift_for(uint64_t span) { return max(64 - __clzll(span) - kBinBits, 0); }

  // A bit an index, in vectors of 16 bytes of shared memory. A thread can see to few of them.
  static constexpr int kMostVectors = 4;
  static __device__ __forceinline__ uint32_t vectors_of_bits(int index_bits) { return 1u << max(index_bits - 7, 0); }
  static __device__ __forceinline__ bool has_bits(int index_bits) {
    return vectors_of_bits(index_bits) <= kMostVectors * kThreads;
  }
  struct IndexBits {
    uint32_t start;  // in block_shared_memory
    int index_bits;

    __device__ __forceinline__ uint4* vectors() const { return block_shared_memory + start; }
    __device__ __forceinline__ uint32_t* words() const { return reinterpret_cast<uint32_t*>(vectors()); }

    __device__ __forceinline__ uint32_t index(uint64_t pair) const {
      return ~static_cast<uint32_t>(pair) & static_cast<uint32_t>((uint64_t{1} << index_bits) - 1);
    }
    __device__ __forceinline__ void set_if(bool active, uint64_t pair) const {
      or_if(active, address_of(words() + index(pair) / 32), 1u << index(pair) % 32);
    }
  };

  struct Kth {
    uint64_t pair;     // exactly k pairs, or up to `slack` more, are no smaller
    uint64_t best;     // no pair is larger
    uint32_t varying;  // bits of the keys, those that differ between any two of them among others
  };

  // What kth_largest can be spared: the largest of the threads' keys is made known in shared().key_max, and the bins
  // are cleared. For all threads together; a barrier must follow.
  static __device__ __forceinline__ void prepare(uint32_t key) {
    key = __reduce_max_sync(kFullWarp, key);
    if (threadIdx.x % 32 == 0) atomicMax(&shared().key_max, key);
    clear_bins();
  }
  // And their least, in shared().key_min.
  static __device__ __forceinline__ void prepare(uint32_t most, uint32_t least) {
    least = __reduce_min_sync(kFullWarp, least);
    if (threadIdx.x % 32 == 0) atomicMin(&shared().key_min, least);
    prepare(most);
  }

  // The k-th largest of pairs()[0..count), whose indices have so many bits; at least k of them are not kNoPair, and
  // k > 0. All threads get it. Who knows that the keys lie from key_min to key_max, and has cleared the bins, saves a
  // look at all pairs. If kMarks, the bits that begin there, which are clear, are set of the pairs that are no smaller,
  // and `varying` is none; if these `spread`, neighbours lie close together.
  template <bool kMarks = false>
  static __device__ __noinline__ Kth kth_largest(uint32_t count, uint32_t k, int index_bits, uint32_t slack,
                                                 uint32_t key_min = kNoKey, uint32_t key_max = kNoKey,
                                                 uint32_t start_of_bits = 0, bool spread = false) {
    const IndexBits bits{start_of_bits, index_bits};
    const uint32_t bins_address = address_of(shared().bins);
    uint64_t best = ~uint64_t{0}, worst = kLowestPair, overall_best = 0;
#pragma unroll 1
    while (true) {
      if (key_min == kNoKey) {
        key_max = 0;
        key_min = 0xFFFFFFFFu;
        for_each(count, worst, best, [&](uint64_t pair) {
          const uint32_t key = static_cast<uint32_t>(pair >> index_bits);
          key_max = max(key_max, key);
          key_min = min(key_min, key);
        });
        clear_bins();
        key_max = __reduce_max_sync(kFullWarp, key_max);
        key_min = __reduce_min_sync(kFullWarp, key_min);
        if (threadIdx.x % 32 == 0) {
          atomicMax(&shared().key_max, key_max);
          atomicMin(&shared().key_min, key_min);
        }
        __syncthreads();
        key_max = shared().key_max;
        key_min = shared().key_min;
      }
      best = min(best, (static_cast<uint64_t>(key_max) + 1 << index_bits) - 1);
      worst = max(worst, static_cast<uint64_t>(key_min) << index_bits);
      key_min = kNoKey;
      if (overall_best == 0) overall_best = best;
      // Bins of one step, and where there are too few for that, of eight steps from the best on. An exact k-th, of few
      // pairs that are too many, is near the worst, so there the steps are small.
      const uint64_t span = best - worst;
      const int shift = max(shift_for(span) - (slack == 0 ? 2 : 0), 0);
      const int left_out = max(static_cast<int>(span >> shift) - (kBins - 1), 0);  // steps without a bin of their own
      const uint32_t some_key = static_cast<uint32_t>(overall_best >> index_bits);
      uint32_t key_varying = 0;
      for_some<kAtOnce>(count, false, [&](const uint64_t (&some)[kAtOnce]) {
#pragma unroll
        for (uint64_t pair : some) {
          const bool is_inside = best - pair <= span;
          const int step = static_cast<int>((best - pair) >> shift);
          add_one_if(is_inside, bins_address + 4 * max(step >> 3, step - left_out));
          if (!kMarks && is_inside) key_varying |= static_cast<uint32_t>(pair >> index_bits) ^ some_key;
        }
      });
      if (!kMarks) {
        key_varying = __reduce_or_sync(kFullWarp, key_varying);
        if (threadIdx.x % 32 == 0) atomicOr(&shared().key_varying, key_varying);
      }
      __syncthreads();
      const uint32_t overall_varying = shared().key_varying;
      if (threadIdx.x == 0) {
        shared().key_max = 0;
        shared().key_min = 0xFFFFFFFFu;
        shared().members = 0;
      }
      find_bin(k);
      k -= shared().found.before;
      const uint32_t bin = shared().found.bin, first_step = min(8 * bin, bin + left_out);
      const uint64_t last = (static_cast<uint64_t>(min(8 * bin + 7, bin + left_out) - first_step + 1) << shift) - 1;
      best -= static_cast<uint64_t>(first_step) << shift;
      if (best - worst > last) worst = best - last;
      const uint32_t last_count = shared().found.count;
      const bool is_exact = last_count <= k + slack;
      if (is_exact && !kMarks) return {worst, overall_best, overall_varying};
      if (!is_exact && last_count > kMostListed) continue;
      // So few that comparing each with all ends it. Their list is where the bins were.
      uint64_t* members = reinterpret_cast<uint64_t*>(shared().bins);
      // As few are counted, the lanes need not add up first what is one address: so the compiler is not to know it.
      uint32_t tid;
      asm volatile("mov.u32 %0, %%tid.x;" : "=r"(tid));
      const uint32_t counter = address_of(&shared().members) + (tid >> 10 << 2);
      const uint64_t certain = is_exact ? worst : best + 1;  // no smaller one need be compared
      for_some<kAtOnce>(count, kMarks && spread, [&](const uint64_t (&some)[kAtOnce]) {
        bool is_member[kAtOnce];
        uint32_t place[kAtOnce] = {};
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          is_member[i] = some[i] >= worst && some[i] < certain;
          count_if(is_member[i], counter, place[i]);
          if (kMarks) bits.set_if(some[i] >= certain, some[i]);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) store_if(is_member[i], bins_address + 8 * place[i], some[i]);
      });
      if (threadIdx.x == 0 && !is_exact) members[last_count] = kNoPair;
      __syncthreads();
      if (is_exact) return {worst, overall_best, overall_varying};
      if (threadIdx.x < last_count) {
        const uint64_t pair = members[threadIdx.x];
        const uint32_t larger = count_larger(pair, members, last_count);
        if (kMarks) bits.set_if(larger < k, pair);
        if (larger == k - 1) shared().kth = pair;
      }
      __syncthreads();
      return {shared().kth, overall_best, overall_varying};
    }
  }

  // The same, roughly and for a few keys of each thread: the least key of the bin that holds number k, or kNoKey if
  // more than `most` reach that, or fewer than k are no smaller than key_min; and a key that about an eighth of the k
  // are above. Smaller ones than key_min are left out, and none is larger than key_max. The bins are clear. Where the
  // range is wide, and so a bin holds too many, it is divided again. The first bins are no wider than 1 << widest, and
  // the last has the rest.
  struct KeyBound {
    uint32_t key, few;
  };
  template <int kKeys>
  static __device__ __forceinline__ KeyBound kth_key(const uint32_t (&keys)[kKeys], uint32_t k, uint32_t most,
                                                     uint32_t key_min, uint32_t key_max, int widest) {
    uint32_t rank_of_few = k / 8 + 1, few = key_max;
#pragma unroll 1
    while (true) {
      const int shift = min(max(32 - __clz(key_max - key_min) - kBinBits, 0), widest);
#pragma unroll
      for (uint32_t key : keys) {
        add_one_if(key >= key_min && key <= key_max,
                   address_of(shared().bins) + 4 * min(key_max - key >> shift, uint32_t{kBins} - 1));
      }
      if (threadIdx.x == 0) shared().found = {0, 0, ~0u, kBins};
      __syncthreads();
      if (threadIdx.x == 0) {
        shared().key_max = 0;
        shared().key_min = 0xFFFFFFFFu;
      }
      find_bin(k, rank_of_few);
      const auto found = shared().found;
      if (found.bin_of_few != kBins) few = key_max - (found.bin_of_few << shift);
      rank_of_few = rank_of_few > found.before ? rank_of_few - found.before : 0;
      const uint32_t width = (1u << shift) - 1;
      key_max -= found.bin << shift;
      if (found.bin != kBins - 1 && key_max - key_min > width) key_min = key_max - width;
      if (found.count <= most - found.before) return {key_min, few};
      if (found.count == ~0u || shift == 0) return {kNoKey, 0};
      k -= found.before;
      most -= found.before;
      widest = 32;
      clear_bins();
      __syncthreads();
    }
  }

  // Bins of pairs whose keys lie from key_min to key_max; larger ones share the first bin.
  struct Division {
    uint64_t best, worst;
    int shift;

    __device__ __forceinline__ Division(int index_bits, uint32_t key_min, uint32_t key_max)
        : best((static_cast<uint64_t>(key_max) + 1 << index_bits) - 1),
          worst(max(kLowestPair, static_cast<uint64_t>(key_min) << index_bits)),
          shift(shift_for(best - worst)) {}
    __device__ __forceinline__ uint32_t bin_of(uint64_t pair) const {
      return pair < best ? static_cast<uint32_t>((best - pair) >> shift) : 0;
    }
  };

  // Divides pairs()[0..count) into bins, which are clear, and finds that of the k-th largest. None of the keys is below
  // key_min, and few are above key_max. Where few pairs are far above all others, these are divided again without them:
  // the result is the key_max of the division. Or it is kNoKey, and the bins are clear again: if some bin has many
  // pairs, or that of the k-th comes down below the doubt of any lane, a pair. If kFindsStarts, each bin becomes the
  // number of what lies in earlier ones, which is faster than by order_by_bins, but takes more registers than blocks
  // have which share a multiprocessor.
  template <bool kFindsStarts>
  static __device__ __noinline__ uint32_t divide(uint32_t count, uint32_t k, int index_bits, uint32_t key_min,
                                                 uint32_t key_max, uint64_t doubt) {
    constexpr uint32_t kFew = 32;
    bool again = false;
#pragma unroll 1
    while (true) {
      const Division by(index_bits, key_min, key_max);
      if (threadIdx.x == 0) {
        shared().members = 0;
        shared().kth = 0;
      }
      for_each(count, by.worst, ~uint64_t{0}, [&](uint64_t pair) { atomicAdd(&shared().bins[by.bin_of(pair)], 1); });
      __syncthreads();
      bool some_crowded, too_crowded;
      const Bins own = own_bins();
      uint32_t most = 0;
      if constexpr (kFindsStarts) {
        const uint32_t before = exclusive_sum(own.sum), few = min(k, kFew);
        uint32_t start = before;
#pragma unroll
        for (uint32_t i = 0; i < kBinsOfThread; i += kBinsAtOnce) {
          SomeBins starts;
#pragma unroll
          for (uint32_t j = 0; j < kBinsAtOnce; ++j) {
            const uint32_t size = own.counts[i + j];
            starts.counts[j] = start;
            if (start < few && few <= start + size) shared().kth = kBinsOfThread * threadIdx.x + i + j;
            most = max(most, size);
            start += size;
          }
          *reinterpret_cast<SomeBins*>(shared().bins + kBinsOfThread * threadIdx.x + i) = starts;
        }
        if (before < k && k <= start) find_among(own, before, k);
        if (before < k && most > kMostToCompare) shared().members = 1;
        some_crowded = __syncthreads_or(before < k && most > kFew) != 0;
        too_crowded = shared().members != 0;
      } else {
#pragma unroll
        for (uint32_t size : own.counts) most = max(most, size);
        if (most > kFew) atomicMax(&shared().members, most > kMostToCompare ? 2 : 1);
        find_bin(k);
        some_crowded = shared().members != 0;
        too_crowded = shared().members > 1;
        if (too_crowded) {
          most = 0;
#pragma unroll
          for (uint32_t i = 0; i < kBinsOfThread; ++i) {
            if (kBinsOfThread * threadIdx.x + i <= shared().found.bin) most = max(most, own.counts[i]);
          }
          if (most > kMostToCompare) shared().kth = 1;
          __syncthreads();
          too_crowded = shared().kth != 0;
        }
      }
      const uint64_t depth = (static_cast<uint64_t>(shared().found.bin) + 1 << by.shift) - 1;
      const bool is_certain = by.best > depth && __all_sync(kFullWarp, by.best - depth >= doubt);
      uint32_t first_bin = 0;
      if (!again && (some_crowded || !is_certain)) {
        if constexpr (kFindsStarts) {
          first_bin = static_cast<uint32_t>(shared().kth);
        } else {
          find_bin(min(k, kFew));
          first_bin = shared().found.bin;
          find_bin(k);
        }
      }
      if (first_bin < kBins / 2 && !too_crowded && is_certain) return key_max;
      if (kFindsStarts) __syncthreads();
      clear_bins();
      __syncthreads();
      if (first_bin < kBins / 2) return kNoKey;
      key_max = static_cast<uint32_t>(by.best - (static_cast<uint64_t>(first_bin) << by.shift) >> index_bits);
      again = true;
    }
  }

  // Puts the last 16 bits of every key of pairs()[0..count) in front of the others, less `last_bits`, so that nothing
  // is left of them if they are the same; if not, all is as it was. Whether they were. Ends with a barrier.
  static __device__ __noinline__ bool leave_out(uint32_t count, int index_bits, uint32_t last_bits) {
    const uint64_t last_index = (uint64_t{1} << index_bits) - 1;
    bool differ = false;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t pair = pairs()[i];
      const uint32_t key = static_cast<uint32_t>(pair >> index_bits), more = (key ^ last_bits) & 0xFFFF;
      differ |= more != 0;
      pairs()[i] = static_cast<uint64_t>(more << 16 | key >> 16) << index_bits | (pair & last_index);
    }
    if (!__syncthreads_or(differ)) return true;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t pair = pairs()[i];
      const uint32_t key = static_cast<uint32_t>(pair >> index_bits);
      pairs()[i] = static_cast<uint64_t>(key << 16 | (key >> 16 ^ last_bits)) << index_bits | (pair & last_index);
    }
    __syncthreads();
    return false;
  }

  // Calls write(place, pair) for the k largest of pairs()[0..count) in descending order, after a division in which few
  // of them share a bin. `spare` has room for k pairs and kMostToCompare more. are_close: any two of the pairs differ
  // by less than 2^31, which makes them faster to compare.
  template <bool kFindsStarts, class Write>
  static __device__ __forceinline__ void order_by_bins(uint32_t count, uint32_t k, const Division& by, uint64_t* spare,
                                                       bool are_close, Write write) {
    uint32_t* bins = shared().bins;
    const uint32_t last_bin = shared().found.bin, size = shared().found.before + shared().found.count;
    if (!kFindsStarts) scan(bins, kBins);
    for_each(count, by.worst, ~uint64_t{0}, [&](uint64_t pair) {
      if (by.bin_of(pair) <= last_bin) spare[atomicAdd(&bins[by.bin_of(pair)], 1)] = pair;
    });
    if (threadIdx.x == 0) spare[size] = by.worst - 1;
    __syncthreads();
    // Now bins[b] is where bin b ends, and the next begins.
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t pair = spare[i];
      const uint32_t bin = by.bin_of(pair);
      // Two at once: what else lies beside the first of the bin is larger, and beside the last smaller.
      uint32_t rank = bin == 0 ? 0 : bins[bin - 1] & ~1u;
      rank += are_close ? count_larger_of_close(pair, spare + rank, bins[bin] - rank)
                        : count_larger(pair, spare + rank, bins[bin] - rank);
      if (rank < k) write(rank, pair);
    }
  }

  // Calls write(place, pair) for each of pairs()[0..count) that is no smaller than `bound`, of which there are k, with
  // its place in ascending order of the index. The bits of these are set; they are counted up to each word. If
  // `gathers_first`, they are put in order in shared memory first, behind the bits, where these `bytes` have room:
  // whole lines are faster to write, if neighbours in pairs() are far apart in that order or choices are many.
  static_assert(kMaxSelectK < 1 << 16);
  template <class Write>
  static __device__ __forceinline__ void in_order_of_index(uint32_t count, uint64_t bound, uint32_t k, IndexBits bits,
                                                           uint32_t bytes, bool gathers_first, bool spread,
                                                           Write write) {
    const uint32_t vectors = vectors_of_bits(bits.index_bits);
    uint2* before = reinterpret_cast<uint2*>(bits.vectors() + vectors);  // 16 bits a word
    uint64_t* in_order = reinterpret_cast<uint64_t*>(before + vectors);
    const bool gathers =
        gathers_first && reinterpret_cast<uint4*>(in_order + k) <= bits.vectors() + bytes / sizeof(uint4);
    // Each warp has some vectors, of which its lanes take turns.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t of_thread = (vectors + kThreads - 1) / kThreads;
    const uint32_t first = 32 * of_thread * warp + lane;
    uint32_t sums[kMostVectors] = {};  // of a vector's bits up to each word's end, a byte each
#pragma unroll
    for (int i = 0; i < kMostVectors; ++i) {
      if (i >= of_thread) break;
      const uint4 own = first + 32 * i < vectors ? bits.vectors()[first + 32 * i] : make_uint4(0, 0, 0, 0);
      sums[i] = (__popc(own.x) | __popc(own.y) << 8 | __popc(own.z) << 16 | __popc(own.w) << 24) * 0x01010101u;
    }
    uint32_t own_before[kMostVectors], of_warp = 0;
#pragma unroll
    for (int i = 0; i < kMostVectors; i += 2) {
      if (i >= of_thread) break;
      const uint32_t two = sums[i] >> 24 | sums[i + 1] >> 24 << 16, sum = inclusive_sum_of_lanes(two);
      const uint32_t of_both = __shfl_sync(kFullWarp, sum, 31);
      own_before[i] = of_warp + (sum - two & 0xFFFF);
      own_before[i + 1] = of_warp + (of_both & 0xFFFF) + (sum - two >> 16);
      of_warp += (of_both & 0xFFFF) + (of_both >> 16);
    }
    if (lane == 0) shared().warp_sums[warp] = of_warp;
    __syncthreads();
    const uint32_t start = __reduce_add_sync(kFullWarp, lane < warp ? shared().warp_sums[lane] : 0);
#pragma unroll
    for (int i = 0; i < kMostVectors; ++i) {
      if (i >= of_thread || first + 32 * i >= vectors) break;
      const uint32_t twice = (start + own_before[i]) * 0x00010001u, earlier = sums[i] << 8;
      before[first + 32 * i] =
          make_uint2(twice + __byte_perm(earlier, 0, 0x4140), twice + __byte_perm(earlier, 0, 0x4342));
    }
    __syncthreads();
    for_some<kAtOnce>(count, gathers && spread, [&](const uint64_t (&some)[kAtOnce]) {
      uint32_t place[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t index = bits.index(some[i]);
        const uint32_t earlier = bits.words()[index / 32] & ((1u << index % 32) - 1);
        place[i] = reinterpret_cast<const uint16_t*>(before)[index / 32] + __popc(earlier);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (gathers) {
          store_if(some[i] >= bound, address_of(in_order + place[i]), some[i]);
        } else if (some[i] >= bound) {
          write(place[i], some[i]);
        }
      }
    });
    if (!gathers) return;
    __syncthreads();
#pragma unroll 1
    for (uint32_t place = threadIdx.x; place < k; place += kThreads) write(place, in_order[place]);
  }

  // Calls write(place, pair) for each of pairs()[0..count) that is no smaller than `bound`, with its place in
  // descending order if kByKey, else in ascending order of the index. Exactly `size` pairs are no smaller, and none is
  // larger than `best`. Of their keys, only bits in `varying` differ, and their indices are below `length`. `spare` has
  // room for ordering_bytes(size).
  template <bool kByKey, class Write>
  static __device__ __forceinline__ void order(uint32_t count, uint64_t bound, uint64_t best, uint32_t varying,
                                               uint32_t size, int index_bits, uint32_t length, uint64_t* spare,
                                               Write write) {
    const auto for_each_chosen = [&](auto body) {
      for_each(count, bound, best, body);
      __syncthreads();
    };
    // Distance from the front. Values with few bits, as those that were rounded to bf16, lie far apart, and many on one
    // place: bits that no two keys differ in are left out, and so are those that no index has.
    using Distance = std::conditional_t<kByKey, uint64_t, uint32_t>;
    const uint32_t last_index = static_cast<uint32_t>((uint64_t{1} << index_bits) - 1);
    const uint32_t best_key = static_cast<uint32_t>(best >> index_bits);
    const int unused_bits = varying != 0 ? __ffs(varying) - 1 : 0;
    const int used_index_bits = 32 - __clz(length - 1);
    const auto distance = [&](uint64_t pair) -> Distance {
      const uint32_t index = ~static_cast<uint32_t>(pair) & last_index;
      if constexpr (!kByKey) return index;
      const uint32_t between = best_key - static_cast<uint32_t>(pair >> index_bits) >> unused_bits;
      return static_cast<uint64_t>(between) << used_index_bits | index;
    };
    const int shift = shift_for(kByKey ? distance(bound) : length - 1);
    uint32_t* bins = shared().bins;
    uint32_t* fine = reinterpret_cast<uint32_t*>(spare + size);
    clear_bins();
    __syncthreads();
    for_each_chosen([&](uint64_t pair) { atomicAdd(&bins[distance(pair) >> shift], 1); });
    // Where a bin holds many pairs, all are divided again, into half as many parts as pairs.
    const bool divide = scan(bins, kBins);
    uint32_t* starts = divide ? fine : bins;
    const auto part = [&](uint64_t pair) -> uint32_t {
      const uint32_t bin = distance(pair) >> shift;
      if (!divide) return bin;
      const uint32_t start = bins[bin];
      const uint32_t end = bin + 1 < kBins ? bins[bin + 1] : size;
      const Distance rest = distance(pair) & ((Distance{1} << shift) - 1);
      const uint32_t fraction = static_cast<uint32_t>(shift > 16 ? rest >> (shift - 16) : rest << (16 - shift));
      return (start + (fraction * (end - start) >> 16)) / 2;
    };
    if (divide) {
      clear(fine, size / 2 + 1);
      __syncthreads();
      for_each_chosen([&](uint64_t pair) { atomicAdd(&fine[part(pair)], 1); });
      scan(fine, size / 2 + 1);
    }
    for_each_chosen([&](uint64_t pair) { spare[atomicAdd(&starts[part(pair)], 1)] = pair; });
    // Now starts[p] is where part p ends, and the next begins. Of two pairs the larger comes first, or of their
    // indices, which are inverted, the larger.
    const auto rest_of = [&](uint64_t pair) { return kByKey ? pair : pair & last_index; };
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint64_t pair = spare[i];
      const uint32_t p = part(pair);
      uint32_t rank = p == 0 ? 0 : starts[p - 1];
#pragma unroll 4
      for (uint32_t other = rank, end = starts[p]; other < end; ++other) rank += rest_of(spare[other]) > rest_of(pair);
      write(rank, pair);
    }
  }
};

}  // namespace jax_router::cuda
