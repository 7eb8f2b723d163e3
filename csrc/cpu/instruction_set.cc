// Chooses the instruction set once for the process, and splits the rows of an op over threads.
#include <cstring>
#include <new>

#include "../common/ops.h"
#include "kernels.h"

#define JR_ISA baseline
#include "rows.h"
#include "scratch.h"
#undef JR_ISA
#ifdef JR_X86
#define JR_ISA avx2
#include "rows.h"
#undef JR_ISA
#define JR_ISA avx512
#include "rows.h"
#undef JR_ISA
#endif

namespace jax_router::cpu {
namespace {

enum class Isa { kBaseline, kAvx2, kAvx512 };

Isa detect() {
#ifdef JR_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) return avx512 ? Isa::kAvx512 : Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

// Rows that are worth another thread.
int64_t grain(double nanoseconds_per_row) {
  constexpr double kNanosecondsPerChunk = 40e3;
  const auto rows = static_cast<int64_t>(kNanosecondsPerChunk / nanoseconds_per_row);
  return rows < 1 ? 1 : rows;
}

int64_t count_rows(const Permute& op) { return op.rows.token_rows(); }
int64_t count_rows(const Combine& op) { return op.rows.token_rows(); }
int64_t count_rows(const PermuteCotangent& op) { return op.rows.token_rows(); }
int64_t count_rows(const CombineCotangent& op) { return op.rows.token_rows(); }
template <typename Op>
int64_t count_rows(const Op& op) {
  return op.rows;
}

template <typename Op>
void run_rows(const Op& op, double nanoseconds_per_row, const ParallelFor& parallel_for) {
  static const Isa isa = detect();
  parallel_for(count_rows(op), grain(nanoseconds_per_row), [&op](int64_t begin, int64_t end) {
    switch (isa) {
#ifdef JR_X86
      case Isa::kAvx512:
        return avx512::rows(op, begin, end);
      case Isa::kAvx2:
        return avx2::rows(op, begin, end);
#endif
      default:
        return baseline::rows(op, begin, end);
    }
  });
}

// Zeros in the rows of the slots that are not in use.
void clear_unused(const DispatchedRows& rows, int64_t row_bytes, void* out, const ParallelFor& parallel_for) {
  if (row_bytes == 0) return;
  parallel_for(rows.slot_rows(), grain(10.0), [&rows, row_bytes, out](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot) {
      if (!is_in_use(rows, slot)) std::memset(static_cast<char*>(out) + slot * row_bytes, 0, row_bytes);
    }
  });
}

int64_t row_bytes(const DispatchedRows& rows, DType dtype) { return rows.hidden * (dtype == DType::kF32 ? 4 : 2); }

// Of a token, whose choices each take a row.
double nanoseconds(const DispatchedRows& rows, double of_element) {
  return 20.0 + of_element * static_cast<double>(rows.hidden) * (rows.k + 1);
}

}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

// The costs are rough, of one row on one core: they only choose how much work is worth a thread.

void run(const ActivationTopk& op, const ParallelFor& parallel_for) {
  const bool scores_all =
      op.bias != nullptr || op.selection.groups.num_groups > 1 || op.selection.scoring.needs_whole_row();
  run_rows(op, 50.0 + (scores_all ? 2.5 : 1.0) * op.selection.experts + 5.0 * op.selection.k, parallel_for);
}

void run(const RouteAt& op, const ParallelFor& parallel_for) {
  run_rows(op, 10.0 + 5.0 * op.k + (op.scoring.needs_whole_row() ? 1.0 * op.experts : 0.0), parallel_for);
}

void run(const RouteCotangent& op, const ParallelFor& parallel_for) {
  run_rows(op, 10.0 + 10.0 * op.k + (op.scoring.needs_whole_row() ? 2.0 : 0.2) * op.experts, parallel_for);
}

void run(const Permute& op, const ParallelFor& parallel_for) {
  run_rows(op, nanoseconds(op.rows, 0.2), parallel_for);
  clear_unused(op.rows, op.rows.hidden * op.element_bytes, op.out, parallel_for);
}

void run(const Combine& op, const ParallelFor& parallel_for) { run_rows(op, nanoseconds(op.rows, 0.2), parallel_for); }

void run(const PermuteCotangent& op, const ParallelFor& parallel_for) {
  run_rows(op, nanoseconds(op.rows, 0.3), parallel_for);
}

void run(const CombineCotangent& op, const ParallelFor& parallel_for) {
  run_rows(op, nanoseconds(op.rows, 0.4), parallel_for);
  clear_unused(op.rows, row_bytes(op.rows, op.dtype), op.grad_y, parallel_for);
}

void run(const TopkSelect& op, const ParallelFor& parallel_for) {
  run_rows(op, 100.0 + 0.6 * op.length + 20.0 * op.k, parallel_for);
}

}  // namespace jax_router::cpu
