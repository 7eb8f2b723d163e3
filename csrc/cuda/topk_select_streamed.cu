// topk_select for rows of any length: the k largest of each row, exactly and deterministically, for any distribution.
//
// A row belongs to one thread block, or to a cluster of blocks that each take part of it. A block streams its part
// through shared memory, a few vectors of 16 bytes a thread and step, and keeps what can still be among the k best: the
// pairs (key, index) no smaller than a bound that comes from a sample, the largest of the first vectors of every
// thread. A step's elements are compared with the bound together, and the few that reach it are looked at one by one.
// The candidates of all blocks meet in the shared memory of the cluster's first block, which selects exactly k of them,
// puts them in order and writes them.
//
// The order of the index is found by a bit an index, as long as shared memory has room for a row's bits. It is set for
// those that are chosen: at once where that is certain, while the k-th is still looked for. For the order by value the
// candidates are divided into bins once, which is enough to choose them too, unless many share a bin. Those, and longer
// rows in the order of the index, are put in order by PairSelect::order.
//
// Every thread reads back only what it fetched itself. The blocks of a cluster have few steps, and each step is spread
// evenly over the block's part, 32 elements here and there: the first, which is the sample, is right for sorted rows
// too. The part of a block that is alone has a stretch for each warp, and a warp takes its steps from one stretch after
// the other, which memory likes better: the first steps lie far apart, and the candidates of a sorted row, which are
// neighbours, are spread over the warps. Where that sample differs from warp to warp by more than chance, the row has a
// trend, and another sample is taken, evenly from all of the block's part. Where a block that is alone finds more
// candidates than it has room for, it keeps the k best so far, whose worst is its bound from then on, and goes on: rows
// that are sorted cost that a few times, random rows never. Should the bound be wrong (fewer than k candidates, or the
// k-th of them below some block's bound) or the candidates of a cluster not fit, the row is read again with a bound
// that is certain: the k-th best of the pairs at hand, or none if they are fewer than k.
//
// Blocks hand over by stores that a barrier in shared memory counts as they arrive. A barrier of the cluster would need
// a fence at each side, which takes half a microsecond; one that does not wait for memory makes sure that all have
// begun, and that none has ended.
//
// Nothing but the row is read from device memory, and nothing but the result is written.
// Floor: rows * (length * sizeof(T) + k * (sizeof(T) + 4)) bytes.
#include <cstdint>

#include "../common/score.h"
#include "parts/cluster.cuh"
#include "parts/launch.cuh"
#include "parts/pair_select.cuh"
#include "parts/streamed_row.cuh"
#include "topk_select.cuh"

