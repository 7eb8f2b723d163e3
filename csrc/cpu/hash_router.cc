// hash_router: a gather of k ids a token. Each token reads one table row and writes 8 * k bytes. Ids and weights are
// written in two passes: two interleaved streams of stores take twice the time.
#include <cstring>

#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {
namespace {

// kStaticK is k where the compiler shall unroll for it, else 0.
template <int kStaticK>
void rows(const HashRouter& op, int64_t begin, int64_t end) {
  const HashRouter hash = op;  // a copy, which the stores below cannot change
  const int64_t k = kStaticK > 0 ? kStaticK : hash.k;
  const float weight = hash.scale / static_cast<float>(k);
  const auto valid = [&hash](int64_t token) { return token >= 0 && token < hash.vocab_size; };
  for (int64_t row = begin; row < end; ++row) {
    const int64_t token = hash.token_ids[row];
    if (valid(token)) {
      std::memcpy(hash.expert_ids + row * k, hash.hash_lut + token * k, k * sizeof(int32_t));
    } else {
      for (int64_t j = 0; j < k; ++j) hash.expert_ids[row * k + j] = -1;
    }
  }
  for (int64_t row = begin; row < end; ++row) {
    const float row_weight = valid(hash.token_ids[row]) ? weight : 0.0f;
    for (int64_t j = 0; j < k; ++j) hash.weights[row * k + j] = row_weight;
  }
}

}  // namespace

void run(const HashRouter& op, const ParallelFor& parallel_for) {
  const int64_t grain = 1 + 32768 / (op.k + 1);
  const auto split = [&](auto rows_of_k) {
    parallel_for(op.rows, grain, [&op, rows_of_k](int64_t begin, int64_t end) { rows_of_k(op, begin, end); });
  };
  switch (op.k) {
    case 1:
      return split(rows<1>);
    case 2:
      return split(rows<2>);
    case 4:
      return split(rows<4>);
    case 6:
      return split(rows<6>);
    case 8:
      return split(rows<8>);
    default:
      return split(rows<0>);
  }
}

}  // namespace jax_router::cpu
