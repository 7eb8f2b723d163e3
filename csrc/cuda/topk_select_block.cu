// topk_select for rows that the registers of one thread block hold: each row is read once, 16 bytes a load, all loads
// under way together.
//
// Few choices (k up to kMaxFewK): each warp knows that the j largest of its threads' maxima are elements no smaller
// than the j-th of them. The least of these bounds over the warps is one that at least k elements reach, and the next
// above it one that k nearly always reach, and seldom many more: those go to shared memory, where every thread counts
// how many of them beat its own.
//
// Many choices: a histogram over the elements rounded to f16 names the bin that holds the k-th largest. Its members are
// ranked, which says which of them are chosen; of the others their bin says it. They are counted in the order of the
// row, and go out by way of shared memory, in whole lines.
//
// Best first, bins of one width divide what lies above a bound from the threads' maxima: few elements share one,
// whatever their distribution. All up to the k-th's go to shared memory in the order of the bins, and each element's
// place is its rank in its bin. Where that crowds a bin, as when a few are far above all others, the bins are those of
// f16, which are the narrower the nearer they are to zero.
//
// Where too many elements share a bin or reach the bound (narrow ranges, many equal elements), a bisection takes over:
// of the keys of a bin, of which those that equal the k-th's are counted in the order of the row, or of the pairs
// (key, index). PairSelect::order then puts the chosen in order: slower, but the same for any row.
//
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include "parts/launch.cuh"
#include "parts/pair_select.cuh"
#include "parts/register_row.cuh"
#include "parts/tile.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

