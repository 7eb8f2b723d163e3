// From a token's logits to its experts: the selection that every router kernel shares, so that a token gets the same
// weights and ids, bit for bit, whichever kernel made its logits and whatever else is in its batch.
//
// A tile of kLanes neighbouring lanes of a warp (kLanes = 16 or 32) owns one token and holds its logits in registers,
// in quads: element i of lane l is expert_of<kLanes>(l, i) = (i / 4) * 4 * kLanes + 4 * l + i % 4.
//
// The k best are found by a bound and a ranking. Each lane takes the largest of its keys; at least k experts have a key
// no smaller than the k-th largest of these, and only slightly more than k do. Those few go to shared memory, one lane
// each, and every lane counts how many of them beat its own. The bound is tightened where more than the lanes reach it.
// Rows with NaN or many equal keys take k rounds of an exact maximum instead.
//
// Where the keys are scores + bias, the bound is one of cheap scores, lowered by what these may be wrong by, and only
// the few that reach it get their exact keys. Groups go by cheap scores too, where these leave no doubt about them.
#pragma once

#include <cmath>

#include "../common/ops.h"
#include "../common/order.h"
#include "load.cuh"
#include "row_score.cuh"

namespace jax_router::cuda {

// How often a bound that too many keys reach is tightened.
constexpr int kMostAttempts = 16;

// A tile selects up to this many experts.
template <int kLanes>
constexpr int kMaxTileTopK = kLanes / 2;

// What the keys that select are made of.
enum class KeyMode {
  kLogits,  // the logits themselves: no bias and no groups
  kScores,  // score + bias
  kGroups,  // score + bias, within the best groups; see tile_can_group
};

// The options of a launch, the same for all tokens.
struct Selection {
  int experts;
  int k;
  Scoring scoring;
  Groups groups;
};

// Where a token's results go: its k values start at `place` of each array. place < 0: nowhere, the tile has no token
// and only keeps its warp company. chosen_logits is optional.
struct TokenOutput {
  float* weights;
  int32_t* expert_ids;
  float* chosen_logits;
  int64_t place = 0;

  __device__ __forceinline__ void store(int j, float weight, int expert, float logit) const {
    weights[place + j] = weight;
    expert_ids[place + j] = expert;
    if (chosen_logits != nullptr) chosen_logits[place + j] = logit;
  }
};

// Shared memory of one tile.
template <int kLanes>
struct alignas(16) SelectScratch {
  uint64_t pairs[kLanes];
  int candidates[kLanes];
  float values[kLanes];
};

template <int kLanes>
__device__ __forceinline__ int tile_lane() {
  return static_cast<int>(threadIdx.x) & (kLanes - 1);
}

template <int kLanes>
__device__ __forceinline__ int expert_of(int lane, int element) {
  return (element >> 2) * (4 * kLanes) + 4 * lane + (element & 3);
}

// How many of the tile's pairs, of which `count` are not 0, are larger than this one.
template <int kLanes>
__device__ __forceinline__ int rank_of(uint64_t pair, const uint64_t (&pairs)[kLanes], int count) {
  int rank = 0;
#pragma unroll 1
  for (int begin = 0; begin < kLanes; begin += 8) {
    if (!__any_sync(kFullWarp, begin < count)) break;
#pragma unroll
    for (int i = begin; i < begin + 8; i += 2) {
      const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(pairs + i);
      asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(rank) : "l"(others.x), "l"(pair));
      asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.s32 %0, %0, 1; }" : "+r"(rank) : "l"(others.y), "l"(pair));
    }
  }
  return rank;
}

// Whether the groups are whole runs of a tile's lanes, and no more than its lanes.
__host__ __device__ inline bool tile_can_group(int lanes, int experts, int num_groups) {
  const int quads = experts / num_groups / 4;
  const bool whole = quads * 4 * num_groups == experts && quads > 0 && (quads & (quads - 1)) == 0;
  return whole && quads <= lanes && num_groups <= lanes;
}

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

