// Which kernels compute an expert_dispatch: one cluster of blocks that holds a whole sort, or a kernel that counts and
// one that sorts.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../../common/macros.h"
#include "choices.h"
#include "names.h"
#include "quotient.h"

namespace jax_router::cuda {

// How one sort is laid over thread blocks.
struct SortLayout {
  uint32_t choices;   // of one sort
  Quotient token_of;  // of the number of a choice
  uint32_t experts;
  uint32_t slots;           // of one sort
  uint32_t align;           // groups begin at its multiples
  uint32_t capacity;        // choices of a group, at most
  uint32_t columns;         // of a count table: the experts, the ids outside, the places past the end; made even
  uint32_t chunks;          // of one sort, a multiple of the cluster size
  uint32_t chunk_choices;   // choices of one chunk
  uint32_t rounds;          // choices a thread holds
  uint32_t mask_bins;       // of a warp's table of lane masks
  uint32_t cluster_blocks;  // of the clusters that hold the sort or count its chunks
  bool sends;               // whether the blocks of a cluster that holds a sort send each other their counts
  uint32_t owned_bits;      // 2^this bins are those whose counts a block adds up for the cluster that counts

  JR_DEVICE_TOO constexpr uint32_t size_of_group(uint32_t kept) const {
    return align == 1 || kept == 0 ? kept : ((kept - 1) / align + 1) * align;
  }
  JR_DEVICE_TOO constexpr bool may_drop() const { return capacity < choices; }
  JR_DEVICE_TOO constexpr uint32_t bins() const { return experts + 1; }
  JR_DEVICE_TOO constexpr uint32_t clusters() const { return chunks / cluster_blocks; }
};

constexpr uint32_t kMaxSortBlocks = 16;    // of a cluster that holds a whole sort
constexpr uint32_t kEnoughSortBlocks = 8;  // where there are many experts, or few choices
constexpr uint32_t kCountBlocks = 8;       // of the clusters that count the chunks of a long sort
// Threads of a block, in the order of preference. The tables of the warps' counts lie in shared memory beside each
// other, so many experts leave room for few warps: for 128 threads alone where a block has no more than 99 KiB.
constexpr int kSortThreads[] = {512, 256, 128};
constexpr int kMostSortThreads = kSortThreads[0];
constexpr int64_t kSortStaticBytes = 1024;  // at most, of what the kernels declare as __shared__
// A warp finds the lanes with the same bin by a table of lane masks, over the bin's low bits if it has more than these.
constexpr uint32_t kMaskBins = 512;

struct ExpertDispatchNumbers {
  int few_experts;        // up to so many, the blocks of a cluster have 256 threads, but for the longest sorts
  int few_wave_experts;   // up to so many, those of one wave, on a device with clusters
  int many_experts;       // from so many on, a cluster has kEnoughSortBlocks at most
  int lone_block_unused;  // slots without a choice that one block clears as fast as more do
  int unused_of_few;      // where there are few_experts at most, so many of each, and kMostSortThreads at least
};
// Measured on an H100 alone, one sort at a time, of 8 to 4096 experts.
constexpr auto kExpertDispatchNumbers =
    everywhere(ExpertDispatchNumbers{/*few_experts=*/256, /*few_wave_experts=*/1536, /*many_experts=*/512,
                                     /*lone_block_unused=*/6144, /*unused_of_few=*/12});

enum class SortKernel {
  kCluster,  // a sort is one cluster's work, each block's chunk one tile
  kOneWave,  // counted first; one block a multiprocessor, which finds room there while the counting kernel still runs
  kLonger,   // counted first; tile after tile
};

// How a long sort is cut: into so many chunks a multiprocessor, and clusters of them, at most, and choices a thread
// holds at most.
struct SortCut {
  int chunks;
  int clusters;
  uint32_t rounds;

