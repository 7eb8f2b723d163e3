// The groups of a token's experts, by the tile that holds its keys (tile.cuh): their scores, and which are the best.
//
// Groups go by cheap scores, where these leave no doubt about them, and else by exact ones.
#pragma once

#include <cmath>

#include "tile.cuh"

namespace jax_router::cuda {

// The largest of some keys and the next, or as much as two runs of keys have together.
struct BestTwo {
  float best;
  float second;

  __device__ __forceinline__ void merge(const BestTwo& other) {
    second = fmaxf(fminf(best, other.best), fmaxf(second, other.second));
    best = max_nan(best, other.best);
  }
  __device__ __forceinline__ BestTwo of_lane(int mask) const {
    return {__shfl_xor_sync(kFullWarp, best, mask), __shfl_xor_sync(kFullWarp, second, mask)};
  }
};

// log2 of how many neighbouring lanes share a group, a quad each, where tile_can_group: experts is 4 * num_groups times
// this power of two.
__device__ __forceinline__ int group_shift(const Selection& selection) {
  return __clz(selection.groups.num_groups) - __clz(selection.experts) - 2;
}

// Writes the scores of the groups to scratch.values, and -inf behind them. quads: the best two keys of each of the
// lane's quads. The result is the largest magnitude of the keys that the lane's groups go by.
template <int kLanes, int kChunks>
__device__ __forceinline__ float score_groups(const Selection& selection, BestTwo (&quads)[kChunks],
                                              SelectScratch<kLanes>& scratch) {
  static_assert((kChunks & (kChunks - 1)) == 0, "chunks are halved");
  const int shift = group_shift(selection);
  const int lanes_a_group = 1 << shift;
  const int lane = tile_lane<kLanes>();
  float extreme = 0.0f;
  scratch.values[lane] = -INFINITY;
  __syncwarp();
  // The group that this lane's quad of chunk c belongs to, which `sharers` neighbouring lanes know about.
  const auto publish = [&](const BestTwo& of_group, int c, int sharers) {
    const int group = (c * kLanes + lane) >> shift;
    const bool sum = selection.groups.score == GroupScore::kTop2Sum;
    if (group < selection.groups.num_groups && (lane & (sharers - 1)) == 0) {
      scratch.values[group] = sum ? __fadd_rn(of_group.best, of_group.second) : of_group.best;
      extreme = fmaxf(extreme, fmaxf(fabsf(of_group.best), fabsf(of_group.second)));
    }
  };
  if (lanes_a_group >= kChunks) {
    // Each step halves the chunks that a lane goes on with, and the lanes that share a group.
    int chunk = 0;
    int step = lanes_a_group;
#pragma unroll
    for (int half = kChunks / 2; half > 0; half /= 2) {
      step /= 2;
      const bool upper = (lane & step) != 0;
#pragma unroll
      for (int c = 0; c < half; ++c) {
        const BestTwo sent = upper ? quads[c] : quads[half + c];
        if (upper) quads[c] = quads[half + c];
        quads[c].merge(sent.of_lane(step));
      }
      chunk += upper ? half : 0;
    }
    const int sharers = step;
    while ((step /= 2) > 0) quads[0].merge(quads[0].of_lane(step));
    publish(quads[0], chunk, sharers);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      for (int step = 1; step < lanes_a_group; step *= 2) quads[c].merge(quads[c].of_lane(step));
      publish(quads[c], c, lanes_a_group);
    }
  }
  __syncwarp();
  return extreme;
}

// Whether the group of the lane's own number is one of the top_groups best, in the order of groups: that of their
// scores, equal ones to the lower group, NaN first.
template <int kLanes>
__device__ __forceinline__ bool is_best_group(const Selection& selection, SelectScratch<kLanes>& scratch) {
  const int lane = tile_lane<kLanes>();
  const bool exists = lane < selection.groups.num_groups;
  const uint64_t pair = exists ? order_pair(order_key(scratch.values[lane]), static_cast<uint32_t>(lane)) : 0;
  scratch.pairs[lane] = pair;
  __syncwarp();
  const int rank = rank_of(pair, scratch.pairs, selection.groups.num_groups);  // by all lanes
  return exists && rank < selection.groups.top_groups;
}

