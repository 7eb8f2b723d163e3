// From a token's logits to its experts: the selection that every router kernel shares, so that a token gets the same
// weights and ids, bit for bit, whichever kernel made its logits and whatever else is in its batch. A tile of lanes
// owns the token, as tile.cuh says.
//
// Where the keys are scores + bias, the bound is one of cheap scores, lowered by what these may be wrong by, and only
// the few that reach it get their exact keys. Groups go by cheap scores too, where these leave no doubt about them.
// Where they are not good enough, the rounds go by exact scores of all experts.
#pragma once

#include <cmath>
#include <type_traits>

#include "groups.cuh"
#include "row_score.cuh"
#include "tile.cuh"

namespace jax_router::cuda {

// Where a token's results go: its k values start at first + place of each array, of which `first` had best be the same
// for a whole block. place < 0: nowhere, the tile has no token and only keeps its warp company. chosen_logits is
// optional.
struct TokenOutput {
  float* weights;
  int32_t* expert_ids;
  float* chosen_logits;
  int64_t first;
  int place = 0;

  __device__ __forceinline__ void store(int j, float weight, int expert, float logit) const {
    (weights + first)[place + j] = weight;
    (expert_ids + first)[place + j] = expert;
    if (chosen_logits != nullptr) (chosen_logits + first)[place + j] = logit;
  }
};

// Whether the biases of a lane wait in the places of its keys until these are added. Where there are many, each quad is
// loaded when it is added: it comes from the L1 cache, and there are registers for more warps.
template <KeyMode kMode, int kLanes, int kElements>
constexpr bool kBiasesWait = kMode != KeyMode::kLogits && !(kMode == KeyMode::kScores && kLanes == 8 && kElements > 16);

// Loads the biases of the tile's elements, if there are any, to the places of their keys. It had best come next to the
// loads of the logits, where nothing is waited for in between. quads: see rows_have_quads.
template <KeyMode kMode, int kLanes, int kFullChunks, int kElements>
__device__ __forceinline__ void load_biases(int experts, const float* bias, bool quads, float (&keys)[kElements]) {
  if constexpr (kBiasesWait<kMode, kLanes, kElements>) {
    if (kMode == KeyMode::kScores || bias != nullptr) {
      load_tile<kLanes, kFullChunks>(bias, experts, kLanes == 8 || quads, keys);
    }
  }
}

// The keys of all the tile's elements, score + bias, -inf where they are not eligible. In the places of the keys are
// what load_biases put there. bias may be null for kGroups.
template <KeyMode kMode, Accuracy kAccuracy, int kLanes, int kFullChunks, int kElements>
__device__ __forceinline__ void score_keys(const RowScore& score, const float (&logits)[kElements], uint32_t eligible,
                                           const float* bias, float (&keys)[kElements]) {
  const bool biased = kMode == KeyMode::kScores || bias != nullptr;
  with_score<kAccuracy>(score, [&](auto score_of) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if constexpr (!kBiasesWait<kMode, kLanes, kElements>) {
        static_assert(kFullChunks == kElements / 4);
        if (i % 4 == 0) {
          const float4 quad = load_quad(bias + expert_of<kLanes>(tile_lane<kLanes>(), i));
          keys[i] = quad.x;
          keys[i + 1] = quad.y;
          keys[i + 2] = quad.z;
          keys[i + 3] = quad.w;
        }
      }
      const float s = score_of(logits[i]);
      if constexpr (kAccuracy == Accuracy::kRough) {
        keys[i] = s + keys[i];  // in one instruction with the score's last
      } else {
        keys[i] = biased ? __fadd_rn(s, keys[i]) : s;
      }
      if (i / 4 >= kFullChunks && (eligible >> i & 1) == 0) keys[i] = -INFINITY;
    }
  });
}

