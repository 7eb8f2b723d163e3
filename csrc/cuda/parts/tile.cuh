// What a tile of lanes does with a row of keys that it holds in registers: loading it, and finding the k best.
//
// A tile of kLanes neighbouring lanes of a warp (kLanes = 8, 16 or 32) owns one row, in quads of neighbours: element i
// of lane l is expert_of<kLanes>(l, i) = (i / 4) * 4 * kLanes + 4 * l + i % 4. (The row of a token has an element an
// expert; that of topk_select has others, in the same layout.)
//
// The k best are found by a bound and a ranking. Each lane takes the largest of its keys; at least k elements have a
// key no smaller than the k-th largest of these, and only slightly more than k do. Those few go to shared memory, one
// lane each (with 8 lanes, two), and every lane counts how many of them beat its own. The bound is tightened where
// there is no room for as many as reach it. Rows with NaN or many equal keys take k rounds of an exact maximum instead.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../common/ops.h"
#include "../../common/order.h"
#include "../plan/row_tile.h"
#include "dtype.cuh"
#include "row_score.cuh"
#include "warp.cuh"

namespace jax_router::cuda {

// How often a bound that too many keys reach is tightened.
constexpr int kMostAttempts = 16;

// How many candidates a tile has room for: one a lane, but never fewer than 16.
template <int kLanes>
constexpr int kSlots = kLanes < 16 ? 16 : kLanes;

// Shared memory of one tile.
template <int kLanes>
struct alignas(16) SelectScratch {
  uint64_t pairs[kSlots<kLanes>];
  int candidates[kSlots<kLanes>];
  float values[kLanes];
};

// The largest of a lane's keys; with 8 lanes that of its even elements and that of its odd ones, as a bound goes by 16
// of them at least.
template <int kLanes>
using LaneMaxima = std::conditional_t<kLanes == 8, float2, float>;

__device__ __forceinline__ float largest_of(float maximum) { return maximum; }
__device__ __forceinline__ float largest_of(float2 maxima) { return max_nan(maxima.x, maxima.y); }
__device__ __forceinline__ void set_lowest(float& maximum) { maximum = -INFINITY; }
__device__ __forceinline__ void set_lowest(float2& maxima) { maxima = make_float2(-INFINITY, -INFINITY); }
__device__ __forceinline__ void include(float& maximum, float other) { maximum = max_nan(maximum, other); }
__device__ __forceinline__ void include(float2& maxima, float2 others) {
  include(maxima.x, others.x);
  include(maxima.y, others.y);
}

template <int kLanes>
__device__ __forceinline__ int tile_lane() {
  return static_cast<int>(threadIdx.x) & (kLanes - 1);
}

template <int kLanes>
__device__ __forceinline__ int expert_of(int lane, int element) {
  return (element >> 2) * (4 * kLanes) + 4 * lane + (element & 3);
}

// Elements of 16 bits in the layout above, two neighbours a word.
template <class T, int kElements>
struct PackedTile {
  uint32_t words[kElements / 2];
};

template <int kElements>
struct FloatTile {
  float values[kElements];
};

template <class T, int kElements>
__device__ __forceinline__ FloatTile<kElements> as_floats(const PackedTile<T, kElements>& packed) {
  FloatTile<kElements> elements;
#pragma unroll
  for (int i = 0; i < kElements; i += 2) {
    const float2 two = unpack_two(packed.words[i / 2], T{});
    elements.values[i] = two.x;
    elements.values[i + 1] = two.y;
  }
  return elements;
}
template <int kElements>
__device__ __forceinline__ const FloatTile<kElements>& as_floats(const float (&elements)[kElements]) {
  return reinterpret_cast<const FloatTile<kElements>&>(elements);
}

template <class Tile>
constexpr int kElementsOf = std::extent_v<Tile>;
template <class T, int kElements>
constexpr int kElementsOf<PackedTile<T, kElements>> = kElements;

// A row of `length` elements into the registers of a tile of kLanes lanes, in the layout above; -inf where there is
// no element. kFullChunks: the first so many of the quads are within any row that comes here.
template <int kLanes, int kFullChunks, class T, int kElements, class Loads = OrdinaryLoads>
__device__ __forceinline__ void load_tile(const T* row, int length, bool quads, PackedTile<T, kElements>& packed,
                                          Loads loads = {}) {
  const int first = 4 * (static_cast<int>(threadIdx.x) & (kLanes - 1));
  row += first;
  asm("" : "+l"(row));  // one address with constant offsets, where the compiler would make one for each load
  const int left = length - first;
  const uint32_t none = pack_two(-INFINITY, -INFINITY, T{});
  if (quads) {
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      uint2 quad = make_uint2(none, none);
      if (c < kFullChunks || 4 * kLanes * c < left) quad = loads.packed_quad(row + 4 * kLanes * c);
      packed.words[2 * c] = quad.x;
      packed.words[2 * c + 1] = quad.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      const int offset = i / 4 * 4 * kLanes + i % 4;
      const float low = offset < left ? load_one(row + offset) : -INFINITY;
      const float high = offset + 1 < left ? load_one(row + offset + 1) : -INFINITY;
      packed.words[i / 2] = pack_two(low, high, T{});
    }
  }
}

