// topk_select for short rows: a warp or half a warp a row, the row in registers.
//
// The fewest choices (k up to kMaxTileK) are found as the router finds its experts without a bias (parts/tile.cuh): a
// bound that few elements reach, and a ranking of these. More of them (k up to kMaxWarpK) by a bisection of the keys'
// range, where a step counts the keys above its middle; the elements that then are chosen find their places by their
// order.
//
// Values are written with the bits that they have in the row: they are read again, when the row is in the L1 cache.
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include <climits>

#include "parts/launch.cuh"
#include "parts/pair_select.cuh"
#include "parts/tile.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

// The largest of every kLanes-th element of a tile's row: lane l has the elements whose index is
// l % (kLanes / 4) * 4 + l / (kLanes / 4) beyond a multiple of kLanes. The best of a row in order are neighbours; a
// bound by the largest of each lane's own quads would let whole quads of them pass. NaN if one of them is.
template <int kLanes, int kElements>
__device__ __forceinline__ float largest_of_every(const float (&keys)[kElements]) {
  float largest[4] = {keys[0], keys[1], keys[2], keys[3]};
#pragma unroll
  for (int i = 4; i < kElements; ++i) largest[i % 4] = max_nan(largest[i % 4], keys[i]);
  // The lanes of every kLanes / 4-th quad have the same indices: each keeps one of four, and gives away the others.
  const int lane = tile_lane<kLanes>();
#pragma unroll
  for (int kept = 2; kept > 0; kept /= 2) {
    const bool upper = (lane & kLanes / 4 * kept) != 0;
#pragma unroll
    for (int i = 0; i < kept; ++i) {
      const float given = upper ? largest[i] : largest[i + kept];
      const float own = upper ? largest[i + kept] : largest[i];
      largest[i] = max_nan(own, __shfl_xor_sync(kFullWarp, given, kLanes / 4 * kept));
    }
  }
  return largest[0];
}

// kChunks: quads a lane, of which the first kFullChunks are within a row of op.length.
template <typename T, int kLanes, int kChunks, int kFullChunks>
__global__ void __launch_bounds__(kTileThreads) topk_select_tiles(const TopkSelect op, const bool quads) {
  constexpr int kElements = 4 * kChunks;
  __shared__ SelectScratch<kLanes> scratches[kTileThreads / kLanes];
  SelectScratch<kLanes>& scratch = scratches[threadIdx.x / kLanes];
  const int lane = tile_lane<kLanes>();
  const int64_t row_index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kLanes) + threadIdx.x / kLanes;
  const bool exists = row_index < op.rows;
  const int row_length = static_cast<int>(op.length);
  const T* row = static_cast<const T*>(op.scores) + row_index * row_length;

  float keys[kElements];
  int length = 0;
  uint32_t eligible = 0;
  if (exists) {
    load_tile<kLanes, kFullChunks>(row, row_length, quads, keys);
    length = static_cast<int>(length_of_row(op, row_index));
    eligible = existing_elements<kLanes, kFullChunks, kElements>(row_length);
  }
  if (op.lengths != nullptr || !exists) {
    eligible = existing_elements<kLanes, 0, kElements>(length);
#pragma unroll
    for (int i = 0; i < kElements; ++i) keys[i] = (eligible >> i & 1) != 0 ? keys[i] : -INFINITY;
  }
  const int k = min(static_cast<int>(op.k), length);

  const float maximum = largest_of_every<kLanes>(keys);
  int count = 0;
  if (__any_sync(kFullWarp, maximum != maximum) ||
      !list_candidates<kLanes>(keys, eligible, maximum, max(k, 1), k, 0.0f, scratch.candidates, count)) {
    select_by_rounds<kLanes>(keys, eligible, static_cast<int>(op.k), scratch.candidates);
    count = k;
  }
  __syncwarp();

  const bool candidate = lane < count;
  T value{};
  int index = 0;
  // Of 16-bit elements a word holds key and index.
  constexpr bool kIsNarrow = sizeof(T) == 2;
  using Pair = std::conditional_t<kIsNarrow, uint32_t, RankedPair>;
  Pair pair = 0;
  if (candidate) {
    index = scratch.candidates[lane];
    value = row[index];
    const uint64_t bits = PairFormat<T>{kIsNarrow ? 10 : 30}.pair(as_float(value), static_cast<uint32_t>(index));
    if constexpr (kIsNarrow) {
      pair = static_cast<Pair>(bits);
    } else {
      pair = ranked_pair(bits);
    }
  }
  auto& pairs = reinterpret_cast<Pair(&)[kLanes]>(scratch.pairs);
  pairs[lane] = pair;
  __syncwarp();
  int place = rank_of(pair, pairs, most_of_tiles<kLanes>(count));
  const bool chosen = candidate && place < k;
  if (!op.sorted) {
    // The place is the number of chosen indices below the own.
    if (chosen) scratch.candidates[place] = index;
    if (lane >= k) scratch.candidates[lane] = INT_MAX;
    __syncwarp();
    place = 0;
#pragma unroll 1
    for (int begin = 0; begin < op.k; begin += 4) {
      const int4 others = *reinterpret_cast<const int4*>(scratch.candidates + begin);
      place += (others.x < index) + (others.y < index) + (others.z < index) + (others.w < index);
    }
  }
  if (chosen) {
    static_cast<T*>(op.values)[row_index * op.k + place] = value;
    op.indices[row_index * op.k + place] = index;
  }
  if (exists && lane >= k && lane < op.k) write_nothing<T>(op, row_index, lane);
}

