// The selection of token.cuh by a whole block, whose threads have one expert each, or two or four far apart: for few
// tokens, whose time is that of the longest chain of instructions. Same arithmetic, same order, same results.
//
// Keys are exact, so that none has to be looked at again. The k-th largest of 32 maxima, each over some neighbouring
// threads, is a bound that the k best keys reach and few others do. Each warp finds it for itself, by counting. Where
// threads have one expert, it finds at the same time which groups are the best: which maxima count is then a mask. The
// first warp ranks the candidates. Where there are too many of them, the block halves what lies above the bound until
// there are not.
#pragma once

#include "../plan/activation_topk.h"
#include "token.cuh"

namespace jax_router::cuda {

struct Candidate {
  alignas(16) int expert;
  float logit;
  float score;
};

// The largest key of some and the next.
struct TwoKeys {
  uint32_t best;
  uint32_t second;

  __device__ __forceinline__ void merge(const TwoKeys& other) {
    second = max(min(best, other.best), max(second, other.second));
    best = max(best, other.best);
  }
  __device__ __forceinline__ TwoKeys of_lane(int mask) const {
    return {__shfl_xor_sync(kFullWarp, best, mask), __shfl_xor_sync(kFullWarp, second, mask)};
  }
  // That of the score of a group, whose best they are. Where the best key is a NaN, best + second is one too, whatever
  // the second is.
  __device__ __forceinline__ uint32_t group_key(const Selection& selection) const {
    const bool sum = selection.groups.score == GroupScore::kTop2Sum;
    return order_key(sum ? __fadd_rn(float_of_key(best), float_of_key(second)) : float_of_key(best));
  }
};

// Shared memory of a block that selects. kMost: of a token's experts.
template <int kMost>
struct BlockScratch {
  alignas(16) RankedPair pairs[kBlockCandidates];  // 0 behind the last candidate
  alignas(16) RankedPair group_pairs[32];          // 0 behind the last group
  alignas(16) uint32_t maxima[32];
  alignas(16) float values[kBlockCandidates];
  Candidate candidates[kBlockCandidates];
  TwoKeys of_warps[kMost / 32];
  float largest_of_warps[32];
  float sums_of_quads[kMost / 4];
  int listed[2];

  // To be called before the selection, best where the block waits for something else.
  __device__ __forceinline__ void clear(const Selection& selection) {
    const unsigned thread = threadIdx.x;
    if (thread >= 32) return;
    pairs[thread] = {};
    values[thread] = 0.0f;
    if (thread >= static_cast<unsigned>(selection.groups.num_groups)) group_pairs[thread] = {};
    if (thread < 2) listed[thread] = 0;
  }
};
static_assert(sizeof(BlockScratch<1024>) <= kBlockScratchBytes);

// Softmax's shift and sum over the row of a block, -inf where there is no expert. The order of the additions is that of
// softmax_of_tile.
template <int kThreads, int kOwn, int kMost>
__device__ __forceinline__ RowScore softmax_of_block(const float (&logits)[kOwn], BlockScratch<kMost>& scratch) {
  unsigned thread = threadIdx.x;
  asm("" : "+r"(thread));  // so that nothing of this is done where no softmax is asked for
  const unsigned lane = thread % 32;
  const unsigned threads = blockDim.x;
  const float of_warp = tile_max_nan<32>(largest_of(logits));
  if (lane == 0) scratch.largest_of_warps[thread / 32] = of_warp;
  __syncthreads();
  const bool has_warp = 32 * lane < threads;
  const float shift = softmax_shift(tile_max_nan<32>(has_warp ? scratch.largest_of_warps[lane] : -INFINITY));
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    float quad = exp_nonpositive(__fadd_rn(logits[j], -shift));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) quad = __fadd_rn(quad, __shfl_xor_sync(kFullWarp, quad, step));
    if (thread % 4 == 0) scratch.sums_of_quads[(j * kThreads + thread) / 4] = quad;
  }
  __syncthreads();
  float sum = 0.0f;
#pragma unroll 1
  for (unsigned i = lane; i < ((kOwn - 1) * kThreads + threads) / 4; i += 32)
    sum = __fadd_rn(sum, scratch.sums_of_quads[i]);
  return softmax_of_sums<32>(sum, shift);
}

