// The cotangents of a row's chosen logits from those of its weights, for lanes that hold its choices.
#pragma once

#include <cuda_bf16.h>

#include "../../common/ops.h"
#include "dtype.cuh"
#include "row_score.cuh"
#include "tile.cuh"

namespace jax_router::cuda {

__device__ __forceinline__ float score_derivative(ScoreFn score_fn, float logit) {
  if (score_fn == ScoreFn::kSqrtSoftplus) return sqrtsoftplus_derivative(logit);
  if (score_fn == ScoreFn::kSigmoid) return sigmoid_derivative(logit);
  return 1.0f;
}

// Calls body(h, j) for choice h * kLanes + j, in their order, and for up to seven behind the last: eight at a time, so
// that what their lanes give the others is under way at once.
template <int kLanes, int kHeld, class Body>
__device__ __forceinline__ void for_each_choice(int k, Body body) {
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
#pragma unroll 1
    for (int first = 0; first < min(k - h * kLanes, kLanes); first += 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) body(h, first + j);
    }
  }
}

// The sum of one number a choice over the tile's choices, in their order; lanes without a choice have 0.
template <int kLanes, int kHeld>
__device__ __forceinline__ float sum_over_choices(const float (&values)[kHeld], int k) {
  float sum = 0.0f;
  for_each_choice<kLanes, kHeld>(
      k, [&](int h, int j) { sum = __fadd_rn(sum, __shfl_sync(kFullWarp, values[h], j, kLanes)); });
  return sum;
}

// d(weights . grad) / d(chosen logit), choice j = h * kLanes + lane; 0 where the id is -1.
template <int kLanes, int kHeld>
__device__ __forceinline__ void differentiate(const Scoring& scoring, int k, const int (&ids)[kHeld],
                                              const float (&logits)[kHeld], const float (&grads)[kHeld],
                                              float (&cotangents)[kHeld]) {
  float scores[kHeld];
  float derivatives[kHeld];
  float divisor = 1.0f;
  float mean = 0.0f;
  if (scoring.score_fn == ScoreFn::kSoftmax) {
    float maximum = -INFINITY;
#pragma unroll
    for (int h = 0; h < kHeld; ++h) maximum = ids[h] < 0 ? maximum : max_nan(maximum, logits[h]);
    const float shift = softmax_shift(tile_max_nan<kLanes>(maximum));
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      scores[h] = ids[h] < 0 ? 0.0f : exp_nonpositive(__fadd_rn(logits[h], -shift));
      derivatives[h] = scores[h];
    }
  } else {
    const RowScore score{scoring.score_fn};
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      scores[h] = ids[h] < 0 || !scoring.renormalize ? 0.0f : score(logits[h]);
      derivatives[h] = ids[h] < 0 ? 0.0f : score_derivative(scoring.score_fn, logits[h]);
    }
  }
  if (scoring.renormalize) {
    divisor = renormalize_divisor(scoring, sum_over_choices<kLanes>(scores, k));
    float terms[kHeld];
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      terms[h] = ids[h] < 0 ? 0.0f : __fmul_rn(grads[h], divide(scores[h], divisor));
    }
    mean = sum_over_choices<kLanes>(terms, k);
  }
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    const float slope = divide(__fmul_rn(scoring.scale, __fadd_rn(grads[h], -mean)), divisor);
    cotangents[h] = ids[h] < 0 ? 0.0f : __fmul_rn(slope, derivatives[h]);
  }
}

// Gives the first of several choices of one expert the sum over them, and the others the id -1. Lanes without a choice
// have the id -1 and the value 0. No sum is -0.
template <int kLanes, int kHeld>
__device__ __forceinline__ void merge_equal_ids(int k, int (&ids)[kHeld], float (&values)[kHeld]) {
  const int lane = tile_lane<kLanes>();
  bool repeated[kHeld] = {};
  for_each_choice<kLanes, kHeld>(k, [&](int other, int j) {
    const int id = __shfl_sync(kFullWarp, ids[other], j, kLanes);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      repeated[h] = repeated[h] || (id == ids[h] && other * kLanes + j < h * kLanes + lane);
    }
  });
  bool any = false;
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    any = any || (repeated[h] && ids[h] >= 0);
    values[h] = __fadd_rn(0.0f, values[h]);
  }
  if (!__any_sync(kFullWarp, any)) return;

  float sums[kHeld] = {};
  for_each_choice<kLanes, kHeld>(k, [&](int other, int j) {
    const int id = __shfl_sync(kFullWarp, ids[other], j, kLanes);
    const float value = __shfl_sync(kFullWarp, values[other], j, kLanes);
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      if (id == ids[h]) sums[h] = __fadd_rn(sums[h], value);
    }
  });
#pragma unroll
  for (int h = 0; h < kHeld; ++h) {
    values[h] = sums[h];
    ids[h] = repeated[h] ? -1 : ids[h];
  }
}

// Two parts in bf16 that add up to a number but for 2^-16 of it, the larger first. Infinity leaves no rest.
__device__ __forceinline__ uint32_t bf16_parts(float value) {
  const float high = bits_float(float_bits(value) & 0xFFFF0000u);
  const float rest = fabsf(value) == INFINITY ? 0.0f : __fadd_rn(value, -high);
  return pack_two(high, rest, __nv_bfloat16{});
}

}  // namespace jax_router::cuda
