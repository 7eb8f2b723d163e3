// Which kernel computes a topk_select. Short rows have a warp each, or half of one, and so have longer ones where they
// are many and the choices few; others a thread block that holds them in registers; the longest are streamed through
// one block, or through a cluster of them.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "names.h"

namespace jax_router::cuda {

// What the kernels take at most.
constexpr int kMaxShortLength = 1024;  // of a row in a warp or half of one
constexpr int kMaxTileK = 16;          // where a tile ranks the few elements above a bound
constexpr int kMaxWarpK = 128;         // where a warp bisects the range of the keys
constexpr int kMaxBlockLength = 8192;  // of a row in the registers of a block
constexpr int kMaxFewK = 64;           // where a block ranks the few elements above a bound, or a warp sorts them

// k is limited by shared memory, where the candidates of a row lie. A block of an A100 or a later large GPU has at
// least kSharedBytesOfMaxSelectK of it, which is enough for kMaxSelectK; every GPU since the A100's generation has at
// least kLeastSharedBytes, enough for kMaxSelectKOfAny. kStaticSharedBytes of both are left for what kernels declare as
// __shared__. Python learns of the limit by max_select_k().
constexpr int kMaxSelectK = 8192;
constexpr int kMaxSelectKOfAny = 4096;
constexpr int64_t kSharedBytesOfMaxSelectK = 163 * 1024;
constexpr int64_t kLeastSharedBytes = 99 * 1024;
constexpr int64_t kStaticSharedBytes = 1024;

constexpr int max_select_k(const Device& device) {
  return device.shared_bytes >= kSharedBytesOfMaxSelectK ? kMaxSelectK : kMaxSelectKOfAny;
}

struct TopkSelectNumbers {
  HalfWarpRows half_warps;
  int64_t warp_rows;          // from so many of an H100 on, a warp a row of up to kMaxShortLength / 2 elements
  int64_t many_warp_rows;     // for more choices than few, and for rows of up to kMaxShortLength
  int64_t ordered_warp_rows;  // of the shorter rows, for more sorted choices than few
  int64_t warp_length;        // of fewer rows, a warp for rows so short that a block has nothing to share out
  int64_t sorting_length;     // a warp sorts the candidates for few choices of rows longer than so,
  int64_t sorting_rows;       // from so many of an H100 on,
  int64_t sorting_longest;    // or so many where they are for the kernel that holds the longest,
  int64_t sorting_rows_of_16_bits;
  int64_t sorting_longest_of_16_bits;
  int64_t short_few_k;      // of rows up to kMaxShortLength, up to so many choices count as few
  int64_t ordered_k;        // from so many sorted choices on there is much to put in order: more threads a row
  int64_t crowded_k;        // from so many on, sorted rows have the most threads where they are few
  int64_t long_block_k;     // from so many on, the longest rows stay in registers where streamed ones have 128 threads
  int64_t long_ordered_k;   // and from so many sorted choices on where these have more
  int64_t narrow_length;    // up to so long, a streamed row has 256 threads instead of 512 also where rows are not many
  int64_t narrow_few_k;     // and so many choices, where rows are few
  int64_t narrowest_rows;   // and 128 from so many rows of an H100 on,
  int64_t narrowest_k;      // up to so many choices
  int64_t narrowest_bytes;  // and so many bytes of a row
  int64_t small_cluster;    // of up to so many blocks, each must have
  int64_t small_part;       // so much of a row
  int64_t part_length;      // and of more blocks, so much
  int64_t candidates;       // that a block of a cluster keeps at most, beside k
  int64_t lone_candidates;  // that a block which is alone has room for at least, beside k
  int64_t most_candidates;  // and at most, where shared memory is free
};
// Measured on an H100, and what concerns streamed rows on an H200, which has its multiprocessors. Rows count as few
// where each has a multiprocessor of its own, and as many where each has less than half of one.
constexpr auto kTopkSelectNumbers = everywhere(TopkSelectNumbers{/*half_warps=*/{{1, 1, 2048, 2048}},
                                                                 /*warp_rows=*/768,
                                                                 /*many_warp_rows=*/2640,
                                                                 /*ordered_warp_rows=*/2048,
                                                                 /*warp_length=*/64,
                                                                 /*sorting_length=*/256,
                                                                 /*sorting_rows=*/661,
                                                                 /*sorting_longest=*/3168,
                                                                 /*sorting_rows_of_16_bits=*/396,
                                                                 /*sorting_longest_of_16_bits=*/792,
                                                                 /*short_few_k=*/32,
                                                                 /*ordered_k=*/2048,
                                                                 /*crowded_k=*/800,
                                                                 /*long_block_k=*/250,
                                                                 /*long_ordered_k=*/300,
                                                                 /*narrow_length=*/32768,
                                                                 /*narrow_few_k=*/560,
                                                                 /*narrowest_rows=*/528,
                                                                 /*narrowest_k=*/512,
                                                                 /*narrowest_bytes=*/72000,
                                                                 /*small_cluster=*/4,
                                                                 /*small_part=*/2048,
                                                                 /*part_length=*/4352,
                                                                 /*candidates=*/4096,
                                                                 /*lone_candidates=*/3072,
                                                                 /*most_candidates=*/12288});

enum class TopkKernel {
  kTile,      // few choices of a short row: a bound and a ranking
  kWarp,      // more choices of a short row: a bisection
  kSorting,   // few choices of a row in the registers of a warp, which sorts its candidates
  kFew,       // few choices of a row in the registers of a block
  kMany,      // more choices of such a row
  kStreamed,  // rows of any length
};

// A kernel as it is compiled: a row's lanes and their quads of a tile or warp, or a row's threads and the vectors of 16
// bytes that each holds.
struct TopkInstance {
  TopkKernel kernel;
  int threads;
  int size;
  int full_chunks;