// The same as f32.
template <int kLanes, int kFullChunks, int kElements, class T, class Loads = OrdinaryLoads>
__device__ __forceinline__ void load_tile(const T* row, int length, bool quads, float (&elements)[kElements],
                                          Loads loads = {}) {
  const int first = 4 * (static_cast<int>(threadIdx.x) & (kLanes - 1));
  row += first;
  asm("" : "+l"(row));
  const int left = length - first;
  if (quads) {
    // 16-bit quads stay packed until all loads are under way: the compiler would wait for some of them to unpack these.
    constexpr bool kPacked = sizeof(T) == 2;
    [[maybe_unused]] uint2 packed[kPacked ? kElements / 4 : 1];
    if constexpr (kPacked) {
#pragma unroll
      for (int c = 0; c < kElements / 4; ++c) {
        if (c < kFullChunks || 4 * kLanes * c < left) packed[c] = loads.packed_quad(row + 4 * kLanes * c);
      }
    }
#pragma unroll
    for (int c = 0; c < kElements / 4; ++c) {
      float4 quad = make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
      if (c < kFullChunks || 4 * kLanes * c < left) {
        if constexpr (kPacked) {
          quad = unpack_quad(row, packed[c]);
        } else {
          quad = loads.quad(row + 4 * kLanes * c);
        }
      }
      elements[4 * c + 0] = quad.x;
      elements[4 * c + 1] = quad.y;
      elements[4 * c + 2] = quad.z;
      elements[4 * c + 3] = quad.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int offset = i / 4 * 4 * kLanes + i % 4;
      elements[i] = offset < left ? load_one(row + offset) : -INFINITY;
    }
  }
}

// A sum below 2^24 of the terms whose condition holds. It is kept as the float with these bits, which is subnormal (or
// next to that) and so exact: a multiprocessor adds twice as many floats at a time as it adds or compares integers.
struct SumOfTrue {
  float bits = 0.0f;

  __device__ __forceinline__ void add_if_greater(uint64_t a, uint64_t b) {
    asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "l"(a), "l"(b));
  }
  __device__ __forceinline__ void add_if_greater(double a, double b) {
    asm("{ .reg .pred p; setp.gt.f64 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "d"(a), "d"(b));
  }
  __device__ __forceinline__ void add_if_greater(uint32_t a, uint32_t b) {
    asm("{ .reg .pred p; setp.gt.u32 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "r"(a), "r"(b));
  }
  __device__ __forceinline__ void add_if_greater(float a, float b) {
    asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "f"(a), "f"(b));
  }
  __device__ __forceinline__ void add_if_reaches(float a, float b, uint32_t term = 1) {
    asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; @p add.f32 %0, %0, %3; }"
        : "+f"(bits)
        : "f"(a), "f"(b), "f"(bits_float(term)));
  }
  __device__ __forceinline__ void add_if_reaches(uint32_t a, uint32_t b, uint32_t term) {
    asm("{ .reg .pred p; setp.ge.u32 p, %1, %2; @p add.f32 %0, %0, %3; }"
        : "+f"(bits)
        : "r"(a), "r"(b), "f"(bits_float(term)));
  }
  __device__ __forceinline__ void add_unless_below(float a, float b, uint32_t term) {
    asm("{ .reg .pred p; setp.geu.f32 p, %1, %2; @p add.f32 %0, %0, %3; }"
        : "+f"(bits)
        : "f"(a), "f"(b), "f"(bits_float(term)));
  }
  __device__ __forceinline__ uint32_t value() const { return float_bits(bits); }
};

