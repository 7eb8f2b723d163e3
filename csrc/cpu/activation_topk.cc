// activation_topk: rows are taken in blocks. A row's order keys are written to a buffer in the first-level cache and its k
// best are selected there (select.h); the chosen logits of a block are then weighed together. Without a bias and without
// groups the logits themselves are the keys, and only the chosen ones are scored.
#include "convert.h"
#include "rows.h"
#include "scratch.h"
#include "select.h"
#include "weigh.h"

namespace jax_router::cpu::JR_ISA {
namespace {

constexpr int64_t kRowsPerBlock = 64;
static_assert(kMaxExperts <= kChunk, "a row is one chunk");

template <typename T>
void scores_of_row(ScoreFn score_fn, const Softmax& softmax, const T* logits, int64_t n, float* scores) {
  if (score_fn == ScoreFn::kSoftmax) {
    const float divisor = softmax.sum == 0.0f ? 1.0f : softmax.sum;
    for (int64_t e = 0; e < n; ++e) scores[e] = exp_nonpositive(to_f32(logits[e]) - softmax.shift) / divisor;
  } else {
    with_score_fn(score_fn, [=](auto fn) {
      for (int64_t e = 0; e < n; ++e) scores[e] = fn.score(to_f32(logits[e]));
    });
  }
}

// The float that has this order key.
float float_of_key(uint32_t key) { return bits_float(key ^ (key >> 31 != 0 ? 0x80000000u : 0xFFFFFFFFu)); }

// The sum of a group's two best keys, or its best.
float score_of_group(const uint32_t* keys, int64_t n, GroupScore score) {
  constexpr int64_t kLanes = 8;
  uint32_t best[kLanes] = {}, second[kLanes] = {};
  const auto add = [&](uint32_t key, int64_t lane) {
    const uint32_t worse = key < best[lane] ? key : best[lane];
    second[lane] = worse > second[lane] ? worse : second[lane];
    best[lane] = key > best[lane] ? key : best[lane];
  };
  const int64_t whole = n - n % kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) add(keys[i + j], j);
  }
  for (int64_t i = whole; i < n; ++i) add(keys[i], 0);
  for (int64_t j = 1; j < kLanes; ++j) {
    add(best[j], 0);
    add(second[j], 0);
  }
  if (score == GroupScore::kMax || n < 2) return float_of_key(best[0]);
  return float_of_key(best[0]) + float_of_key(second[0]);
}

// Gives the experts outside the best groups the worst key.
void exclude_groups(const Groups& groups, int64_t experts, TopK& select, uint32_t* keys) {
  alignas(64) uint32_t group_keys[kChunk];
  int32_t best[kMaxExperts];
  float group_scores[kMaxExperts];
  const int64_t size = experts / groups.num_groups;
  for (int64_t g = 0; g < groups.num_groups; ++g) {
    group_scores[g] = score_of_group(keys + g * size, size, groups.score);
  }
  load_keys(group_scores, groups.num_groups, group_keys);
  select.reset(groups.top_groups);
  select.push(group_keys, groups.num_groups, 0);
  select.finish(false, best);
  int64_t next = 0;
  for (int64_t i = 0; i <= groups.top_groups; ++i) {
    const int64_t end = i < groups.top_groups ? best[i] * size : experts;
    for (; next < end; ++next) keys[next] = kWorstKey;
    next += size;
  }
}

}  // namespace

void rows(const ActivationTopk& op, int64_t begin, int64_t end) {
  const int64_t k = op.k;
  const bool grouped = op.groups.num_groups > 1;
  const bool scored = op.bias != nullptr || grouped;
  const bool whole_row = op.scoring.score_fn == ScoreFn::kSoftmax && (scored || !op.scoring.renormalize);
  const int64_t most_selected = grouped && op.groups.top_groups > k ? op.groups.top_groups : k;
  TopK select(op.experts, most_selected);
  Scratch<float> block_logits(kRowsPerBlock * k);
  alignas(64) float scores[kMaxExperts];
  alignas(64) uint32_t keys[kChunk];
  Softmax softmax[kRowsPerBlock];
  with_type(op.dtype, [&](auto type) {
    const auto* logits = static_cast<const decltype(type)*>(op.logits);
    for (int64_t first = begin; first < end; first += kRowsPerBlock) {
      const int64_t count = end - first < kRowsPerBlock ? end - first : kRowsPerBlock;
      int32_t* const expert_ids = op.expert_ids + first * k;
      float* const chosen = op.chosen_logits != nullptr ? op.chosen_logits + first * k : block_logits;
      for (int64_t r = 0; r < count; ++r) {
        int32_t* const ids = expert_ids + r * k;
        if (op.token_mask != nullptr && !op.token_mask[first + r]) {
          softmax[r] = {0.0f, 0.0f};
          for (int64_t j = 0; j < k; ++j) {
            ids[j] = -1;
            chosen[r * k + j] = 0.0f;
          }
          continue;
        }
        const auto* row = logits + (first + r) * op.experts;
        if (whole_row) softmax[r] = softmax_of_row(row, op.experts);
        if (scored) {
          scores_of_row(op.scoring.score_fn, softmax[r], row, op.experts, scores);
          if (op.bias != nullptr) {
            const float* bias = op.bias + (first + r) * op.bias_stride;
            for (int64_t e = 0; e < op.experts; ++e) scores[e] += bias[e];
          }
          load_keys(scores, op.experts, keys);
          if (grouped) exclude_groups(op.groups, op.experts, select, keys);
        } else {
          load_keys(row, op.experts, keys);
        }
        select.reset(k);
        select.push(keys, op.experts, 0);
        select.finish(true, ids);
        for (int64_t j = 0; j < k; ++j) chosen[r * k + j] = to_f32(row[ids[j]]);
      }
      weigh(op.scoring, count, k, chosen, expert_ids, softmax, op.weights + first * k);
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
