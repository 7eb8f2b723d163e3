// From chosen logits to scores, for a block of rows at once.
#pragma once

#include <cstdint>

#include "../common/score.h"
#include "convert.h"
#include "scratch.h"

namespace jax_router::cpu::JR_ISA {

constexpr int64_t kRowsPerBlock = 32;

constexpr float kMinusInfinity = -__builtin_inff();

// The softmax of a logit of a row is exp(x - shift) / divisor.
struct Softmax {
  float shift;
  float divisor;
};

inline float larger(float x, float y) { return x > y ? x : y; }

// Over all of a row. If one of its logits is NaN, so is the divisor, whatever the shift.
template <typename T>
inline Softmax softmax_of_row(const T* logits, int64_t n) {
  constexpr int64_t kLanes = 32;
  const int64_t whole = n - n % kLanes;
  float best[kLanes];
  for (float& x : best) x = kMinusInfinity;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) best[j] = larger(to_f32(logits[i + j]), best[j]);
  }
  for (int64_t i = whole; i < n; ++i) best[0] = larger(to_f32(logits[i]), best[0]);
  float maximum = best[0];
  for (const float x : best) maximum = larger(x, maximum);
  const float shift = softmax_shift(maximum);
  float sums[kLanes] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += exp_nonpositive(to_f32(logits[i + j]) - shift);
  }
  for (int64_t i = whole; i < n; ++i) sums[i - whole] += exp_nonpositive(to_f32(logits[i]) - shift);
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  return {shift, nonzero_divisor(sum)};
}

// A score function of one logit as a type.
template <ScoreFn kScoreFn>
struct Pointwise {
  static float score(float x) { return pointwise_score<kScoreFn>(x); }
  static float derivative(float x) { return pointwise_derivative<kScoreFn>(x); }
};

// body(a Pointwise)
template <typename Body>
inline void with_pointwise(ScoreFn score_fn, const Body& body) {
  if (score_fn == ScoreFn::kSqrtSoftplus) return body(Pointwise<ScoreFn::kSqrtSoftplus>());
  body(Pointwise<ScoreFn::kSigmoid>());
}

// Numbers of k choices of a block's rows, choice by choice: loops over the rows vectorise, however small k is.
class PerChoice {
 public:
  explicit PerChoice(int64_t k) : data_(k * kRowsPerBlock) {}
  float* operator[](int64_t choice) const { return data_ + choice * kRowsPerBlock; }

 private:
  Scratch<float> data_;
};

class ChosenRows {
 public:
  // The logit of a choice that is none: its score is 0 and enters no sum.
  static constexpr float kNoLogit = kMinusInfinity;

  ChosenRows(const Scoring& scoring, int64_t k) : scoring_(scoring), k_(k), logits_(k), scores_(k) {}

  void set_logit(int64_t row, int64_t choice, float logit) { logits_[choice][row] = logit; }

  // Needed for each row if scoring.needs_whole_row().
  void set_softmax(int64_t row, const Softmax& softmax) {
    shift_[row] = softmax.shift;
    divisor_[row] = softmax.divisor;
  }

  // Computes every score, and the divisor that makes it a weight.
  void score() {
    const bool softmax = scoring_.score_fn == ScoreFn::kSoftmax;
    if (softmax) {
      if (scoring_.renormalize) find_shift();
      for (int64_t j = 0; j < k_; ++j) {
        for (int64_t r = 0; r < kRowsPerBlock; ++r) scores_[j][r] = exp_nonpositive(logits_[j][r] - shift_[r]);
      }
    } else {
      with_pointwise(scoring_.score_fn, [&](auto fn) {
        for (int64_t i = 0; i < k_ * kRowsPerBlock; ++i) scores_[0][i] = fn.score(logits_[0][i]);
      });
    }
    if (scoring_.needs_whole_row()) return;
    for (float& x : divisor_) x = scoring_.renormalize ? 0.0f : 1.0f;
    if (!scoring_.renormalize) return;
    for (int64_t j = 0; j < k_; ++j) {
      for (int64_t r = 0; r < kRowsPerBlock; ++r) divisor_[r] += scores_[j][r];
    }
    for (float& x : divisor_) x = renormalize_divisor(scoring_, x);
  }

  const float* logits(int64_t choice) const { return logits_[choice]; }
  const float* scores(int64_t choice) const { return scores_[choice]; }
  const float* divisor() const { return divisor_; }

  // Writes the weights of the first `rows` rows: 0 where the id is below 0.
  void weigh(int64_t rows, const int32_t* ids, float* weights) {
    score();
    for (int64_t j = 0; j < k_; ++j) {
      for (int64_t r = 0; r < kRowsPerBlock; ++r) scores_[j][r] = scores_[j][r] / divisor_[r] * scoring_.scale;
    }
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < k_; ++j) weights[r * k_ + j] = ids[r * k_ + j] >= 0 ? scores_[j][r] : 0.0f;
    }
  }

 private:
  void find_shift() {
    for (float& x : shift_) x = kMinusInfinity;
    for (int64_t j = 0; j < k_; ++j) {
      for (int64_t r = 0; r < kRowsPerBlock; ++r) shift_[r] = larger(logits_[j][r], shift_[r]);
    }
    for (float& x : shift_) x = softmax_shift(x);
  }

  const Scoring scoring_;
  const int64_t k_;
  PerChoice logits_;
  PerChoice scores_;
  alignas(64) float shift_[kRowsPerBlock] = {};
  alignas(64) float divisor_[kRowsPerBlock] = {};
};

}  // namespace jax_router::cpu::JR_ISA
