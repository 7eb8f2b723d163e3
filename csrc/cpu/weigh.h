// From logits to weights.
#pragma once

#include <cstdint>

#include "../common/score.h"
#include "convert.h"

namespace jax_router::cpu::JR_ISA {

// What turns a logit of a row into its softmax: exp(x - shift) / sum. A sum of 0 stands for scores of 0.
struct Softmax {
  float shift;
  float sum;

  float of(float x) const { return sum == 0.0f ? 0.0f : exp_nonpositive(x - shift) / sum; }
};

// Of a row with a NaN the sum is NaN, whatever the shift.
template <typename T>
inline Softmax softmax_of_row(const T* logits, int64_t n) {
  constexpr int64_t kLanes = 32;
  const int64_t whole = n - n % kLanes;
  float best[kLanes];
  for (float& x : best) x = bits_float(0xFF800000u);
  const auto max = [](float x, float y) { return x > y ? x : y; };
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) best[j] = max(to_f32(logits[i + j]), best[j]);
  }
  for (int64_t i = whole; i < n; ++i) best[i - whole] = max(to_f32(logits[i]), best[i - whole]);
  float maximum = best[0];
  for (const float x : best) maximum = max(x, maximum);
  const float shift = softmax_shift(maximum);
  float sums[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += exp_nonpositive(to_f32(logits[i + j]) - shift);
  }
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += exp_nonpositive(to_f32(logits[i]) - shift);
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return {shift, sum};
}

// The score functions of one logit as types.
template <ScoreFn kScoreFn>
struct ScoreTag {
  static float score(float x) { return pointwise_score<kScoreFn>(x); }
  static float derivative(float x) { return pointwise_derivative<kScoreFn>(x); }
};

// body(a ScoreTag)
template <typename Body>
inline void with_score_fn(ScoreFn score_fn, const Body& body) {
  switch (score_fn) {
    case ScoreFn::kSqrtSoftplus:
      return body(ScoreTag<ScoreFn::kSqrtSoftplus>());
    case ScoreFn::kSigmoid:
      return body(ScoreTag<ScoreFn::kSigmoid>());
    default:
      return body(ScoreTag<ScoreFn::kIdentity>());
  }
}

// The largest of a row's chosen logits, for softmax over those; NaN if one is.
inline float softmax_shift_of_chosen(const float* chosen, const int32_t* ids, int64_t k) {
  float maximum = bits_float(0xFF800000u);
  for (int64_t j = 0; j < k; ++j) {
    const float x = chosen[j];
    if (ids[j] >= 0 && (x > maximum || x != x)) maximum = x;
  }
  return softmax_shift(maximum);
}

// The weights of `rows` rows of k chosen logits; an id below 0 has weight 0 and does not enter the sum. `softmax` holds
// one for each row if scoring.needs_whole_row().
inline void weigh(const Scoring& scoring, int64_t rows, int64_t k, const float* chosen, const int32_t* ids,
                  const Softmax* softmax, float* weights) {
  if (scoring.score_fn == ScoreFn::kSoftmax) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t first = row * k;
      const float shift = scoring.renormalize ? softmax_shift_of_chosen(chosen + first, ids + first, k) : softmax[row].shift;
      for (int64_t i = first; i < first + k; ++i) weights[i] = chosen[i] - shift;
    }
    for (int64_t i = 0; i < rows * k; ++i) weights[i] = exp_nonpositive(weights[i]);
  } else {
    with_score_fn(scoring.score_fn, [=](auto score_fn) {
      for (int64_t i = 0; i < rows * k; ++i) weights[i] = score_fn.score(chosen[i]);
    });
  }
  if (scoring.renormalize || scoring.needs_whole_row()) {
    for (int64_t row = 0; row < rows; ++row) {
      float* const w = weights + row * k;
      float sum = 0.0f;
      if (scoring.needs_whole_row()) {
        sum = softmax[row].sum;
      } else {
        for (int64_t j = 0; j < k; ++j) sum += ids[row * k + j] >= 0 ? w[j] : 0.0f;
      }
      const float divisor = scoring.score_fn != ScoreFn::kSoftmax ? sum + kRenormalizeEpsilon : sum == 0.0f ? 1.0f : sum;
      for (int64_t j = 0; j < k; ++j) w[j] /= divisor;
    }
  }
  for (int64_t i = 0; i < rows * k; ++i) weights[i] = ids[i] >= 0 ? weights[i] * scoring.scale : 0.0f;
}

}  // namespace jax_router::cpu::JR_ISA