// Ranks the experts in scratch.candidates[0 .. count), which are among the tile's eligible ones and include its k best,
// and writes the k weights and ids. The arguments are those of select_token; kNarrow: the logits were 16-bit numbers.
template <KeyMode kMode, int kLanes, bool kNarrow = false, class LogitAt>
__device__ __forceinline__ void finish_token(const Selection& selection, const RowScore& score, int count, bool wanted,
                                             const float* bias, LogitAt logit_at, const TokenOutput& output,
                                             SelectScratch<kLanes>& scratch) {
  const int lane = tile_lane<kLanes>();
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  const int most = most_of_tiles<kLanes>(count);
  __syncwarp();  // the candidates are there, and what else was in the scratch has been read

  constexpr int kOwn = kSlots<kLanes> / kLanes;  // candidates of a lane
  using Pair = std::conditional_t<kNarrow && kMode == KeyMode::kLogits, uint32_t, RankedPair>;
  int experts[kOwn] = {};
  float logits[kOwn] = {};
  float scores[kOwn] = {};
  Pair own[kOwn] = {};
  Pair(&pairs)[kSlots<kLanes>] = reinterpret_cast<Pair(&)[kSlots<kLanes>]>(scratch.pairs);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (i > 0 && most <= 8) break;
    const int slot = lane + i * kLanes;
    if (slot < count) {
      const int expert = scratch.candidates[slot];
      const float logit = logit_at(expert);
      float key = logit;
      if constexpr (kMode != KeyMode::kLogits) {
        const bool biased = kMode == KeyMode::kScores || bias != nullptr;
        const float offset = biased ? __ldg(bias + expert) : 0.0f;
        scores[i] = score(logit);
        key = biased ? __fadd_rn(scores[i], offset) : scores[i];
      }
      if constexpr (sizeof(Pair) == 4) {
        // The lowest 13 bits of the key of a 16-bit number follow from the others: there is room for the expert.
        constexpr uint32_t kRoom = 0x1FFF;
        static_assert(kMaxExperts <= kRoom);
        own[i] = (order_key(key) & ~kRoom) | (static_cast<uint32_t>(expert) ^ kRoom);
      } else {
        own[i] = ranked_pair(order_key(key), static_cast<uint32_t>(expert));
      }
      experts[i] = expert;
      logits[i] = logit;
    }
    pairs[slot] = own[i];
  }
  scratch.values[lane] = 0.0f;
  __syncwarp();
  int ranks[kOwn];
  ranks_of(own, pairs, most, ranks);

  int expert = experts[0];
  float logit = logits[0];
  float s = scores[0];
  int rank = ranks[0];
  bool chosen = lane < count && rank < k;
  if constexpr (kOwn > 1) {
    // The choices go to the lanes of their ranks, so that a lane has one from here on.
    __syncwarp();
    int2* choices = reinterpret_cast<int2*>(scratch.pairs);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (i > 0 && most <= 8) break;
      if (lane + i * kLanes < count && ranks[i] < k) {
        choices[ranks[i]] = make_int2(experts[i], static_cast<int>(float_bits(logits[i])));
        if constexpr (kMode != KeyMode::kLogits) scratch.values[ranks[i]] = scores[i];
      }
    }
    __syncwarp();
    chosen = wanted && lane < k;
    rank = lane;
    if (chosen) {
      expert = choices[lane].x;
      logit = bits_float(static_cast<uint32_t>(choices[lane].y));
      if constexpr (kMode != KeyMode::kLogits) s = scratch.values[lane];
    }
  }
  if constexpr (kMode == KeyMode::kLogits) s = score(logit);
  const float weight = finish_weight<kMode == KeyMode::kLogits>(scoring, k, chosen, rank, logit, s, scratch.values,
                                                                [] { __syncwarp(); });
  if (chosen) {
    output.store(rank, weight, expert, logit);
  } else if (!wanted && output.place >= 0 && lane < k) {
    output.store(lane, 0.0f, -1, 0.0f);
  }
  __syncwarp();
}

