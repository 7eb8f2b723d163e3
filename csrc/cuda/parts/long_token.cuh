// The selection of token.cuh for rows and counts that do not fit its registers: a warp owns a token and keeps the keys
// of its whole row in shared memory. Same arithmetic, same order, same results.
#pragma once

#include "../plan/activation_topk.h"
#include "token.cuh"

namespace jax_router::cuda {

__device__ constexpr int up_to_multiple(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The shared memory of one warp, long_token_bytes of it.
struct LongScratch {
  uint64_t* pairs;       // [kLongCandidates]
  int* candidates;       // [kLongCandidates]
  int* expert_ids;       // [kMaxTopK]
  float* logits;         // [kMaxTopK]
  float* values;         // [kMaxTopK]
  uint32_t* keys;        // [experts, to a multiple of 128]
  uint32_t* group_keys;  // [num_groups, to a multiple of 128], if there are groups

  __device__ __forceinline__ LongScratch(char* memory, int experts)
      : pairs(reinterpret_cast<uint64_t*>(memory)),
        candidates(reinterpret_cast<int*>(pairs + kLongCandidates)),
        expert_ids(candidates + kLongCandidates),
        logits(reinterpret_cast<float*>(expert_ids + kMaxTopK)),
        values(logits + kMaxTopK),
        keys(reinterpret_cast<uint32_t*>(values + kMaxTopK)),
        group_keys(keys + up_to_multiple(experts, 128)) {}
};

// The largest key, of those with no bit below `lowest_bit`, that at least k of the counted keys reach; count(key): how
// many of the lane's own keys do.
template <class Count>
__device__ __forceinline__ uint32_t kth_key(int k, int lowest_bit, Count count) {
  uint32_t key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= lowest_bit; --bit) {
    const uint32_t higher = key | 1u << bit;
    if (static_cast<int>(__reduce_add_sync(kFullWarp, count(higher))) >= k) key = higher;
  }
  return key;
}

// The k best of keys[0 .. n): all above `key`, and the first `equals` of those equal to it.
struct Cut {
  uint32_t key;
  int equals;
};

__device__ __forceinline__ Cut exact_cut(const uint32_t* keys, int n, int k) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const auto count = [&](uint32_t key) {
    int number = 0;
    for (int i = lane; i < n; i += 32) number += keys[i] >= key;
    return number;
  };
  const uint32_t key = kth_key(k, 0, count);
  const int above = key == 0xFFFFFFFFu ? 0 : static_cast<int>(__reduce_add_sync(kFullWarp, count(key + 1)));
  return {key, k - above};
}

// visit(i, taken) for every i < n, rounded up to 32, by whole warps in ascending order.
template <class Visit>
__device__ __forceinline__ void for_each_cut(const uint32_t* keys, int n, Cut cut, Visit visit) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  for (int begin = 0; begin < n; begin += 32) {
    const int i = begin + lane;
    const uint32_t key = i < n ? keys[i] : kNoKey;
    const bool equal = key == cut.key && key != kNoKey;
    const uint32_t equals = __ballot_sync(kFullWarp, equal);
    visit(i, key > cut.key || (equal && __popc(equals & ((1u << lane) - 1)) < cut.equals));
    cut.equals = max(cut.equals - __popc(equals), 0);
  }
}

// Takes the keys of all experts outside the best groups away.
__device__ __forceinline__ void keep_best_groups(const Selection& selection, const LongScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int size = selection.experts / selection.groups.num_groups;
  for (int group = 0; group < selection.groups.num_groups; ++group) {
    // Where the best key is a NaN, best + second is one too, whatever the second is.
    uint32_t best = kNoKey;
    uint32_t second = kNoKey;
    for (int i = lane; i < size; i += 32) {
      const uint32_t key = scratch.keys[group * size + i];
      second = max(second, min(best, key));
      best = max(best, key);
    }
    for (int step = 16; step > 0; step /= 2) {
      const uint32_t other_best = __shfl_xor_sync(kFullWarp, best, step);
      const uint32_t other_second = __shfl_xor_sync(kFullWarp, second, step);
      second = max(min(best, other_best), max(second, other_second));
      best = max(best, other_best);
    }
    const bool sum = selection.groups.score == GroupScore::kTop2Sum;
    const float score = sum ? __fadd_rn(float_of_key(best), float_of_key(second)) : float_of_key(best);
    if (lane == 0) scratch.group_keys[group] = order_key(score);
  }
  __syncwarp();
  const int groups = selection.groups.num_groups;
  const Cut cut = exact_cut(scratch.group_keys, groups, selection.groups.top_groups);
  for_each_cut(scratch.group_keys, groups, cut, [&](int group, bool taken) {
    if (group < groups) scratch.group_keys[group] = taken;
  });
  __syncwarp();
  for (int e = lane; e < selection.experts; e += 32) {
    if (scratch.group_keys[e / size] == 0) scratch.keys[e] = kNoKey;
  }
  __syncwarp();
}

