// combine, and permute's cotangents, which are a combine with products beside it: a stretch of a token's row is summed
// in f32 over the rows of its slots.
#include "dispatched.h"
#include "result_rows.h"
#include "rows.h"

namespace jax_router::cpu::JR_ISA {

void rows(const Combine& op, int64_t begin, int64_t end) {
  const DispatchedRows rows = op.rows;
  const int64_t hidden = rows.hidden;
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const ResultRows out(op.out, rows.token_rows(), hidden * sizeof(T), kLargeComputed);
    for (int64_t row = begin; row < end; ++row) {
      T* const sum = out.place<T>(row);
      const Token token(rows, op.weights, row);
      for_stretches(hidden, [&](int64_t first, int64_t count) {
        alignas(64) float sums[kStretch] = {};
        token.for_choices(rows, [&](int32_t, int64_t slot, float weight) {
          add_row(weight, static_cast<const T*>(op.y) + slot * hidden + first, count, sums);
        });
        round_row(sums, count, sum + first);
      });
      out.copy(sum, row);
    }
  });
}

void rows(const PermuteCotangent& op, int64_t begin, int64_t end) {
  const DispatchedRows rows = op.rows;
  const int64_t hidden = rows.hidden;
  Product products[kMaxTopK];
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t row = begin; row < end; ++row) {
      const T* const x = static_cast<const T*>(op.x) + row * hidden;
      const Token token(rows, op.weights, row);
      for (int32_t j = 0; j < rows.k; ++j) products[j] = {};
      for_stretches(hidden, [&](int64_t first, int64_t count) {
        alignas(64) float sums[kStretch] = {};
        token.for_choices(rows, [&](int32_t j, int64_t slot, float weight) {
          const T* const grad = static_cast<const T*>(op.grad) + slot * hidden + first;
          add_row(weight, grad, count, sums);
          products[j].add(x + first, grad, count);
        });
        round_row(sums, count, static_cast<T*>(op.grad_x) + row * hidden + first);
      });
      for (int32_t j = 0; j < rows.k; ++j) op.grad_weights[row * rows.k + j] = products[j].sum();
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