// A bound that at least k and at most `most` of a row's pairs reach, where the row has more than `most`. The k-th
// largest has a key between the least and the largest that any thread gives. The row is read again for each step: it is
// in the caches, and there are no registers for its pairs. For all threads together; `counts` is shared memory.
template <typename T, int kThreads>
__device__ __noinline__ uint64_t bisect(const T* row, uint32_t length, uint32_t key_min, uint32_t key_max, uint32_t k,
                                        uint32_t most, uint32_t (&counts)[2][kThreads / 32]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PairFormat<T> format = {kRowIndexBits};
  key_max = __reduce_max_sync(kFullWarp, key_max);
  key_min = __reduce_min_sync(kFullWarp, key_min);
  if (lane == 0) counts[0][warp] = key_max;
  if (lane == 0) counts[1][warp] = key_min;
  __syncthreads();
  key_max = __reduce_max_sync(kFullWarp, counts[0][lane % (kThreads / 32)]);
  key_min = __reduce_min_sync(kFullWarp, counts[1][lane % (kThreads / 32)]);
  __syncthreads();
  // Many equal elements are the usual reason to come here: only indices that exist are divided. The first `low` is
  // never tried, so it lies below all of them: k may be their number.
  uint64_t low = (static_cast<uint64_t>(key_min) << kRowIndexBits | ~(length - 1)) - 1;
  uint64_t high = static_cast<uint64_t>(key_max) << kRowIndexBits | 0xFFFFFFFFu;
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
  constexpr int kOwn = 2;                             // candidates of a thread, where a second bound is taken from them
  constexpr uint32_t kMost = kOwn * kThreads;         // candidates
  constexpr uint32_t kMostRanked = 5 * kThreads / 8;  // of them, to be compared each with all
  __shared__ alignas(16) uint64_t pairs[kMost];
  __shared__ alignas(16) float warp_bounds[kWarps];
  __shared__ uint32_t counts[2][kWarps];
  __shared__ uint32_t found[2];  // candidates of an attempt
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int64_t row_index = blockIdx.x;
  const T* data = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  constexpr PairFormat<T> format = {30};  // few enough bits that pairs are in order as doubles
  // Warps take turns of 128 bytes, 8 threads each, where all have some: each has its part of the best of a sorted row.
  static_assert(kMaxFewK <= 8 * kWarps);
  const bool takes_turns = length >= (8 * kWarps + 1) * Row::kElements;
  const Row row(data, length, takes_turns ? (lane / 8 * kWarps + warp) * 8 + lane % 8 : threadIdx.x);
  pairs[threadIdx.x] = 0;
  if (threadIdx.x < 2) found[threadIdx.x] = 0;

  // Each warp owes its share of the bound, where they do not take turns those all of whose threads have an element.
  const uint32_t full_warps = takes_turns ? kWarps : (row.end - row.head) / (32 * Row::kElements);
  const uint32_t share = max((k + full_warps - 1) / max(full_warps, 1u), 1u);
  // The least of the warps' bounds, and the next, or the least again where some warps have none, or owe so little that
  // fewer than k elements now and then reach the next. A NaN is above +inf, and so is a thread that has one.
  const auto bounds_of_best = [&](float x, uint32_t share, uint32_t warps) {
    const float sorted = sort_descending<32>(x != x ? INFINITY : x);
    const float bound_of_warp = share <= 32 ? __shfl_sync(kFullWarp, sorted, share - 1) : -INFINITY;
    if (lane == 0) warp_bounds[warp] = bound_of_warp;
    __syncthreads();
    float least = warps == 0 ? -INFINITY : warp_bounds[0], next = INFINITY;
#pragma unroll
    for (int w = 1; w < kWarps; ++w) {
      if (w >= warps) break;
      next = fminf(next, fmaxf(least, warp_bounds[w]));
      least = fminf(least, warp_bounds[w]);
    }
    return make_float2(least, warps == kWarps && share > 4 ? next : least);
  };
  const float maximum = row.maximum();
  const float2 bounds = bounds_of_best(maximum, share, full_warps);
  // At least k elements reach the least bound. As a rule they reach the next as well, and fewer others do.
  float bound = bounds.y;
  uint32_t candidates;
#pragma unroll 1
  for (int attempt = 0;; ++attempt) {
    uint32_t mask = row.reaching(bound);
    const bool edge_reaches = row.has_edge && !(row.edge < bound);
    const uint32_t own = __popc(mask) + (edge_reaches ? 1 : 0);
    const uint32_t sum = inclusive_sum_of_lanes(own);
    uint32_t free_place = 0;
    if (lane == 31 && sum != 0) free_place = atomicAdd(&found[attempt], sum);
    free_place = __shfl_sync(kFullWarp, free_place, 31) + sum - own;
#pragma unroll 1
    for (; mask != 0 && free_place < kMost; ++free_place, mask &= mask - 1) {
      const int i = __ffs(mask) - 1;
      const uint32_t index = row.first + i / Row::kElements * Row::kStep + i % Row::kElements;
      pairs[free_place] = format.pair(load_one(data + index), index);
    }
    if (edge_reaches && free_place < kMost) pairs[free_place] = format.pair(row.edge, row.edge_index);
    __syncthreads();
    candidates = found[attempt];
    if (candidates >= k) break;
    bound = bounds.x;
  }
  if (candidates > kMostRanked && candidates <= kMost) {
    // More than chance brings, as of a sorted row: a bound from these, again of all warps.
    uint64_t own_pairs[kOwn] = {};
    float largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i * kThreads >= candidates) break;
      const uint32_t place = i * kThreads + lane * kWarps + warp;
      if (place < candidates) own_pairs[i] = pairs[place];
      if (place < candidates) largest = max_nan(largest, format.element(own_pairs[i]));
    }
    const float higher_bound = bounds_of_best(largest, (k + kWarps - 1) / kWarps, kWarps).x;
    pairs[threadIdx.x] = kNoPair;
    if (threadIdx.x == 0) found[0] = 0;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i * kThreads >= candidates) break;
      const bool reaches = own_pairs[i] != kNoPair && !(format.element(own_pairs[i]) < higher_bound);
      if (reaches) pairs[atomicAdd(&found[0], 1)] = own_pairs[i];
    }
    __syncthreads();
    candidates = found[0];
  }
  if (candidates > kThreads) {
    const uint32_t key_min = PairFormat<T>::key_of(bound == 0.0f ? -0.0f : bound);  // which reaches 0
    const uint64_t exact_bound =
        bisect<T, kThreads>(data, length, key_min, PairFormat<T>::key_of(maximum), k, kMostRanked, counts);
    pairs[threadIdx.x] = kNoPair;
    if (threadIdx.x == 0) found[0] = 0;
    __syncthreads();
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < length; i += kThreads) {
      const float x = load_one(data + i);
      if (PairFormat<T>{kRowIndexBits}.pair(x, i) >= exact_bound) pairs[atomicAdd(&found[0], 1)] = format.pair(x, i);
    }
    __syncthreads();
    candidates = found[0];
  }
  const uint64_t pair = pairs[threadIdx.x];
  int place = 32 * warp < candidates ? rank_among(ranked_pair(pair), pairs, candidates) : 0;
  const bool chosen = threadIdx.x < candidates && place < k;
  if (!op.sorted) {
    // A bit for each element of the row, whether it is chosen, and how many are before each word of bits, both where
    // the pairs were.
    constexpr int kWordsOfLane = Row::kStep * kVectors / 1024, kWords = 32 * kWordsOfLane;
    static_assert(2 * kWords * sizeof(uint32_t) <= sizeof pairs && kWords <= kThreads);
    uint32_t* bits = reinterpret_cast<uint32_t*>(pairs);
    uint32_t* before = bits + kWords;
    const uint32_t index = format.index(pair), word = index / 32, bit = 1u << index % 32;
    __syncthreads();
    if (threadIdx.x < kWords) bits[threadIdx.x] = 0;
    __syncthreads();
    if (chosen) atomicOr(&bits[word], bit);
    __syncthreads();
    if (warp == 0) {
      uint32_t own = 0;
#pragma unroll
      for (int i = 0; i < kWordsOfLane; ++i) own += __popc(bits[lane * kWordsOfLane + i]);
      uint32_t sum = inclusive_sum_of_lanes(own) - own;
#pragma unroll
      for (int i = 0; i < kWordsOfLane; ++i) {
        before[lane * kWordsOfLane + i] = sum;
        sum += __popc(bits[lane * kWordsOfLane + i]);
      }
    }
    __syncthreads();
    if (chosen) place = before[word] + __popc(bits[word] & (bit - 1));
  }
  if (chosen) write_result(op, row_index, data, place, format, pair);
  if (threadIdx.x >= k && threadIdx.x < op.k) write_nothing<T>(op, row_index, threadIdx.x);
}

