// route_cotangent: the dense gradient of a row is zero but at its chosen experts, whose numbers add up in a row of f32
// zeros before they are rounded to the gradient's dtype; that row is cleared where it was touched. Softmax over all
// experts has a gradient everywhere.
#include <cstring>

#include "convert.h"
#include "rows.h"
#include "scratch.h"
#include "weigh.h"

namespace jax_router::cpu::JR_ISA {
namespace {

// The chosen experts of one row.
struct Chosen {
  int64_t k;
  int32_t experts;
  const int32_t* ids;
  const float* grad;

  // body(j, expert) for each valid choice
  template <typename Body>
  void for_each(const Body& body) const {
    for (int64_t j = 0; j < k; ++j) {
      if (static_cast<uint32_t>(ids[j]) < static_cast<uint32_t>(experts)) body(j, ids[j]);
    }
  }
};

// Writes to `cotangent` the derivative of sum(weights * grad) by each chosen logit. `score` and `derivative` are scratch.
void cotangent_of_chosen(const Scoring& scoring, const Chosen& chosen, const float* logits, float* score,
                         float* derivative, float* cotangent) {
  const int64_t k = chosen.k;
  float divisor = 1.0f;
  if (scoring.score_fn == ScoreFn::kSoftmax) {
    float maximum = bits_float(0xFF800000u);
    chosen.for_each([&](int64_t j, int32_t) {
      if (logits[j] > maximum || logits[j] != logits[j]) maximum = logits[j];
    });
    const float shift = softmax_shift(maximum);
    for (int64_t j = 0; j < k; ++j) score[j] = exp_nonpositive(logits[j] - shift);
    divisor = 0.0f;
    chosen.for_each([&](int64_t j, int32_t) { divisor += score[j]; });
    if (divisor == 0.0f) divisor = 1.0f;
    for (int64_t j = 0; j < k; ++j) derivative[j] = score[j];
  } else {
    with_score_fn(scoring.score_fn, [&](auto score_fn) {
      for (int64_t j = 0; j < k; ++j) derivative[j] = score_fn.derivative(logits[j]);
      if (!scoring.renormalize) return;
      for (int64_t j = 0; j < k; ++j) score[j] = score_fn.score(logits[j]);
    });
    if (scoring.renormalize) {
      divisor = kRenormalizeEpsilon;
      chosen.for_each([&](int64_t j, int32_t) { divisor += score[j]; });
    }
  }
  float mean = 0.0f;
  if (scoring.renormalize) {
    chosen.for_each([&](int64_t j, int32_t) { mean += chosen.grad[j] * (score[j] / divisor); });
  }
  for (int64_t j = 0; j < k; ++j) cotangent[j] = scoring.scale * (chosen.grad[j] - mean) * (derivative[j] / divisor);
}

template <typename T>
void dense_softmax_row(const Scoring& scoring, const Chosen& chosen, const T* logits, float* sums, T* grad_logits) {
  const Softmax softmax = softmax_of_row(logits, chosen.experts);
  float mean = 0.0f;
  chosen.for_each([&](int64_t j, int32_t expert) {
    mean += chosen.grad[j] * softmax.of(to_f32(logits[expert]));
    sums[expert] += chosen.grad[j];
  });
  const float factor = softmax.sum == 0.0f ? 0.0f : scoring.scale / softmax.sum;
  for (int64_t e = 0; e < chosen.experts; ++e) {
    grad_logits[e] = from_f32<T>(factor * exp_nonpositive(to_f32(logits[e]) - softmax.shift) * (sums[e] - mean));
  }
  chosen.for_each([&](int64_t, int32_t expert) { sums[expert] = 0.0f; });
}

}  // namespace

void rows(const RouteCotangent& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  Scratch<float> sums(op.experts);
  Scratch<float> of_chosen(3 * k);
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const Chosen chosen{k, op.experts, op.expert_ids + row * k, op.grad_weights + row * k};
      T* const grad_logits = static_cast<T*>(op.grad_logits) + row * op.experts;
      if (op.scoring.needs_whole_row()) {
        dense_softmax_row(op.scoring, chosen, static_cast<const T*>(op.residual) + row * op.experts, sums, grad_logits);
        continue;
      }
      float* const cotangent = of_chosen;
      cotangent_of_chosen(op.scoring, chosen, static_cast<const float*>(op.residual) + row * k, cotangent + k,
                          cotangent + 2 * k, cotangent);
      chosen.for_each([&](int64_t j, int32_t expert) { sums[expert] += cotangent[j]; });
      std::memset(static_cast<void*>(grad_logits), 0, sizeof(T) * op.experts);
      chosen.for_each([&](int64_t, int32_t expert) { grad_logits[expert] = from_f32<T>(sums[expert]); });
      chosen.for_each([&](int64_t, int32_t expert) { sums[expert] = 0.0f; });
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
