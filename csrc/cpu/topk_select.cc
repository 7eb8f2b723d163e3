// topk_select: a row streams through the running selection of select.h, 4096 numbers at a time, and is read once.
#include "convert.h"
#include "rows.h"
#include "select.h"

namespace jax_router::cpu::JR_ISA {

void rows(const TopkSelect& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  if (k == 0) return;
  TopK top_k(op.length, k);
  alignas(64) uint32_t keys[kChunk];
  with_type(op.dtype, [&](auto type) {
    using T = decltype(type);
    const T minus_infinity = from_f32<T>(bits_float(0xFF800000u));
    for (int64_t row = begin; row < end; ++row) {
      const T* scores = static_cast<const T*>(op.scores) + row * op.length;
      int64_t length = op.length;
      if (op.lengths != nullptr) {
        const int64_t wanted = op.lengths[row];
        length = wanted < 0 ? 0 : wanted < length ? wanted : length;
      }
      const int64_t found = k < length ? k : length;
      T* const values = static_cast<T*>(op.values) + row * k;
      int32_t* const indices = op.indices + row * k;
      top_k.reset(found);
      for (int64_t first = 0; first < length; first += kChunk) {
        const int64_t n = length - first < kChunk ? length - first : kChunk;
        load_keys(scores + first, n, keys);
        top_k.push(keys, n, first);
      }
      top_k.finish(op.sorted, indices);
      for (int64_t j = 0; j < found; ++j) values[j] = scores[indices[j]];
      for (int64_t j = found; j < k; ++j) {
        values[j] = minus_infinity;
        indices[j] = -1;
      }
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