template <typename T, int kThreads, int kVectors>
using BlockSelect = PairSelect<kThreads, block_row_bins(kVectors, dtype_of(T{}))>;
static_assert(sizeof(BlockSelect<float, 256, 1>) == pair_select_bytes(256, 4));
static_assert(sizeof(BlockSelect<float, 1024, 2>) == pair_select_bytes(1024, 8));

// Ascending bins hold descending elements. Two bins in the halves of a word.
template <int kBinBits>
__device__ __forceinline__ uint32_t bins_of_two(float low, float high) {
  const __half2 rounded = __floats2half2_rn(low, high);
  const uint32_t halves = *reinterpret_cast<const uint32_t*>(&rounded);
  const uint32_t signs = halves & 0x80008000u;
  const uint32_t ascending = halves ^ 0x7FFF7FFFu ^ (signs - (signs >> 15));
  return ascending >> (16 - kBinBits) & (0xFFFFu >> (16 - kBinBits)) * 0x10001u;
}

// Bins of one width between two elements of a row, in descending order. The last bin is for all that lies below them.
// Of numbers of few bits many are equal: there earlier elements come before later ones. An element is taken to be the
// less, by no more than it is above the next number of so few bits, the later it comes.
template <typename T, int kBins>
struct LinearBins {
  static constexpr uint32_t kLast = kBins - 1;