namespace jax_router::cuda {
namespace {

constexpr int kSampled = kSampledVectors;
static_assert(kSampled <= kBatch, "the sample is of the first step");
constexpr int kMaxClusterBlocks = 16;
constexpr uint32_t kMostBeside = kSampled * 256 / 4;  // candidates beside k that are kept: there is room for four times

// How the rows are laid over the device, as the kernel needs to know.
struct Rows {
  int block_bits;     // a row has 2^block_bits blocks; more than one form a cluster
  uint32_t capacity;  // candidates that a block can hold, and a sample
};

// Shared memory that the other blocks of a cluster write to.
struct Gathering {
  TransferBarrier sent;                // what the others sent to the first block, or it to this one
  uint64_t doubts[kMaxClusterBlocks];  // in the first block: below this a block may have left candidates out
  uint64_t counts[kMaxClusterBlocks];  // in the first block: its count just after a block added to it, and above it the
                                       // largest key of that block's candidates
  uint64_t next_bound;                 // for reading the row again, or 0 if there is no need
  uint32_t count;                      // of candidates, those that found no room included
  uint32_t bulk_key;                   // above it are few keys, unless it is the largest
  int32_t left_out;                    // the last 16 bits of all keys, where the candidates do without them, or -1
};
constexpr uint64_t kNoRoom = ~uint64_t{0};  // as a doubt: the block did leave candidates out

// A bound that about the k best of a row reach, from elements that lie evenly over the block's part and are fetched for
// this alone. The part has at least 2 * kThreads of them. Of a steep row, where larger elements lie together, little is
// left to chance. A function of its own, as it is seldom called and the others need the registers.
template <typename T, int kThreads>
__device__ __noinline__ uint64_t bound_of_even_sample(Stream<T, kThreads, false> stream, PairFormat<T> format,
                                                      uint32_t k, uint32_t length, bool is_steep) {
  using Select = PairSelect<kThreads, kStreamedBins>;
  constexpr uint32_t kElements = Stream<T, kThreads, false>::kElements;
  // Some that lie side by side come in one piece from memory.
  constexpr uint32_t kRun = 8, kOfThread = kThreads == kFewestStreamedThreads ? 4 : 2;
  const uint32_t elements = stream.own_vectors() * kElements;
  const uint32_t runs = min(elements / 2, kOfThread * kThreads) / kRun, size = runs * kRun;
  const float expected = __fdividef(static_cast<float>(k) * static_cast<float>(size), static_cast<float>(length));
  const uint32_t rank =
      static_cast<uint32_t>(expected + max((is_steep ? 2 : 4) * fast_sqrt(expected), static_cast<float>(kRun))) + 2;
  const float spacing = __fdividef(static_cast<float>(elements), static_cast<float>(runs));
  const auto index_of = [&](uint32_t i) {
    const uint32_t start = static_cast<uint32_t>((static_cast<float>(i / kRun) + 0.5f) * spacing);
    return stream.head + min(start / kRun * kRun, elements - kRun) + i % kRun;
  };
  float sampled[kOfThread];  // all under way together
#pragma unroll
  for (uint32_t j = 0; j < kOfThread; ++j) {
    const uint32_t i = j * kThreads + threadIdx.x;
    if (i < size) sampled[j] = load_one(stream.row + index_of(i));
  }
  uint32_t most = 0, least = 0xFFFFFFFFu;
#pragma unroll
  for (uint32_t j = 0; j < kOfThread; ++j) {
    const uint32_t i = j * kThreads + threadIdx.x;
    if (i < size) {
      const uint64_t pair = format.pair(sampled[j], index_of(i));
      most = max(most, format.key(pair));
      least = min(least, format.key(pair));
      Select::pairs()[i] = pair;
    }
  }
  Select::prepare(most, least);
  __syncthreads();
  return Select::kth_largest(size, rank, format.index_bits, rank / 8, Select::shared().key_min,
                             Select::shared().key_max)
      .pair;
}

template <typename T, int kThreads, bool kInCluster>
__global__ void __launch_bounds__(kThreads, kInCluster ? 2 : kStreamedThreads / kThreads)
    topk_select_streamed(TopkSelect op, Rows rows) {
  using Select = PairSelect<kThreads, kStreamedBins>;
  constexpr int kElements = 16 / sizeof(T);
  constexpr bool kShortens = kInCluster && sizeof(T) == 4;
  __shared__ Gathering gathering;
  __shared__ uint32_t unevenness, start;
  constexpr int kParts = 4;
  __shared__ uint32_t largest_of[kParts];  // the largest key of each fourth of the sample, or kNoKey
  __shared__ uint32_t highest_least;       // the largest of the least keys of the warps' samples
  __shared__ uint32_t sample_rank;
  __shared__ float sample_groups;

  const uint32_t block_bits = kInCluster ? rows.block_bits : 0, blocks = 1u << block_bits;
  const int64_t row_index = blockIdx.x >> block_bits;
  const uint32_t block = blockIdx.x & (blocks - 1);
  const T* row = static_cast<const T*>(op.scores) + row_index * op.length;
  const uint32_t length = length_of_row(op, row_index);
  const uint32_t k = min(static_cast<uint32_t>(op.k), length);
  uint64_t* pairs = Select::pairs();
  // Whole lines of the row are copied faster to whole lines of shared memory.
  const uint32_t pairs_end = static_cast<uint32_t>(__cvta_generic_to_shared(pairs + rows.capacity));
  uint4* ring = reinterpret_cast<uint4*>(pairs + rows.capacity) + (-pairs_end % kLineBytes) / sizeof(uint4);
  const Stream<T, kThreads, kInCluster> stream(row, length, block, block_bits, ring);
  if (kInCluster) {  // before anything else is found out
#pragma unroll
    for (uint32_t step = 0; step < kStages; ++step) stream.fetch(step);
  }
  const auto format = PairFormat<T>::of(op);

  // Room for `own` more candidates of each lane: the first one's place. Called by whole warps.
  const auto reserve = [&](uint32_t own) {
    const uint32_t before = inclusive_sum_of_lanes(own);
    uint32_t place = 0;
    if (threadIdx.x % 32 == 31) place = atomicAdd(&gathering.count, before);
    return __shfl_sync(kFullWarp, place, 31) + before - own;
  };

  // Whether the warps' shares of the sampled pairs that reach the bound differ by more than chance: the row has a
  // trend, and the stripes of the sample are no measure of what lies between them.
  const auto is_uneven = [&](uint64_t bound, int own_pairs, uint32_t rank, float sampled) {
    uint32_t present = 0, reaching = 0;
#pragma unroll 1
    for (int i = 0; i < own_pairs; ++i) {
      const uint64_t pair = pairs[i * kThreads + threadIdx.x];
      present += pair != kNoPair;
      reaching += pair >= bound;
    }
    const float share = __fdividef(static_cast<float>(rank), sampled);
    const float difference = static_cast<float>(__reduce_add_sync(kFullWarp, reaching)) -
                             share * static_cast<float>(__reduce_add_sync(kFullWarp, present));
    if (threadIdx.x % 32 == 0) atomicAdd(&unevenness, static_cast<uint32_t>(difference * difference));
    __syncthreads();
    return static_cast<float>(unevenness) > 6 * static_cast<float>(rank) * (1 - share);
  };

  // In a cluster: a bound that about the k best reach, from the first step.
  const auto bound_of_sample = [&]() -> uint64_t {
    const float vectors =
        __fdividef(static_cast<float>(stream.all_own_vectors()), static_cast<float>(max(stream.steps, 1u)));
    // Five standard deviations are left for chance, or what is sampled of a turn: of a sorted row, a block may have one
    // more of those that are wanted. Where a bound is too high, the row is read again without one, which takes long.
    const auto wanted_of = [&](float size, uint32_t of_turn) {
      const float expected = __fdividef(static_cast<float>(k) * size, static_cast<float>(length));
      return expected + max(5 * fast_sqrt(expected), static_cast<float>(of_turn));
    };
    if (length >= 8 * k) {
      // Few elements are among the k best: of a thread's elements at the same place of its vectors, which lie far
      // apart, the largest stands for all.
      const float elements = vectors * kElements, groups = min(elements, static_cast<float>(kThreads * kElements));
      const float wanted = wanted_of(elements, stream.kTurn * kElements);
      // A group may hold several of those that are wanted.
      const uint32_t rank = static_cast<uint32_t>(groups * (1 - __expf(-__fdividef(wanted, groups)))) + 2;
      // More are no harm as long as there is room for what they stand for.
      const float room = 0.7f * static_cast<float>(rows.capacity);
      const uint32_t most =
          max(rank + rank / 8, static_cast<uint32_t>(__fdividef(room * elements, static_cast<float>(length))));
      wait_for_groups<kStages - 1>();
      // Where one does not exist, neither does a later one, and its slot may hold anything.
      const bool any = stream.samples(0);
      uint4 vectors_of_step[kSampled];
#pragma unroll
      for (uint32_t vector = 0; vector < kSampled; ++vector) vectors_of_step[vector] = *stream.slot(0, vector);
      uint4 largest = vectors_of_step[0];
#pragma unroll
      for (uint32_t vector = 1; vector < kSampled; ++vector) {
        const uint4 next = stream.samples(vector) ? vectors_of_step[vector] : vectors_of_step[0];
        largest = make_uint4(max_of_words(largest.x, next.x, T{}), max_of_words(largest.y, next.y, T{}),
                             max_of_words(largest.z, next.z, T{}), max_of_words(largest.w, next.w, T{}));
      }
      uint32_t keys[kElements], best = kNoKey;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        keys[e] = any ? format.key_of(element_of(largest, e, T{})) : kNoKey;
        best = max(best, keys[e]);
      }
      const uint32_t highest_of_warp = __reduce_max_sync(kFullWarp, best);
      const uint32_t lowest_of_warp = __reduce_min_sync(kFullWarp, any ? best : 0xFFFFFFFFu);
      if (threadIdx.x % 32 == 0) {
        atomicMax(&Select::shared().key_max, highest_of_warp);
        atomicMin(&Select::shared().key_min, lowest_of_warp);
      }
      Select::clear_bins();
      __syncthreads();
      // Bins for 16 powers of two: most rows have their k best there, whatever the largest and the least may be.
      constexpr int kWidest = 27 - PairFormat<T>::kKeyShift - Select::kBinBits;
      const auto reached =
          Select::kth_key(keys, rank, most, Select::shared().key_min, Select::shared().key_max, kWidest);
      if (reached.key != kNoKey) {
        const uint32_t above = min(reached.few - reached.key, ~reached.key / 4);
        if (threadIdx.x == 0) gathering.bulk_key = reached.key + 4 * above;
        return static_cast<uint64_t>(reached.key) << format.index_bits;
      }
    }
    // Or one element of each vector. Of many that are equal, some reach the bound.
    const uint32_t rank = static_cast<uint32_t>(wanted_of(vectors, stream.kTurn)) + 2;
    if (rank >= static_cast<uint32_t>(vectors)) return kLowestPair;
    wait_for_groups<kStages - 1>();
#pragma unroll 1
    for (uint32_t vector = 0; vector < kSampled; ++vector) {
      const uint32_t e = threadIdx.x % kElements, index = stream.index(0, vector);
      pairs[vector * kThreads + threadIdx.x] =
          stream.samples(vector) ? format.pair(element_of(*stream.slot(0, vector), e, T{}), index + e) : kNoPair;
    }
    __syncthreads();
    return Select::kth_largest(kSampled * kThreads, rank, format.index_bits, rank / 8).pair;
  };