// Makes every expert outside the top_groups best groups ineligible. False, for the token, if rough keys leave in doubt
// which groups these are: `margin` is as much as two of them, up to kMostCertainKey, may be in the wrong order by.
template <int kLanes, int kElements>
__device__ __forceinline__ bool keep_best_groups(const Selection& selection, float margin, float (&keys)[kElements],
                                                 uint32_t& eligible, SelectScratch<kLanes>& scratch) {
  constexpr int kChunks = kElements / 4;
  const int lanes_a_group = selection.experts / selection.groups.num_groups / 4;
  const int group_shift = __ffs(lanes_a_group) - 1;
  const int lane = tile_lane<kLanes>();
  BestTwo two[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const float* quad = keys + 4 * c;
    two[c] = {max_nan(quad[0], quad[1]), fminf(quad[0], quad[1])};
    two[c].merge({max_nan(quad[2], quad[3]), fminf(quad[2], quad[3])});
  }
  float extreme = 0.0f;
  scratch.pairs[lane] = 0;
  __syncwarp();
  // The group that this lane's quad of chunk c belongs to, which `sharers` neighbouring lanes know about.
  const auto publish = [&](const BestTwo& of_group, int c, int sharers) {
    const int group = (c * kLanes + lane) >> group_shift;
    const bool sum = selection.groups.score == GroupScore::kTop2Sum;
    const float score = sum ? __fadd_rn(of_group.best, of_group.second) : of_group.best;
    if (group < selection.groups.num_groups && (lane & (sharers - 1)) == 0) {
      scratch.pairs[group] = order_pair(order_key(score), static_cast<uint32_t>(group));
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
        const BestTwo sent = upper ? two[c] : two[half + c];
        if (upper) two[c] = two[half + c];
        two[c].merge(sent.of_lane(step));
      }
      chunk += upper ? half : 0;
    }
    const int sharers = step;
    while ((step /= 2) > 0) two[0].merge(two[0].of_lane(step));
    publish(two[0], chunk, sharers);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      for (int step = 1; step < lanes_a_group; step *= 2) two[c].merge(two[c].of_lane(step));
      publish(two[c], c, lanes_a_group);
    }
  }
  __syncwarp();
  const uint64_t pair = scratch.pairs[lane];
  const int rank = rank_of(pair, scratch.pairs, selection.groups.num_groups);
  uint32_t kept = __ballot_sync(kFullWarp, pair != 0 && rank < selection.groups.top_groups);
  if constexpr (kLanes < 32) kept = kept >> (threadIdx.x & 16) & 0xFFFF;
  kept >>= lane >> group_shift;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int group = c * kLanes >> group_shift;  // of lane 0
    const bool keep = group < 32 && (kept >> group & 1) != 0;
    if (!keep) eligible &= ~(0xFu << (4 * c));
#pragma unroll
    for (int j = 0; j < 4; ++j) keys[4 * c + j] = keep ? keys[4 * c + j] : -INFINITY;
  }
  if (margin == 0.0f) return true;
  // The last group that is kept and the next must be well apart.
  if (pair != 0) scratch.values[rank] = float_of_key(pair_key(pair));
  __syncwarp();
  const bool all = selection.groups.top_groups == selection.groups.num_groups;
  const float last = scratch.values[selection.groups.top_groups - 1];
  const float next = all ? -INFINITY : scratch.values[selection.groups.top_groups];
  __syncwarp();  // these are read: the scratch may be written again
  const bool doubtful = !(last - next > 2.0f * margin) || !(extreme <= kMostCertainKey);
  uint32_t doubts = __ballot_sync(kFullWarp, doubtful);
  if constexpr (kLanes < 32) doubts = doubts >> (threadIdx.x & 16) & 0xFFFF;
  return doubts == 0;
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

// A bound that at least k of the tile's keys reach, but not many more: the k-th largest of 16 or 32 maxima of them.
template <int kLanes>
__device__ __forceinline__ float bound_of_best(float lane_maximum, int k) {
  if (kLanes == 32 && k > kMaxTileTopK<16>) {
    return __shfl_sync(kFullWarp, sort_descending<32>(lane_maximum), k - 1);
  }
  if constexpr (kLanes == 32) lane_maximum = fmaxf(lane_maximum, __shfl_xor_sync(kFullWarp, lane_maximum, 16));
  return __shfl_sync(kFullWarp, sort_descending<16>(lane_maximum), k - 1, 16);
}

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

// The keys of all the tile's elements, score + bias, -inf where they are not eligible.
template <bool kRough, int kLanes, int kFullChunks, int kElements>
__device__ __forceinline__ void score_keys(int experts, const RowScore& score, const float (&logits)[kElements],
                                           uint32_t eligible, const float* bias, float (&keys)[kElements]) {
  if (bias != nullptr) load_tile<kLanes, kFullChunks>(bias, experts, rows_have_quads(bias, experts, 4), keys);
  const auto score_all = [&](auto score_of) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float s = score_of(logits[i]);
      keys[i] = bias != nullptr ? __fadd_rn(s, keys[i]) : s;
      if (i / 4 >= kFullChunks && (eligible >> i & 1) == 0) keys[i] = -INFINITY;
    }
  };
  if constexpr (kRough) {
    with_rough_score(score, score_all);
  } else {
    with_score(score, score_all);
  }
}

