// The cases of every op: shapes that reach every kernel, on ordinary and on hostile operands.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "calls.h"

namespace jax_router::launches {

using Visit = std::function<void(const Call&)>;

// Experts, and groups of them that the kernels for groups take; 0: none that they do.
struct Experts {
  int32_t experts, num_groups;
};

inline void hash_router_cases(const Visit& visit) {
  Maker make;
  for (int64_t rows : {1, 1000})
    for (int32_t k : {1, 2, 3, 4, 6, 8, 300}) visit(hash_router(make, rows, k));
}

inline void activation_topk_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes) {
    for (Keys keys : kKeys) {
      // Up to 16 choices of up to 1024 experts: rows in registers, or in shared memory.
      for (auto [experts, num_groups] : {Experts{5, 0},
                                         {36, 9},
                                         {37, 0},
                                         {128, 4},
                                         {160, 0},
                                         {192, 6},
                                         {256, 8},
                                         {257, 0},
                                         {384, 12},
                                         {511, 0},
                                         {512, 8},
                                         {1024, 32}}) {
        if (keys == Keys::kGroups && num_groups == 0) continue;
        for (Content content : kContents) {
          const int32_t k = std::min(experts, make.pick({1, 6, 8, 16}));
          visit(activation_topk(make, dtype, make.pick({1, 17, 130}), experts, k, keys, num_groups, content));
        }
      }
      // More: rows in shared memory alone.
      for (Content content : kContents) {
        visit(activation_topk(make, dtype, 17, 36, 20, keys, 3, content));
        visit(activation_topk(make, dtype, 17, 1500, 6, keys, 15, content));
        visit(activation_topk(make, dtype, 3, 4095, 64, keys, 15, content));
      }
    }
  }
}

inline void weighing_cases(const Visit& visit, int64_t vocab_size) {
  Maker make;
  for (DType dtype : kDTypes)
    for (int32_t experts : {36, 257})
      for (int32_t k : {1, 6, 8, 64})
        for (bool whole_row : {false, true}) {
          const Scoring scoring = whole_row ? Scoring{ScoreFn::kSoftmax, false, 2.5f} : make.scoring();
          visit(route_at(make, dtype, make.pick({1, 33}), experts, k, vocab_size, scoring, make.pick(kContents)));
        }
}

inline void route_at_cases(const Visit& visit) { weighing_cases(visit, 0); }

inline void scored_hash_router_cases(const Visit& visit) { weighing_cases(visit, 50); }

inline void route_cotangent_cases(const Visit& visit) {
  Maker make;
  for (DType dtype : kDTypes) {
    for (ScoreFn score_fn : {ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax, ScoreFn::kIdentity})
      for (int32_t experts : {36, 257, 1024, 4095})
        for (int32_t k : {1, 6, 8, 33, 64})
          visit(route_cotangent(make, dtype, make.pick({1, 2, 33}), experts, k,
                                {score_fn, make.pick({false, true}), 2.5f}, make.pick(kContents)));
    // The gradient of topk_select.
    for (auto [length, k] : {std::array{500, 300}, {4097, 6}, {9001, 700}})
      visit(route_cotangent(make, dtype, 3, length, k, {ScoreFn::kIdentity, false, 1.0f}, make.pick(kContents)));
  }
}

inline void routed_cotangent_cases(const Visit& visit) {
  Maker make;
  for (ScoreFn score_fn : {ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax})
    for (int32_t experts : {36, 257, 1024, 4095})
      for (int32_t k : {1, 6, 8, 33, 64}) {
        const bool renormalize = score_fn == ScoreFn::kSoftmax || make.pick({false, true});
        visit(routed_cotangent(make, make.pick({1, 2, 33}), experts, k, {score_fn, renormalize, 2.5f},
                               make.pick(kContents)));
      }
}