  // The order of the index is found by bits that lie where the ring was, if the row is not too long for them.
  static_assert(Select::kMostVectors * (sizeof(uint4) + sizeof(uint2)) <= kRing * sizeof(uint4));
  const bool uses_bits = !op.sorted && block == 0 && Select::has_bits(format.index_bits);
  const uint32_t bits = ring - block_shared_memory;
  const bool are_far = op.length >= 64 * op.k;  // neighbours among the candidates, in the order of the index

  uint64_t bound = kLowestPair;
  uint32_t best_key = kNoKey;  // of this thread's candidates
  uint32_t count;              // of the row's candidates, in the first block
  typename Select::Kth kth;    // its pair is 0 if the candidates are divided into bins instead,
  uint32_t key_min, top_key;   // of these keys, and kth.varying says whether all pairs differ by less than 2^31
  // A candidate with all bits of its key.
  const auto whole = [&](uint64_t pair, int32_t left_out) {
    if (!kShortens || left_out < 0) return pair;
    const uint64_t key = static_cast<uint64_t>(format.key(pair)) << 16 | static_cast<uint32_t>(left_out);
    return key << format.index_bits | (pair & format.last_index());
  };
  uint32_t reading = 0;
  while (k != 0) {
    const bool first_reading = reading == 0;
    if (!kInCluster || !first_reading) {
#pragma unroll 1
      for (uint32_t step = 0; step < kStages; ++step) stream.fetch(step);
    }
    if (first_reading) {
      // The fence takes long: not by the first warp, which has more to do than the others, and while elements arrive.
      const bool sets_up = threadIdx.x == kThreads - 32;
      // Where few elements are among the k best, the largest of some of a thread's vectors stands for them all.
      uint32_t group = 0;  // of so many
      if (!kInCluster) {
#pragma unroll
        for (uint32_t more = 1; more <= kSampled; ++more) group += length >= more * 2 * kElements * k;
      }
      Select::init();
      if (sets_up) {
        unevenness = 0;
        highest_least = kNoKey;
#pragma unroll
        for (uint32_t& largest : largest_of) largest = kNoKey;
        gathering.count = 0;
        gathering.bulk_key = 0xFFFFFFFFu;
        gathering.left_out = -1;
        if (kInCluster) init_transfers(&gathering.sent, block == 0 ? blocks - 1 : 1);
        if (!kInCluster) {
          // The rank of the bound in the sample, by one thread while the elements arrive.
          const uint32_t sample_size = stream.vectors_of_first(group == 0 ? kSampled : group);
          const float groups = __fdividef(static_cast<float>(sample_size), static_cast<float>(max(group, 1u)));
          const float elements = static_cast<float>(sample_size * (group == 0 ? 1 : kElements));
          const float expected = __fdividef(static_cast<float>(k) * elements, static_cast<float>(length));
          // Six standard deviations are left for chance: where a bound is too high, the row is read again without one,
          // which takes three times as long. A group may hold several of those that are wanted.
          const float wanted = expected + 6 * fast_sqrt(expected);
          const float reached = group == 0 ? wanted : groups * (1 - __expf(-__fdividef(wanted, groups)));
          sample_rank = static_cast<uint32_t>(reached) + 2;
          sample_groups = groups;
        }
      }
      __syncthreads();
      if (kInCluster && block == 0 && sets_up) cluster_fence();
      const bool has_sample = length > k + max(2 * k, kSampled * kThreads);
      if constexpr (kInCluster) {
        if (has_sample) bound = bound_of_sample();
      } else if (has_sample) {
        wait_for_groups<kStages - 1>();
        uint64_t largest = kNoPair;
        uint32_t least_key = 0xFFFFFFFFu;
        if (group != 0) {
          float x = -INFINITY;
#pragma unroll
          for (uint32_t vector = 0; vector < kSampled; ++vector) {
            if (vector < group && stream.samples(vector)) {
              const uint4 elements[1] = {*stream.slot(0, vector)};
              x = max_nan(x, largest_element<T>(elements));
            }
          }
          if (stream.samples(0)) {
            largest = format.pair(x, stream.index(0, 0));
            least_key = format.key(largest);
          }
          pairs[threadIdx.x] = largest;
        } else {
#pragma unroll 1
          for (uint32_t vector = 0; vector < kSampled; ++vector) {
            uint64_t pair = kNoPair;
            if (stream.samples(vector)) {
              pair = format.pair(element_of(*stream.slot(0, vector), threadIdx.x % kElements, T{}),
                                 stream.index(0, vector));
              least_key = min(least_key, format.key(pair));
            }
            largest = max(largest, pair);
            pairs[vector * kThreads + threadIdx.x] = pair;
          }
        }
        const uint32_t most = __reduce_max_sync(kFullWarp, format.key(largest));
        least_key = __reduce_min_sync(kFullWarp, least_key);
        // A few lanes' worth would differ by chance.
        const bool is_whole = __all_sync(kFullWarp, stream.samples(0));
        if (threadIdx.x % 32 == 0) {
          atomicMax(&Select::shared().key_max, most);
          atomicMin(&Select::shared().key_min, least_key);
          if (is_whole) {
            atomicMax(&highest_least, least_key);
            atomicMax(&largest_of[threadIdx.x / (kThreads / kParts)], most);
          }
        }
        Select::clear_bins();
        __syncthreads();
        const uint32_t rank = sample_rank;
        const float groups = sample_groups;
        if (rank < static_cast<uint32_t>(groups)) {
          const auto least_largest = [&] {
            uint32_t least = 0xFFFFFFFFu;
#pragma unroll
            for (uint32_t largest : largest_of) {
              if (largest != kNoKey) least = min(least, largest);
            }
            return least;
          };
          // All that a warp has is larger than all of a fourth: that is no chance, and the sample of no use.
          const bool is_steep = highest_least > least_largest();
          bool has_trend = is_steep;
          if (!is_steep) {
            bound = Select::kth_largest(group == 0 ? kSampled * kThreads : kThreads, rank, format.index_bits, rank / 8,
                                        Select::shared().key_min, Select::shared().key_max)
                        .pair;
            has_trend = is_uneven(bound, group == 0 ? kSampled : 1, rank, groups);
          }
          if (has_trend) {
            bound = bound_of_even_sample(stream, format, k, length, is_steep);
          } else if (threadIdx.x == 0) {
            // Seldom an outlier's key, as these are not in all parts of the sample.
            const uint32_t key = least_largest(), bound_key = format.key(bound);
            if (key > bound_key) gathering.bulk_key = bound_key + 4 * min(key - bound_key, ~bound_key / 4);
          }
        }
      }
      // The other blocks may use what was set up above, and this block's pairs, which the sample needs no more.
      if (kInCluster) cluster_arrive_relaxed();
    }

    const uint64_t sampled_bound = bound;
    // Whether the element outside whole vectors is done with: it is below the bound, or there was room for it.
    const auto keep_edge = [&] {
      const uint64_t pair = format.pair(load_one(row + stream.edge), stream.edge);
      if (pair < bound) return true;
      best_key = max(best_key, format.key(pair));
      const uint32_t place = atomicAdd(&gathering.count, 1);
      if (place < rows.capacity) pairs[place] = pair;
      return place < rows.capacity;
    };
    // While this thread waited for its element, others may have taken all room.
    bool edge_waits = stream.has_edges && stream.edge < length && !keep_edge();
    // Whether elements that equal the bound are looked at one by one, as they may be many: those behind it are none.
    bool is_exact =
        !first_reading || (kInCluster && bound != kLowestPair && format.index(bound) != format.last_index());
    uint32_t step = 0;
    uint32_t placed = 0;  // of this thread's elements of a step for which there was no more room: those that had some
#pragma unroll 1
    while (true) {
      const float bound_element = format.bound(bound);
      // Behind the bound's index an element must be larger. The order of -0 and 0 is not that of a comparison.
      const uint32_t bound_index = float_bits(bound_element) == 0x80000000u ? 0xFFFFFFFFu : format.index(bound);
      const float larger_element = format.larger(bound);
      bool has_room = true;
#pragma unroll 1
      for (; step < stream.steps && has_room; ++step) {
        wait_for_groups<kStages - 1>();
        // Not each lane need see the same.
        const bool is_full = !kInCluster && *const_cast<volatile uint32_t*>(&gathering.count) > rows.capacity;
        uint4 vectors[kBatch];
#pragma unroll
        for (int v = 0; v < kBatch; ++v) vectors[v] = *stream.slot(step, v);
        const uint32_t first_index = stream.index(step, 0);
        uint32_t mask = elements_reaching<T>(vectors, first_index > bound_index ? larger_element : bound_element);
        // Of vectors that do not exist, the slots hold old elements.
        if (stream.index(step, kBatch - 1) >= stream.end) {
#pragma unroll
          for (int v = 0; v < kBatch; ++v) {
            if (stream.index(step, v) >= stream.end) mask &= ~(((1u << kElements) - 1) << v * kElements);
          }
        }
        mask &= ~placed;
        if (__any_sync(kFullWarp, mask != 0 || is_full)) {
          const T* const own_vectors = reinterpret_cast<const T*>(stream.slot(step, 0));
          const auto pair_of = [&](uint32_t bit) {
            const uint32_t v = bit / kElements, e = bit % kElements;
            return format.pair(as_float(own_vectors[v * (kThreads * kElements) + e]),
                               first_index + v * stream.of_vector() + e);
          };
          if (is_exact) {
#pragma unroll 1
            for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
              const uint32_t bit = __ffs(rest) - 1;
              if (pair_of(bit) < bound) mask ^= 1u << bit;
            }
          }
          const uint32_t own = __popc(mask), all = mask;
          if (__any_sync(kFullWarp, own > kBatch * kElements * 3 / 8)) {
            // Many, as of a sorted row: without waiting for one before the next, and neighbouring lanes side by side.
            uint32_t place = 0;
            const uint32_t of_warp = __reduce_add_sync(kFullWarp, own);
            if (threadIdx.x % 32 == 0) place = atomicAdd(&gathering.count, of_warp);
            place = __shfl_sync(kFullWarp, place, 0);
            const uint32_t lower_lanes = (1u << threadIdx.x % 32) - 1;
#pragma unroll 1
            for (uint32_t v = 0; v < kBatch; ++v) {
              const uint4 vector = *stream.slot(step, v);
              const uint32_t index = first_index + v * stream.of_vector();
#pragma unroll
              for (uint32_t e = 0; e < kElements; ++e) {
                const uint32_t bit = 1u << v * kElements << e;
                const uint32_t lanes = __ballot_sync(kFullWarp, (all & bit) != 0);
                const uint32_t own_place = place + __popc(lanes & lower_lanes);
                if ((all & bit) != 0 && own_place < rows.capacity) {
                  const uint64_t pair = format.pair(element_of(vector, e, T{}), index + e);
                  pairs[own_place] = pair;
                  best_key = max(best_key, format.key(pair));
                  mask ^= bit;
                }
                place += __popc(lanes);
              }
            }
          } else {
            uint32_t place = own != 0 ? atomicAdd(&gathering.count, own) : 0;
            const uint32_t places_end = min(place + own, rows.capacity);
#pragma unroll 1
            for (; place < places_end; ++place, mask &= mask - 1) {
              const uint64_t pair = pair_of(__ffs(mask) - 1);
              pairs[place] = pair;
              best_key = max(best_key, format.key(pair));
            }
          }
          placed |= all ^ mask;
          if (!kInCluster && __any_sync(kFullWarp, mask != 0)) break;
          has_room = kInCluster || __any_sync(kFullWarp, is_full) == 0;
        }
        placed = 0;
        stream.fetch(step + kStages);
      }
      Select::prepare(best_key);
      if (kInCluster || __syncthreads_or(step < stream.steps) == 0) break;

      // No more room: the k best so far, and few beside them, are all that matters of what has been read.
      bound = Select::kth_largest(rows.capacity, k, format.index_bits, min(k / 8, kMostBeside), format.least_key(bound),
                                  Select::shared().key_max)
                  .pair;
      is_exact = true;
      if (threadIdx.x == 0) gathering.count = 0;
#pragma unroll 1
      for (uint32_t first = 0; first < rows.capacity; first += kThreads) {
        const uint32_t i = first + threadIdx.x;
        const uint64_t pair = i < rows.capacity ? pairs[i] : kNoPair;
        __syncthreads();
        const bool stays = pair >= bound;
        const uint32_t place = reserve(stays ? 1 : 0);
        if (stays) pairs[place] = pair;
      }
      if (edge_waits) edge_waits = !keep_edge();
      __syncthreads();
    }
    if (kInCluster) __syncthreads();
    if (uses_bits) {
#pragma unroll 1
      for (uint32_t i = threadIdx.x; i < Select::vectors_of_bits(format.index_bits); i += kThreads) {
        ring[i] = make_uint4(0, 0, 0, 0);
      }
    }

