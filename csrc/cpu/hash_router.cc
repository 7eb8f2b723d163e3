// hash_router: a gather of k ids a token. Each token reads one table row and writes 8 * k bytes.
#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {

void run(const HashRouter& op, const ParallelFor& parallel_for) {
  const int64_t k = op.k;
  const float weight = op.scale / static_cast<float>(k);
  parallel_for(op.rows, 1 + 16384 / (k + 1), [&op, k, weight](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = op.token_ids[row];
      const bool valid = token >= 0 && token < op.vocab_size;
      int32_t* expert_ids = op.expert_ids + row * k;
      float* weights = op.weights + row * k;
      const int32_t* entry = op.hash_lut + (valid ? token : 0) * k;
      for (int64_t j = 0; j < k; ++j) {
        expert_ids[j] = valid ? entry[j] : -1;
        weights[j] = valid ? weight : 0.0f;
      }
    }
  });
}

}  // namespace jax_router::cpu