inline void routed_gradients_cases(const Visit& visit) {
  Maker make;
  struct Sizes {
    int64_t rows;
    int32_t experts, k, hidden;
  };
  for (const Sizes& sizes :
       {Sizes{1, 1, 1, 8}, Sizes{63, 8, 8, 136}, Sizes{65, 70, 3, 1032}, Sizes{1000, 128, 8, 2048},
        Sizes{2500, 100, 5, 2880}, Sizes{300, 128, 7, 264}, Sizes{9000, 128, 1, 512}, Sizes{1300, 40, 3, 8712}}) {
    for (ScoreFn score_fn : {ScoreFn::kSqrtSoftplus, ScoreFn::kSigmoid, ScoreFn::kSoftmax}) {
      const bool renormalize = score_fn == ScoreFn::kSoftmax || make.pick({false, true});
      visit(routed_gradients(make, sizes.rows, sizes.experts, sizes.k, sizes.hidden, {score_fn, renormalize, 2.5f},
                             make.pick(kContents)));
    }
  }
}

inline void topk_select_cases(const Visit& visit) {
  using Sizes = std::array<int64_t, 3>;  // rows, length, k
  // In a warp or half of one, in the registers of a block, and streamed through one block or a cluster of up to 16.
  constexpr Sizes kSizes[] = {{2, 1, 1},         {3, 5, 5},        {3, 256, 6},      {33, 37, 6},      {130, 128, 1},
                              {3, 510, 16},      {3, 1024, 9},     {5, 40, 40},      {5, 256, 128},    {30, 511, 33},
                              {30, 1024, 100},   {3, 1999, 6},     {100, 600, 8},    {3, 4000, 64},    {3, 8192, 17},
                              {3, 1500, 300},    {3, 2001, 200},   {3, 4001, 700},   {133, 4000, 500}, {3, 8000, 900},
                              {133, 8000, 1400}, {133, 8999, 300}, {3, 2000, 2000},  {3, 9001, 700},   {3, 25001, 2048},
                              {1, 40001, 512},   {1, 65537, 512},  {2, 131073, 8192}};
  Maker make;
  for (DType dtype : kDTypes)
    for (auto [rows, length, k] : kSizes)
      for (Content content : kContents)
        visit(topk_select(make, dtype, rows, length, k, make.pick({false, true}), make.pick({false, true}), content));
  // Several keys, of many elements each, in the bin of the k-th largest.
  for (DType dtype : kDTypes)
    for (auto [length, k] : {std::array{1001, 300}, {4001, 700}, {8000, 2500}})
      visit(
          topk_select(make, dtype, 3, length, k, make.pick({false, true}), make.pick({false, true}), Content::kNarrow));
  // Zeros of which a block's sample promises more than there are.
  for (DType dtype : kDTypes)
    visit(topk_select(make, dtype, 3, 40960, 512, make.pick({false, true}), false, Content::kZeros));
  // A few choices of long rows of a few values: ties of the bound that is sampled are left out.
  for (DType dtype : kDTypes) visit(topk_select(make, dtype, 2, 30001, 4, true, false, Content::kSteps));
  // So many choices that a block takes no sample and has no room for its whole row, whose largest elements are those
  // behind the last whole vector.
  for (DType dtype : kDTypes)
    for (auto [length, k] : {std::array{12285, 4096}, {24573, 8192}})
      visit(topk_select(make, dtype, 140, length, k, make.pick({false, true}), false, Content::kRising));
  // Neighbours among a type's numbers, numbers far from all others, and such as are below all normal ones.
  for (DType dtype : kDTypes)
    for (Content content : {Content::kBinade, Content::kOutliers, Content::kDenormals}) {
      for (auto [length, k] : {std::array{1001, 300}, {4001, 700}, {8000, 2500}})
        visit(topk_select(make, dtype, 2, length, k, true, false, content));
      visit(topk_select(make, dtype, 2, 20001, 512, make.pick({false, true}), false, content));
      visit(topk_select(make, dtype, 1, 40001, 2000, true, false, content));
    }
  // Candidates of which a warp of the block has too few for its share of a bound.
  for (DType dtype : kDTypes) visit(topk_select(make, dtype, 1, 4000, 64, true, false, Content::kSpikes));
}