    // Only the bound of a sample is uncertain. Of what is below it, some are candidates and some are not.
    const uint64_t doubt = first_reading ? sampled_bound : 0;
    if (kInCluster) {
      if (first_reading) cluster_wait();
      if (block != 0) {
        const uint32_t size = min(gathering.count, rows.capacity);
        if (threadIdx.x == 0) start = remote_add(address_in_block(&gathering.count, 0), size);
        __syncthreads();
        const uint32_t sent = address_in_block(&gathering.sent, 0);
        const uint32_t first_place = min(start, rows.capacity);
        const uint32_t places = min(size, rows.capacity - first_place);
        if (threadIdx.x == 0) {
          announce(address_of(&gathering.sent), sizeof(uint64_t));
          announce(sent, (places + 2) * sizeof(uint64_t));
          send(address_in_block(&gathering.doubts[block], 0), size < gathering.count ? kNoRoom : doubt, sent);
          send(address_in_block(&gathering.counts[block], 0),
               static_cast<uint64_t>(Select::shared().key_max) << 32 | (start + size), sent);
        }
        const uint32_t first_pair = address_in_block(pairs + first_place, 0);
#pragma unroll 1
        for (uint32_t i = threadIdx.x; i < places; i += kThreads) {
          send(first_pair + i * sizeof(uint64_t), pairs[i], sent);
        }
      } else {
        wait_for_transfers(&gathering.sent, reading);
      }
    }

