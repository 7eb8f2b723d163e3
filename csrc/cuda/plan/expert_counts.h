// Which kernels compute an expert_counts: one cluster of blocks that counts all ids, or several clusters, and a kernel
// that adds up their counts.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../../common/ops.h"
#include "choices.h"
#include "names.h"
#include "quotient.h"

namespace jax_router::cuda {

constexpr int kCountThreads = 1024;
constexpr uint32_t kCountIdsAtOnce = 4;          // that a thread loads as one word
constexpr uint32_t kCountWords = 6;              // that a thread has under way
constexpr uint32_t kMostCountBlocks = 16;        // of a cluster that counts alone
constexpr uint32_t kSharedCountBlocks = 8;       // of each of several clusters
constexpr int kMostCountingBlocks = 128;         // of all clusters, which are to run at once
constexpr int64_t kCountTableBytes = 64 * 1024;  // of a block's copies of the counts
constexpr uint32_t kCopiesOfPiece = 4;           // copies that are cleared and added up as one word
static_assert(kCountTableBytes >= int64_t{4} * kCopiesOfPiece * kMaxExperts);

struct ExpertCountsNumbers {
  int64_t lone_block_choices;  // up to so many for each block that a lone cluster may have, one is enough
};
// 1,500,000 for the 16 blocks of an H100. Measured at 800,000 choices, which one cluster counts in 7.6 us and several
// in 10.6, and at 2,100,000, which take 12.7 and 11.2.
constexpr auto kExpertCountsNumbers = everywhere(ExpertCountsNumbers{/*lone_block_choices=*/93750});

// How the ids of one problem are laid over thread blocks.
struct CountLayout {
  uint32_t choices;   // of one problem
  Quotient token_of;  // of the number of a choice
  uint32_t experts;
  uint32_t copies;    // of a block's counts, a power of two: neighbouring lanes count in different ones
  uint32_t clusters;  // that share a problem
  uint32_t cluster_blocks;
  uint32_t owned_bits;     // 2^this experts are those whose counts a block adds up for its cluster
  uint32_t chunk_choices;  // that a block counts
};

struct ExpertCountsPlan {
  CountLayout layout;
  int64_t blocks;
  int64_t shared_bytes;
  int64_t workspace_bytes;
};

inline std::optional<ExpertCountsPlan> counts_plan(const ExpertCounts& op, int64_t clusters, uint32_t cluster_blocks) {
  CountLayout layout{};
  layout.choices = static_cast<uint32_t>(op.tokens * op.k);
  layout.token_of = Quotient::by(op.k);
  layout.experts = op.experts;
  layout.copies = 32;
  while (layout.copies > kCopiesOfPiece && int64_t{4} * layout.copies * op.experts > kCountTableBytes)
    layout.copies /= 2;
  layout.clusters = static_cast<uint32_t>(clusters);
  layout.cluster_blocks = cluster_blocks;
  while (int64_t{cluster_blocks} << layout.owned_bits < op.experts) ++layout.owned_bits;
  layout.chunk_choices =
      static_cast<uint32_t>(round_up(ceil_div(layout.choices, clusters * cluster_blocks), kCountIdsAtOnce));
  const int64_t words = int64_t{layout.copies} * (layout.experts + 1) + (int64_t{cluster_blocks} << layout.owned_bits);
  const ExpertCountsPlan plan{layout, op.batch * clusters * cluster_blocks, 4 * words,
                              clusters > 1 ? 4 * op.batch * clusters * op.experts : 0};
  const bool fits = plan.blocks <= kMostBlocks && plan.workspace_bytes <= op.workspace.bytes;
  return fits ? std::optional(plan) : std::nullopt;
}

constexpr uint32_t most_count_blocks(const Device& device) {
  return std::min<uint32_t>(device.cluster_blocks(), kMostCountBlocks);
}

// One cluster a problem, with no more blocks than have a word of ids for each thread.
inline std::optional<ExpertCountsPlan> lone_cluster_plan(const ExpertCounts& op, const Device& device) {
  const uint32_t most = most_count_blocks(device);
  const int64_t wanted = ceil_div(op.tokens * op.k, int64_t{kCountThreads} * kCountIdsAtOnce);
  uint32_t blocks = 1;
  while (blocks < most && blocks < wanted) blocks *= 2;
  return counts_plan(op, 1, blocks);
}

inline std::optional<ExpertCountsPlan> several_clusters_plan(const ExpertCounts& op, const Device& device) {
  const uint32_t blocks = device.has_clusters ? kSharedCountBlocks : 1;
  const int64_t held = int64_t{kCountThreads} * kCountIdsAtOnce * blocks;
  const int most = std::min(kMostCountingBlocks, device.multiprocessors);
  const int64_t clusters = std::min<int64_t>(most / blocks, ceil_div(op.tokens * op.k, held));
  return clusters > 1 ? counts_plan(op, clusters, blocks) : std::nullopt;
}

inline std::optional<ExpertCountsPlan> plan(const ExpertCounts& op, const Device& device) {
  if (!has_numbered_choices(op)) return std::nullopt;
  if (op.tokens * op.k > kExpertCountsNumbers.of(device).lone_block_choices * most_count_blocks(device)) {
    if (const auto several = several_clusters_plan(op, device)) return several;
  }
  return lone_cluster_plan(op, device);
}

inline std::vector<ExpertCountsPlan> plans(const ExpertCounts& op, const Device& device) {
  std::vector<ExpertCountsPlan> found;
  if (!has_numbered_choices(op)) return found;
  for (const auto& plan : {lone_cluster_plan(op, device), several_clusters_plan(op, device)}) {
    if (plan) found.push_back(*plan);
  }
  return found;
}

inline std::string name(const ExpertCounts&, const ExpertCountsPlan& plan) {
  return plan.layout.clusters == 1 ? "one cluster" : "several clusters";
}

constexpr Needs needs(const ExpertCountsPlan& plan) {
  return {plan.shared_bytes, static_cast<int>(plan.layout.cluster_blocks), false};
}

inline std::vector<std::string> instances(const ExpertCounts&, const Device&) {
  return {"one cluster", "several clusters"};
}

}  // namespace jax_router::cuda
