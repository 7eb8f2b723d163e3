// A token's scores: what softmax needs to know of its row, the weights of its choices, and scores that are only good
// enough to tell which experts need exact ones.
#pragma once

#include <cmath>

#include "../../common/ops.h"
#include "../../common/order.h"
#include "../../common/score.h"
#include "warp.cuh"

namespace jax_router::cuda {

// A score function with what softmax needs to know of its row.
struct RowScore {
  ScoreFn score_fn;
  float shift = 0.0f;
  float inverse_sum = 0.0f;

  __device__ __forceinline__ float operator()(float logit) const {
    if (score_fn == ScoreFn::kSqrtSoftplus) return sqrtsoftplus(logit);
    if (score_fn == ScoreFn::kSigmoid) return sigmoid(logit);
    if (score_fn == ScoreFn::kSoftmax) return softmax(logit);
    return logit;
  }

  __device__ __forceinline__ float softmax(float logit) const {
    return __fmul_rn(exp_nonpositive(__fadd_rn(logit, -shift)), inverse_sum);
  }
};

// exp(x - shift) of four neighbours, added up.
__device__ __forceinline__ float sum_of_quad(float4 quad, float shift) {
  const float low = __fadd_rn(exp_nonpositive(__fadd_rn(quad.x, -shift)), exp_nonpositive(__fadd_rn(quad.y, -shift)));
  const float high = __fadd_rn(exp_nonpositive(__fadd_rn(quad.z, -shift)), exp_nonpositive(__fadd_rn(quad.w, -shift)));
  return __fadd_rn(low, high);
}

template <int kLanes>
__device__ __forceinline__ RowScore softmax_of_sums(float sum, float shift) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kFullWarp, sum, step));
  return RowScore{ScoreFn::kSoftmax, shift, sum == 0.0f ? 0.0f : divide(1.0f, sum)};
}

// Softmax's shift and sum over a whole row whose missing experts are -inf. The order of the additions does not depend
// on kLanes: over the experts with equal e / 4 mod 32 first, in ascending order, then a tree over these 32 sums.
template <int kLanes, int kElements>
__device__ __forceinline__ RowScore softmax_of_tile(const float (&logits)[kElements]) {
  constexpr int kFold = 32 / kLanes;
  const float shift = softmax_shift(tile_max_nan<kLanes>(largest_of(logits)));
  float sums[kFold] = {};
#pragma unroll
  for (int i = 0; i < kElements; i += 4) {
    const float4 quad = make_float4(logits[i], logits[i + 1], logits[i + 2], logits[i + 3]);
    sums[i / 4 % kFold] = __fadd_rn(sums[i / 4 % kFold], sum_of_quad(quad, shift));
  }
#pragma unroll
  for (int step = kFold / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i < step; ++i) sums[i] = __fadd_rn(sums[i], sums[i + step]);
  }
  return softmax_of_sums<kLanes>(sums[0], shift);
}

// The same by a whole warp for a row of any length: quad_at(e) gives the logits e .. e + 3.
template <class QuadAt>
__device__ __forceinline__ RowScore softmax_of_row(int experts, QuadAt quad_at) {
  const int first = 4 * static_cast<int>(threadIdx.x & 31);
  float maximum = -INFINITY;
#pragma unroll 4
  for (int e = first; e < experts; e += 128) {
    const float4 quad = quad_at(e);
    maximum = max_nan(maximum, max_nan(max_nan(quad.x, quad.y), max_nan(quad.z, quad.w)));
  }
  const float shift = softmax_shift(tile_max_nan<32>(maximum));
  float sum = 0.0f;
#pragma unroll 4
  for (int e = first; e < experts; e += 128) sum = __fadd_rn(sum, sum_of_quad(quad_at(e), shift));
  return softmax_of_sums<32>(sum, shift);
}

// Softmax over a token's k chosen logits, which are logits[0..k), and may be known to be in order, the best first.
__device__ __forceinline__ float shift_of_chosen(const float* logits, int k, bool in_order = false) {
  float maximum = logits[0];
#pragma unroll 1
  for (int j = 1; j < k && !in_order; ++j) maximum = max_nan(maximum, logits[j]);
  return softmax_shift(maximum);
}

// What renormalisation divides by, from a token's k scores: added up from the first (the best) to the last. The scores
// are aligned to 16 bytes, and 0 from k to the next multiple of 4.
__device__ __forceinline__ float divisor_of_scores(const Scoring& scoring, const float* scores, int k) {
  float sum = 0.0f;
  const auto add_quad = [&](int j) {
    const float4 quad = *reinterpret_cast<const float4*>(scores + j);
    sum = __fadd_rn(__fadd_rn(__fadd_rn(__fadd_rn(sum, quad.x), quad.y), quad.z), quad.w);
  };
  add_quad(0);
  if (k > 4) add_quad(4);
#pragma unroll 1
  for (int j = 8; j < k; j += 4) add_quad(j);
  return renormalize_divisor(scoring, sum);
}

