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
// Where they are not good enough, the rounds go by exact scores of all experts.
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

// A sum below 2^24 of the terms whose condition holds. It is kept as the float with these bits, which is subnormal (or
// next to that) and so exact: a multiprocessor adds twice as many floats at a time as it adds or compares integers.
struct SumOfTrue {
  float bits = 0.0f;

  __device__ __forceinline__ void add_if_greater(uint64_t a, uint64_t b) {
    asm("{ .reg .pred p; setp.gt.u64 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "l"(a), "l"(b));
  }
  __device__ __forceinline__ void add_if_greater(float a, float b) {
    asm("{ .reg .pred p; setp.gt.f32 p, %1, %2; @p add.f32 %0, %0, 0f00000001; }" : "+f"(bits) : "f"(a), "f"(b));
  }
  __device__ __forceinline__ void add_if_reaches(float a, float b, uint32_t term = 1) {
    asm("{ .reg .pred p; setp.ge.f32 p, %1, %2; @p add.f32 %0, %0, %3; }"
        : "+f"(bits)
        : "f"(a), "f"(b), "f"(bits_float(term)));
  }
  __device__ __forceinline__ uint32_t value() const { return float_bits(bits); }
};

// How many of the tile's pairs, of which `count` are not 0, are larger than this one.
template <int kLanes>
__device__ __forceinline__ int rank_of(uint64_t pair, const uint64_t (&pairs)[kLanes], int count) {
  SumOfTrue rank;
#pragma unroll 1
  for (int begin = 0; begin < kLanes; begin += 16) {
    if (begin > 0 && !__any_sync(kFullWarp, begin < count)) break;
#pragma unroll
    for (int i = begin; i < begin + 16; i += 2) {
      const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(pairs + i);
      rank.add_if_greater(others.x, pair);
      rank.add_if_greater(others.y, pair);
    }
  }
  return static_cast<int>(rank.value());
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

// The same without an order. `doubtful`, of any of the tile's lanes, says that the order or more exact scores decide:
// that a group outside the best is at most `margin` below one of these, or that a score is no number to subtract from.
template <int kLanes>
__device__ __forceinline__ bool is_best_group(const Selection& selection, float margin,
                                              const SelectScratch<kLanes>& scratch, bool& doubtful) {
  const int lane = tile_lane<kLanes>();
  const float score = scratch.values[lane];
  const float rival_score = score - margin;
  SumOfTrue better;
  SumOfTrue rivals;  // and the group itself
#pragma unroll 1
  for (int begin = 0; begin < selection.groups.num_groups; begin += 8) {
#pragma unroll
    for (int i = begin; i < begin + 8; i += 4) {
      const float4 others = *reinterpret_cast<const float4*>(scratch.values + i);
      better.add_if_greater(others.x, score);
      rivals.add_if_reaches(others.x, rival_score);
      better.add_if_greater(others.y, score);
      rivals.add_if_reaches(others.y, rival_score);
      better.add_if_greater(others.z, score);
      rivals.add_if_reaches(others.z, rival_score);
      better.add_if_greater(others.w, score);
      rivals.add_if_reaches(others.w, rival_score);
    }
  }
  const bool best =
      lane < selection.groups.num_groups && static_cast<int>(better.value()) < selection.groups.top_groups;
  doubtful = (best && static_cast<int>(rivals.value()) > selection.groups.top_groups) || !(score < INFINITY);
  return best;
}

// Makes every expert outside the top_groups best groups ineligible. The result is the largest of the keys that are
// left. kExact: all is decided; kFine: `doubtful`, see is_best_group, says if not.
template <Accuracy kAccuracy, int kLanes, int kElements>
__device__ __forceinline__ float keep_best_groups(const Selection& selection, const float (&keys)[kElements],
                                                  bool wanted, uint32_t& eligible, SelectScratch<kLanes>& scratch,
                                                  bool& doubtful) {
  static_assert(kAccuracy != Accuracy::kRough);
  constexpr int kChunks = kElements / 4;
  BestTwo quads[kChunks];
  float maxima[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const float* quad = keys + 4 * c;
    quads[c] = {max_nan(quad[0], quad[1]), fminf(quad[0], quad[1])};
    quads[c].merge({max_nan(quad[2], quad[3]), fminf(quad[2], quad[3])});
    maxima[c] = quads[c].best;
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
    best = is_best_group(selection, margin, scratch, doubtful);
  }
  uint32_t kept = __ballot_sync(kFullWarp, best);
  if constexpr (kLanes < 32) kept >>= threadIdx.x & 16;
  const int shift = group_shift(selection);
  kept >>= tile_lane<kLanes>() >> shift;
  float maximum = -INFINITY;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int group = c * kLanes >> shift;  // of lane 0; beyond 31 for quads that do not exist
    if ((kept >> (group & 31) & 1) != 0) {
      maximum = max_nan(maximum, maxima[c]);
    } else {
      eligible &= ~(0xFu << (4 * c));
    }
  }
  return maximum;
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

// The keys of all the tile's elements, score + bias, -inf where they are not eligible. bias may be null, but not for
// kRough.
template <Accuracy kAccuracy, int kLanes, int kFullChunks, int kElements>
__device__ __forceinline__ void score_keys(int experts, const RowScore& score, const float (&logits)[kElements],
                                           uint32_t eligible, const float* bias, float (&keys)[kElements]) {
  const bool biased = kAccuracy == Accuracy::kRough || bias != nullptr;
  if (biased) load_tile<kLanes, kFullChunks>(bias, experts, rows_have_quads(bias, experts, 4), keys);
  with_score<kAccuracy>(score, [&](auto score_of) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float s = score_of(logits[i]);
      if constexpr (kAccuracy == Accuracy::kRough) {
        keys[i] = s + keys[i];  // in one instruction with the score's last
      } else {
        keys[i] = biased ? __fadd_rn(s, keys[i]) : s;
      }
      if (i / 4 >= kFullChunks && (eligible >> i & 1) == 0) keys[i] = -INFINITY;
    }
  });
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
    SumOfTrue lower_half;
    SumOfTrue upper_half;
#pragma unroll
    for (int i = 0; i < kElements / 2; ++i) {
      lower_half.add_if_reaches(keys[i], threshold, 1u << i);
      upper_half.add_if_reaches(keys[kElements / 2 + i], threshold, 1u << i);
    }
    reaching = (lower_half.value() | upper_half.value() << (kElements / 2)) & eligible;
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
    const int element = 31 - __clz(reaching);
    candidates[position++] = expert_of<kLanes>(lane, element);
    reaching ^= 1u << element;
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
  __syncwarp();  // the candidates are there, and what else was in the scratch has been read

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
      const bool biased = kMode == KeyMode::kScores || bias != nullptr;
      const float offset = biased ? __ldg(bias + expert) : 0.0f;
      s = score(logit);
      key = biased ? __fadd_rn(s, offset) : s;
    }
    pair = order_pair(order_key(key), static_cast<uint32_t>(expert));
  }
  scratch.pairs[lane] = pair;
  scratch.values[lane] = 0.0f;
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
//   bias         the token's own row of [experts] floats; null is possible for kGroups; not used for kLogits
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
  float maximum;
  float margin = 0.0f;
  bool failed;  // whether the keys are not good enough, or one of them is NaN
  if constexpr (kMode == KeyMode::kLogits) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) keys[i] = logits[i];
  } else {
    constexpr Accuracy kAccuracy = kMode == KeyMode::kScores ? Accuracy::kRough : Accuracy::kFine;
    margin = score_margin<kAccuracy>(scoring.score_fn);
    score_keys<kAccuracy, kLanes, kFullChunks>(selection.experts, score, logits, eligible, bias, keys);
  }
  if constexpr (kMode == KeyMode::kGroups) {
    maximum = keep_best_groups<Accuracy::kFine>(selection, keys, wanted, eligible, scratch, failed);
  } else {
    maximum = largest_of(keys);
    failed = kMode == KeyMode::kScores ? !(maximum < INFINITY) : maximum != maximum;
  }
  failed = __any_sync(kFullWarp, wanted && failed);

  int count = 0;
  const int needed = wanted ? k : 0;
  const auto list = [&] {
    // Whatever the logits of a token that is not wanted are, they must not slow its neighbour down.
    if (!wanted) maximum = -INFINITY;
    return list_candidates<kLanes>(keys, eligible, maximum, k, needed, margin, scratch.candidates, count);
  };
  if (failed || !list()) {
    if constexpr (kMode != KeyMode::kLogits) {
      eligible = wanted ? existing_elements<kLanes, kFullChunks, kElements>(selection.experts) : 0;
      with_score<Accuracy::kExact>(score, [&](auto score_of) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          keys[i] = -INFINITY;
          if ((eligible >> i & 1) != 0) {
            // The logits are read anew, so that they need no registers until here.
            const int expert = expert_of<kLanes>(lane, i);
            const float s = score_of(logit_at(expert));
            keys[i] = bias != nullptr ? __fadd_rn(s, __ldg(bias + expert)) : s;
          }
        }
      });
    }
    if constexpr (kMode == KeyMode::kGroups) {
      __syncwarp();  // the scratch has been read
      keep_best_groups<Accuracy::kExact>(selection, keys, wanted, eligible, scratch, failed);
    }
    select_by_rounds<kLanes>(keys, eligible, k, scratch.candidates);
    count = needed;
  }
  finish_token<kMode, kLanes>(selection, score, count, wanted, bias, logit_at, output, scratch);
}

}  // namespace jax_router::cuda
