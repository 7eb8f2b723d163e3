// expert_counts: each thread counts chunks of tokens in counts of its chunk, which are then added up.
#include <algorithm>
#include <vector>

#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {
namespace {

constexpr int64_t kChoicesPerChunk = 16384;

// Counts the choices of tokens [first, last). Ids outside count as one more expert.
void count(const ExpertCounts& op, int64_t problem, int64_t first, int64_t last, int32_t* counts) {
  const int32_t* expert_ids = op.expert_ids + problem * op.tokens * op.k;
  const uint8_t* mask = op.token_mask == nullptr ? nullptr : op.token_mask + problem * op.tokens;
  const auto experts = static_cast<uint32_t>(op.experts);
  const auto count_one = [&](int64_t choice) {
    ++counts[std::min(static_cast<uint32_t>(expert_ids[choice]), experts)];
  };
  if (mask == nullptr) {
    for (int64_t choice = first * op.k; choice < last * op.k; ++choice) count_one(choice);
    return;
  }
  for (int64_t token = first; token < last; ++token) {
    if ((mask[token] & 1) == 0) continue;
    for (int64_t choice = token * op.k; choice < (token + 1) * op.k; ++choice) count_one(choice);
  }
}

}  // namespace

void run(const ExpertCounts& op, const ParallelFor& parallel_for) {
  const int64_t buckets = int64_t{op.experts} + 1;
  const int64_t tokens_per_chunk = 1 + std::max(kChoicesPerChunk, 4 * buckets) / std::max(op.k, 1);
  const int64_t chunks = std::max<int64_t>(1, (op.tokens + tokens_per_chunk - 1) / tokens_per_chunk);
  std::vector<int32_t> counts(op.batch * chunks * buckets);
  const int64_t grain = 1 + kChoicesPerChunk / (1 + std::min(op.tokens, tokens_per_chunk) * op.k);
  parallel_for(op.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * tokens_per_chunk;
      count(op, i / chunks, first, std::min(op.tokens, first + tokens_per_chunk), counts.data() + i * buckets);
    }
  });
  for (int64_t problem = 0; problem < op.batch; ++problem) {
    int32_t* sums = op.counts + problem * op.experts;
    std::copy_n(counts.data() + problem * chunks * buckets, op.experts, sums);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      const int32_t* more = counts.data() + (problem * chunks + chunk) * buckets;
      for (int32_t expert = 0; expert < op.experts; ++expert) sums[expert] += more[expert];
    }
  }
}

}  // namespace jax_router::cpu