template <typename T, int kChunks, int kFullChunks>
__global__ void __launch_bounds__(kTileThreads) topk_select_warps(const TopkSelect op, const bool quads) {
  constexpr int kElements = 4 * kChunks;
  constexpr int kWords = (kChunks + 3) / 4;
  __shared__ alignas(16) uint64_t all_pairs[kTileThreads / 32][kMaxWarpK];
  uint64_t* pairs = all_pairs[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t row_index = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row_index >= op.rows) return;
  const int row_length = static_cast<int>(op.length);
  const T* row = static_cast<const T*>(op.scores) + row_index * row_length;

  uint32_t keys[kElements];
  {
    float elements[kElements];
    load_tile<32, kFullChunks>(row, row_length, quads, elements);
#pragma unroll
    for (int i = 0; i < kElements; ++i) keys[i] = order_key(elements[i]);
  }
  const int length = static_cast<int>(length_of_row(op, row_index));
  const int k = min(static_cast<int>(op.k), length);
  const auto index_of = [&](int i) { return expert_of<32>(lane, i); };
  if (length < 32 * kElements) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) keys[i] = index_of(i) < length ? keys[i] : kNoKey;
  }

  // The largest bound that at least k keys reach: between the least of the lanes' maxima, if that is one of at least k,
  // and the largest key.
  uint32_t largest = keys[0];
#pragma unroll
  for (int i = 1; i < kElements; ++i) largest = max(largest, keys[i]);
  const uint32_t least = __reduce_min_sync(kFullWarp, largest);
  uint32_t high = __reduce_max_sync(kFullWarp, largest);
  uint32_t bound = k <= 32 ? max(least, 1u) : 1;
  bool exact = k == 0;
#pragma unroll 1
  while (bound < high && !exact) {
    const uint32_t middle = high - (high - bound) / 2;
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      asm("{ .reg .pred p; setp.ge.u32 p, %1, %2; @p add.u32 %0, %0, 1; }" : "+r"(own) : "r"(keys[i]), "r"(middle));
    }
    const int count = static_cast<int>(__reduce_add_sync(kFullWarp, own));
    if (count >= k) {
      bound = middle;
    } else {
      high = middle - 1;
    }
    exact = count == k;
  }

  // Calls body(i, place) for each element of a mask, where place counts the elements before it in the row.
  const auto for_each_in_order = [&](uint32_t mask, auto body) {
    uint32_t sums[kWords];  // over the lanes up to this one, of the number of bits in each nibble; a byte each
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      sums[w] = 0;
#pragma unroll
      for (int c = 4 * w; c < kChunks && c < 4 * w + 4; ++c) sums[w] |= __popc(mask >> (4 * c) & 0xF) << (c % 4 * 8);
      sums[w] = inclusive_sum_of_lanes(sums[w]);
    }
    int start = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int shift = c % 4 * 8;
      const int total = __shfl_sync(kFullWarp, sums[c / 4], 31) >> shift & 0xFF;
      int place = start + (sums[c / 4] >> shift & 0xFF) - __popc(mask >> (4 * c) & 0xF);
      start += total;
#pragma unroll 1
      for (uint32_t rest = mask >> (4 * c) & 0xF; rest != 0; rest &= rest - 1) body(4 * c + __ffs(rest) - 1, place++);
    }
  };
  uint32_t chosen = 0;
#pragma unroll
  for (int i = 0; i < kElements; ++i) chosen |= keys[i] >= bound ? 1u << i : 0;
  if (k == 0) chosen = 0;
  if (!exact) {
    // Of the keys that equal the bound, only the first that there is room for.
    uint32_t equal = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) equal |= keys[i] == bound ? 1u << i : 0;
    const int above = static_cast<int>(__reduce_add_sync(kFullWarp, __popc(chosen & ~equal)));
    for_each_in_order(equal, [&](int i, int place) {
      if (above + place >= k) chosen &= ~(1u << i);
    });
  }

  T* values = static_cast<T*>(op.values) + row_index * op.k;
  int32_t* indices = op.indices + row_index * op.k;
  if (!op.sorted) {
    for_each_in_order(chosen, [&](int i, int place) {
      values[place] = row[index_of(i)];
      indices[place] = index_of(i);
    });
  } else {
    constexpr PairFormat<T> format = {30};  // few enough bits that pairs are in order as doubles
    for_each_in_order(chosen,
                      [&](int i, int place) { pairs[place] = format.pair(load_one(row + index_of(i)), index_of(i)); });
    if (lane == 0 && k % 2 != 0) pairs[k] = 0;
    __syncwarp();
    for (int i = lane; i < k; i += 32) {
      const uint64_t pair = pairs[i];
      const int place = rank_among(ranked_pair(pair), pairs, k);
      values[place] = row[format.index(pair)];
      indices[place] = static_cast<int32_t>(format.index(pair));
    }
  }
  for (int i = k + lane; i < op.k; i += 32) write_nothing<T>(op, row_index, i);
}

}  // namespace

cudaError_t run_short(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream) {
  const LaunchShape shape{plan.blocks, plan.threads};
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool quads = rows_have_quads(op.scores, op.length, sizeof(T));
    return with_index<kTopkInstanceCount>(plan.instance, [&](auto index) {
      constexpr TopkInstance kInstance = kTopkInstances[decltype(index)::value];
      constexpr RowTile kTile = kInstance.tile();
      if constexpr (kInstance.kernel == TopkKernel::kTile) {
        return launch_kernel(topk_select_tiles<T, kTile.lanes, kTile.chunks, kTile.full_chunks>, shape, stream, op,
                             quads);
      } else if constexpr (kInstance.kernel == TopkKernel::kWarp) {
        return launch_kernel(topk_select_warps<T, kTile.chunks, kTile.full_chunks>, shape, stream, op, quads);
      }
      return cudaErrorInvalidValue;
    });
  });
}

}  // namespace jax_router::cuda
