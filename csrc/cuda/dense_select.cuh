// The selection of select.cuh by a whole thread block for one token, for when latency is all that counts: same
// arithmetic, same order, same results, any groups.
//
// Every thread makes the keys of its experts. A warp ranks its own experts by counting which of them are better, and
// passes its k best on; the first warp ranks those in the same way.
#pragma once

#include "select.cuh"

namespace jax_router::cuda {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / 32;
constexpr int kMaxBlockExperts = 1024;
constexpr int kMaxBlockTopK = 16;
constexpr int kMaxBlockGroups = 64;

// Expert e belongs to thread e % kBlockThreads.
struct alignas(16) BlockSelect {
  uint64_t pairs[kMaxBlockExperts];
  uint64_t candidates[kBlockWarps * kMaxBlockTopK];
  uint64_t groups[kMaxBlockGroups];
  float values[kMaxBlockTopK];
  int winners[kMaxBlockTopK];
  float logits[kMaxBlockExperts];  // each thread stores its own before select()
  float bias[kMaxBlockExperts];    // likewise, if there is a bias

  __device__ __forceinline__ void select(const Selection& selection, bool has_bias, bool wanted,
                                         const TokenOutput& output);

 private:
  __device__ __forceinline__ void keep_best_groups(const Selection& selection, int padded);
};

// How many of pairs[0 .. n) are larger; n is even.
__device__ __forceinline__ int count_larger(uint64_t pair, const uint64_t* pairs, int n) {
  int count = 0;
#pragma unroll 8
  for (int i = 0; i < n; i += 2) {
    const ulonglong2 others = *reinterpret_cast<const ulonglong2*>(pairs + i);
    count += others.x > pair;
    count += others.y > pair;
  }
  return count;
}

// Takes the pairs of all experts outside the best groups away.
__device__ __forceinline__ void BlockSelect::keep_best_groups(const Selection& selection, int padded) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int size = selection.experts / selection.groups.num_groups;
  const int even_groups = (selection.groups.num_groups + 1) / 2 * 2;
  __syncthreads();
#pragma unroll 1
  for (int group = thread / 32; group < even_groups; group += kBlockWarps) {
    // Where the best key is a NaN, best + second is one too, whatever the second is.
    uint32_t best = kNoKey;
    uint32_t second = kNoKey;
    if (group < selection.groups.num_groups) {
#pragma unroll 1
      for (int i = lane; i < size; i += 32) {
        const uint32_t key = pair_key(pairs[group * size + i]);
        second = max(second, min(best, key));
        best = max(best, key);
      }
    }
#pragma unroll 1
    for (int step = 16; step > 0; step /= 2) {
      const uint32_t other_best = __shfl_xor_sync(kFullWarp, best, step);
      const uint32_t other_second = __shfl_xor_sync(kFullWarp, second, step);
      second = max(min(best, other_best), max(second, other_second));
      best = max(best, other_best);
    }
    const bool sum = selection.groups.score == GroupScore::kTop2Sum;
    const float score = sum ? __fadd_rn(float_of_key(best), float_of_key(second)) : float_of_key(best);
    if (lane == 0) groups[group] = best == kNoKey ? 0 : order_pair(order_key(score), static_cast<uint32_t>(group));
  }
  __syncthreads();
#pragma unroll 1
  for (int e = thread; e < selection.experts; e += kBlockThreads) {
    if (count_larger(groups[e / size], groups, even_groups) >= selection.groups.top_groups) pairs[e] = 0;
  }
}

// All threads of the block call it together.
__device__ __forceinline__ void BlockSelect::select(const Selection& selection, bool has_bias, bool wanted,
                                                    const TokenOutput& output) {
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int lane = thread % 32;
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  const bool scored = has_bias || selection.groups.num_groups > 1;
  const int padded = (selection.experts + kBlockThreads - 1) / kBlockThreads * kBlockThreads;

  RowScore score{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax && (scored || !scoring.renormalize)) {
    __syncthreads();
    score = softmax_of_row(selection.experts, [&](int e) {
      const auto at = [&](int i) { return e + i < selection.experts ? logits[e + i] : -INFINITY; };
      return make_float4(at(0), at(1), at(2), at(3));
    });
  }
#pragma unroll 1
  for (int e = thread; e < padded; e += kBlockThreads) {
    uint64_t pair = 0;
    if (e < selection.experts) {
      float key = logits[e];
      if (scored) key = has_bias ? __fadd_rn(score(key), bias[e]) : score(key);
      pair = order_pair(order_key(key), static_cast<uint32_t>(e));
    }
    pairs[e] = pair;
  }
  if (selection.groups.num_groups > 1) keep_best_groups(selection, padded);

  uint64_t* own_candidates = candidates + warp * k;
  if (lane < k) own_candidates[lane] = 0;
  __syncwarp();
#pragma unroll 1
  for (int e = thread; e < padded; e += kBlockThreads) {
    const uint64_t pair = pairs[e];
    int rank = 0;
#pragma unroll 1
    for (int begin = 32 * warp; begin < padded; begin += kBlockThreads) {
      rank += count_larger(pair, pairs + begin, 32);
    }
    if (pair != 0 && rank < k) own_candidates[rank] = pair;
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll 1
    for (int i = lane; i < kBlockWarps * k; i += 32) {
      const uint64_t pair = candidates[i];
      const int rank = count_larger(pair, candidates, kBlockWarps * k);
      if (pair != 0 && rank < k) winners[rank] = static_cast<int>(pair_index(pair));
    }
    const bool chosen = lane < k;
    if (!chosen && lane < kMaxBlockTopK) values[lane] = 0.0f;
    __syncwarp();
    const int expert = chosen ? winners[lane] : 0;
    const float logit = chosen ? logits[expert] : 0.0f;
    const float weight = finish_weight(score, scoring, k, chosen, lane, logit, values, [] { __syncwarp(); });
    if (chosen && output.place >= 0) {
      output.store(lane, wanted ? weight : 0.0f, wanted ? expert : -1, wanted ? logit : 0.0f);
    }
  }
}

}  // namespace jax_router::cuda