// Selects one token's experts and writes its k weights and ids. All 32 lanes of the warp call it together.
//   kFullChunks  the tile's first so many quads are known to lie within the token's experts
//   logits       in the layout of tile.cuh, floats or, for kLogits, a PackedTile; -inf where the expert does not exist,
//                anything if the token is not wanted
//   keys         what load_biases put there; not used for kLogits
//   wanted       false where the tile has no token or the token is masked: ids -1 and weights 0 if output has a place
//   bias         the token's own row of [experts] floats; null is possible for kGroups; not used for kLogits
//   logit_at     logit_at(expert) gives any of the token's logits once more, to any lane of the tile
template <KeyMode kMode, int kLanes, int kFullChunks, class Logits, class LogitAt>
__device__ __forceinline__ void select_token(const Selection& selection, const Logits& logits,
                                             float (&keys)[kElementsOf<Logits>], bool wanted, const float* bias,
                                             LogitAt logit_at, const TokenOutput& output,
                                             SelectScratch<kLanes>& scratch) {
  constexpr int kElements = kElementsOf<Logits>;
  constexpr bool kPacked = !std::is_array_v<Logits>;
  static_assert(kMode == KeyMode::kLogits || !kPacked);
  static_assert(kElements % 4 == 0 && kElements <= 32 && (kLanes == 8 || kLanes == 16 || kLanes == 32));
  const int lane = tile_lane<kLanes>();
  const int k = selection.k;
  const Scoring& scoring = selection.scoring;
  uint32_t eligible = wanted ? existing_elements<kLanes, kFullChunks, kElements>(selection.experts) : 0;

  RowScore score{scoring.score_fn};
  if (scoring.score_fn == ScoreFn::kSoftmax && (kMode != KeyMode::kLogits || !scoring.renormalize)) {
    score = softmax_of_tile<kLanes>(as_floats(logits).values);
  }
  LaneMaxima<kLanes> maxima;
  float margin = 0.0f;
  bool failed;  // whether the keys are not good enough, or one of them is NaN
  if constexpr (kMode != KeyMode::kLogits) {
    constexpr Accuracy kAccuracy = kMode == KeyMode::kScores ? Accuracy::kRough : Accuracy::kFine;
    margin = score_margin<kAccuracy>(scoring.score_fn);
    score_keys<kMode, kAccuracy, kLanes, kFullChunks>(score, logits, eligible, bias, keys);
  }
  if constexpr (kMode == KeyMode::kGroups) {
    maxima = keep_best_groups<Accuracy::kFine>(selection, keys, wanted, eligible, scratch, failed);
  } else if constexpr (kMode == KeyMode::kScores) {
    maxima = lane_maxima<kLanes>(keys);
    failed = !(largest_of(maxima) < INFINITY);
  } else {
    maxima = lane_maxima<kLanes>(logits);
    const float largest = largest_of(maxima);
    failed = largest != largest;
  }
  failed = __any_sync(kFullWarp, wanted && failed);

  int count = 0;
  const int needed = wanted ? k : 0;
  const auto list = [&] {
    // Whatever the logits of a token that is not wanted are, they must not slow its neighbour down.
    if (!wanted) set_lowest(maxima);
    const auto list_those_of = [&](const auto& row) {
      // Counting them was measured to pay where there is little else to compute, or few tokens.
      if constexpr ((kMode == KeyMode::kLogits && kLanes > 8) || (kMode == KeyMode::kScores && kLanes == 32)) {
        const CountedMaxima<kLanes> maximum(maxima, k, wanted, scratch);
        return list_candidates_by<kLanes, false>(row, eligible, maximum, k, needed, margin, scratch.candidates, count);
      } else {
        return list_candidates<kLanes, kLanes <= 16>(row, eligible, maxima, k, needed, margin, scratch.candidates,
                                                     count);
      }
    };
    if constexpr (kMode == KeyMode::kLogits) return list_those_of(logits);
    return list_those_of(keys);
  };
  if (failed || !list()) {
    if constexpr (kMode != KeyMode::kLogits) {
      eligible = wanted ? existing_elements<kLanes, kFullChunks, kElements>(selection.experts) : 0;
      with_score<Accuracy::kExact>(score, [&](auto score_of) {
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          keys[i] = -INFINITY;
          if ((eligible >> i & 1) != 0) {
            // The logits are read anew, so that they need no registers until here.
            const int expert = expert_of<kLanes>(lane, i);
            const float s = score_of(logit_at(expert));
            keys[i] = bias != nullptr ? __fadd_rn(s, __ldg(bias + expert)) : s;
          }
        }
      });
    }
    if constexpr (kMode == KeyMode::kGroups) {
      __syncwarp();  // the scratch has been read
      keep_best_groups<Accuracy::kExact>(selection, keys, wanted, eligible, scratch, failed);
    }
    if constexpr (kMode == KeyMode::kLogits) {
      select_by_rounds<kLanes>(as_floats(logits).values, eligible, k, scratch.candidates);
    } else {
      select_by_rounds<kLanes>(keys, eligible, k, scratch.candidates);
    }
    count = needed;
  }
  finish_token<kMode, kLanes, kPacked>(selection, score, count, wanted, bias, logit_at, output, scratch);
}

// The same where the biases have not been loaded.
template <KeyMode kMode, int kLanes, int kFullChunks = 0, class Logits, class LogitAt>
__device__ __forceinline__ void select_token(const Selection& selection, const Logits& logits, bool wanted,
                                             const float* bias, LogitAt logit_at, const TokenOutput& output,
                                             SelectScratch<kLanes>& scratch) {
  float keys[kElementsOf<Logits>];
  load_biases<kMode, kLanes, kFullChunks>(selection.experts, bias, rows_have_quads(bias, selection.experts, 4), keys);
  select_token<kMode, kLanes, kFullChunks>(selection, logits, keys, wanted, bias, logit_at, output, scratch);
}

}  // namespace jax_router::cuda