// The experts that may be among the k best, at least k and at most kLongCandidates, into scratch.candidates.
__device__ __forceinline__ int collect_candidates(int experts, int k, const LongScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  int count = 0;
  const auto collect = [&](int expert, bool taken) {
    const uint32_t ballot = __ballot_sync(kFullWarp, taken);
    const int position = count + __popc(ballot & ((1u << lane) - 1));
    if (taken && position < kLongCandidates) scratch.candidates[position] = expert;
    count += __popc(ballot);
  };
  // The k-th largest of 128 maxima bounds the k-th largest key from below, closely if k is well below 128.
  uint4 maxima = make_uint4(kNoKey, kNoKey, kNoKey, kNoKey);
  const int padded = up_to_multiple(experts, 128);
#pragma unroll 4
  for (int e = 4 * lane; e < padded; e += 128) {
    const uint4 quad = *reinterpret_cast<const uint4*>(scratch.keys + e);
    maxima = make_uint4(max(maxima.x, quad.x), max(maxima.y, quad.y), max(maxima.z, quad.z), max(maxima.w, quad.w));
  }
  constexpr int kIgnoredBits = 12;
  const uint32_t bound = max(1u, kth_key(k, kIgnoredBits, [&](uint32_t key) {
                               return (maxima.x >= key) + (maxima.y >= key) + (maxima.z >= key) + (maxima.w >= key);
                             }));
#pragma unroll 2
  for (int e = 4 * lane; e < padded; e += 128) {
    const uint4 quad = *reinterpret_cast<const uint4*>(scratch.keys + e);
    const bool any = max(max(quad.x, quad.y), max(quad.z, quad.w)) >= bound;
    if (!__any_sync(kFullWarp, any)) continue;
    collect(e + 0, quad.x >= bound);
    collect(e + 1, quad.y >= bound);
    collect(e + 2, quad.z >= bound);
    collect(e + 3, quad.w >= bound);
  }
  if (count <= kLongCandidates) return count;
  __syncwarp();
  count = 0;
  for_each_cut(scratch.keys, experts, exact_cut(scratch.keys, experts, k), collect);
  return count;
}

// Selects one token's experts and writes its weights and ids. scored: keys are score + bias, not logits; bias may be
// null. quads: rows_have_quads of the logits.
template <class T>
__device__ __forceinline__ void select_long_token(const Selection& selection, bool scored, const T* row, bool quads,
                                                  const float* bias, const TokenOutput& output,
                                                  const LongScratch& scratch) {
  const int lane = static_cast<int>(threadIdx.x & 31);
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  RowScore score{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax && (scored || !scoring.renormalize)) {
    score =
        softmax_of_row(selection.experts, [&](int e) { return load_quad_of_row(row, e, selection.experts, quads); });
  }

  constexpr int kElements = 16;
#pragma unroll 1
  for (int begin = 0; begin < selection.experts; begin += 32 * kElements) {
    const int experts = min(selection.experts - begin, 32 * kElements);
    float logits[kElements];
    float keys[kElements];
    load_tile<32, 0>(row + begin, experts, quads, logits);
    const uint32_t eligible = existing_elements<32, 0, kElements>(experts);
    if (scored) {
      // As with groups: there may be no bias.
      const float* biases = bias == nullptr ? nullptr : bias + begin;
      load_biases<KeyMode::kGroups, 32, 0>(experts, biases, rows_have_quads(biases, experts, 4), keys);
      score_keys<KeyMode::kGroups, Accuracy::kExact, 32, 0>(score, logits, eligible, biases, keys);
    }
#pragma unroll
    for (int i = 0; i < kElements; i += 4) {
      uint32_t quad[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float key = scored ? keys[i + j] : logits[i + j];
        quad[j] = (eligible >> (i + j) & 1) != 0 ? order_key(key) : kNoKey;
      }
      const int place = begin + expert_of<32>(lane, i);
      if (place < up_to_multiple(selection.experts, 128)) {
        *reinterpret_cast<uint4*>(scratch.keys + place) = make_uint4(quad[0], quad[1], quad[2], quad[3]);
      }
    }
  }
  __syncwarp();
  if (selection.groups.num_groups > 1) keep_best_groups(selection, scratch);

  const int count = collect_candidates(selection.experts, k, scratch);
  __syncwarp();
  for (int i = lane; i < up_to_multiple(count, 2); i += 32) {
    const int expert = i < count ? scratch.candidates[i] : 0;
    scratch.pairs[i] = i < count ? order_pair(scratch.keys[expert], static_cast<uint32_t>(expert)) : 0;
  }
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    const uint64_t pair = scratch.pairs[i];
    int rank = 0;
    for (int other = 0; other < count; other += 2) {
      const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(scratch.pairs + other);
      rank += others.x > pair;
      rank += others.y > pair;
    }
    if (rank >= k) continue;
    const int expert = static_cast<int>(pair_index(pair));
    scratch.expert_ids[rank] = expert;
    scratch.logits[rank] = load_one(row + expert);
  }
  __syncwarp();

  const bool over_chosen = scoring.score_fn == ScoreFn::kSoftmax && scoring.renormalize;
  const float shift = over_chosen ? shift_of_chosen(scratch.logits, k) : 0.0f;
  for (int j = lane; j < kMaxTopK; j += 32) {
    const float logit = j < k ? scratch.logits[j] : -INFINITY;
    scratch.values[j] = over_chosen ? exp_nonpositive(__fadd_rn(logit, -shift)) : score(logit);
  }
  __syncwarp();
  const float divisor = scoring.renormalize ? divisor_of_scores(scoring, scratch.values, k) : 1.0f;
  for (int j = lane; j < k; j += 32) {
    const float s = scratch.values[j];
    const float weight = __fmul_rn(scoring.renormalize ? divide(s, divisor) : s, scoring.scale);
    output.store(j, weight, scratch.expert_ids[j], scratch.logits[j]);
  }
}

}  // namespace jax_router::cuda
