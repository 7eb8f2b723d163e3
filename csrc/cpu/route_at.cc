// route_at: scores at given experts. Rows are taken in blocks: their chosen logits are gathered, and weighed together.
// Memory gives all lines of a row in less time than some of them, one here and one there: a row with few lines for each
// choice is asked for as a whole, some rows ahead.
#include "chosen.h"
#include "convert.h"
#include "rows.h"

namespace jax_router::cpu::JR_ISA {
namespace {

constexpr int64_t kLine = 64;  // bytes
constexpr int64_t kMostLinesOfChoice = 4;
constexpr int64_t kRowsAhead = 8;

void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(row) + i);
}

}  // namespace

void rows(const RouteAt& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  ChosenRows chosen(op.scoring, k);
  with_type(op.dtype, [&](auto type) {
    const auto* logits = static_cast<const decltype(type)*>(op.logits);
    const int64_t row_bytes = op.experts * static_cast<int64_t>(sizeof(type));
    const bool whole_rows = row_bytes <= kMostLinesOfChoice * kLine * k;
    for (int64_t first = begin; first < end; first += kRowsPerBlock) {
      const int64_t count = end - first < kRowsPerBlock ? end - first : kRowsPerBlock;
      if (op.token_ids != nullptr) {  // so that a row of the table is there before its logits are asked for
        for (int64_t row = first + kRowsPerBlock; row < first + 2 * kRowsPerBlock && row < end; ++row) {
          __builtin_prefetch(ids_of_row(op, row));
        }
      }
      int32_t* const valid_ids = op.valid_ids + first * k;
      for (int64_t r = 0; r < count; ++r) {
        const auto* row = logits + (first + r) * op.experts;
        if (whole_rows && first + r + kRowsAhead < end) prefetch(row + kRowsAhead * op.experts, row_bytes);
        const int32_t* const ids = ids_of_row(op, first + r);
        for (int64_t j = 0; j < k; ++j) {
          const int32_t id = ids == nullptr ? -1 : ids[j];
          const bool valid = static_cast<uint32_t>(id) < static_cast<uint32_t>(op.experts);
          const float logit = valid ? to_f32(row[id]) : 0.0f;
          valid_ids[r * k + j] = valid ? id : -1;
          if (op.chosen_logits != nullptr) op.chosen_logits[(first + r) * k + j] = logit;
          chosen.set_logit(r, j, valid ? logit : ChosenRows::kNoLogit);
        }
        if (op.scoring.needs_whole_row()) chosen.set_softmax(r, softmax_of_row(row, op.experts));
      }
      chosen.weigh(count, valid_ids, op.weights + first * k);
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