// A pair whose index is below 2^30 as a number that has its place in the order: to compare two such is one instruction
// in place of two, and for units that have nothing else to do, where there are enough of these.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
using RankedPair = double;
__device__ __forceinline__ RankedPair ranked_pair(uint32_t key, uint32_t index) {
  // Positive and finite, as the highest two bits are 0. A denormal number is compared as well as any.
  return __hiloint2double(static_cast<int>(key >> 2), static_cast<int>(key << 30 | (index ^ 0x3FFFFFFF)));
}
__device__ __forceinline__ RankedPair ranked_pair(uint64_t pair) { return __longlong_as_double(pair); }
#else
using RankedPair = uint64_t;
__device__ __forceinline__ RankedPair ranked_pair(uint32_t key, uint32_t index) { return order_pair(key, index); }
__device__ __forceinline__ RankedPair ranked_pair(uint64_t pair) { return pair; }
#endif

// At least the largest of the counts of a warp's tiles, each of them at most kSlots, and the same in the whole warp.
// With several tiles it is 8 or 16, as rank_of tells no more apart.
template <int kLanes>
__device__ __forceinline__ int most_of_tiles(int count) {
  if constexpr (kLanes == 32) return count;
  return __any_sync(kFullWarp, count > 8) ? 16 : 8;
}

// How many of the tile's keys (of uint32_t, uint64_t or double), of which at most `most` are not 0, are larger than
// each of the lane's own. `most` is the same in the whole warp, and had best be known early: nothing waits for the keys
// then. Where it is at most 8, only the first of the lane's own is looked at.
template <int kOwn, int kCount, class Key>
__device__ __forceinline__ void ranks_of(const Key (&own)[kOwn], const Key (&keys)[kCount], int most,
                                         int (&ranks)[kOwn]) {
  struct alignas(16) Vector {
    Key keys[16 / sizeof(Key)];
  };
  constexpr int kStep = sizeof(Vector) / sizeof(Key);
  SumOfTrue sums[kOwn][2];  // two short sums in place of a long one
  const auto count = [&](int begin, auto at_once, auto of_own) {
#pragma unroll
    for (int i = begin; i < begin + decltype(at_once)::value; i += kStep) {
      const Vector others = *reinterpret_cast<const Vector*>(keys + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
#pragma unroll
        for (int o = 0; o < decltype(of_own)::value; ++o) sums[o][j % 2].add_if_greater(others.keys[j], own[o]);
      }
    }
  };
  constexpr std::integral_constant<int, kOwn> kAll;
  if (most <= 8) {
    count(0, std::integral_constant<int, 8>{}, std::integral_constant<int, 1>{});
  } else {
    count(0, std::integral_constant<int, 16>{}, kAll);
    if (kCount > 16 && most > 16) count(16, std::integral_constant<int, kCount - 16>{}, kAll);
  }
#pragma unroll
  for (int o = 0; o < kOwn; ++o) ranks[o] = static_cast<int>(sums[o][0].value() + sums[o][1].value());
}

// The same of one key.
template <int kCount, class Key>
__device__ __forceinline__ int rank_of(Key key, const Key (&keys)[kCount], int most) {
  const Key own[1] = {key};
  int rank[1];
  ranks_of(own, keys, most, rank);
  return rank[0];
}

// How many of pairs[0..count) are larger than this one, of any number of pairs below 2^62. `pairs` is aligned to 16
// bytes; if count is odd, pairs[count] is 0.
__device__ __forceinline__ int rank_among(RankedPair pair, const uint64_t* pairs, int count) {
  struct alignas(16) Two {
    RankedPair pairs[2];
  };
  SumOfTrue larger[2];
#pragma unroll 4
  for (int other = 0; other < count; other += 2) {
    const Two others = *reinterpret_cast<const Two*>(pairs + other);
    larger[0].add_if_greater(others.pairs[0], pair);
    larger[1].add_if_greater(others.pairs[1], pair);
  }
  return static_cast<int>(larger[0].value() + larger[1].value());
}