    if (block == 0) {
      const int other = threadIdx.x % 32;
      // Whoever was the last to add, this block or another, knows them all.
      const uint64_t known = other != 0 && other < blocks ? gathering.counts[other]
                                                          : static_cast<uint64_t>(Select::shared().key_max) << 32 |
                                                                *const_cast<volatile uint32_t*>(&gathering.count);
      const uint32_t all = __reduce_max_sync(kFullWarp, static_cast<uint32_t>(known));
      count = min(all, rows.capacity);
      bound = kLowestPair;
      kth = {0, 0, 0};
      if (count >= k) {
        const uint64_t its_doubt = other == 0 ? doubt : other < blocks ? gathering.doubts[other] : 0;
        const uint32_t key = its_doubt == kNoRoom ? kNoKey : format.least_key(its_doubt);
        key_min = __reduce_min_sync(kFullWarp, other < blocks ? key : 0xFFFFFFFFu);
        const uint32_t its_best = static_cast<uint32_t>(known >> 32);
        uint32_t key_max = __reduce_max_sync(kFullWarp, its_best);
        uint64_t short_doubt = its_doubt;
        uint32_t top = key_max;
        top = min(top, gathering.bulk_key);
        if (kShortens && op.sorted && k > Select::kBins && key_min != kNoKey) {
          // A row of bf16 values: their equal bits would keep the bins of their indices empty.
          const uint32_t last_bits = Select::shared().key_max & 0xFFFFu;
          const bool same = other >= blocks || (its_best & 0xFFFFu) == last_bits;
          if (__all_sync(kFullWarp, same) && Select::leave_out(count, format.index_bits, last_bits)) {
            key_min >>= 16;
            key_max >>= 16;
            top >>= 16;
            short_doubt = static_cast<uint64_t>((format.key(its_doubt) >> 16) + 1) << format.index_bits;
            if (threadIdx.x == 0) gathering.left_out = last_bits;
          }
        }
        top_key = kNoKey;
        if (op.sorted && all <= rows.capacity && key_min != kNoKey) {
          top_key = Select::template divide<kInCluster>(count, k, format.index_bits, key_min, top, short_doubt);
        }
        if (top_key != kNoKey) {
          bound = 0;
          kth.varying = static_cast<uint64_t>(key_max - key_min) + 1 < uint64_t{1} << 31 >> format.index_bits;
        } else {
          const auto find = [&](auto marks) {
            return Select::template kth_largest<decltype(marks)::value>(count, k, format.index_bits, 0, key_min,
                                                                        key_max, bits, kInCluster && are_far);
          };
          kth = uses_bits ? find(std::true_type{}) : find(std::false_type{});
          const uint64_t kth_pair = op.sorted ? whole(kth.pair, gathering.left_out) : kth.pair;
          const bool exact = kth_pair >= its_doubt;
          bound = __all_sync(kFullWarp, exact) && all <= rows.capacity ? 0 : kth_pair;
        }
      }
      if (threadIdx.x != 0 && threadIdx.x < blocks) {
        send(address_in_block(&gathering.next_bound, threadIdx.x), bound,
             address_in_block(&gathering.sent, threadIdx.x));
      }
    } else {
      wait_for_transfers(&gathering.sent, reading);
      bound = gathering.next_bound;
    }
    if (bound == 0) break;
    ++reading;
    __syncthreads();
    if (threadIdx.x == 0) {
      gathering.count = 0;
      gathering.left_out = -1;
    }
    __syncthreads();
    if (kInCluster) {
      cluster_arrive();
      cluster_wait();
    }
  }
  if (kInCluster) cluster_arrive_relaxed();
  if (block == 0 && k != 0) {
    uint64_t* spare = reinterpret_cast<uint64_t*>(ring);
    const auto write = [&](uint32_t place, uint64_t pair) { write_result(op, row_index, row, place, format, pair); };
    const auto write_whole = [&, left_out = gathering.left_out](uint32_t place, uint64_t pair) {
      write(place, whole(pair, left_out));
    };
    if (op.sorted && kth.pair == 0) {
      Select::template order_by_bins<kInCluster>(count, k, {format.index_bits, key_min, top_key}, spare,
                                                 kth.varying != 0, write_whole);
    } else if (op.sorted) {
      Select::template order<true>(count, kth.pair, kth.best, kth.varying, k, format.index_bits, length, spare,
                                   write_whole);
    } else if (uses_bits) {
      constexpr uint32_t kRingBytes = kRing * kThreads * sizeof(uint4);
      Select::in_order_of_index(count, kth.pair, k, {bits, format.index_bits}, kRingBytes, kInCluster || are_far,
                                kInCluster && are_far, write);
    } else {
      Select::template order<false>(count, kth.pair, kth.best, kth.varying, k, format.index_bits, length, spare, write);
    }
  }
  if (block == 0) {
#pragma unroll 1
    for (uint32_t i = k + threadIdx.x; i < op.k; i += kThreads) write_nothing<T>(op, row_index, i);
  }
  if (kInCluster) cluster_wait();
}

static_assert(sizeof(PairSelect<128, kStreamedBins>) == pair_select_bytes(128, kStreamedBins));
static_assert(sizeof(PairSelect<256, kStreamedBins>) == pair_select_bytes(256, kStreamedBins));
static_assert(sizeof(PairSelect<512, kStreamedBins>) == pair_select_bytes(512, kStreamedBins));

}  // namespace

cudaError_t run_streamed(const TopkSelect& op, const TopkSelectPlan& plan, cudaStream_t stream) {
  const LaunchShape shape{plan.blocks, plan.threads, plan.shared_bytes, plan.cluster};
  const Rows rows{log2_of(plan.cluster), plan.capacity};
  return with_type(op.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel =
        plan.threads == 128
            ? plan.cluster > 1 ? topk_select_streamed<T, 128, true> : topk_select_streamed<T, 128, false>
        : plan.threads == 256
            ? plan.cluster > 1 ? topk_select_streamed<T, 256, true> : topk_select_streamed<T, 256, false>
        : plan.cluster > 1 ? topk_select_streamed<T, 512, true>
                           : topk_select_streamed<T, 512, false>;
    return launch_kernel(kernel, shape, stream, op, rows);
  });
}

}  // namespace jax_router::cuda