// The weight of the choice at position `rank` of a token's k choices, from its logit and score (which softmax over the
// chosen has no use for). All threads that work on the token call it together. A thread whose `chosen` is false has no
// choice; every position must have one. values: shared memory, aligned to 16 bytes, 0 from k to the next multiple of 4.
// sync: makes what these threads wrote there visible to them. kInOrder: the position goes by the logit.
template <bool kInOrder = false, class Sync>
__device__ __forceinline__ float finish_weight(const Scoring& scoring, int k, bool chosen, int rank, float logit,
                                               float score, float* values, Sync sync) {
  if (scoring.score_fn == ScoreFn::kSoftmax && scoring.renormalize) {
    if (chosen) values[rank] = logit;
    sync();
    score = exp_nonpositive(__fadd_rn(logit, -shift_of_chosen(values, k, kInOrder)));
    sync();
  }
  if (scoring.renormalize) {
    if (chosen) values[rank] = score;
    sync();
    // Not the 0 of a thread without a choice: for that the whole warp would take the division's long way.
    score = divide(chosen ? score : 1.0f, divisor_of_scores(scoring, values, k));
  }
  return __fmul_rn(score, scoring.scale);
}

template <class Sync>
__device__ __forceinline__ float finish_weight(const RowScore& score, const Scoring& scoring, int k, bool chosen,
                                               int rank, float logit, float* values, Sync sync) {
  return finish_weight(scoring, k, chosen, rank, logit, score(logit), values, sync);
}

// How good scores are. Cheap ones are to find out which experts need exact ones: two keys, exact or cheap, are in the
// right order if they differ by more than score_margin + kKeyMargin times the larger of them. The margin is twice as
// much as a score may be wrong by:
//   sqrtsoftplus  kRough: 5.7e-4; kFine: exact
//   sigmoid       kRough and kFine: 2^-21
//   softmax       always exact
// A cheap score is NaN where the exact one is, and infinite only where that is too.
enum class Accuracy { kExact, kFine, kRough };

// The four roundings of two sums score + bias, exact and cheap, are a quarter of this.
constexpr float kKeyMargin = 0x1p-20f;

// 0 for exact scores.
template <Accuracy kAccuracy>
__device__ __forceinline__ float score_margin(ScoreFn score_fn) {
  if (score_fn == ScoreFn::kSqrtSoftplus) return kAccuracy == Accuracy::kRough ? 0x1.4p-10f : 0.0f;
  return score_fn == ScoreFn::kSigmoid && kAccuracy != Accuracy::kExact ? 0x1p-20f : 0.0f;
}

__device__ __forceinline__ float rough_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

// With e = exp(-|x|), sqrt(max(x, 0) + e * P(e)) for a P(e) = log1p(e) / e of degree 2, the best one for the root. From
// a logit of 20 on, where e is lost in the sum, it is the exact score. A logarithm in place of P would be one
// instruction for four, but it would be the third of the kind that a multiprocessor has the fewest units for.
__device__ __forceinline__ float rough_sqrtsoftplus(float x) {
  const float e = rough_exp2(__fmul_rn(fabsf(x), -1.44269504f));
  const float p = __fmaf_rn(e, __fmaf_rn(e, 0.124615982f, -0.422239706f), 0.991701199f);
  return fast_sqrt(__fmaf_rn(e, p, fmaxf(x, 0.0f)));
}

__device__ __forceinline__ float rough_sigmoid(float x) {
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(__fadd_rn(rough_exp2(__fmul_rn(x, -1.44269504f)), 1.0f)));
  return reciprocal;
}

// Calls body with the function of a logit that is its score, chosen once for all of a loop. Not for kIdentity.
template <Accuracy kAccuracy, class Body>
__device__ __forceinline__ void with_score(const RowScore& score, Body body) {
  if (score.score_fn == ScoreFn::kSqrtSoftplus) {
    if constexpr (kAccuracy == Accuracy::kRough) {
      body([](float x) { return rough_sqrtsoftplus(x); });
    } else {
      body([](float x) { return sqrtsoftplus(x); });
    }
  } else if (score.score_fn == ScoreFn::kSigmoid) {
    if constexpr (kAccuracy == Accuracy::kExact) {
      body([](float x) { return sigmoid(x); });
    } else {
      body([](float x) { return rough_sigmoid(x); });
    }
  } else {
    body([&](float x) { return score.softmax(x); });
  }
}

}  // namespace jax_router::cuda
