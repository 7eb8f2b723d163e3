// expert_counts: each thread counts chunks of tokens, each chunk in counts of its own, which are then added up. A chunk
// has its counts several times over, and neighbouring choices count in different ones: an addition that follows one to
// the same number would wait for it.
#include <algorithm>
#include <vector>

#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {
namespace {

constexpr int64_t kChoicesPerChunk = 32768;
constexpr int64_t kCopies = 4;
constexpr int64_t kAhead = 1024;  // ids that are asked for before their turn: a page, where the hardware stops asking

}  // namespace

void run(const ExpertCounts& op, const ParallelFor& parallel_for) {
  const int64_t buckets = int64_t{op.experts} + 1;  // the last one for ids outside
  const int64_t tokens_per_chunk = 1 + std::max(kChoicesPerChunk, 4 * kCopies * buckets) / std::max(op.k, 1);
  const int64_t chunks = std::max<int64_t>(1, (op.tokens + tokens_per_chunk - 1) / tokens_per_chunk);
  std::vector<int32_t> all_counts(op.batch * chunks * kCopies * buckets);

  const auto count = [&op, buckets](int64_t problem, int64_t first_token, int64_t last_token, int32_t* counts) {
    const auto experts = static_cast<uint32_t>(op.experts);
    const int32_t* ids = op.expert_ids + problem * op.tokens * op.k;
    int32_t *second = counts + buckets, *third = second + buckets, *fourth = third + buckets;
    const auto bucket_of = [experts](int32_t id) { return std::min(static_cast<uint32_t>(id), experts); };
    const auto count_all = [&](int64_t begin, int64_t end) {
      int64_t choice = begin;
      for (; choice + kCopies <= end; choice += kCopies) {
        __builtin_prefetch(ids + choice + kAhead);
        ++counts[bucket_of(ids[choice])];
        ++second[bucket_of(ids[choice + 1])];
        ++third[bucket_of(ids[choice + 2])];
        ++fourth[bucket_of(ids[choice + 3])];
      }
      for (; choice < end; ++choice) ++counts[bucket_of(ids[choice])];
    };
    if (op.token_mask == nullptr) return count_all(first_token * op.k, last_token * op.k);
    const uint8_t* mask = op.token_mask + problem * op.tokens;
    for (int64_t token = first_token; token < last_token; ++token) {
      if ((mask[token] & 1) != 0) count_all(token * op.k, (token + 1) * op.k);
    }
  };
  const int64_t grain = 1 + kChoicesPerChunk / (1 + std::min(op.tokens, tokens_per_chunk) * op.k);
  parallel_for(op.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first_token = i % chunks * tokens_per_chunk;
      count(i / chunks, first_token, std::min(op.tokens, first_token + tokens_per_chunk),
            all_counts.data() + i * kCopies * buckets);
    }
  });

  for (int64_t problem = 0; problem < op.batch; ++problem) {
    int32_t* sums = op.counts + problem * op.experts;
    std::fill_n(sums, op.experts, 0);
    for (int64_t copy = 0; copy < chunks * kCopies; ++copy) {
      const int32_t* counts = all_counts.data() + (problem * chunks * kCopies + copy) * buckets;
      for (int32_t expert = 0; expert < op.experts; ++expert) sums[expert] += counts[expert];
    }
  }
}

}  // namespace jax_router::cpu
