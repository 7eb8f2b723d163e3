// The selection of token.cuh by a whole block, which has a thread for each expert: for few tokens, whose time is that
// of the longest chain of instructions, and for keys of scores. Same arithmetic, same order, same results.
//
// Each thread scores its one expert exactly, so that a key never has to be looked at again. The k-th largest of 32
// maxima, each over as many neighbours as the block has warps, is a bound that the k best keys reach and few others do.
// Each warp finds it for itself, by counting, and which groups are the best at the same time: which maxima count is a
// mask. The first warp ranks the candidates. Where there are too many, the block takes k rounds of an exact maximum.
#pragma once

#include "../plan/activation_topk.h"
#include "token.cuh"

namespace jax_router::cuda {

struct Candidate {
  alignas(16) int expert;
  float logit;
  float score;
};

struct BlockScratch {
  alignas(16) RankedPair pairs[kBlockCandidates];  // 0 behind the last candidate
  alignas(16) RankedPair group_pairs[32];
  alignas(16) uint32_t maxima[32];
  alignas(16) float values[kBlockCandidates];
  Candidate candidates[kBlockCandidates];
  uint64_t best_of_warps[32];
  int listed;
};

// The largest key of some and the next.
struct TwoKeys {
  uint32_t best;
  uint32_t second;