// Sorts one value a lane within each kRun neighbouring lanes, the largest first, with a bitonic network.
template <int kRun>
__device__ __forceinline__ float sort_descending(float value) {
#pragma unroll
  for (int size = 2; size <= kRun; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      // The first step of a merge compares with the mirror image, so that all runs can be in descending order.
      const float other = __shfl_xor_sync(kFullWarp, value, step == size / 2 ? size - 1 : step);
      value = (threadIdx.x & step) == 0 ? fmaxf(value, other) : fminf(value, other);
    }
  }
  return value;
}

// Sorts within each kRun neighbouring lanes values that rise and then fall, or the reverse.
template <int kRun>
__device__ __forceinline__ float merge_descending(float value) {
#pragma unroll
  for (int step = kRun / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, value, step);
    value = (threadIdx.x & step) == 0 ? fmaxf(value, other) : fminf(value, other);
  }
  return value;
}

// 16 or 32 maxima of the tile's keys, or the 8 largest of them, in descending order: lane i has number i, of at least
// k. At least k of the keys reach number k - 1, but not many more.
template <int kLanes>
__device__ __forceinline__ float sorted_maxima(float lane_maximum, int k) {
  if (kLanes == 32 && k > max_tile_k(16)) return sort_descending<32>(lane_maximum);
  if constexpr (kLanes == 32) lane_maximum = fmaxf(lane_maximum, __shfl_xor_sync(kFullWarp, lane_maximum, 16));
  return sort_descending<16>(lane_maximum);
}
template <int kLanes>
__device__ __forceinline__ float sorted_maxima(float2 maxima, int k) {
  static_assert(kLanes == 8);
  // The 8 best of two runs in order: the larger of each number of one and the mirror image of the other, to be sorted.
  const float mirrored = __shfl_xor_sync(kFullWarp, sort_descending<8>(maxima.y), 7);
  return merge_descending<8>(fmaxf(sort_descending<8>(maxima.x), mirrored));
}

// The same maxima, counted in place of sorted: each lane knows how many reach its own. That is a few instructions more,
// of which fewer wait for each other.
template <int kLanes>
struct CountedMaxima {
  static_assert(kLanes > 8);
  float maximum;
  int reaching;
  bool needed;

  // needed: false for a tile that no number is asked of; it gets any.
  __device__ __forceinline__ CountedMaxima(float lane_maximum, int k, bool needed, SelectScratch<kLanes>& scratch)
      : maximum(lane_maximum), needed(needed) {
    const bool halved = kLanes == 32 && k <= max_tile_k(16);
    if (halved) maximum = fmaxf(maximum, __shfl_xor_sync(kFullWarp, maximum, 16));
    scratch.values[tile_lane<kLanes>()] = maximum;
    __syncwarp();
    SumOfTrue sums[2];  // two short sums in place of a long one
    const auto count = [&](int begin) {
#pragma unroll
      for (int i = begin; i < begin + 16; i += 4) {
        const float4 others = *reinterpret_cast<const float4*>(scratch.values + i);
        sums[0].add_if_reaches(others.x, maximum);
        sums[1].add_if_reaches(others.y, maximum);
        sums[0].add_if_reaches(others.z, maximum);
        sums[1].add_if_reaches(others.w, maximum);
      }
    };
    count(0);
    if (kLanes == 32 && !halved) count(16);
    reaching = static_cast<int>(sums[0].value() + sums[1].value());
  }

  // Number 0 is the largest. It is that of the lane whose own the fewest reach, but more than `number`: equal ones have
  // each of their numbers.
  __device__ __forceinline__ float operator()(int number) const {
    constexpr uint32_t kTile = kLanes == 32 ? kFullWarp : (1u << (kLanes & 31)) - 1;
    uint32_t lanes = needed ? 0 : 1;
#pragma unroll 1
    for (int count = number + 1;; ++count) {
      const uint32_t of_warp = __ballot_sync(kFullWarp, reaching == count);
      if (lanes == 0) lanes = of_warp >> (threadIdx.x & 31 & ~(kLanes - 1)) & kTile;
      if (__all_sync(kFullWarp, lanes != 0)) break;
    }
    return __shfl_sync(kFullWarp, maximum, __ffs(lanes) - 1, kLanes);
  }
};