inline void dense_router_cases(const Visit& visit) {
  Maker make;
  for (const auto& [x, weight] : cuda::kOperandDTypes) {
    for (Keys keys : kKeys) {
      for (int64_t rows : {1, make.pick({2, 16}), make.pick({17, 64, 65, 128})}) {
        for (auto [experts, num_groups] :
             {Experts{36, 9}, {256, 8}, {256, 2}, {257, 0}, {384, 12}, {512, 4}, {1023, 0}, {1024, 32}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          // One step for one warp, several warps, and several steps a warp.
          const int32_t hidden = make.pick({8, 1032, experts > 512 ? 264 : x == DType::kF32 ? 5128 : 10248});
          const DenseRouter sizes = dense_sizes(x, weight, rows, hidden, experts, make.pick({1, 6, 8, 16}),
                                                keys == Keys::kGroups ? num_groups : 1);
          visit(dense_router(make, sizes, keys, make.pick(kContents)));
        }
      }
      // Many tokens: one to four parts of the hidden axis, half warps and warps that select, several waves.
      for (int64_t rows : {make.pick({129, 250}), make.pick({500, 3000})}) {
        for (auto [experts, num_groups] : {Experts{121, 0}, {250, 0}, {256, 8}}) {
          if (keys == Keys::kGroups && num_groups == 0) continue;
          const DenseRouter sizes = dense_sizes(x, weight, rows, make.pick({8, 136, 1032}), experts,
                                                make.pick({1, 6, 8, 16}), keys == Keys::kGroups ? num_groups : 1);
          visit(dense_router(make, sizes, keys, make.pick(kContents)));
        }
      }
    }
  }
}

inline void expert_dispatch_cases(const Visit& visit) {
  Maker make;
  for (int32_t experts : {36, 256, 1000, 4096})
    for (int32_t k : {1, 6})
      for (int64_t choices : {1, 200, 1200, 8200, 40000})  // one block, clusters, a kernel that counts
        for (int64_t batch : {1, 3}) visit(expert_dispatch(make, batch, (choices + k - 1) / k, k, experts));
  // As many choices a thread as there can be: in a cluster, in blocks with one tile, and in blocks with several.
  visit(expert_dispatch(make, 1, 5000, 6, 256));
  visit(expert_dispatch(make, 1, 60000, 6, 256));
  for (int32_t experts : {256, 4096}) visit(expert_dispatch(make, 40, 6000, 6, experts));
  // Groups that end in slots without a choice, and groups that drop choices, in every kernel.
  for (int32_t experts : {36, 4096})
    for (int64_t tokens : {1, 200, 1400, 9000, 70000})
      for (int32_t align : {1, 100, 128})
        for (int32_t capacity : {0, 1, 100, INT32_MAX})
          visit(expert_dispatch(make, 1, tokens, 6, experts, align, capacity));
}

inline void expert_counts_cases(const Visit& visit) {
  Maker make;
  for (int32_t experts : {1, 36, 256, 4096})
    for (int32_t k : {1, 6})
      for (int64_t choices : {1, 203, 8200, 40000, 500000})  // one block, clusters, several of them
        for (int64_t batch : {1, 3}) visit(expert_counts(make, batch, (choices + k - 1) / k, k, experts));
}

// Rows of pieces and of single elements, shorter and longer than a warp's and a block's; one token, many, and several
// problems; few choices, and more than a warp's lanes; no slots but those in use, and many, or several choices of a
// token in one.
inline void moved_cases(const std::function<void(DType, const MovedSizes&, Content)>& visit) {
  constexpr MovedSizes kSizes[] = {{1, 1, 8, 2048, 0},  {1, 1, 1, 8, 0},      {1, 64, 6, 1032, 300}, {2, 33, 3, 72, 9},
                                   {1, 17, 8, 7168, 5}, {3, 5, 33, 257, 1},   {1, 9, 64, 40, 1000},  {1, 700, 2, 1, 40},
                                   {1, 3, 12, 4099, 3}, {1, 2500, 8, 520, 0}, {1, 0, 4, 64, 11},     {2, 60, 0, 96, 30},
                                   {2, 5, 6, 264, -27}, {1, 3, 40, 33, -110}};
  Maker make;
  for (DType dtype : kDTypes) {
    for (MovedSizes sizes : kSizes) {
      visit(dtype, sizes, make.pick(kContents));
      sizes.hostile = true;
      if (sizes.tokens > 0) visit(dtype, sizes, make.pick(kContents));
    }
  }
}

inline void permute_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(permute(make, dtype, size_of(dtype), false, sizes, content));
    visit(permute(make, dtype, size_of(dtype), true, sizes, content));
    if (dtype == DType::kF16) visit(permute(make, dtype, 1, false, sizes, content));
  });
}