  __device__ __forceinline__ void merge_with_lane(int mask) {
    const uint32_t other_best = __shfl_xor_sync(kFullWarp, best, mask);
    const uint32_t other_second = __shfl_xor_sync(kFullWarp, second, mask);
    second = max(min(best, other_best), max(second, other_second));
    best = max(best, other_best);
  }
};

// Softmax's shift and sum over the row of a block, -inf where there is no expert. The order of the additions is that of
// softmax_of_tile. sums: a quarter of the block's threads.
__device__ __forceinline__ RowScore softmax_of_block(float logit, float* maxima, float* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const float of_warp = tile_max_nan<32>(logit);
  if (lane == 0) maxima[thread / 32] = of_warp;
  __syncthreads();
  const bool has_warp = 32 * lane < static_cast<int>(blockDim.x);
  const float shift = softmax_shift(tile_max_nan<32>(has_warp ? maxima[lane] : -INFINITY));
  float quad = exp_nonpositive(__fadd_rn(logit, -shift));
  for (int step = 1; step < 4; step *= 2) quad = __fadd_rn(quad, __shfl_xor_sync(kFullWarp, quad, step));
  if (thread % 4 == 0) sums[thread / 4] = quad;
  __syncthreads();
  float sum = 0.0f;
  for (int i = lane; i < static_cast<int>(blockDim.x) / 4; i += 32) sum = __fadd_rn(sum, sums[i]);
  return softmax_of_sums<32>(sum, shift);
}

// All threads of the block call it together, which are whole warps and no more than kThreads. Those behind the token's
// experts give -inf. `has_bias` may be false for kGroups.
template <KeyMode kMode, int kThreads>
__device__ __forceinline__ void select_token_of_block(const Selection& selection, float logit, bool has_bias,
                                                      float bias, bool wanted, const TokenOutput& output,
                                                      BlockScratch& scratch) {
  static_assert(kMode != KeyMode::kLogits);
  constexpr int kFold = kThreads / 32;  // threads of a maximum
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int k = selection.k;
  if (thread < 32) {
    if (thread == 0) scratch.listed = 0;
    scratch.pairs[thread] = {};
    scratch.values[thread] = 0.0f;
    if (kFold * thread >= static_cast<int>(blockDim.x)) scratch.maxima[thread] = kNoKey;
    if (kMode == KeyMode::kGroups && thread >= selection.groups.num_groups) scratch.group_pairs[thread] = {};
  }

  const Scoring& scoring = selection.scoring;
  RowScore score_of{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax) {
    __shared__ float maxima[32], sums[kThreads / 4];
    score_of = softmax_of_block(logit, maxima, sums);
  }
  const float score = score_of(logit);
  uint32_t key = thread < selection.experts ? order_key(has_bias ? __fadd_rn(score, bias) : score) : kNoKey;
  uint32_t maximum = key;
  int group = 0;
  int group_size = 1;
  if constexpr (kMode == KeyMode::kGroups) {
    group_size = 4 << group_shift(selection);
    group = thread / 4 >> group_shift(selection);
    TwoKeys two{key, kNoKey};
#pragma unroll
    for (int step = 1; step < kFold; step *= 2) two.merge_with_lane(step);
    maximum = two.best;
#pragma unroll
    for (int step = kFold; step < 32; step *= 2) {
      if (step < group_size) two.merge_with_lane(step);
    }
    if (lane % group_size == 0 && group < selection.groups.num_groups) {
      // Where the best key is a NaN, best + second is one too, whatever the second is.
      const float best = float_of_key(two.best);
      const bool sum = selection.groups.score == GroupScore::kTop2Sum;
      const float group_score = sum ? __fadd_rn(best, float_of_key(two.second)) : best;
      scratch.group_pairs[group] = ranked_pair(order_key(group_score), group);
    }
  } else {
#pragma unroll
    for (int step = 1; step < kFold; step *= 2) maximum = max(maximum, __shfl_xor_sync(kFullWarp, maximum, step));
  }
  if (thread % kFold == 0) scratch.maxima[thread / kFold] = maximum;
  __syncthreads();

  const uint32_t own = scratch.maxima[lane];
  SumOfTrue reaching[4];  // a bit for each maximum that is no less than the lane's own
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(scratch.maxima + i);
    reaching[i / 8].add_if_reaches(others.x, own, 1u << i % 8);
    reaching[i / 8].add_if_reaches(others.y, own, 2u << i % 8);
    reaching[i / 8].add_if_reaches(others.z, own, 4u << i % 8);
    reaching[i / 8].add_if_reaches(others.w, own, 8u << i % 8);
  }
  uint32_t counting = kFullWarp;  // which of the maxima
  if constexpr (kMode == KeyMode::kGroups) {
    const int rank = rank_of(scratch.group_pairs[lane], scratch.group_pairs, selection.groups.num_groups);
    const uint32_t best_groups =
        __ballot_sync(kFullWarp, lane < selection.groups.num_groups && rank < selection.groups.top_groups);
    if ((best_groups >> (group & 31) & 1) == 0) key = kNoKey;
    const int group_of_maximum = lane * kFold / 4 >> group_shift(selection);
    counting = __ballot_sync(kFullWarp, best_groups >> (group_of_maximum & 31) & 1);
  }
  const uint32_t reached =
      reaching[0].value() | reaching[1].value() << 8 | reaching[2].value() << 16 | reaching[3].value() << 24;
  const bool bounds = (counting >> lane & 1) != 0 && __popc(reached & counting) >= k;
  const uint32_t bound = max(__reduce_max_sync(kFullWarp, bounds ? own : kNoKey), kNoKey + 1);
  const auto list = [&](int place) {
    scratch.pairs[place] = ranked_pair(key, thread);
    scratch.candidates[place] = {thread, logit, score};
  };
  if (wanted && key >= bound) {
    const int place = atomicAdd(&scratch.listed, 1);  // in any order: the ranking makes one
    if (place < kBlockCandidates) list(place);
  }
  __syncthreads();
  int listed = scratch.listed;
  if (listed > kBlockCandidates) {
    if (thread < 32) scratch.pairs[thread] = {};
    uint64_t left = key == kNoKey ? 0 : order_pair(key, thread);
#pragma unroll 1
    for (int round = 0; round < k; ++round) {
      const auto largest_of_lanes = [](uint64_t pair) {
        for (int step = 16; step > 0; step /= 2) pair = max(pair, __shfl_xor_sync(kFullWarp, pair, step));
        return pair;
      };
      const uint64_t of_warp = largest_of_lanes(left);
      if (lane == 0) scratch.best_of_warps[thread / 32] = of_warp;
      __syncthreads();
      const uint64_t best =
          largest_of_lanes(32 * lane < static_cast<int>(blockDim.x) ? scratch.best_of_warps[lane] : 0);
      if (left == best && best != 0) {
        list(round);
        left = 0;
      }
      __syncthreads();
    }
    listed = k;
  }
  if (thread >= 32) return;

  const Candidate candidate = scratch.candidates[lane];
  const int rank = rank_of(scratch.pairs[lane], scratch.pairs, listed);
  const bool chosen = lane < listed && rank < k;
  const float weight =
      finish_weight(scoring, k, chosen, rank, candidate.logit, candidate.score, scratch.values, [] { __syncwarp(); });
  if (chosen) {
    output.store(rank, weight, candidate.expert, candidate.logit);
  } else if (!wanted && lane < k) {
    output.store(lane, 0.0f, -1, 0.0f);
  }
}

}  // namespace jax_router::cuda
