// A block's part of a row that is streamed through a ring in shared memory: which vectors a thread fetches, and when.
#pragma once

#include <cstdint>

#include "../plan/topk_select.h"
#include "async_copy.cuh"

namespace jax_router::cuda {

constexpr int kBatch = kStreamBatch;  // vectors of a thread and step
constexpr int kStages = kStreamStages;
constexpr int kRing = kBatch * kStages;

// A block's part of a row, step by step. The row's whole vectors of 16 bytes are [head, end), and the blocks of a
// cluster take 32 elements of them in turns, so that each has the same part of every trend; what lies outside them is
// one more step of the first block.
template <typename T, int kThreads, bool kInCluster>
struct Stream {
  static constexpr uint32_t kElements = 16 / sizeof(T);
  static constexpr uint32_t kTurn = kInCluster ? 32 / kElements : 8;  // vectors

  const T* row;
  uint32_t head, end;
  uint32_t block, block_bits;
  uint32_t steps;    // of whole vectors
  uint32_t first;    // index in the row of this thread's first vector in a cluster, else of its lane's of the block
  uint32_t of_step;  // in a cluster, from a vector of one step to that of the next
  uint32_t edge;     // index of this thread's element outside whole vectors, or length
  bool has_edges;
  uint4* ring;  // kRing vectors, kThreads apart

  __device__ __forceinline__ Stream(const T* row, uint32_t length, uint32_t block, uint32_t block_bits, uint4* ring)
      : row(row), block(block), block_bits(block_bits), ring(ring + threadIdx.x) {
    const uint32_t misaligned = reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T);
    head = min(misaligned == 0 ? 0 : kElements - misaligned, length);
    end = length - (length - head) % kElements;
    constexpr uint32_t kOfStep = kThreads * kElements * kBatch;
    steps = head == end ? 0 : ((end - head - 1) / kOfStep >> block_bits) + 1;
    first = index_of_own(kInCluster ? threadIdx.x / kTurn * kTurn * steps + threadIdx.x % kTurn : threadIdx.x % 32);
    of_step = kTurn * kElements << block_bits;
    // Every other warp takes its steps backwards: those of the same step differ in their bits of the index, which
    // choose a bank of shared memory where these are put in order.
    if (kInCluster && threadIdx.x / 32 % 2 != 0) {
      first += (steps - 1) * of_step;
      of_step = -of_step;
    }
    edge = min(threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head, length);
    has_edges = block == 0 && head + length - end != 0;
  }

  // The index in the row of the block's own vector of this number, and how many there are in whole turns.
  __device__ __forceinline__ uint32_t index_of_own(uint32_t number) const {
    return head + (((number / kTurn << block_bits) + block) * kTurn + number % kTurn) * kElements;
  }
  __device__ __forceinline__ uint32_t own_vectors() const {
    return ((end - head) / (kElements * kTurn) >> block_bits) * kTurn;
  }

  // How many it has, those of an incomplete turn too.
  __device__ __forceinline__ uint32_t all_own_vectors() const {
    const uint32_t whole_turns = own_vectors();
    const int32_t rest = (end - head) / kElements - (whole_turns << block_bits) - block * kTurn;
    return whole_turns + min(max(rest, 0), static_cast<int32_t>(kTurn));
  }

  // How many of the block's vectors are among the first so many of a thread.
  __device__ __forceinline__ uint32_t vectors_of_first(uint32_t of_thread) const {
    const uint32_t all = all_own_vectors();
    const uint32_t of_warp = 32 * kBatch * max(steps, 1u);
    return all / of_warp * 32 * of_thread + min(all % of_warp, 32 * of_thread);
  }

  // From a vector of a step to the next.
  __device__ __forceinline__ uint32_t of_vector() const {
    return kInCluster ? (kThreads * kElements << block_bits) * steps : 32 * kElements;
  }
  // In the row, of a vector of this thread's step.
  __device__ __forceinline__ uint32_t index(uint32_t step, uint32_t vector) const {
    // vector * of_vector(), multiplied in the order that was timed.
    if (kInCluster) return first + vector * (kThreads * kElements << block_bits) * steps + step * of_step;
    const uint32_t stretch = (threadIdx.x / 32 + step) % (kThreads / 32);
    return first + (stretch * steps + step) * (kBatch * 32 * kElements) + vector * of_vector();
  }
  // Whether the thread's first step, which is the sample, has this vector.
  __device__ __forceinline__ bool samples(uint32_t vector) const { return steps != 0 && index(0, vector) < end; }
  __device__ __forceinline__ uint4* slot(uint32_t step, uint32_t vector) const {
    return ring + (step % kStages * kBatch + vector) * kThreads;
  }

  __device__ __forceinline__ void fetch(uint32_t step) const {
    if (step < steps) {
      const uint32_t first_index = index(step, 0), rest = first_index < end ? end - first_index : 0;
      const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(slot(step, 0)));
      const T* from = row + first_index;
#pragma unroll
      for (uint32_t vector = 0; vector < kBatch; ++vector) {
        if (vector * of_vector() < rest) {
          copy_async(to + vector * kThreads * sizeof(uint4), from + vector * of_vector());
        }
      }
    }
    commit_copies();
  }
};

}  // namespace jax_router::cuda
