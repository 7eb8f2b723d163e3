// activation_topk: rows are taken in blocks. A row's order keys are written to a buffer in the first-level cache and
// its k best are selected there (select.h); the chosen logits of a block are then weighed together. Without a bias and
// without groups the logits themselves are the keys, and only the chosen ones are scored.
#include "chosen.h"
#include "convert.h"
#include "rows.h"
#include "select.h"
#include "short_rows.h"

namespace jax_router::cpu::JR_ISA {
namespace {

static_assert(kRowsPerBlock <= ShortRowsTopK::kRows, "a block is selected at once");
static_assert(kMaxExperts <= kChunk, "a row is one chunk");

// Asks for what lies a page behind n numbers that are read now. The hardware does not ask beyond a page, and a core
// that is busy with one row does not get to the loads of the next in time.
template <typename T>
void prefetch_ahead(const T* numbers, int64_t n) {
  constexpr uintptr_t kPage = 4096, kLine = 64;
  const auto first = reinterpret_cast<uintptr_t>(numbers) + kPage;
  for (uintptr_t i = 0; i < n * sizeof(T); i += kLine) __builtin_prefetch(reinterpret_cast<const void*>(first + i));
}

template <typename T>
void scores_of_row(ScoreFn score_fn, const Softmax& softmax, const T* logits, int64_t n, float* scores) {
  if (score_fn == ScoreFn::kSoftmax) {
    for (int64_t e = 0; e < n; ++e) scores[e] = exp_nonpositive(to_f32(logits[e]) - softmax.shift) / softmax.divisor;
  } else {
    with_pointwise(score_fn, [=](auto fn) {
      for (int64_t e = 0; e < n; ++e) scores[e] = fn.score(to_f32(logits[e]));
    });
  }
}

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
  const int64_t experts = op.selection.experts;
  const int64_t k = op.selection.k;
  const Scoring& scoring = op.selection.scoring;
  const Groups& groups = op.selection.groups;
  const bool grouped = groups.num_groups > 1;
  const bool scored = op.bias != nullptr || grouped;
  const bool whole_row = scoring.score_fn == ScoreFn::kSoftmax && (scored || !scoring.renormalize);
  const bool are_short = ShortRowsTopK::pays(end - begin, experts, k);
  TopK select(experts, grouped && groups.top_groups > k ? groups.top_groups : k);
  ShortRowsTopK select_short(are_short ? experts : 0);
  ChosenRows chosen(scoring, k);
  alignas(64) float scores[kMaxExperts];
  alignas(64) uint32_t keys[kChunk];
  with_type(op.dtype, [&](auto type) {
    const auto* logits = static_cast<const decltype(type)*>(op.logits);
    for (int64_t first = begin; first < end; first += kRowsPerBlock) {
      const int64_t count = end - first < kRowsPerBlock ? end - first : kRowsPerBlock;
      int32_t* const expert_ids = op.expert_ids + first * k;
      for (int64_t r = 0; r < count; ++r) {
        if (is_masked(op, first + r)) continue;
        const auto* row = logits + (first + r) * experts;
        prefetch_ahead(row, experts);
        Softmax softmax{0.0f, 1.0f};
        if (whole_row) softmax = softmax_of_row(row, experts);
        chosen.set_softmax(r, softmax);
        if (scored) {
          scores_of_row(scoring.score_fn, softmax, row, experts, scores);
          if (op.bias != nullptr) {
            const float* bias = op.bias + (first + r) * op.bias_stride;
            for (int64_t e = 0; e < experts; ++e) scores[e] += bias[e];
          }
          load_keys(scores, experts, keys);
          if (grouped) exclude_groups(groups, experts, select, keys);
        } else {
          load_keys(row, experts, keys);
        }
        if (are_short) {
          select_short.set(r, keys);
        } else {
          select.reset(k);
          select.push(keys, experts, 0);
          select.finish(true, expert_ids + r * k);
        }
      }
      if (are_short) select_short.finish(count, k, expert_ids);
      for (int64_t r = 0; r < count; ++r) {
        const bool masked = is_masked(op, first + r);
        const auto* row = logits + (first + r) * experts;
        for (int64_t j = 0; j < k; ++j) {
          int32_t& id = expert_ids[r * k + j];
          if (masked) id = -1;
          const float logit = masked ? 0.0f : to_f32(row[id]);
          if (op.chosen_logits != nullptr) op.chosen_logits[(first + r) * k + j] = logit;
          chosen.set_logit(r, j, masked ? ChosenRows::kNoLogit : logit);
        }
      }
      chosen.weigh(count, expert_ids, op.weights + first * k);
    }
  });
}

}  // namespace jax_router::cpu::JR_ISA