  constexpr RowTile tile() const { return {threads, size, full_chunks}; }
};
constexpr TopkInstance kTopkInstances[] = {
    {TopkKernel::kTile, 16, 2, 0},     {TopkKernel::kTile, 16, 4, 2},      {TopkKernel::kTile, 16, 8, 4},
    {TopkKernel::kTile, 32, 2, 0},     {TopkKernel::kTile, 32, 4, 2},      {TopkKernel::kTile, 32, 8, 4},
    {TopkKernel::kWarp, 32, 2, 0},     {TopkKernel::kWarp, 32, 4, 2},      {TopkKernel::kWarp, 32, 8, 4},
    {TopkKernel::kSorting, 32, 4, 0},  {TopkKernel::kSorting, 32, 8, 0},   {TopkKernel::kSorting, 32, 16, 0},
    {TopkKernel::kSorting, 32, 32, 0}, {TopkKernel::kFew, 256, 1, 0},      {TopkKernel::kFew, 256, 2, 0},
    {TopkKernel::kFew, 256, 4, 0},     {TopkKernel::kFew, 256, 8, 0},      {TopkKernel::kMany, 256, 1, 0},
    {TopkKernel::kMany, 256, 2, 0},    {TopkKernel::kMany, 256, 4, 0},     {TopkKernel::kMany, 512, 1, 0},
    {TopkKernel::kMany, 512, 2, 0},    {TopkKernel::kMany, 512, 4, 0},     {TopkKernel::kMany, 1024, 1, 0},
    {TopkKernel::kMany, 1024, 2, 0},   {TopkKernel::kStreamed, 128, 0, 0}, {TopkKernel::kStreamed, 256, 0, 0},
    {TopkKernel::kStreamed, 512, 0, 0}};

constexpr int kMostSortingVectors = 32;

// Whether an instance was compiled for a type. Rows of 16-bit elements, of which a vector has 8, need fewer vectors.
constexpr bool has_instance(const TopkInstance& instance, DType dtype) {
  if (instance.kernel != TopkKernel::kFew && instance.kernel != TopkKernel::kMany) return true;
  const int most_vectors = dtype == DType::kF32 ? 8 : instance.kernel == TopkKernel::kFew ? 4 : 2;
  return instance.size <= most_vectors && instance.threads * instance.size * (16 / size_of(dtype)) <= kMaxBlockLength;
}

struct TopkSelectPlan {
  int instance;  // of kTopkInstances
  int threads;
  int64_t blocks;
  int cluster;        // blocks of a streamed row
  uint32_t capacity;  // candidates that a block of a streamed row can hold, and a sample
  int64_t shared_bytes;