  // Clusters of a size that a device has room for at once.
  constexpr int64_t clusters_on(const Device& device, int64_t cluster_blocks) const {
    return std::clamp<int64_t>(chunks * device.multiprocessors / cluster_blocks, 1, clusters);
  }
};
constexpr uint32_t kClusterRounds = 4;
constexpr SortCut kOneWaveCut{1, 16, 6};
constexpr SortCut kLongerCut{2, 32, 4};

constexpr uint32_t most_sort_blocks(const Device& device) {
  return std::min<uint32_t>(device.cluster_blocks(), kMaxSortBlocks);
}
constexpr uint32_t sort_blocks(const ExpertDispatch& op, const Device& device) {
  const bool many = op.experts >= kExpertDispatchNumbers.of(device).many_experts;
  return many ? std::min(most_sort_blocks(device), kEnoughSortBlocks) : most_sort_blocks(device);
}
constexpr uint32_t count_blocks(const Device& device) { return device.has_clusters ? kCountBlocks : 1; }

struct ExpertDispatchPlan {
  SortKernel kernel;
  int threads;
  SortLayout layout;
  int64_t blocks;
  int64_t shared_bytes;
  int64_t workspace_bytes;
};

constexpr int64_t sort_shared_bytes(const SortLayout& layout, int threads) {
  const int64_t received = layout.sends ? int64_t{layout.cluster_blocks} * layout.columns : 0;
  return int64_t{threads / 32} * (4 * layout.mask_bins + 2 * layout.columns) + 12 * layout.columns + 2 * received +
         4 * threads * layout.rounds;
}
constexpr int64_t count_shared_bytes(const SortLayout& layout) {
  const int64_t received = layout.cluster_blocks == 1 ? 0 : int64_t{layout.cluster_blocks} << layout.owned_bits;
  return 4 * (layout.bins() + 1 + received);
}

// Of workspace: the choices of each bin in every chunk, and in every cluster of chunks.
constexpr int64_t count_bytes(const ExpertDispatch& op, int64_t chunks, int64_t cluster_blocks) {
  return 4 * op.batch * (chunks + chunks / cluster_blocks) * (int64_t{op.experts} + 1);
}

// The plan with so many chunks, in clusters of so many blocks.
inline std::optional<ExpertDispatchPlan> sort_plan(const ExpertDispatch& op, SortKernel kernel, int threads,
                                                   int64_t chunks, uint32_t cluster_blocks, uint32_t rounds,
                                                   const Device& device) {
  SortLayout layout{};
  layout.choices = static_cast<uint32_t>(op.tokens * op.k);
  layout.token_of = Quotient::by(op.k);
  layout.experts = op.experts;
  layout.slots = static_cast<uint32_t>(slots_of(op));
  layout.align = op.align;
  layout.capacity = op.capacity;
  layout.columns = static_cast<uint32_t>(round_up(op.experts + 2, 2));
  layout.mask_bins = static_cast<uint32_t>(std::min<int64_t>(kMaskBins, round_up(layout.columns, 4)));
  layout.chunks = static_cast<uint32_t>(chunks);
  layout.cluster_blocks = cluster_blocks;
  layout.chunk_choices = static_cast<uint32_t>(round_up(ceil_div(layout.choices, chunks), 32));
  const int64_t held = ceil_div(layout.chunk_choices, threads);
  if (kernel != SortKernel::kLonger && held > rounds) return std::nullopt;
  layout.rounds = static_cast<uint32_t>(std::min<int64_t>(held, rounds));
  while (int64_t{cluster_blocks} << layout.owned_bits < layout.bins()) ++layout.owned_bits;
  layout.sends = kernel == SortKernel::kCluster && cluster_blocks > 1;
  layout.sends = layout.sends && sort_shared_bytes(layout, threads) + kSortStaticBytes <= device.shared_bytes;
  ExpertDispatchPlan plan{kernel, threads, layout, op.batch * chunks, sort_shared_bytes(layout, threads), 0};
  if (kernel != SortKernel::kCluster) plan.workspace_bytes = count_bytes(op, chunks, cluster_blocks);
  const bool fits = plan.shared_bytes + kSortStaticBytes <= device.shared_bytes && plan.blocks <= kMostBlocks &&
                    plan.workspace_bytes <= op.workspace.bytes;
  return fits ? std::optional(plan) : std::nullopt;
}

inline std::optional<ExpertDispatchPlan> cluster_plan(const ExpertDispatch& op, int threads, int64_t chunks,
                                                      const Device& device) {
  return sort_plan(op, SortKernel::kCluster, threads, chunks, static_cast<uint32_t>(chunks), kClusterRounds, device);
}

inline std::optional<ExpertDispatchPlan> cut_plan(const ExpertDispatch& op, SortKernel kernel, int threads,
                                                  const Device& device) {
  const SortCut cut = kernel == SortKernel::kOneWave ? kOneWaveCut : kLongerCut;
  const int64_t cluster = count_blocks(device);
  const int64_t enough = std::max<int64_t>(cut.clusters_on(device, cluster) / op.batch, 1);
  const int64_t clusters = std::min(
      {enough, ceil_div(op.tokens * op.k, cluster * threads), op.workspace.bytes / count_bytes(op, cluster, cluster)});
  if (clusters == 0) return std::nullopt;
  return sort_plan(op, kernel, threads, clusters * cluster, static_cast<uint32_t>(cluster), cut.rounds, device);
}

// Into how many chunks a sort is cut that one cluster holds, of `most` blocks at most. Every block adds up the counts
// of all: one block does without, some are enough where there are more experts to add up and few choices, and else more
// blocks are faster, as they are where many slots without a choice are to be cleared.
constexpr int64_t cluster_chunks(const ExpertDispatch& op, int threads, int64_t most, const Device& device) {
  const int64_t choices = op.tokens * op.k;
  const int64_t held = threads * int64_t{kClusterRounds};
  const ExpertDispatchNumbers& numbers = kExpertDispatchNumbers.of(device);
  const bool fills = op.batch * most > device.multiprocessors;
  const bool few = op.experts <= numbers.few_experts;
  const int unused = few ? std::max(kMostSortThreads, numbers.unused_of_few * op.experts) : numbers.lone_block_unused;
  const bool clears = !fills && slots_of(op) - choices > unused;
  if (choices <= held && !clears) return 1;
  if (fills) {
    int64_t chunks = 2;
    while (chunks < most && choices > chunks * threads) chunks *= 2;
    return chunks;
  }
  const bool enough = op.experts > numbers.few_experts && choices <= kEnoughSortBlocks * held / 2 && !clears;
  return enough ? std::min<int64_t>(most, kEnoughSortBlocks) : most;
}

inline std::optional<ExpertDispatchPlan> plan_with(const ExpertDispatch& op, int threads, const Device& device) {
  const int64_t choices = op.tokens * op.k;
  const int64_t most = sort_blocks(op, device);
  if (choices <= most * threads * int64_t{kClusterRounds}) {
    return cluster_plan(op, threads, cluster_chunks(op, threads, most, device), device);
  }
  // Without clusters the chunks of one wave are few, and no later kernel finds room beside an earlier one.
  if (device.has_clusters || choices <= int64_t{kOneWaveCut.clusters} * threads) {
    if (const auto one_wave = cut_plan(op, SortKernel::kOneWave, threads, device)) return one_wave;
  }
  return cut_plan(op, SortKernel::kLonger, threads, device);
}

// Whether blocks of 256 threads are better than those of the most: where a cluster of theirs holds the sort, or one
// wave where no cluster can.
constexpr bool prefers_few_threads(const ExpertDispatch& op, const Device& device) {
  const ExpertDispatchNumbers& numbers = kExpertDispatchNumbers.of(device);
  const int threads = kSortThreads[1];
  const int64_t choices = op.tokens * op.k;
  const int64_t of_cluster = int64_t{most_sort_blocks(device)} * kClusterRounds;
  if (choices <= of_cluster * kMostSortThreads) {
    return op.experts <= numbers.few_experts && choices <= of_cluster * threads;
  }
  const int64_t cluster = count_blocks(device);
  const int64_t clusters = std::max<int64_t>(kOneWaveCut.clusters_on(device, cluster) / op.batch, 1);
  const int64_t of_wave = clusters * cluster * kOneWaveCut.rounds;
  const int few =
      device.has_clusters ? numbers.few_wave_experts : threads - 1;  // a bin a thread, with that of no expert
  return op.experts <= few && choices <= of_wave * threads;
}

inline std::optional<ExpertDispatchPlan> plan(const ExpertDispatch& op, const Device& device) {
  if (!has_numbered_choices(op)) return std::nullopt;
  const bool few_threads = prefers_few_threads(op, device);
  for (int threads : kSortThreads) {
    if (threads == kMostSortThreads && few_threads) continue;
    if (const auto found = plan_with(op, threads, device)) return found;
  }
  return std::nullopt;
}

inline std::vector<ExpertDispatchPlan> plans(const ExpertDispatch& op, const Device& device) {
  std::vector<ExpertDispatchPlan> found;
  if (!has_numbered_choices(op)) return found;
  const int most = static_cast<int>(most_sort_blocks(device));
  for (int threads : kSortThreads) {
    for (int chunks = 1; chunks <= most; chunks *= 2) {
      if (const auto plan = cluster_plan(op, threads, chunks, device)) found.push_back(*plan);
    }
    if (op.tokens * op.k == 0) continue;
    for (SortKernel kernel : {SortKernel::kOneWave, SortKernel::kLonger}) {
      if (const auto plan = cut_plan(op, kernel, threads, device)) found.push_back(*plan);
    }
  }
  return found;
}

inline std::string instance_name(SortKernel kernel, int threads) {
  const std::string by = std::to_string(threads) + " threads";
  return (kernel == SortKernel::kCluster   ? "cluster of "
          : kernel == SortKernel::kOneWave ? "one wave of "
                                           : "longer of ") +
         by;
}

inline std::string name(const ExpertDispatch&, const ExpertDispatchPlan& plan) {
  const std::string instance = instance_name(plan.kernel, plan.threads);
  return plan.kernel == SortKernel::kCluster ? instance + ", " + std::to_string(plan.layout.chunks) + " chunks"
                                             : instance;
}

constexpr Needs needs(const ExpertDispatchPlan& plan) {
  return {plan.shared_bytes + kSortStaticBytes, static_cast<int>(plan.layout.cluster_blocks), false};
}

inline std::vector<std::string> instances(const ExpertDispatch&, const Device&) {
  std::vector<std::string> all;
  for (SortKernel kernel : {SortKernel::kCluster, SortKernel::kOneWave, SortKernel::kLonger}) {
    for (int threads : kSortThreads) all.push_back(instance_name(kernel, threads));
  }
  return all;
}

}  // namespace jax_router::cuda