inline void combine_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(combine(make, dtype, make.pick({false, true}), sizes, content));
  });
  // Few rows, each for many tokens: batches of them, and blocks that own the end of a segment and the begin of the
  // next.
  for (DType dtype : kDTypes) {
    for (const MovedSizes& sizes :
         {MovedSizes{1, 700, 6, 2056, -4000}, MovedSizes{1, 260, 16, 1040, -4000}, MovedSizes{1, 129, 1, 8, -100},
          MovedSizes{1, 3000, 7, 4096, -20800}, MovedSizes{1, 300, 0, 64, 10}})
      visit(combine(make, dtype, true, sizes, make.pick(kContents)));
  }
}

inline void permute_cotangent_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    if (sizes.tokens > 0) visit(permute_cotangent(make, dtype, sizes, content));
  });
}

inline void combine_cotangent_cases(const Visit& visit) {
  Maker make;
  moved_cases([&](DType dtype, const MovedSizes& sizes, Content content) {
    visit(combine_cotangent(make, dtype, sizes, content));
  });
}

// The cases of an op, and its kernels, each of which must be in the plans of one of them.
struct OpCases {
  void (*visit)(const Visit&);
  std::vector<std::string> (*instances)(const cuda::Device&);
};

template <class Op>
std::vector<std::string> instances_of(const cuda::Device& device) {
  return cuda::instances(Op{}, device);
}

inline const std::map<std::string, OpCases> kOps = {
    {"activation_topk", {activation_topk_cases, instances_of<ActivationTopk>}},
    {"combine", {combine_cases, instances_of<Combine>}},
    {"combine_cotangent", {combine_cotangent_cases, instances_of<CombineCotangent>}},
    {"dense_router", {dense_router_cases, instances_of<DenseRouter>}},
    {"expert_counts", {expert_counts_cases, instances_of<ExpertCounts>}},
    {"expert_dispatch", {expert_dispatch_cases, instances_of<ExpertDispatch>}},
    {"hash_router", {hash_router_cases, instances_of<HashRouter>}},
    {"permute", {permute_cases, instances_of<Permute>}},
    {"permute_cotangent", {permute_cotangent_cases, instances_of<PermuteCotangent>}},
    {"route_at", {route_at_cases, instances_of<RouteAt>}},
    {"route_cotangent", {route_cotangent_cases, instances_of<RouteCotangent>}},
    {"routed_cotangent", {routed_cotangent_cases, instances_of<RoutedCotangent>}},
    {"routed_gradients", {routed_gradients_cases, instances_of<RoutedGradients>}},
    {"scored_hash_router", {scored_hash_router_cases, instances_of<RouteAt>}},
    {"topk_select", {topk_select_cases, instances_of<TopkSelect>}}};

}  // namespace jax_router::launches