  constexpr TopkKernel kernel() const { return kTopkInstances[instance].kernel; }
};

// The bytes of a PairSelect (parts/pair_select.cuh), and of what it needs to put so many pairs in order.
constexpr int64_t pair_select_bytes(int threads, int bins_of_thread) {
  return 4 * threads * bins_of_thread + 4 * (threads / 32) + 48;
}
constexpr int64_t ordering_bytes(int64_t size) { return 8 * size + 4 * (size / 2 + 2); }

constexpr int kStreamedBins = 2;
constexpr int kLineBytes = 128;  // so that the stream begins with a line of shared memory
// Where the bins are those of a whole row, a thread has as many of them as elements, or as many as pay.
constexpr int block_row_bins(int vectors, DType dtype) { return std::min(vectors * (16 / size_of(dtype)), 8); }
// Of the stream through shared memory: vectors of a thread's step, and steps under way.
constexpr int kStreamBatch = 4;
constexpr int kStreamStages = 2;
// Of a multiprocessor that streams rows, by the registers of a thread.
constexpr int kStreamedThreads = 1280;
constexpr int kFewestStreamedThreads = 128;
// Vectors of a thread, at most, that a sample is taken from.
constexpr int kSampledVectors = 4;

constexpr int64_t block_row_bytes(const TopkInstance& instance, const TopkSelect& op) {
  const int64_t chosen = 8 * op.k + (op.sorted ? ordering_bytes(op.k) : 0);
  return pair_select_bytes(instance.threads, block_row_bins(instance.size, op.dtype)) +
         std::max<int64_t>(8 * (instance.threads + 2), chosen);
}

constexpr int64_t streamed_bytes(int threads, uint32_t capacity, int64_t k) {
  const int64_t ring = int64_t{16} * kStreamBatch * kStreamStages * threads;
  return pair_select_bytes(threads, kStreamedBins) + 8 * static_cast<int64_t>(capacity) + kLineBytes +
         std::max(ring, ordering_bytes(k));
}

// The candidates that a block of a streamed row has room for: enough of them, or where shared memory is scarce, a
// sample.
constexpr uint32_t streamed_capacity(int64_t k, int threads, bool in_cluster, const Device& device) {
  const TopkSelectNumbers& numbers = kTopkSelectNumbers.of(device);
  const auto even = [&](int64_t spare) { return static_cast<uint32_t>((k + spare + 1) / 2 * 2); };
  const int64_t sample = kSampledVectors * threads;
  // Blocks of the fewest threads are to be eight on a multiprocessor.
  const int64_t spare = threads == kFewestStreamedThreads ? 5 * k / 4 : 2 * k;
  const uint32_t enough =
      even(std::min(std::max(spare, sample), in_cluster ? numbers.candidates : numbers.lone_candidates));
  return streamed_bytes(threads, enough, k) + kStaticSharedBytes <= device.shared_bytes ? enough : even(sample);
}

// How many blocks that are alone with their rows a multiprocessor has room for.
constexpr int64_t lone_blocks(int64_t k, int threads, const Device& device) {
  const int64_t bytes = streamed_bytes(threads, streamed_capacity(k, threads, false, device), k) + kStaticSharedBytes;
  return std::min<int64_t>(device.blocks_with(bytes), kStreamedThreads / threads);
}

// The candidates of such a block: it has what shared memory the blocks of a multiprocessor leave free.
constexpr uint32_t lone_capacity(const TopkSelect& op, int threads, const Device& device) {
  const uint32_t least = streamed_capacity(op.k, threads, false, device);
  const auto bytes = [&](uint32_t capacity) { return streamed_bytes(threads, capacity, op.k) + kStaticSharedBytes; };
  const int64_t most_blocks = std::max<int64_t>(lone_blocks(op.k, threads, device), 1);
  const int64_t blocks = std::clamp<int64_t>(ceil_div(op.rows, device.multiprocessors), 1, most_blocks);
  const int64_t free = (device.bytes_with(blocks) - bytes(0)) / 8;
  const int64_t most = std::min<int64_t>(free, op.k + kTopkSelectNumbers.of(device).most_candidates);
  return std::max(least, static_cast<uint32_t>(std::max<int64_t>(most, 0) / 2 * 2));
}

constexpr bool can_stream(int64_t k, int threads, const Device& device) {
  const uint32_t capacity = streamed_capacity(k, threads, true, device);
  return streamed_bytes(threads, capacity, k) + kStaticSharedBytes <= device.shared_bytes;
}

// Whether a kernel can compute the op.
constexpr bool can_use(const TopkSelect& op, const TopkInstance& instance, const Device& device) {
  if (!has_instance(instance, op.dtype)) return false;
  const int64_t held = static_cast<int64_t>(instance.threads) * instance.size * (16 / size_of(op.dtype));
  switch (instance.kernel) {
    case TopkKernel::kTile:
      return instance.tile().holds(op.length) && op.k <= max_tile_k(instance.threads);
    case TopkKernel::kWarp:
      return instance.tile().holds(op.length) && op.k <= kMaxWarpK;
    case TopkKernel::kSorting:
    case TopkKernel::kFew:
      return op.length <= held && op.k <= kMaxFewK;
    case TopkKernel::kMany:
      return op.length <= held && block_row_bytes(instance, op) + kStaticSharedBytes <= device.shared_bytes;
    case TopkKernel::kStreamed:
      return op.length <= INT32_MAX && can_stream(op.k, instance.threads, device);
  }
  return false;
}

constexpr int kTopkInstanceCount = static_cast<int>(std::size(kTopkInstances));

// The first instance of a kernel that can compute the op, or -1. threads, size: 0 for any.
constexpr int find_instance(const TopkSelect& op, const Device& device, TopkKernel kernel, int threads = 0,
                            int size = 0) {
  for (int i = 0; i < kTopkInstanceCount; ++i) {
    const TopkInstance& instance = kTopkInstances[i];
    if (instance.kernel == kernel && (threads == 0 || instance.threads == threads) &&
        (size == 0 || instance.size == size) && can_use(op, instance, device)) {
      return i;
    }
  }
  return -1;
}

// What holds a row of which more than few are chosen. Few rows have many threads each, the more the more there is to
// put in order; of many rows, several are to be under way on a multiprocessor.
constexpr int find_instance_for_many(const TopkSelect& op, const Device& device) {
  const bool is_wide = size_of(op.dtype) == 4;
  const bool orders_many = op.sorted && op.k >= kTopkSelectNumbers.of(device).ordered_k;
  const bool some_rows = op.rows <= 2 * device.multiprocessors;
  const bool few_rows = op.rows <= device.multiprocessors;
  const int64_t crowded_k = few_rows ? kTopkSelectNumbers.of(device).crowded_k : kMaxBlockLength / 2 + 1;
  const bool crowded = op.sorted && op.k >= crowded_k;
  struct Choice {
    bool wanted;
    int threads;
    int vectors;
  };
  const Choice choices[] = {{op.length <= kMaxShortLength || !crowded, 256, 1},
                            {few_rows, 512, 1},
                            {crowded, 1024, 1},
                            {crowded, 1024, 2},
                            {few_rows, 512, 2},
                            {few_rows, 512, 4},
                            {some_rows || (orders_many && !is_wide), 512, 1},
                            {true, 256, 2},
                            {some_rows || orders_many, 512, 2},
                            {true, 256, 4},
                            {true, 512, 2},
                            {true, 512, 4}};
  for (const Choice& choice : choices) {
    const int found = choice.wanted ? find_instance(op, device, TopkKernel::kMany, choice.threads, choice.vectors) : -1;
    if (found >= 0) return found;
  }
  return -1;
}

// Into how many blocks a streamed row is cut. Each must have enough of it, and larger clusters are slow to start where
// many multiprocessors are taken.
constexpr int cluster_of(const TopkSelect& op, const Device& device) {
  const TopkSelectNumbers& numbers = kTopkSelectNumbers.of(device);
  int blocks = 1;
  const auto pays = [&](int64_t more) {
    const int64_t part = more <= numbers.small_cluster ? numbers.small_part : numbers.part_length;
    // Large clusters do not fill a device: the multiprocessors of one lie together.
    const int64_t room = more <= numbers.small_cluster ? device.multiprocessors
                         : more <= 8                   ? device.multiprocessors * 11 / 12
                                                       : device.multiprocessors / 2;
    return more <= device.cluster_blocks() && op.length > more * std::max(part, op.k * 3 / 4) && op.rows * more <= room;
  };
  while (pays(2 * blocks)) blocks *= 2;
  return blocks;
}

constexpr TopkSelectPlan make_plan(const TopkSelect& op, const Device& device, int instance, int cluster) {
  const TopkInstance& kernel = kTopkInstances[instance];
  TopkSelectPlan plan{instance, kernel.threads, op.rows, 1, 0, 0};
  if (kernel.kernel == TopkKernel::kTile || kernel.kernel == TopkKernel::kWarp) {
    plan.threads = kTileThreads;
    plan.blocks = tile_blocks(op.rows, kernel.threads);
  } else if (kernel.kernel == TopkKernel::kMany) {
    plan.shared_bytes = block_row_bytes(kernel, op);
  } else if (kernel.kernel == TopkKernel::kStreamed) {
    plan.cluster = cluster;
    plan.blocks = op.rows * cluster;
    plan.capacity =
        cluster > 1 ? streamed_capacity(op.k, kernel.threads, true, device) : lone_capacity(op, kernel.threads, device);
    plan.shared_bytes = streamed_bytes(kernel.threads, plan.capacity, op.k);
  }
  return plan;
}

// Whether shared memory has room for more streamed rows at a time with 256 threads each than with 512.
constexpr bool has_room_for_more(const TopkSelect& op, const Device& device) {
  return lone_blocks(op.k, 256, device) > lone_blocks(op.k, 512, device);
}
// Whether many of them, that are not long, are to have 256: there, or where it has room for all.
constexpr bool narrow_pays(const TopkSelect& op, const Device& device) {
  return has_room_for_more(op, device) || op.rows <= lone_blocks(op.k, 256, device) * device.multiprocessors;
}

constexpr int find_chosen_instance(const TopkSelect& op, const Device& device) {
  const TopkSelectNumbers& numbers = kTopkSelectNumbers.of(device);
  const bool few_rows = op.rows <= device.multiprocessors;
  const bool some_rows = op.rows <= 2 * device.multiprocessors;
  const bool is_short = op.length <= kMaxShortLength;
  if (is_short && op.k <= kMaxTileK) {
    const int half = find_instance(op, device, TopkKernel::kTile, 16);
    if (half >= 0 && numbers.half_warps.pay(op.rows, kTopkInstances[half].size, device)) return half;
    return find_instance(op, device, TopkKernel::kTile, 32);
  }
  const int sorting =
      op.k <= kMaxFewK && op.length > numbers.sorting_length ? find_instance(op, device, TopkKernel::kSorting) : -1;
  if (sorting >= 0) {
    const bool is_wide = size_of(op.dtype) == 4;
    const int64_t rows = kTopkInstances[sorting].size < kMostSortingVectors
                             ? (is_wide ? numbers.sorting_rows : numbers.sorting_rows_of_16_bits)
                             : (is_wide ? numbers.sorting_longest : numbers.sorting_longest_of_16_bits);
    if (op.rows >= device.scaled(rows)) return sorting;
  }
  // A warp takes long to put many in order: then only the shorter rows pay, and where there are more of them.
  const bool orders_many = op.sorted && op.k > kMaxFewK && op.length > kMaxWarpK;
  const bool pays_for_many = op.rows >= device.scaled(numbers.many_warp_rows);
  const bool pays_long = pays_for_many && !orders_many;
  const bool pays_short = op.rows >= device.scaled(orders_many ? numbers.ordered_warp_rows : numbers.warp_rows);
  const int64_t warp_length = pays_long ? kMaxShortLength : pays_short ? kMaxShortLength / 2 : numbers.warp_length;
  if (op.length <= warp_length && op.k <= kMaxWarpK) return find_instance(op, device, TopkKernel::kWarp);
  // Where all rows are under way at once, the order of the index comes cheaper of bins than of a ranking. (Of longer
  // rows too, but for those whose elements are all in a few bins.)
  const bool bins_pay = is_short && !op.sorted && op.rows <= 5 * device.multiprocessors;
  if (op.length <= kMaxBlockLength && op.k <= (is_short ? numbers.short_few_k : kMaxFewK) && !bins_pay) {
    return find_instance(op, device, TopkKernel::kFew);
  }
  // Of many rows that are not too long for it, more are under way where each has the fewest threads.
  const bool narrowest = op.rows >= device.scaled(numbers.narrowest_rows) && op.k <= numbers.narrowest_k &&
                         op.length * size_of(op.dtype) <= numbers.narrowest_bytes;
  // The longest of these rows fill so many registers that few of them are under way at once. They stay there where rows
  // are not many, where choices are, and in the order of the index unless, streamed, they had the fewest threads.
  const bool holds_longest = some_rows || (op.sorted ? !narrowest && op.k >= numbers.long_ordered_k
                                                     : !narrowest || op.k >= numbers.long_block_k);
  if (op.length <= (holds_longest ? kMaxBlockLength : kMaxBlockLength / 2)) {
    const int held = find_instance_for_many(op, device);
    if (held >= 0) return held;
  }
  // Many long rows were compared only where a multiprocessor has room for two of 512 threads.
  const bool is_long = op.length > numbers.narrow_length;
  const bool narrow = few_rows  ? !is_long && op.k <= numbers.narrow_few_k
                      : is_long ? !some_rows && has_room_for_more(op, device) && lone_blocks(op.k, 512, device) > 1
                                : narrow_pays(op, device);
  const int wanted = find_instance(op, device, TopkKernel::kStreamed,
                                   narrow && narrowest ? kFewestStreamedThreads
                                   : narrow            ? 256
                                                       : 512);
  return wanted >= 0 ? wanted : find_instance(op, device, TopkKernel::kStreamed);
}

inline std::optional<TopkSelectPlan> plan(const TopkSelect& op, const Device& device) {
  const int instance = find_chosen_instance(op, device);
  if (instance < 0) return std::nullopt;
  const TopkSelectPlan plan = make_plan(op, device, instance, cluster_of(op, device));
  return plan.blocks <= kMostBlocks ? std::optional(plan) : std::nullopt;
}

inline std::vector<TopkSelectPlan> plans(const TopkSelect& op, const Device& device) {
  constexpr int kLeastPart = 2048;  // of a row, where a cluster is more than a few steps' work
  std::vector<TopkSelectPlan> found;
  const auto add = [&](const TopkSelectPlan& plan) {
    if (plan.blocks <= kMostBlocks) found.push_back(plan);
  };
  for (int i = 0; i < kTopkInstanceCount; ++i) {
    if (!can_use(op, kTopkInstances[i], device)) continue;
    add(make_plan(op, device, i, 1));
    if (kTopkInstances[i].kernel != TopkKernel::kStreamed) continue;
    for (int cluster = 2; cluster <= device.cluster_blocks() && op.length > cluster * kLeastPart; cluster *= 2) {
      add(make_plan(op, device, i, cluster));
    }
  }
  return found;
}

inline std::string instance_name(DType dtype, const TopkInstance& instance) {
  const std::string size = std::to_string(instance.threads) + "x" + std::to_string(instance.size);
  switch (instance.kernel) {
    case TopkKernel::kTile:
      return name(dtype) + " " + name(instance.tile());
    case TopkKernel::kWarp:
      return name(dtype) + " warp " + size;
    case TopkKernel::kSorting:
      return name(dtype) + " sorting " + size;
    case TopkKernel::kFew:
      return name(dtype) + " few " + size;
    case TopkKernel::kMany:
      return name(dtype) + " many " + size;
    case TopkKernel::kStreamed:
      return name(dtype) + " streamed " + std::to_string(instance.threads);
  }
  return "";
}

inline std::string name(const TopkSelect& op, const TopkSelectPlan& plan) {
  const std::string kernel = instance_name(op.dtype, kTopkInstances[plan.instance]);
  return plan.kernel() == TopkKernel::kStreamed ? kernel + ", " + std::to_string(plan.cluster) + " blocks a row"
                                                : kernel;
}

constexpr Needs needs(const TopkSelectPlan& plan) {
  return {plan.shared_bytes + kStaticSharedBytes, plan.cluster, false};
}

inline std::vector<std::string> instances(const TopkSelect&, const Device&) {
  std::vector<std::string> all;
  for (DType dtype : kDTypes) {
    for (const TopkInstance& instance : kTopkInstances) {
      if (has_instance(instance, dtype)) all.push_back(instance_name(dtype, instance));
    }
  }
  return all;
}

constexpr bool can_select(int64_t k, int shared_bytes) {
  const Device device{80, 108, shared_bytes, false, false};
  const TopkSelect op{1, 1 << 20, k, DType::kF32, nullptr, nullptr, nullptr, nullptr, true};
  const TopkSelect short_op{1, kMaxBlockLength, k, DType::kF32, nullptr, nullptr, nullptr, nullptr, true};
  return find_chosen_instance(op, device) >= 0 && find_chosen_instance(short_op, device) >= 0;
}
static_assert(can_select(kMaxSelectK, kSharedBytesOfMaxSelectK));
static_assert(can_select(kMaxSelectKOfAny, kLeastSharedBytes) && can_select(kMaxSelectKOfAny / 2, kLeastSharedBytes));

}  // namespace jax_router::cuda