  float factor, offset, step_of_vector;

  // is_bf16: whether the elements have no more bits than bf16.
  __device__ __forceinline__ LinearBins(float low, float high, bool is_bf16) {
    // Of f32 so little that no number changes. But not 0, of which -inf would become NaN.
    const float step = is_bf16 ? 1.0f / (1 << 8) : std::is_same_v<T, __half> ? 1.0f / (1 << 11) : 0x1p-100f;
    low -= fabsf(low) * step;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(factor) : "f"(high - low));
    offset = high * factor;
    step_of_vector = step * (1.0f / (kMaxBlockLength * sizeof(T) / 16 + 1));
  }
  // For elements of one vector of the row.
  __device__ __forceinline__ float step_at(uint32_t index) const {
    return (index / (16 / sizeof(T)) + 1) * step_of_vector;
  }
  __device__ __forceinline__ uint32_t operator()(float x, float step) const {
    x = __fmaf_rn(fabsf(x), -step, x);
    constexpr float kInteger = 1 << 23;  // added to a number below it, its last bits are that number's integer
    return float_bits(__fmaf_rn(__saturatef(__fmaf_rn(x, -factor, offset)), kLast, kInteger)) - float_bits(kInteger);
  }
  // Whether the bins of halves, which are narrow near zero, may part what shares this one.
  __device__ __forceinline__ bool is_rough(uint32_t bin) const {
    return bin == 0 || bin == kLast || fabsf(offset - bin * (1.0f / kBins)) < 1.0f / 64;
  }
};