// Lists the experts of the tile's eligible keys that are among the `needed` best or at most `margin` below these, and
// counts them: at least `needed`, at most kLanes. False, for the whole warp, where that fails: too many nearly equal
// keys.
template <int kLanes, int kElements>
__device__ __forceinline__ bool list_candidates(const float (&keys)[kElements], uint32_t eligible, float lane_maximum,
                                                int k, int needed, float margin, int* candidates, int& count) {
  const int lane = tile_lane<kLanes>();
  const uint32_t tile = kLanes == 32 ? kFullWarp : 0xFFFFu << (threadIdx.x & 16);
  const uint32_t before = tile & ((1u << (threadIdx.x & 31)) - 1);
  float bound = bound_of_best<kLanes>(lane_maximum, k);
  uint32_t low = 0;
  uint32_t high = 0;
  bool probing = false;  // whether it is open that at least `needed` keys reach the bound
  uint32_t reaching;
  int position;
#pragma unroll 1
  for (int attempt = 0;; ++attempt) {
    const float threshold = margin == 0.0f || probing ? bound : bound - margin - fabsf(bound) * kKeyMargin;
    reaching = 0;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; @p or.b32 %0, %0, %3; }"
          : "+r"(reaching)
          : "f"(keys[i]), "f"(threshold), "r"(1u << i));
    }
    reaching &= eligible;
    // Where the lane's own start in the list: the sum of the counts of the lanes before it, bit by bit of these counts.
    const int own = __popc(reaching);
    position = 0;
    count = 0;
#pragma unroll
    for (int bit = 1; bit <= 4; bit *= 2) {
      const uint32_t lanes = __ballot_sync(kFullWarp, (own & bit) != 0);
      position += bit * __popc(lanes & before);
      count += bit * __popc(lanes & tile);
    }
    const bool crowded = (__ballot_sync(kFullWarp, own >= 8) & tile) != 0 || count > kLanes;
    const bool fits = !crowded && count >= needed;
    if (!__any_sync(kFullWarp, probing || !fits)) break;
    if (attempt == 0) {
      low = order_key(bound);
      high = order_key(tile_max_nan<kLanes>(lane_maximum));
    }
    // It is equal keys that are too many if the next larger bound, which is the first to be tried, is too large.
    const bool tied = attempt == 1 && probing && !crowded && !fits;
    if (__any_sync(kFullWarp, tied) || attempt == kMostAttempts) return false;
    if (fits) {
      probing = false;
    } else {
      // Halfway between a bound that too many keys reach and one that too few do.
      (crowded ? low : high) = order_key(bound);
      bound = float_of_key(attempt == 0 ? low + 1 : low + (high - low) / 2);
      probing = true;
    }
  }
  while (reaching != 0) {
    candidates[position++] = expert_of<kLanes>(lane, __ffs(reaching) - 1);
    reaching &= reaching - 1;
  }
  return true;
}

// Ranks the experts in scratch.candidates[0 .. count), which are among the tile's eligible ones and include its k best,
// and writes the k weights and ids. The arguments are those of select_token.
template <KeyMode kMode, int kLanes, class LogitAt>
__device__ __forceinline__ void finish_token(const Selection& selection, const RowScore& score, int count, bool wanted,
                                             const float* bias, LogitAt logit_at, const TokenOutput& output,
                                             SelectScratch<kLanes>& scratch) {
  const int lane = tile_lane<kLanes>();
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  scratch.values[lane] = 0.0f;
  __syncwarp();

  const bool candidate = lane < count;
  int expert = 0;
  float logit = 0.0f;
  float s = 0.0f;
  uint64_t pair = 0;
  if (candidate) {
    expert = scratch.candidates[lane];
    logit = logit_at(expert);
    float key = logit;
    if constexpr (kMode != KeyMode::kLogits) {
      const float offset = bias != nullptr ? __ldg(bias + expert) : 0.0f;
      s = score(logit);
      key = bias != nullptr ? __fadd_rn(s, offset) : s;
    }
    pair = order_pair(order_key(key), static_cast<uint32_t>(expert));
  }
  scratch.pairs[lane] = pair;
  __syncwarp();
  const int rank = rank_of(pair, scratch.pairs, count);

  if constexpr (kMode == KeyMode::kLogits) s = score(logit);
  const bool chosen = candidate && rank < k;
  const float weight = finish_weight(scoring, k, chosen, rank, logit, s, scratch.values, [] { __syncwarp(); });
  if (chosen) {
    output.store(rank, weight, expert, logit);
  } else if (!wanted && output.place >= 0 && lane < k) {
    output.store(lane, 0.0f, -1, 0.0f);
  }
  __syncwarp();
}

