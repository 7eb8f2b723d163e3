// expert_dispatch: a stable counting sort in two passes over the ids. The choices of one sort are cut into chunks; the
// first pass counts each chunk's ids by expert, a prefix sum turns the counts into each chunk's first position for each
// expert, and the second pass places the choices. The bucket after the last expert holds the ids outside [0, experts).
// Slots without a choice are filled between the passes.
#include <algorithm>
#include <vector>

#include "../common/ops.h"
#include "kernels.h"

namespace jax_router::cpu {
namespace {

constexpr int64_t kChoicesPerChunk = 16384;

uint32_t bucket_of(int32_t expert_id, int32_t experts) {
  return std::min(static_cast<uint32_t>(expert_id), static_cast<uint32_t>(experts));
}

}  // namespace

void run(const ExpertDispatch& op, const ParallelFor& parallel_for) {
  const int32_t k = op.k, experts = op.experts;
  const int64_t choices = op.tokens * k;
  const int64_t buckets = int64_t{experts} + 1;
  // Whole tokens, and enough of them that the counts cost little beside the ids.
  const int64_t tokens_per_chunk = 1 + std::max(kChoicesPerChunk, 4 * buckets) / std::max(k, 1);
  const int64_t chunks = std::max<int64_t>(1, (op.tokens + tokens_per_chunk - 1) / tokens_per_chunk);
  std::vector<uint32_t> positions(op.batch * chunks * buckets);

  // Calls visit(sort, first token, last token, the chunk's counts) for each chunk of each sort.
  const auto for_chunks = [&](const auto& visit) {
    const int64_t grain = 1 + kChoicesPerChunk / (1 + std::min(choices, tokens_per_chunk * k));
    parallel_for(op.batch * chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first_token = i % chunks * tokens_per_chunk;
        const int64_t last_token = std::min(op.tokens, first_token + tokens_per_chunk);
        visit(i / chunks, first_token, last_token, positions.data() + i * buckets);
      }
    });
  };

  for_chunks([choices, k, experts, &op](int64_t sort, int64_t first_token, int64_t last_token, uint32_t* counts) {
    const int32_t* expert_ids = op.expert_ids + sort * choices;
    for (int64_t choice = first_token * k; choice < last_token * k; ++choice) {
      ++counts[bucket_of(expert_ids[choice], experts)];
    }
  });

  const int64_t slots = slots_of(op);
  std::vector<uint32_t> kept_ends(op.batch * buckets);  // slot behind the last choice that a group keeps
  for (int64_t sort = 0; sort < op.batch; ++sort) {
    uint32_t* counts = positions.data() + sort * chunks * buckets;
    int32_t* token_index = op.token_index + sort * slots;
    uint32_t begin = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
      uint32_t position = begin;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const uint32_t count = counts[chunk * buckets + expert];
        counts[chunk * buckets + expert] = position;
        position += count;
      }
      const int64_t kept = std::min<int64_t>(position - begin, op.capacity);
      const int64_t size = (kept + op.align - 1) / op.align * op.align;
      op.group_sizes[sort * experts + expert] = static_cast<int32_t>(size);
      std::fill(token_index + begin + kept, token_index + begin + size, -1);
      kept_ends[sort * buckets + expert] = begin + static_cast<uint32_t>(kept);
      begin += static_cast<uint32_t>(size);
    }
    std::fill(token_index + begin, token_index + slots, -1);
  }

  for_chunks([choices, slots, buckets, k, experts, &kept_ends, &op](int64_t sort, int64_t first_token,
                                                                    int64_t last_token, uint32_t* next) {
    const int32_t* expert_ids = op.expert_ids + sort * choices;
    const uint32_t* kept_end = kept_ends.data() + sort * buckets;  // 0 of the ids outside: they have no slot
    int32_t* token_index = op.token_index + sort * slots;
    int32_t* slot = op.slot + sort * choices;
    for (int64_t token = first_token; token < last_token; ++token) {
      for (int64_t choice = token * k; choice < (token + 1) * k; ++choice) {
        const uint32_t bucket = bucket_of(expert_ids[choice], experts);
        const uint32_t position = next[bucket]++;
        const bool has_slot = position < kept_end[bucket];
        if (has_slot) token_index[position] = static_cast<int32_t>(token);
        slot[choice] = has_slot ? static_cast<int32_t>(position) : -1;
      }
    }
  });
}

}  // namespace jax_router::cpu