// Of the shortest rows, one block more fits a multiprocessor.
template <typename T, int kThreads, int kVectors, bool kSorted>
__global__ void __launch_bounds__(kThreads, 1024 / kThreads + (kThreads * kVectors * (16 / sizeof(T)) <= 1024 ? 1 : 0))
    topk_select_many(const TopkSelect op) {
  using Row = RegisterRow<T, kThreads, kVectors>;
  using Select = BlockSelect<T, kThreads, kVectors>;
  constexpr int kWarps = kThreads / 32, kHalf = Row::kElements / 2, kEdge = kVectors * Row::kElements;
  constexpr int kWords = (kVectors + 1) / 2;  // of numbers of a vector each, two in a word
  constexpr uint32_t kNoLeast = 0xFFFFFFFFu;
  __shared__ uint32_t counts[2][kWarps];
  __shared__ uint32_t sizes[kWords][kWarps];   // how many are chosen of a warp's vectors
  __shared__ uint32_t members_chosen[kWarps];  // of the list of the k-th's bin, a bit each
  __shared__ uint64_t exact_bound;
  struct alignas(16) Range {
    uint32_t low, middle, high;
    uint32_t more_bits;  // than those of bf16, that some element has
  };
  __shared__ Range range;  // of the keys
  __shared__ uint32_t count, head_size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int64_t row_index = blockIdx.x;
  const T* data = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  uint32_t* bins = Select::shared().bins;
  uint64_t* pairs = Select::pairs();
  const PairFormat<T> format = {kRowIndexBits};
  const Row row(data, length);
  Select::clear_bins();
  Select::init();
  if (threadIdx.x == 0) {
    count = 0;
    range = {kNoLeast, 0, 0, 0};
  }
  __syncthreads();

  if (k != 0) {
    uint32_t bins_of[kVectors][kHalf];  // of a vector's element e, and e + kHalf
    uint32_t edge_bin;
    const auto count_rounded = [&] {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kHalf; ++e) {
          bins_of[v][e] = bins_of_two<Select::kBinBits>(row.element(v, e), row.element(v, e + kHalf));
        }
        if (!row.exists(v)) continue;
#pragma unroll
        for (int e = 0; e < kHalf; ++e) {
          atomicAdd(&bins[bins_of[v][e] & 0xFFFF], 1);
          atomicAdd(&bins[bins_of[v][e] >> 16], 1);
        }
      }
      edge_bin = bins_of_two<Select::kBinBits>(row.edge, row.edge) & 0xFFFF;
      if (row.has_edge) atomicAdd(&bins[edge_bin], 1);
    };
    bool crowded = false;
    if constexpr (kSorted) {
      // Of each 8 elements, or 4 where a thread has no more, the largest. By chance the least of these is never above
      // the k-th, and seldom far below it. The middle is the largest of the warps' least.
      constexpr int kOfGroup = sizeof(T) == 4 && kVectors > 1 ? 2 : 1;
      constexpr uint32_t kLowest = 0x007FFFFFu;  // order_key(-inf)
      uint32_t least = kNoLeast, largest = order_key(row.edge), more_bits = float_bits(row.edge);
#pragma unroll
      for (int v = 0; v < kVectors; v += kOfGroup) {
        uint4 group[kOfGroup];
#pragma unroll
        for (int i = 0; i < kOfGroup; ++i) group[i] = row.vectors[v + i];
        const uint32_t key = order_key(largest_element<T>(group));
        if (key != kLowest) least = min(least, key);
        largest = max(largest, key);
        if constexpr (sizeof(T) == 4) {
#pragma unroll
          for (const uint4& vector : group) more_bits |= vector.x | vector.y | vector.z | vector.w;
        }
      }
      least = __reduce_min_sync(kFullWarp, least);
      largest = __reduce_max_sync(kFullWarp, largest);
      if (lane == 0 && least != kNoLeast) {
        atomicMin(&range.low, least);
        atomicMax(&range.middle, least);
      }
      if (lane == 0) atomicMax(&range.high, largest);
      if constexpr (sizeof(T) == 4) {
        more_bits = __reduce_or_sync(kFullWarp, more_bits) & 0xFFFF;
        if (lane == 0 && more_bits != 0) atomicOr(&range.more_bits, more_bits);
      }
      __syncthreads();
      // The bins lie between the least and the largest, or a bound that some outliers may be above.
      const float low = float_of_key(range.low), middle = float_of_key(range.middle);
      const float bound = middle > low ? low + 32.0f * (middle - low) : INFINITY;
      const float high = fminf(float_of_key(range.high), bound);
      const LinearBins<T, Select::kBins> linear_bin(low, high, !std::is_same_v<T, __half> && range.more_bits == 0);
#pragma unroll 1
      for (bool linear = 3 * k <= length && high >= low;; linear = false) {
        if (linear) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const float step = linear_bin.step_at(row.index(v));
#pragma unroll
            for (int e = 0; e < kHalf; ++e) {
              const uint32_t a = linear_bin(row.element(v, e), step), b = linear_bin(row.element(v, e + kHalf), step);
              bins_of[v][e] = __byte_perm(a, b, 0x5410);
              atomicAdd(&bins[a], 1);
              atomicAdd(&bins[b], 1);
            }
          }
          edge_bin = linear_bin(row.edge, linear_bin.step_at(row.edge_index));
          if (row.has_edge) atomicAdd(&bins[edge_bin], 1);
        } else {
          count_rounded();
        }
        __syncthreads();
        crowded = Select::find_bin_and_starts(k);
        const uint32_t bin = Select::shared().found.bin;
        if (!linear || (bin != linear_bin.kLast && !(crowded && linear_bin.is_rough(bin)))) break;
        Select::clear_bins();
        __syncthreads();
      }
    } else {
      count_rounded();
      __syncthreads();
      Select::find_bin(k);
    }
    const auto found = Select::shared().found;

    // Bit i for number i of the thread's elements, if it lies in the bins up to one; -1 for none. Half of a difference
    // has its highest bit then.
    const auto mask_up_to = [&](int bin) {
      const uint32_t two = (0x8000u + bin) * 0x10001u;
      uint32_t mask = row.has_edge && static_cast<int>(edge_bin) <= bin ? 1u << kEdge : 0;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint32_t halves = 0;
#pragma unroll
        for (int e = 0; e < kHalf; ++e) halves |= ((two - bins_of[v][e]) & 0x80008000u) >> (15 - e);
        const uint32_t of_vector = (halves | halves >> (16 - kHalf)) & ((1u << Row::kElements) - 1);
        if (row.exists(v)) mask |= of_vector << (v * Row::kElements);
      }
      return mask;
    };
    const int kth_bin = static_cast<int>(found.bin);
    const auto write = [&](uint32_t place, uint64_t pair) { write_result(op, row_index, data, place, format, pair); };
    if (kSorted && !crowded) {
      // All up to the k-th's bin go to shared memory by their bins. A pair has its bin where its index has bits that
      // are 1 in all. Several places are asked for before the first is used.
      static_assert(kMaxBlockLength <= 1 << 16);
      constexpr int kAtOnce = kVectors * Row::kElements < 8 ? 4 : 8;
      const auto with_bin = [](uint64_t pair, uint32_t bin) { return pair ^ (0xFFFFu ^ bin) << 16; };
      const uint32_t bins_address = static_cast<uint32_t>(__cvta_generic_to_shared(bins));
      const uint32_t pairs_address = static_cast<uint32_t>(__cvta_generic_to_shared(pairs));
      const uint32_t candidates = mask_up_to(kth_bin);
#pragma unroll
      for (int first = 0; first < kVectors * Row::kElements; first += kAtOnce) {
        const auto bin_at = [&](int i) {
          const int e = i % Row::kElements;
          return bins_of[i / Row::kElements][e % kHalf] >> (e / kHalf * 16) & 0xFFFF;
        };
        uint32_t places[kAtOnce] = {};
#pragma unroll
        for (int i = first; i < first + kAtOnce; ++i) {
          count_if((candidates >> i & 1) != 0, bins_address + 4 * bin_at(i), places[i - first]);
        }
#pragma unroll
        for (int i = first; i < first + kAtOnce; ++i) {
          store_if((candidates >> i & 1) != 0, pairs_address + 8 * places[i - first],
                   with_bin(row.pair(i / Row::kElements, i % Row::kElements), bin_at(i)));
        }
      }
      if ((candidates >> kEdge & 1) != 0) {
        pairs[atomicAdd(&bins[edge_bin], 1)] = with_bin(row.edge_pair(), edge_bin);
      }
      __syncthreads();
      // Now bins[b] is where bin b ends, and the next begins.
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < found.before + found.count; i += kThreads) {
        const uint64_t pair = pairs[i];
        const uint32_t bin = static_cast<uint32_t>(pair) >> 16;
        uint32_t place = bin == 0 ? 0 : bins[bin - 1];
#pragma unroll 4
        for (uint32_t other = place, end = bins[bin]; other < end; ++other) place += pairs[other] > pair;
        if (place < k) write(place, with_bin(pair, bin));
      }
    } else {
      // How many elements of a mask come before each of the thread's vectors, and before its edge, in the order of the
      // row: by vector, warp and lane. For all threads together.
      struct Places {
        uint32_t of_vector[kVectors], of_edge;
      };
      const auto places_in_order = [&](uint32_t mask) {
        const auto size_of_vector = [&](int v) {
          return __popc(mask >> (v * Row::kElements) & ((1u << Row::kElements) - 1));
        };
        Places places;
        uint32_t own[kWords], sums[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          own[w] = size_of_vector(2 * w);
          if (2 * w + 1 < kVectors) own[w] |= size_of_vector(2 * w + 1) << 16;
          sums[w] = inclusive_sum_of_lanes(own[w]);
          if (lane == 31) sizes[w][warp] = sums[w];
        }
        // The edges belong to the first warp.
        const uint32_t edges = __ballot_sync(kFullWarp, (mask >> kEdge & 1) != 0);
        if (threadIdx.x == 0) head_size = __popc(edges & ((1u << row.head) - 1));
        __syncthreads();
        uint32_t start = head_size;  // of a vector of all threads
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          const uint32_t size = lane < kWarps ? sizes[w][lane] : 0;
          const uint32_t all = __reduce_add_sync(kFullWarp, size);
          const uint32_t before = __reduce_add_sync(kFullWarp, lane < warp ? size : 0) + sums[w] - own[w];
#pragma unroll
          for (int v = 2 * w; v < 2 * w + 2 && v < kVectors; ++v) {
            places.of_vector[v] = start + (before >> (v % 2 * 16) & 0xFFFF);
            start += all >> (v % 2 * 16) & 0xFFFF;
          }
        }
        const uint32_t earlier = __popc(edges & ((1u << lane) - 1));
        places.of_edge = lane < row.head ? earlier : start - head_size + earlier;
        return places;
      };
      uint32_t chosen = mask_up_to(kth_bin - 1);
      const uint32_t members = mask_up_to(kth_bin) & ~chosen;  // of the bin of the k-th
      const auto pair_at = [&](uint32_t i) {
        const uint32_t index = row.index_at(i);
        return format.pair(load_one(data + index), index);
      };
      uint32_t first_place = 0;  // of the thread's members in their list
      if (members != 0 && found.count <= kThreads) {
        first_place = atomicAdd(&count, __popc(members));
        uint32_t place = first_place;
#pragma unroll 1
        for (uint32_t rest = members; rest != 0; rest &= rest - 1) pairs[place++] = pair_at(__ffs(rest) - 1);
      }
      if (threadIdx.x == 0 && found.count <= kThreads) pairs[found.count] = kNoPair;
      __syncthreads();
      if (found.count <= kThreads) {
        if (32 * warp < found.count) {
          const uint64_t pair = threadIdx.x < found.count ? pairs[threadIdx.x] : kNoPair;
          const uint32_t place = found.before + count_larger(pair, pairs, found.count);
          const bool exists = threadIdx.x < found.count;
          const uint32_t those_chosen = __ballot_sync(kFullWarp, exists && place < k);
          if (lane == 0) members_chosen[warp] = those_chosen;
          if (exists && place == k - 1) exact_bound = pair;
        }
      } else {
        // Too many to be listed: a bisection of the range of their keys, and of those that equal the k-th's the first.
        const auto for_each_member = [&](auto body) {
#pragma unroll 1
          for (uint32_t rest = members; rest != 0; rest &= rest - 1) {
            body(rest & -rest, format.key_of(load_one(data + row.index_at(__ffs(rest) - 1))));
          }
        };
        uint32_t low = 0xFFFFFFFFu, high = 0;
        for_each_member([&](uint32_t, uint32_t key) {
          low = min(low, key);
          high = max(high, key);
        });
        low = __reduce_min_sync(kFullWarp, low);
        high = __reduce_max_sync(kFullWarp, high);
        if (lane == 0) atomicMin(&Select::shared().key_min, low);
        if (lane == 0) atomicMax(&Select::shared().key_max, high);
        __syncthreads();
        low = Select::shared().key_min;
        high = Select::shared().key_max;
        uint32_t larger = found.before;  // elements of the row above `high`, or in earlier bins: at most k
#pragma unroll 1
        for (int round = 0; low < high; round ^= 1) {
          const uint32_t middle = high - (high - low) / 2;
          uint32_t own = 0;
#pragma unroll 4
          for (uint32_t i = threadIdx.x; i < length; i += kThreads) own += format.key_of(load_one(data + i)) >= middle;
          own = __reduce_add_sync(kFullWarp, own);
          if (lane == 0) counts[round][warp] = own;
          __syncthreads();
          const uint32_t size = __reduce_add_sync(kFullWarp, lane < kWarps ? counts[round][lane] : 0);
          if (size > k) {
            low = middle;
          } else {
            high = middle - 1;
            larger = size;
            if (size == k) low = high;
          }
        }
        uint32_t equal = 0;
        for_each_member([&](uint32_t bit, uint32_t key) {
          chosen |= key > low ? bit : 0;
          equal |= key == low ? bit : 0;
        });
        const Places places = places_in_order(equal);
        const auto choose = [&](uint32_t bit, uint32_t place) {
          if ((equal & bit) != 0 && place < k - larger) chosen |= bit;
        };
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          uint32_t place = places.of_vector[v];
#pragma unroll
          for (int e = 0; e < Row::kElements; ++e) {
            const uint32_t bit = 1u << (v * Row::kElements + e);
            choose(bit, place);
            if ((equal & bit) != 0) ++place;
          }
        }
        choose(1u << kEdge, places.of_edge);
        if (threadIdx.x == 0) exact_bound = static_cast<uint64_t>(low) << kRowIndexBits | ~(length - 1);
      }
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
      const uint64_t bound = exact_bound;
      if (found.count <= kThreads) {
#pragma unroll 1
        for (uint32_t rest = members; rest != 0; rest &= rest - 1, ++first_place) {
          if ((members_chosen[first_place / 32] >> first_place % 32 & 1) != 0) chosen |= rest & -rest;
        }
      }
      const bool edge_chosen = (chosen >> kEdge & 1) != 0;
      const auto is_chosen = [&](int v, int e) { return (chosen >> (v * Row::kElements + e) & 1) != 0; };

      if constexpr (kSorted) {
        uint64_t best = 0;
        uint32_t varying = 0;
        const auto keep = [&](uint64_t pair) {
          best = max(best, pair);
          varying |= static_cast<uint32_t>((pair ^ bound) >> format.index_bits);
          pairs[atomicAdd(&count, 1)] = pair;
        };
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
#pragma unroll
          for (int e = 0; e < Row::kElements; ++e) {
            if (is_chosen(v, e)) keep(row.pair(v, e));
          }
        }
        if (edge_chosen) keep(row.edge_pair());
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
        // In ascending order of the index. They go to shared memory first, since whole lines are faster to write.
        using Bits = typename Row::Bits;
        struct alignas(2 * sizeof(Bits)) Result {
          Bits bits, index;
        };
        static_assert(sizeof(Bits) == 4 || kMaxBlockLength <= 1 << 16);
        Result* results = reinterpret_cast<Result*>(pairs);
        // Of a sorted row, a thread with 8 elements has 8 results side by side: a gap behind them spreads these over
        // the banks.
        const auto result_at = [&](uint32_t place) -> Result& {
          return results[Row::kElements == 8 ? place + place / 8 : place];
        };
        const Places places = places_in_order(chosen);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          uint32_t place = places.of_vector[v];
#pragma unroll
          for (int e = 0; e < Row::kElements; ++e) {
            if (is_chosen(v, e)) result_at(place++) = {row.bits(v, e), static_cast<Bits>(row.index(v) + e)};
          }
        }
        if (edge_chosen) {
          result_at(places.of_edge) = {reinterpret_cast<const Bits*>(data)[row.edge_index],
                                       static_cast<Bits>(row.edge_index)};
        }
        __syncthreads();
        Bits* values = static_cast<Bits*>(op.values) + row_index * op.k;
        int32_t* indices = op.indices + row_index * op.k;
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < k; i += kThreads) {
          const Result result = result_at(i);
          values[i] = result.bits;
          indices[i] = static_cast<int32_t>(result.index);
        }
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
          const auto kernel = op.sorted ? topk_select_many<T, kInstance.threads, kInstance.size, true>
                                        : topk_select_many<T, kInstance.threads, kInstance.size, false>;
          return launch_kernel(kernel, shape, stream, op);
        }
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace jax_router::cuda