// The same without an order: whether no more than top_groups groups, itself among them, are better than the lane's own
// or at most `margin` below it. Fewer than top_groups groups are that where the order or more exact scores decide.
template <int kLanes>
__device__ __forceinline__ bool is_clearly_best_group(const Selection& selection, float margin,
                                                      const SelectScratch<kLanes>& scratch, float score) {
  const float rival_score = score - margin;
  SumOfTrue rivals[2];
#pragma unroll 1
  for (int begin = 0; begin < selection.groups.num_groups; begin += 8) {
#pragma unroll
    for (int i = begin; i < begin + 8; i += 4) {
      const float4 others = *reinterpret_cast<const float4*>(scratch.values + i);
      rivals[0].add_if_reaches(others.x, rival_score);
      rivals[1].add_if_reaches(others.y, rival_score);
      rivals[0].add_if_reaches(others.z, rival_score);
      rivals[1].add_if_reaches(others.w, rival_score);
    }
  }
  return tile_lane<kLanes>() < selection.groups.num_groups &&
         static_cast<int>(rivals[0].value() + rivals[1].value()) <= selection.groups.top_groups;
}

// Makes every expert outside the top_groups best groups ineligible. The result is the largest of the lane's keys that
// are left, or another one that is as good for a bound. kExact: all is decided; kFine: `doubtful`, in any of the tile's
// lanes, says if not.
template <Accuracy kAccuracy, int kLanes, int kElements>
__device__ __forceinline__ LaneMaxima<kLanes> keep_best_groups(const Selection& selection,
                                                               const float (&keys)[kElements], bool wanted,
                                                               uint32_t& eligible, SelectScratch<kLanes>& scratch,
                                                               bool& doubtful) {
  static_assert(kAccuracy != Accuracy::kRough);
  constexpr int kChunks = kElements / 4;
  BestTwo quads[kChunks];
  LaneMaxima<kLanes> maxima[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const float* quad = keys + 4 * c;
    quads[c] = {max_nan(quad[0], quad[2]), fminf(quad[0], quad[2])};
    const BestTwo odd = {max_nan(quad[1], quad[3]), fminf(quad[1], quad[3])};
    if constexpr (kLanes == 8) maxima[c] = make_float2(quads[c].best, odd.best);
    quads[c].merge(odd);
    if constexpr (kLanes > 8) maxima[c] = quads[c].best;
  }
  const float extreme = score_groups<kLanes>(selection, quads, scratch);
  bool best;
  if constexpr (kAccuracy == Accuracy::kExact) {
    best = is_best_group(selection, scratch);
  } else {
    float margin = score_margin<kAccuracy>(selection.scoring.score_fn);
    if (margin != 0.0f) {
      // The largest of the warp: floats that are not negative are in the order of their bits.
      const float largest = bits_float(__reduce_max_sync(kFullWarp, wanted ? float_bits(extreme) : 0));
      // Of two sums of two keys: the errors of four scores, and the rounding of four keys and two sums, exact and
      // cheap, which with that of the difference is 18 halves of a unit in the last place of the largest key.
      margin = 2.0f * margin + 1.25f * kKeyMargin * largest;
    }
    const float score = scratch.values[tile_lane<kLanes>()];
    best = is_clearly_best_group(selection, margin, scratch, score);
    doubtful = !(score < INFINITY);
  }
  uint32_t kept = __ballot_sync(kFullWarp, best);
  if constexpr (kLanes < 32) kept = kept >> (threadIdx.x & 31 & ~(kLanes - 1)) & ((1u << (kLanes & 31)) - 1);
  if constexpr (kAccuracy != Accuracy::kExact) doubtful |= __popc(kept) != selection.groups.top_groups;
  const int shift = group_shift(selection);
  kept >>= tile_lane<kLanes>() >> shift;
  const auto keep_quads = [&](auto include_quad) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int group = c * kLanes >> shift;  // of lane 0; beyond 31 for quads that do not exist
      if ((kept >> (group & 31) & 1) != 0) {
        include_quad(c);
      } else {
        eligible &= ~(0xFu << (4 * c));
      }
    }
  };
  if constexpr (kLanes == 16) {
    // Half of the lanes may have most of the best groups. So each two lanes share the largest two quads of both.
    BestTwo largest = {-INFINITY, -INFINITY};
    keep_quads([&](int c) { largest.merge({maxima[c], -INFINITY}); });
    largest.merge(largest.of_lane(8));
    return (threadIdx.x & 8) == 0 ? largest.best : largest.second;
  } else {
    LaneMaxima<kLanes> largest;
    set_lowest(largest);
    keep_quads([&](int c) { include(largest, maxima[c]); });
    return largest;
  }
}

}  // namespace jax_router::cuda