// All threads of the block call it together, which are whole warps and no more than kThreads, or as many where kOwn is
// not 1, behind a clear() of the scratch. Another barrier must lie between the return and the next clear().
//   logits  of the thread's experts, number j of which is j * kThreads + thread; -inf where there is none
//   biases  theirs, where has_bias is true, as it is for kScores and may be for kGroups
template <KeyMode kMode, int kThreads, int kOwn>
__device__ __forceinline__ void select_token_of_block(const Selection& selection, const float (&logits)[kOwn],
                                                      bool has_bias, const float (&biases)[kOwn], bool wanted,
                                                      const TokenOutput& output,
                                                      BlockScratch<kThreads * kOwn>& scratch) {
  constexpr int kMost = kThreads * kOwn;
  constexpr int kRunBits = log2_of(kThreads / 32);                         // log2 of the threads of a maximum
  constexpr bool kBoundsByGroup = kMode == KeyMode::kGroups && kOwn == 1;  // each maximum is of one group
  const unsigned thread = threadIdx.x;
  const unsigned lane = thread % 32;
  const auto expert = [&](int j) { return j * kThreads + thread; };
  const auto experts = static_cast<unsigned>(selection.experts);
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;

  RowScore score_of{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax && (kMode != KeyMode::kLogits || !scoring.renormalize)) {
    score_of = softmax_of_block<kThreads>(logits, scratch);
  }
  float scores[kOwn] = {};
  uint32_t keys[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    float key = logits[j];
    if constexpr (kMode != KeyMode::kLogits) {
      scores[j] = score_of(logits[j]);
      key = has_bias ? __fadd_rn(scores[j], biases[j]) : scores[j];
    }
    keys[j] = expert(j) < experts ? order_key(key) : kNoKey;
  }

  uint32_t maximum = kNoKey;
  int run_bits = kRunBits;
  [[maybe_unused]] int group_bits = 0;  // log2 of the threads of a group
  const auto group = [&](int j) { return expert(j) >> group_bits; };
  // A bit for each of the best groups; the others' keys are gone.
  const auto keep_best_groups = [&] {
    const unsigned groups = selection.groups.num_groups;
    const int rank = rank_of(scratch.group_pairs[lane], scratch.group_pairs, groups);
    const uint32_t best = __ballot_sync(kFullWarp, lane < groups && rank < selection.groups.top_groups);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if ((best >> (group(j) & 31) & 1) == 0) keys[j] = kNoKey;
    }
    return best;
  };
  if constexpr (kMode == KeyMode::kGroups) {
    group_bits = group_shift(selection) + 2;
    if (kBoundsByGroup) run_bits = min(kRunBits, group_bits);
    TwoKeys two[kOwn];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      two[j] = {keys[j], kNoKey};
#pragma unroll
      for (int bit = 0; bit < 5; ++bit) {
        if (bit < group_bits) two[j].merge(two[j].of_lane(1 << bit));
        if (kBoundsByGroup && bit < kRunBits) maximum = two[j].best;
      }
    }
    if (group_bits > 5) {
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (lane == 0) scratch.of_warps[expert(j) / 32] = two[j];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        for (int step = 1; step < 1 << (group_bits - 5); ++step) two[j].merge(scratch.of_warps[expert(j) / 32 ^ step]);
      }
    }
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const bool leads = (thread & ((1 << group_bits) - 1)) == 0;
      if (leads && group(j) < static_cast<unsigned>(selection.groups.num_groups)) {
        scratch.group_pairs[group(j)] = ranked_pair(two[j].group_key(selection), group(j));
      }
    }
    if constexpr (!kBoundsByGroup) {
      __syncthreads();
      keep_best_groups();
    }
  }
  if constexpr (!kBoundsByGroup) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) maximum = max(maximum, keys[j]);