// The exact k best of the eligible keys, best first, into candidates.
template <int kLanes, int kElements>
__device__ __forceinline__ void select_by_rounds(const float (&keys)[kElements], uint32_t eligible, int k,
                                                 int* candidates) {
  const int lane = tile_lane<kLanes>();
  for (int round = 0; round < k; ++round) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const uint64_t pair = order_pair(order_key(keys[i]), static_cast<uint32_t>(expert_of<kLanes>(lane, i)));
      if ((eligible >> i & 1) != 0 && pair > best) best = pair;
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullWarp, best, step);
      best = other > best ? other : best;
    }
    const int expert = static_cast<int>(pair_index(best));
    if (lane == 0) candidates[round] = expert;
    const int quad = expert >> 2;
    if (best != 0 && (quad & (kLanes - 1)) == lane) eligible &= ~(1u << (quad / kLanes * 4 + (expert & 3)));
  }
}

// Which of the tile's elements are experts: bit i for element i. The first kFullChunks quads are known to be.
template <int kLanes, int kFullChunks, int kElements>
__device__ __forceinline__ uint32_t existing_elements(int experts) {
  uint32_t existing = kFullChunks == 8 ? 0xFFFFFFFFu : (1u << (4 * kFullChunks % 32)) - 1;
#pragma unroll
  for (int c = kFullChunks; c < kElements / 4; ++c) {
    const int of_quad = min(max(experts - expert_of<kLanes>(tile_lane<kLanes>(), 4 * c), 0), 4);
    existing |= ((1u << of_quad) - 1) << (4 * c);
  }
  return existing;
}

// Which of the lane's keys reach a bound: bit i for element i.
template <int kElements>
__device__ __forceinline__ uint32_t reaching(const float (&keys)[kElements], float bound) {
  SumOfTrue lower_half;
  SumOfTrue upper_half;
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    lower_half.add_if_reaches(keys[i], bound, 1u << i);
    upper_half.add_if_reaches(keys[kElements / 2 + i], bound, 1u << i);
  }
  return lower_half.value() | upper_half.value() << (kElements / 2);
}
template <class T, int kElements>
__device__ __forceinline__ uint32_t reaching(const PackedTile<T, kElements>& keys, float bound) {
  const uint32_t bounds = two_no_less(bound, T{});
  uint32_t halves[2] = {};  // 16 elements each, the odd ones in the upper half of the word
#pragma unroll
  for (int i = 0; i < kElements / 2; ++i) {
    halves[i / 8] |= reaches_of_two(keys.words[i], bounds, T{}) & (0x00020001u << (2 * (i % 8)));
  }
  const uint32_t low = (halves[0] | halves[0] >> 16) & 0xFFFF;
  return kElements <= 16 ? low : low | (halves[1] | halves[1] << 16) & 0xFFFF0000;
}

template <int kLanes, int kElements>
__device__ __forceinline__ LaneMaxima<kLanes> lane_maxima(const float (&keys)[kElements]) {
  if constexpr (kLanes > 8) {
    return largest_of(keys);
  } else {
    float2 maxima = make_float2(keys[0], keys[1]);
#pragma unroll
    for (int i = 2; i < kElements; i += 2) include(maxima, make_float2(keys[i], keys[i + 1]));
    return maxima;
  }
}
template <int kLanes, class T, int kElements>
__device__ __forceinline__ LaneMaxima<kLanes> lane_maxima(const PackedTile<T, kElements>& keys) {
  uint32_t largest = keys.words[0];
#pragma unroll
  for (int i = 1; i < kElements / 2; ++i) largest = max_of_words(largest, keys.words[i], T{});
  const float2 maxima = unpack_two(largest, T{});
  if constexpr (kLanes > 8) {
    return largest_of(maxima);
  } else {
    return maxima;
  }
}

