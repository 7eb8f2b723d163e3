// The selection of token.cuh by a block of dense_router, whose threads have the logits of several experts each: expert
// e belongs to thread e % kThreads. All warps look for the candidates, and one ranks them. Groups, softmax over all
// experts, and rows with NaN or too many equal keys are left to that warp as a whole.
#pragma once

#include <cmath>

#include "token.cuh"

namespace jax_router::cuda {

// Whether the scores take a sum over the whole row.
template <KeyMode kMode>
__device__ __forceinline__ bool needs_softmax(const Scoring& scoring) {
  return scoring.score_fn == ScoreFn::kSoftmax && (kMode != KeyMode::kLogits || !scoring.renormalize);
}

// Of a block's threads, how many experts each has where 128 * kChunks hold all.
template <int kChunks, int kThreads>
constexpr int kExpertsOfThread = (128 * kChunks + kThreads - 1) / kThreads;

constexpr int kCandidates = 32;

// Shared memory of a block that selects.
template <int kChunks, int kThreads>
struct DenseTokenScratch {
  alignas(16) float logits[kThreads * kExpertsOfThread<kChunks, kThreads>];
  alignas(16) float maxima[32];
  SelectScratch<32> token;     // its candidates are those of the block
  float2 scored[kCandidates];  // their logits and, for kScores, scores
  int count;                   // of the candidates

  // To be called before the selection, best where the block waits for something else.
  __device__ __forceinline__ void clear() {
    if (threadIdx.x < 32) {
      token.pairs[threadIdx.x] = 0;
      token.values[threadIdx.x] = 0.0f;
    }
    if (threadIdx.x == 0) count = 0;
  }
};

// Selects one token's experts and writes its k weights and ids. All threads of the block call it together.
//   logits  of the thread's experts, anything where there is none
//   biases  theirs, for kScores
// The other arguments are those of select_token. Another barrier must lie between the return and the next token.
template <KeyMode kMode, int kThreads, int kChunks, int kFullChunks>
__device__ __forceinline__ void select_dense_token(
    const Selection& selection, const float (&logits)[kExpertsOfThread<kChunks, kThreads>],
    [[maybe_unused]] const float (&biases)[kExpertsOfThread<kChunks, kThreads>], bool wanted, const float* bias,
    const TokenOutput& output, DenseTokenScratch<kChunks, kThreads>& scratch) {
  constexpr int kOwn = kExpertsOfThread<kChunks, kThreads>;
  constexpr int kSharers = kThreads / 32;  // threads of a maximum
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  RankedPair(&pairs)[kCandidates] = reinterpret_cast<RankedPair(&)[kCandidates]>(scratch.token.pairs);
  const RowScore score{selection.scoring.score_fn};
  bool listed = kMode != KeyMode::kGroups && !needs_softmax<kMode>(selection.scoring);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) scratch.logits[j * kThreads + thread] = logits[j];
  if (listed) {
    // The k-th largest of 32 maxima is a bound that all of the k best reach, and only a few others.
    float keys[kOwn];
    float scores[kOwn] = {};
    float maximum = -INFINITY;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      keys[j] = logits[j];
      if constexpr (kMode == KeyMode::kScores) {
        scores[j] = score(logits[j]);
        keys[j] = __fadd_rn(scores[j], biases[j]);
      }
      if (j * kThreads + thread < selection.experts) maximum = max_nan(maximum, keys[j]);
    }
#pragma unroll
    for (int step = 1; step < kSharers; step *= 2) {
      maximum = max_nan(maximum, __shfl_xor_sync(kFullWarp, maximum, step));
    }
    scratch.maxima[thread / kSharers] = maximum;
    __syncthreads();
    const float own_maximum = scratch.maxima[lane];
    SumOfTrue larger[4];  // short sums in place of a long one
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float4 others = *reinterpret_cast<const float4*>(scratch.maxima + i);
      larger[0].add_if_greater(others.x, own_maximum);
      larger[1].add_if_greater(others.y, own_maximum);
      larger[2].add_if_greater(others.z, own_maximum);
      larger[3].add_if_greater(others.w, own_maximum);
    }
    const uint32_t count = larger[0].value() + larger[1].value() + larger[2].value() + larger[3].value();
    const uint32_t bound_key = count < static_cast<uint32_t>(selection.k) ? order_key(own_maximum) : 0xFFFFFFFFu;
    const float bound = float_of_key(__reduce_min_sync(kFullWarp, bound_key));
    listed = !__any_sync(kFullWarp, own_maximum != own_maximum);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int e = j * kThreads + thread;
      if (keys[j] >= bound && e < selection.experts) {
        // In any order: the ranking makes one.
        const int place = atomicAdd(&scratch.count, 1);
        if (place < kCandidates) {
          pairs[place] = ranked_pair(order_key(keys[j]), static_cast<uint32_t>(e));
          scratch.token.candidates[place] = e;
          scratch.scored[place] = make_float2(logits[j], scores[j]);
        }
      }
    }
  }
  __syncthreads();
  if (thread >= 32) return;
  const int count = scratch.count;
  if (!listed || count > kCandidates) {
    constexpr int kHeld = kMode == KeyMode::kGroups && kChunks == 3 ? 4 : kChunks;  // see score_groups
    float row[4 * kHeld];
#pragma unroll
    for (int i = 0; i < 4 * kHeld; ++i) {
      const int e = expert_of<32>(lane, i);
      row[i] = e < selection.experts ? scratch.logits[e] : -INFINITY;
    }
    const auto logit_at = [&](int expert) { return scratch.logits[expert]; };
    select_token<kMode, 32, kFullChunks>(selection, row, wanted, bias, logit_at, output, scratch.token);
    return;
  }
  const int k = selection.k;
  const bool is_candidate = lane < count;
  const int rank = rank_of(pairs[lane], pairs, count);
  const bool chosen = wanted && is_candidate && rank < k;
  const int expert = is_candidate ? scratch.token.candidates[lane] : 0;
  const float2 scored = is_candidate ? scratch.scored[lane] : make_float2(0.0f, 0.0f);
  const float s = kMode == KeyMode::kScores ? scored.y : score(scored.x);
  const float weight = finish_weight<kMode == KeyMode::kLogits>(selection.scoring, k, chosen, rank, scored.x, s,
                                                                scratch.token.values, [] { __syncwarp(); });
  if (chosen) {
    output.store(rank, weight, expert, scored.x);
  } else if (!wanted && lane < k) {
    output.store(lane, 0.0f, -1, 0.0f);
  }
}

}  // namespace jax_router::cuda
