// route_at: scores at given experts. Rows are taken in blocks: their chosen logits are gathered first, and weighed together.
#include "convert.h"
#include "rows.h"
#include "scratch.h"
#include "weigh.h"

namespace jax_router::cpu::JR_ISA {
namespace {

constexpr int64_t kRowsPerBlock = 64;

}  // namespace

void rows(const RouteAt& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  Scratch<float> block_logits(kRowsPerBlock * k);
  Softmax softmax[kRowsPerBlock];
  with_type(op.dtype, [&](auto type) {
    const auto* logits = static_cast<const decltype(type)*>(op.logits);
    for (int64_t first = begin; first < end; first += kRowsPerBlock) {
      const int64_t count = end - first < kRowsPerBlock ? end - first : kRowsPerBlock;
      int32_t* const valid_ids = op.valid_ids + first * k;
      float* const chosen = op.chosen_logits != nullptr ? op.chosen_logits + first * k : block_logits;
      for (int64_t r = 0; r < count; ++r) {
        const auto* row = logits + (first + r) * op.experts;
        for (int64_t i = r * k; i < (r + 1) * k; ++i) {
          const int32_t id = op.expert_ids[first * k + i];
          const bool valid = static_cast<uint32_t>(id) < static_cast<uint32_t>(op.experts);
          valid_ids[i] = valid ? id : -1;
          chosen[i] = valid ? to_f32(row[id]) : 0.0f;
        }
        if (op.scoring.needs_whole_row()) softmax[r] = softmax_of_row(row, op.experts);
      }
      weigh(op.scoring, count, k, chosen, valid_ids, softmax, op.weights + first * k);
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