// The sum of x over the tile's earlier lanes, and that over all of them: more than kSlots, but not exact, where that or
// some x above 7 makes it so. kInSteps: with fewer instructions, of which more wait for each other.
template <int kLanes, bool kInSteps>
__device__ __forceinline__ int exclusive_sum_of_tile(int x, int& all) {
  if constexpr (!kInSteps) {
    // Bit by bit of the numbers.
    const uint32_t tile = kLanes == 32 ? kFullWarp : 0xFFFFu << (threadIdx.x & 16);
    const uint32_t before = tile & ((1u << (threadIdx.x & 31)) - 1);
    int sum = 0;
    all = 0;
#pragma unroll
    for (int bit = 1; bit <= 4; bit *= 2) {
      const uint32_t lanes = __ballot_sync(kFullWarp, (x & bit) != 0);
      sum += bit * __popc(lanes & before);
      all += bit * __popc(lanes & tile);
    }
    if ((__ballot_sync(kFullWarp, x >= 8) & tile) != 0) all = kSlots<kLanes> + 1;
    return sum;
  } else {
    int sum = x;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      // __shfl_up_sync, which says itself whether there is a lane so far below.
      asm volatile(
          "{ .reg .pred p; .reg .b32 other; shfl.sync.up.b32 other|p, %0, %1, %2, -1; @p add.s32 %0, %0, other; }"
          : "+r"(sum)
          : "r"(step), "r"((32 - kLanes) << 8));
    }
    all = __shfl_sync(kFullWarp, sum, kLanes - 1, kLanes);
    return sum - x;
  }
}

// Lists the experts of the tile's eligible keys that are among the `needed` best or at most `margin` below these, and
// counts them: at least `needed`, at most kSlots. False, for the whole warp, where that fails: too many nearly equal
// keys. maximum: maximum(i) gives number i of sorted_maxima. kInSteps: see exclusive_sum_of_tile.
template <int kLanes, bool kInSteps, class Keys, class Maximum>
__device__ __forceinline__ bool list_candidates_by(const Keys& keys, uint32_t eligible, const Maximum& maximum, int k,
                                                   int needed, float margin, int* candidates, int& count) {
  const int lane = tile_lane<kLanes>();
  float bound = maximum(k - 1);
  uint32_t low = 0;
  uint32_t high = 0;
  bool probing = false;  // whether it is open that at least `needed` keys reach the bound
  uint32_t reach;
  int position;
#pragma unroll 1
  for (int attempt = 0;; ++attempt) {
    const float threshold = margin == 0.0f || probing ? bound : bound - margin - fabsf(bound) * kKeyMargin;
    reach = reaching(keys, threshold) & eligible;
    position = exclusive_sum_of_tile<kLanes, kInSteps>(__popc(reach), count);
    const bool crowded = count > kSlots<kLanes>;
    const bool fits = !crowded && count >= needed;
    if (!__any_sync(kFullWarp, (probing && margin != 0.0f) || !fits)) break;
    const uint32_t key = order_key(bound);
    // It is equal keys that are too many if the next larger bound is too large.
    const bool tied = probing && !crowded && !fits && key == low + 1;
    if (__any_sync(kFullWarp, tied) || attempt == kMostAttempts) return false;
    // The next larger maximum most often will do. If not, a bound is tried that tells if keys are equal, and then those
    // halfway between one that too many keys reach and one that too few do.
    uint32_t next;
    if (attempt == 0) {
      low = key;
      high = order_key(maximum(0));
      next = max(order_key(maximum(max(k - 2, 0))), key + 1);
    } else {
      if (!fits) (crowded ? low : high) = key;
      next = low + (attempt == 1 ? 1 : (high - low) / 2);
    }
    probing = !fits;
    if (!fits) bound = float_of_key(next);
  }
  for (int* place = candidates + position; reach != 0; ++place) {
    const int element = 31 - __clz(reach);
    *place = 4 * lane + element + (element & ~3) * (kLanes - 1);  // expert_of<kLanes>(lane, element)
    reach ^= 1u << element;
  }
  return true;
}
template <int kLanes, bool kInSteps = kLanes == 8, class Keys>
__device__ __forceinline__ bool list_candidates(const Keys& keys, uint32_t eligible, LaneMaxima<kLanes> maxima, int k,
                                                int needed, float margin, int* candidates, int& count) {
  const float sorted = sorted_maxima<kLanes>(maxima, k);
  const auto maximum = [&](int i) { return __shfl_sync(kFullWarp, sorted, i, kLanes); };
  return list_candidates_by<kLanes, kInSteps>(keys, eligible, maximum, k, needed, margin, candidates, count);
}

}  // namespace jax_router::cuda