#pragma unroll
    for (int bit = 0; bit < kRunBits; ++bit) {
      maximum = max(maximum, __shfl_xor_sync(kFullWarp, maximum, 1 << bit));
    }
    if (thread < 32 && thread << kRunBits >= blockDim.x) scratch.maxima[thread] = kNoKey;
  }
  const unsigned run = thread >> run_bits;
  if ((thread & ((1 << run_bits) - 1)) == 0 && run < 32) scratch.maxima[run] = maximum;
  __syncthreads();

  const uint32_t own = scratch.maxima[lane];
  SumOfTrue reaching[4];  // of the maxima those that are no less than the lane's own: their number, or a bit for each
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(scratch.maxima + i);
    const auto term = [&](int place) { return kBoundsByGroup ? 1u << (i + place) % 8 : 1u; };
    reaching[i / 8].add_if_reaches(others.x, own, term(0));
    reaching[i / 8].add_if_reaches(others.y, own, term(1));
    reaching[i / 8].add_if_reaches(others.z, own, term(2));
    reaching[i / 8].add_if_reaches(others.w, own, term(3));
  }
  bool bounds;
  [[maybe_unused]] bool counts = true;
  if constexpr (kBoundsByGroup) {
    const uint32_t counting = __ballot_sync(kFullWarp, keep_best_groups() >> (lane >> (group_bits - run_bits)) & 1);
    const uint32_t reached =
        reaching[0].value() | reaching[1].value() << 8 | reaching[2].value() << 16 | reaching[3].value() << 24;
    counts = (counting >> lane & 1) != 0;
    bounds = counts && __popc(reached & counting) >= k;
  } else {
    bounds =
        static_cast<int>(reaching[0].value() + reaching[1].value() + reaching[2].value() + reaching[3].value()) >= k;
  }
  const uint32_t bound = max(__reduce_max_sync(kFullWarp, bounds ? own : kNoKey), kNoKey + 1);
  // In any order: the ranking makes one.
  const auto list = [&](int j, int& listed) {
    const int place = atomicAdd(&listed, 1);
    if (place >= kBlockCandidates) return;
    scratch.pairs[place] = ranked_pair(keys[j], expert(j));
    scratch.candidates[place] = {static_cast<int>(expert(j)), logits[j], scores[j]};
  };
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    if (wanted && keys[j] >= bound) list(j, scratch.listed[0]);
  }
  __syncthreads();
  int listed = scratch.listed[0];
  if (__builtin_expect(listed > kBlockCandidates, false)) {
    // By key and number, of which no two are equal.
    unsigned last = kMost - 1 - thread;
    asm("" : "+r"(last));  // so that it is not found before it is asked for
    const auto order = [&](int j) { return uint64_t{keys[j]} * kMost + (last - j * kThreads); };
    uint64_t low = uint64_t{bound} * kMost;  // that too many reach
    uint64_t high = uint64_t{__reduce_max_sync(kFullWarp, counts ? own : kNoKey)} * kMost + kMost;  // and none
    uint64_t middle;
    do {
      middle = low + (high - low) / 2;
      listed = 0;
#pragma unroll
      for (int j = 0; j < kOwn; ++j) listed += __syncthreads_count(order(j) >= middle);
      (listed < k ? high : low) = middle;
    } while (listed < k || listed > kBlockCandidates);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (order(j) >= middle) list(j, scratch.listed[1]);
    }
    if (thread >= static_cast<unsigned>(listed) && thread < kBlockCandidates) scratch.pairs[thread] = {};
    __syncthreads();
  }
  if (thread >= 32) return;

  const Candidate candidate = scratch.candidates[lane];
  const int rank = rank_of(scratch.pairs[lane], scratch.pairs, listed);
  const bool chosen = lane < static_cast<unsigned>(listed) && rank < k;
  float score = candidate.score;
  if constexpr (kMode == KeyMode::kLogits) score = score_of(candidate.logit);
  const float weight = finish_weight<kMode == KeyMode::kLogits>(scoring, k, chosen, rank, candidate.logit, score,
                                                                scratch.values, [] { __syncwarp(); });
  if (chosen) {
    output.store(rank, weight, candidate.expert, candidate.logit);
  } else if (!wanted && lane < static_cast<unsigned>(k)) {
    output.store(lane, 0.0f, -1, 0.0f);
  }
}

}  // namespace jax_router::cuda