// Selects one token's experts and writes its k weights and ids. All 32 lanes of the warp call it together.
//   kFullChunks  the tile's first so many quads are known to lie within the token's experts
//   logits       in the layout above; -inf where the expert does not exist, anything if the token is not wanted
//   wanted       false where the tile has no token or the token is masked: ids -1 and weights 0 if output has a place
//   bias         the token's own row of [experts] floats, or null; not used for kLogits
//   logit_at     logit_at(expert) gives any of the token's logits once more, to any lane of the tile
template <KeyMode kMode, int kLanes, int kFullChunks = 0, int kElements, class LogitAt>
__device__ __forceinline__ void select_token(const Selection& selection, const float (&logits)[kElements], bool wanted,
                                             const float* bias, LogitAt logit_at, const TokenOutput& output,
                                             SelectScratch<kLanes>& scratch) {
  static_assert(kElements % 4 == 0 && kElements <= 32 && (kLanes == 16 || kLanes == 32));
  const int lane = tile_lane<kLanes>();
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  uint32_t eligible = wanted ? existing_elements<kLanes, kFullChunks, kElements>(selection.experts) : 0;

  RowScore score{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax && (kMode != KeyMode::kLogits || !scoring.renormalize)) {
    score = softmax_of_tile<kLanes>(logits);
  }
  float keys[kElements];
  float margin = 0.0f;
  bool failed = false;
  if constexpr (kMode == KeyMode::kLogits) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) keys[i] = logits[i];
  } else if constexpr (kMode == KeyMode::kScores) {
    score_keys<true, kLanes, kFullChunks>(selection.experts, score, logits, eligible, bias, keys);
    margin = rough_margin(scoring.score_fn);
    float largest = logits[0];
#pragma unroll
    for (int i = 1; i < kElements; ++i) largest = fmaxf(largest, logits[i]);
    failed = largest > kMostRoughLogit;
  } else if (scoring.score_fn == ScoreFn::kSqrtSoftplus) {
    score_keys<false, kLanes, kFullChunks>(selection.experts, score, logits, eligible, bias, keys);
    keep_best_groups(selection, 0.0f, keys, eligible, scratch);
  } else {
    margin = rough_margin(scoring.score_fn);
    score_keys<true, kLanes, kFullChunks>(selection.experts, score, logits, eligible, bias, keys);
    failed = !keep_best_groups(selection, margin + kMostCertainKey * kKeyMargin, keys, eligible, scratch);
  }
  float maximum = keys[0];
#pragma unroll
  for (int i = 1; i < kElements; ++i) maximum = max_nan(maximum, keys[i]);
  if (!wanted) maximum = -INFINITY;  // whatever the token's logits are, they must not slow its neighbour down
  failed = __any_sync(kFullWarp, (wanted && failed) || maximum != maximum);

  int count = 0;
  const int needed = wanted ? k : 0;
  if (failed || !list_candidates<kLanes>(keys, eligible, maximum, k, needed, margin, scratch.candidates, count)) {
    if constexpr (kMode != KeyMode::kLogits) {
      eligible = wanted ? existing_elements<kLanes, kFullChunks, kElements>(selection.experts) : 0;
      score_keys<false, kLanes, kFullChunks>(selection.experts, score, logits, eligible, bias, keys);
    }
    if constexpr (kMode == KeyMode::kGroups) {
      __syncwarp();  // the first attempt has read the scratch
      keep_best_groups(selection, 0.0f, keys, eligible, scratch);
    }
    select_by_rounds<kLanes>(keys, eligible, k, scratch.candidates);
    count = needed;
  }
  finish_token<kMode, kLanes>(selection, score, count, wanted, bias, logit_at, output, scratch);
}

}  // namespace jax_router::cuda
