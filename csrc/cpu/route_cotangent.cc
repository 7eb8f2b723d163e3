// route_cotangent: the dense gradient of a row is zero but at its chosen experts, whose numbers add up in a row of f32
// zeros before they are rounded to the gradient's dtype; that row is cleared where it was touched. Softmax over all
// experts has a gradient everywhere.
#include <cstring>

#include "chosen.h"
#include "convert.h"
#include "result_rows.h"
#include "rows.h"
#include "scratch.h"

namespace jax_router::cpu::JR_ISA {
namespace {

// The choices of one row.
struct Choices {
  int64_t k;
  int32_t experts;
  const int32_t* ids;

  bool valid(int64_t j) const { return static_cast<uint32_t>(ids[j]) < static_cast<uint32_t>(experts); }

  // body(j, expert) for each valid choice
  template <typename Body>
  void for_each(const Body& body) const {
    for (int64_t j = 0; j < k; ++j) {
      if (valid(j)) body(j, ids[j]);
    }
  }
};

// The derivative of sum(weights * grad) by each chosen logit, in place of grad.
void pull_back(const Scoring& scoring, int64_t k, ChosenRows& chosen, const PerChoice& grad) {
  chosen.score();
  const float* const divisor = chosen.divisor();
  alignas(64) float mean[kRowsPerBlock] = {};
  if (scoring.renormalize) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t r = 0; r < kRowsPerBlock; ++r) mean[r] += grad[j][r] * (chosen.scores(j)[r] / divisor[r]);
    }
  }
  const auto apply = [&](const auto& derivative) {
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t r = 0; r < kRowsPerBlock; ++r) {
        grad[j][r] = scoring.scale * (grad[j][r] - mean[r]) * (derivative(j, r) / divisor[r]);
      }
    }
  };
  if (scoring.score_fn == ScoreFn::kSoftmax) return apply([&](int64_t j, int64_t r) { return chosen.scores(j)[r]; });
  with_pointwise(scoring.score_fn,
                 [&](auto fn) { apply([&](int64_t j, int64_t r) { return fn.derivative(chosen.logits(j)[r]); }); });
}

// Writes a row of the gradient that is zero but where sums was touched, and clears sums.
template <typename T>
void write_sparse(const Choices& choices, float* sums, int64_t row, const ResultRows& grad_logits) {
  T* const made = grad_logits.place<T>(row);
  std::memset(static_cast<void*>(made), 0, sizeof(T) * choices.experts);
  choices.for_each([&](int64_t, int32_t expert) { made[expert] = from_f32<T>(sums[expert]); });
  choices.for_each([&](int64_t, int32_t expert) { sums[expert] = 0.0f; });
  grad_logits.copy(made, row);
}

// Softmax over all experts. A row without a valid choice, a masked one say, may hold anything and has no gradient.
template <typename T>
void write_dense(float scale, const Choices& choices, const T* logits, const float* grad, float* sums, T* grad_logits) {
  bool chosen = false;
  choices.for_each([&](int64_t, int32_t) { chosen = true; });
  if (!chosen) {
    std::memset(static_cast<void*>(grad_logits), 0, sizeof(T) * choices.experts);
    return;
  }
  const Softmax softmax = softmax_of_row(logits, choices.experts);
  const auto softmax_of = [=](T x) { return exp_nonpositive(to_f32(x) - softmax.shift) / softmax.divisor; };
  float mean = 0.0f;
  choices.for_each([&](int64_t j, int32_t expert) {
    mean += grad[j] * softmax_of(logits[expert]);
    sums[expert] += grad[j];
  });
  for (int64_t e = 0; e < choices.experts; ++e) {
    grad_logits[e] = from_f32<T>(scale * softmax_of(logits[e]) * (sums[e] - mean));
  }
  choices.for_each([&](int64_t, int32_t expert) { sums[expert] = 0.0f; });
}

}  // namespace

void rows(const RouteCotangent& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  const bool identity = op.scoring.score_fn == ScoreFn::kIdentity;
  Scratch<float> sums(op.experts);
  ChosenRows chosen(op.scoring, k);
  PerChoice cotangents(k);
  const auto choices_of = [&](int64_t row) { return Choices{k, op.experts, op.expert_ids + row * k}; };
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    T* const grad_logits = static_cast<T*>(op.grad_logits);
    const ResultRows sparse_rows(op.grad_logits, op.rows, op.experts * sizeof(T), kLargeComputed);
    for (int64_t first = begin; first < end; first += kRowsPerBlock) {
      const int64_t count = end - first < kRowsPerBlock ? end - first : kRowsPerBlock;
      if (op.scoring.needs_whole_row()) {
        for (int64_t row = first; row < first + count; ++row) {
          write_dense(op.scoring.scale, choices_of(row), static_cast<const T*>(op.residual) + row * op.experts,
                      op.grad_weights + row * k, sums, grad_logits + row * op.experts);
        }
        continue;
      }
      if (!identity) {
        for (int64_t r = 0; r < count; ++r) {
          const Choices choices = choices_of(first + r);
          for (int64_t j = 0; j < k; ++j) {
            const int64_t i = (first + r) * k + j;
            const float logit = static_cast<const float*>(op.residual)[i];
            chosen.set_logit(r, j, choices.valid(j) ? logit : ChosenRows::kNoLogit);
            cotangents[j][r] = choices.valid(j) ? op.grad_weights[i] : 0.0f;
          }
        }
        pull_back(op.scoring, k, chosen, cotangents);
      }
      for (int64_t r = 0; r < count; ++r) {
        const Choices choices = choices_of(first + r);
        const float* const grad = op.grad_weights + (first + r) * k;
        choices.for_each([&](int64_t j, int32_t expert) {
          sums[expert] += identity ? op.scoring.scale * grad[j] : cotangents[j][r];
        });
        write_sparse<T>(choices, sums, first + r, sparse_rows);
      }
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
