// permute, and combine's cotangents, which are a permute with products beside it: a token's row is read once from
// memory, and goes to its slots, one choice after another: of several in one slot the last stays. Who clears the slots
// without a choice is instruction_set.cc.
#include "dispatched.h"
#include "result_rows.h"
#include "rows.h"

namespace jax_router::cpu::JR_ISA {

void rows(const Permute& op, int64_t begin, int64_t end) {
  const DispatchedRows rows = op.rows;
  const int64_t hidden = rows.hidden, row_bytes = hidden * op.element_bytes;
  const ResultRows out(op.out, rows.slot_rows(), row_bytes, op.weights == nullptr ? kLargeCopied : kLargeComputed);
  for (int64_t row = begin; row < end; ++row) {
    const Token token(rows, op.weights, row);
    token.for_choices(rows, [&](int32_t j, int64_t slot, float weight) {
      if (!lies_in(rows, token.problem, token.number, token.slots[j])) return;
      if (op.weights == nullptr) {
        out.copy(static_cast<const char*>(op.x) + row * row_bytes, slot);
        return;
      }
      with_type(op.dtype, [&](auto type) {
        using T = decltype(type);
        const T* const from = static_cast<const T*>(op.x) + row * hidden;
        T* const to = out.place<T>(slot);
        for (int64_t i = 0; i < hidden; ++i) to[i] = from_f32<T>(weight * to_f32(from[i]));
        out.copy(to, slot);
      });
    });
  }
}

void rows(const CombineCotangent& op, int64_t begin, int64_t end) {
  const DispatchedRows rows = op.rows;
  const int64_t hidden = rows.hidden;
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const ResultRows rows_of_grad_y(op.grad_y, rows.slot_rows(), hidden * sizeof(T), kLargeComputed);
    for (int64_t row = begin; row < end; ++row) {
      const T* const grad = static_cast<const T*>(op.grad) + row * hidden;
      float* const grad_weights = op.grad_weights + row * rows.k;
      for (int32_t j = 0; j < rows.k; ++j) grad_weights[j] = 0.0f;
      const Token token(rows, op.weights, row);
      token.for_choices(rows, [&](int32_t j, int64_t slot, float weight) {
        const T* const y = static_cast<const T*>(op.y) + slot * hidden;
        T* const grad_y = rows_of_grad_y.place<T>(slot);
        const bool mine = lies_in(rows, token.problem, token.number, token.slots[j]);
        Product product;
        for_stretches(hidden, [&](int64_t first, int64_t count) {
          product.add(grad + first, y + first, count);
          if (!mine) return;
          for (int64_t i = first; i < first + count; ++i) grad_y[i] = from_f32<T>(weight * to_f32(grad[i]));
        });
        if (mine) rows_of_grad_y.copy(grad_y, slot);
        grad_weights[j] = product.sum();
      });
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
