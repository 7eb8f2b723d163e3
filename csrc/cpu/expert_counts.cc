// expert_counts: each thread counts chunks of tokens. A chunk has its counts several times over, and neighbouring
// choices count in different ones: an addition that follows one to the same number would wait for it. They are added up
// at the end of the chunk, those of the chunks by the caller. Few choices are counted where their result lies.
#include <algorithm>
#include <vector>

#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {
namespace {

constexpr int64_t kChoicesPerChunk = 32768;
constexpr int64_t kFewChoices = 1024;
constexpr int64_t kCopies = 4;
constexpr int64_t kAhead = 1024;  // ids that are asked for before their turn: a page, where the hardware stops asking

// Calls visit(ids, how many) for the choices of tokens [begin, end) that count, in as few pieces as there are.
template <typename Visit>
void for_choices(const ExpertCounts& op, int64_t problem, int64_t begin, int64_t end, const Visit& visit) {
  const int32_t* ids = op.expert_ids + problem * op.tokens * op.k;
  if (op.token_mask == nullptr) return visit(ids + begin * op.k, (end - begin) * op.k);
  const uint8_t* mask = op.token_mask + problem * op.tokens;
  for (int64_t token = begin; token < end; ++token) {
    if ((mask[token] & 1) != 0) visit(ids + token * op.k, op.k);
  }
}

void count_few(const ExpertCounts& op, int64_t problem, int64_t begin, int64_t end, int32_t* counts) {
  const auto experts = static_cast<uint32_t>(op.experts);
  std::fill_n(counts, experts, 0);
  for_choices(op, problem, begin, end, [experts, counts](const int32_t* ids, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (static_cast<uint32_t>(ids[i]) < experts) ++counts[ids[i]];
    }
  });
}

void count_many(const ExpertCounts& op, int64_t problem, int64_t begin, int64_t end, int32_t* counts) {
  const auto experts = static_cast<uint64_t>(op.experts);
  const int64_t buckets = op.experts + int64_t{1};  // the last one for ids outside
  std::vector<int32_t> copies(kCopies * buckets);
  int32_t* first = copies.data();
  int32_t *second = first + buckets, *third = second + buckets, *fourth = third + buckets;
  // In 64 bits, as what it indexes: one instruction less a choice.
  const auto bucket_of = [experts](int32_t id) { return std::min<uint64_t>(static_cast<uint32_t>(id), experts); };
  for_choices(op, problem, begin, end, [=](const int32_t* ids, int64_t n) {
    int64_t i = 0;
    for (; i + kCopies <= n; i += kCopies) {
      __builtin_prefetch(ids + i + kAhead);
      ++first[bucket_of(ids[i])];
      ++second[bucket_of(ids[i + 1])];
      ++third[bucket_of(ids[i + 2])];
      ++fourth[bucket_of(ids[i + 3])];
    }
    for (; i < n; ++i) ++first[bucket_of(ids[i])];
  });
  for (int64_t i = 0; i < op.experts; ++i) counts[i] = first[i] + second[i] + third[i] + fourth[i];
}

}  // namespace

void run(const ExpertCounts& op, const ParallelFor& parallel_for) {
  const int64_t experts = op.experts;
  const int64_t tokens_per_chunk = 1 + std::max(kChoicesPerChunk, 4 * kCopies * experts) / std::max(op.k, 1);
  const int64_t chunks = (op.tokens + tokens_per_chunk - 1) / tokens_per_chunk;
  const int64_t grain = 1 + kChoicesPerChunk / (1 + std::min(op.tokens, tokens_per_chunk) * op.k);
  if (chunks <= 1) {
    return parallel_for(op.batch, grain, [&op, experts](int64_t begin, int64_t end) {
      const auto count = op.tokens * op.k < kFewChoices ? count_few : count_many;
      for (int64_t problem = begin; problem < end; ++problem) {
        count(op, problem, 0, op.tokens, op.counts + problem * experts);
      }
    });
  }
  std::vector<int32_t> counts(op.batch * chunks * experts);
  parallel_for(op.batch * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % chunks * tokens_per_chunk;
      count_many(op, i / chunks, first, std::min(op.tokens, first + tokens_per_chunk), counts.data() + i * experts);
    }
  });
  for (int64_t problem = 0; problem < op.batch; ++problem) {
    const int32_t* of_chunk = counts.data() + problem * chunks * experts;
    int32_t* sums = op.counts + problem * experts;
    std::copy_n(of_chunk, experts, sums);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      of_chunk += experts;
      for (int64_t expert = 0; expert < experts; ++expert) sums[expert] += of_chunk[expert];
    }
  }
}

}  // namespace jax_router::cpu
